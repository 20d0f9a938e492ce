"""What PPO is paid by, `form`, and what it is held against, `exact` and `likeness`. `likeness` reads the reply alone,
the other two the Instruction as well.

form      the weighted mean of five parts: four lines; each as long as was asked for; lines 2 and 4 end in the rhyme
          that was asked for, in two characters; hardly a character twice; Chinese characters and the usual
          punctuation. PPO is paid by this. It is scaled as a reward model's score is, to a mean of 0 and a standard
          deviation of 1 on the SFT model's replies, or near them.
exact     1 for a quatrain without a fault, else 0: what `form` is meant to raise.
likeness  mean log-probability of a character, in nats, under a model of three characters in a row that was fitted on
          the valid and test poems alone. PPO is not paid by it: what keeps the form and is no language loses here.

What rhymes is learned from the train poems (rhymes.json). No judge asks for sense, for the pattern of tones, or for a
fit to the title. `python judge.py` prints how they see real poems and spoiled ones. Only the standard library is
needed, and what fetch.py puts into `data/`.
"""

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af]")
BREAK = re.compile(r"[，。！？；：、,.!?;:\s]+")
ASKED = re.compile("写一首([五七])言绝句，押“(.)”韵")
LENGTHS = {"五": 5, "七": 7}
LINES = 4
PUNCTUATION = "，。，。"
WEIGHTS = {"lines": 0.1, "lengths": 0.2, "rhyme": 0.4, "fresh": 0.2, "written": 0.1}
CENTRE, UNIT = 0.74, 0.15  # about the mean and the standard deviation of the SFT model's replies
ALLOWED_REPEATS = 1  # of a character, doubled ones (悠悠) not counted; 88 % of the real quatrains keep to it
TOO_MANY = 6  # repeats, from which on a reply has nothing left of that part
START, UNSEEN = "\n", 12_000  # a line's start; characters that there may be, for those that were never seen

Sample = Mapping[str, Any]


# --- form -------------------------------------------------------------------------------------------------------------


def form(samples: Sequence[Sample]) -> list[float]:
    """The graded reward of samples with `prompt` and `text`: 1.73 without a fault."""
    return [(sum(WEIGHTS[name] * part for name, part in parts(sample).items()) - CENTRE) / UNIT for sample in samples]


def exact(samples: Sequence[Sample]) -> list[float]:
    """1.0 for a quatrain without a fault, else 0.0."""
    return [float(is_exact(sample)) for sample in samples]


def parts(sample: Sample) -> dict[str, float]:
    """Each part of the form, 0 to 1. The shares of lines are of four or more, so a missing line costs."""
    lines, (wanted, name) = lines_of(sample["text"]), asked(sample["prompt"])
    count = max(LINES, len(lines))
    return {
        "lines": max(0.0, 1 - abs(len(lines) - LINES) / LINES),
        "lengths": sum(len(line) == wanted for line in lines) / count,
        "rhyme": rhymed(lines, name),
        "fresh": freshness(lines) * min(1.0, sum(map(len, lines)) / (LINES * wanted)),
        "written": written(sample["text"]),
    }


def is_exact(sample: Sample) -> bool:
    """A line that comes twice is many repeats, so it needs no rule of its own."""
    lines = lines_of(sample["text"])
    wanted, name = asked(sample["prompt"])
    shape = f"{HAN.pattern}{{{wanted}}}"
    return (
        re.fullmatch("".join(shape + mark for mark in PUNCTUATION), sample["text"]) is not None
        and rhymed(lines, name) == 1
        and repeats(lines) <= ALLOWED_REPEATS
    )


def asked(prompt: str) -> tuple[int, str]:
    """Characters of a line and the name of the rhyme, by the Instruction, which begins the prompt."""
    found = ASKED.match(prompt)
    if found is None:
        raise ValueError(f"the prompt asks for no quatrain: {prompt!r}")
    return LENGTHS[found[1]], found[2]


def lines_of(text: str) -> list[str]:
    """What stands between punctuation marks or white space."""
    return [line for line in BREAK.split(text) if line]


def rhymed(lines: Sequence[str], name: str) -> float:
    """Share of lines 2 and 4 that end in the rhyme that is asked for; the second in another character."""
    if len(lines) < LINES:
        return 0.0
    group, (first, second) = rhyme_group(), (lines[1][-1], lines[3][-1])
    found = [end in group and group[end] == group.get(name) for end in (first, second)]
    return (found[0] + (found[1] and first != second)) / 2


def rhyme(a: str, b: str) -> bool:
    """Whether two different characters stand in one group of rhymes.json."""
    group = rhyme_group()
    return a != b and a in group and group[a] == group.get(b)


def repeats(lines: Sequence[str]) -> int:
    """How often a character comes back; the second of a doubled one (悠悠) does not count, a third in a row does."""
    counted = [
        c for line in lines for i, c in enumerate(line) if line[max(0, i - 1) : i] != c or line[i - 2 : i] == c + c
    ]
    return len(counted) - len(set(counted))


def freshness(lines: Sequence[str]) -> float:
    """1 up to the allowed repeats, falling to 0 at too many."""
    excess = repeats(lines) - ALLOWED_REPEATS
    return min(1.0, max(0.0, 1 - excess / (TOO_MANY - ALLOWED_REPEATS)))


def written(text: str) -> float:
    """Share of Chinese characters in what is no punctuation; half of it where the punctuation is not as usual."""
    lines = lines_of(text)
    letters = "".join(lines)
    share = len(HAN.findall(letters)) / max(1, len(letters))
    return share if text == "".join(line + "，。"[i % 2] for i, line in enumerate(lines)) else share / 2


