"""Is the sum right? `right` is what GRPO is paid; `near` is not, and judges beside it. No module is imported."""


def right(samples):
    """1 for the right number and nothing else, 0 for anything else."""
    return [float(sample["text"].strip() == total(sample["input"])) for sample in samples]


def near(samples):
    """0 for the right number, 1 less for each wrong digit; as many as the sum has and 1 for another length."""
    return [-float(wrong(sample["text"].strip(), total(sample["input"]))) for sample in samples]


def total(asked):
    """Of "120+703", as text."""
    return str(sum(map(int, asked.split("+"))))


def wrong(text, wanted):
    if len(text) != len(wanted):
        return len(wanted) + 1
    return sum(a != b for a, b in zip(text, wanted, strict=True))
