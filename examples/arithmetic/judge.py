"""Is the sum right? `right` is what GRPO is paid; `near` is not, and judges beside it. No module is imported."""


def right(samples):
    """1 for the right number and nothing else, 0 for anything else."""
    return [float(sample["text"].strip() == str(total(sample["input"]))) for sample in samples]


def near(samples):
    """0 for the right number, below that minus how far off it is, at most 10 (also for what is no number)."""
    return [-float(min(10, distance(sample["text"].strip(), total(sample["input"])))) for sample in samples]


def total(asked):
    """Of "12+7"."""
    return sum(map(int, asked.split("+")))


def distance(text, wanted):
    return abs(int(text) - wanted) if text.isascii() and text.isdigit() and len(text) < 9 else 10