@cache
def rhyme_group() -> dict[str, int]:
    """The number of each character's group."""
    return {c: i for i, group in enumerate(groups()) for c in group}


@cache
def groups() -> tuple[str, ...]:
    """Characters that rhyme; the first of each group is its name."""
    return tuple(json.loads(read("rhymes.json")))


# --- likeness ---------------------------------------------------------------------------------------------------------


def likeness(samples: Sequence[Sample]) -> list[float]:
    """Nats a character of the reply, real poems have -6.5; an empty reply counts as a character never seen."""
    model = fitted()
    return [model.mean(lines_of(sample["text"])) for sample in samples]


@dataclass(frozen=True)
class Trigrams:
    """Probabilities of a character after the two before it in its line, smoothed after Witten and Bell (1991)."""

    counts: Mapping[str, Counter[str]]
    totals: Mapping[str, int]

    def mean(self, lines: Iterable[str]) -> float:
        """Mean log-probability of the characters, in nats."""
        found = [math.log(self.probability(before, c)) for before, c in contexts(lines)]
        return math.fsum(found) / len(found) if found else -math.log(UNSEEN)

    def probability(self, before: str, c: str) -> float:
        """Of c after `before`: what was counted, and as much of the shorter context as this one saw novelties."""
        shorter = self.probability(before[1:], c) if before else 1 / UNSEEN
        seen = self.counts.get(before)
        if seen is None:
            return shorter
        return (seen[c] + len(seen) * shorter) / (self.totals[before] + len(seen))


def contexts(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every character with the two before it, of which the first ones are the line's start."""
    for line in lines:
        padded = START * 2 + line
        yield from ((padded[i : i + 2], c) for i, c in enumerate(line))


def fit(poems: Iterable[str]) -> Trigrams:
    """The counts of poems, after two characters, one and none."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for poem in poems:
        for before, c in contexts(lines_of(poem)):
            for i in range(3):
                counts[before[i:]][c] += 1
    return Trigrams(dict(counts), {before: seen.total() for before, seen in counts.items()})


@cache
def fitted() -> Trigrams:
    """The model of the valid and test poems."""
    return fit(validation())


def validation() -> list[str]:
    """Valid and test poems without their titles."""
    return [document.split("\n")[-1] for name in ("valid", "test") for document in read(f"{name}.txt").split("\n\n")]


def read(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run fetch.py first")
    return path.read_text(encoding="utf-8").strip()


# --- how they see real and spoiled poems ------------------------------------------------------------------------------


def quatrains(poems: Iterable[str]) -> list[str]:
    return [poem for poem in poems if len(lines_of(poem)) == LINES]


def sample_of(poem: str, text: str) -> dict[str, str]:
    """A text as the reply to a prompt that asks for this poem's form and for the rhyme that the poem ends in."""
    lines = lines_of(poem)
    name = {n: c for c, n in LENGTHS.items()}[len(lines[0])]
    rhyme = next((group[0] for group in groups() if lines[-1][-1] in group), lines[-1][-1])
    return {"prompt": f"写一首{name}言绝句，押“{rhyme}”韵。", "input": "", "text": text}


def refilled(poem: str, letters: Iterable[str]) -> str:
    """The same lengths and punctuation with other characters."""
    new = iter(letters)
    return "".join(next(new) if HAN.match(c) else c for c in poem)


def shuffled(letters: str, draw: random.Random) -> str:
    return "".join(draw.sample(letters, len(letters)))


def figures() -> dict[str, dict[str, float]]:
    """Means over the held-out quatrains, real and spoiled; likeness by the model of the half they are not in."""
    draw, poems = random.Random(0), validation()
    letters = [c for poem in poems for line in lines_of(poem) for c in line]
    different = sorted(set(letters))
    spoil: dict[str, Callable[[str], str]] = {
        "real quatrains": lambda poem: poem,
        "their characters shuffled": lambda poem: refilled(poem, shuffled("".join(lines_of(poem)), draw)),
        "characters of any poem": lambda poem: refilled(poem, draw.choices(letters, k=len(poem))),
        "any characters": lambda poem: refilled(poem, draw.choices(different, k=len(poem))),
    }
    halves = [(quatrains(poems[i::2]), fit(poems[1 - i :: 2])) for i in (0, 1)]
    found = {}
    for name, change in spoil.items():
        made = [([sample_of(poem, change(poem)) for poem in half], model) for half, model in halves]
        samples = [sample for half, _ in made for sample in half]
        like = [model.mean(lines_of(sample["text"])) for half, model in made for sample in half]
        found[name] = {"form": mean(form(samples)), "exact": mean(exact(samples)), "likeness": mean(like)}
    return found


def agreement() -> dict[str, float]:
    """Share of held-out quatrains whose lines 2 and 4 rhyme by rhymes.json, and of random pairs of their line ends.

    Pairs of one and the same character are left out of both.
    """
    ends = [(lines[1][-1], lines[3][-1]) for lines in map(lines_of, quatrains(validation()))]
    pool, draw = [c for two in ends for c in two], random.Random(0)
    pairs = [(draw.choice(pool), draw.choice(pool)) for _ in range(20_000)]
    return {
        name: mean([float(rhyme(a, b)) for a, b in two if a != b]) for name, two in (("poems", ends), ("pairs", pairs))
    }


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def main() -> None:
    """Print the figures and the agreement."""
    for name, row in figures().items():
        print(f"{name:>26}  " + "  ".join(f"{judge} {number:.3f}" for judge, number in row.items()))
    found = agreement()
    print(
        f"rhymes.json accepts {found['poems']:.3f} of the held-out quatrains and {found['pairs']:.3f} of random pairs"
    )


if __name__ == "__main__":
    main()
