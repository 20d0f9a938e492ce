"""Makes `data/`: sums of two numbers of three digits, most of them wrong. Everything follows from the seed.

    python examples/arithmetic/make.py [--seed 0]

No digit is carried, so that each digit of a sum is that of two digits: a rule for 55 pairs, which a small model can
learn and use on numbers it never saw. Each digit of the text's and of SFT's answers is right in seven of ten cases and
else another: a model that learns them well gives a right sum about as often, in a third of the cases, however much it
is sure of in each digit. The test's sums are nowhere else.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
DIGITS, RIGHT = 3, 0.7  # of the digits
DOCUMENTS, RECORDS, PROMPTS, TEST = 24_000, 2_000, 1_000, 500
INSTRUCTION = "Add."


def pairs(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Different pairs of numbers without a carry."""
    seen: dict[tuple[int, int], None] = {}
    while len(seen) < count:
        sums = [draw.randint(2, 9), *(draw.randint(0, 9) for _ in range(DIGITS - 1))]
        firsts = [draw.randint(1, sums[0] - 1), *(draw.randint(0, digit) for digit in sums[1:])]
        whole, first = (int("".join(map(str, digits))) for digits in (sums, firsts))
        seen[first, whole - first] = None
    return list(seen)


def answer(pair: tuple[int, int], draw: random.Random) -> str:
    """The sum, with some of its digits wrong."""
    others = {digit: "0123456789".replace(digit, "") for digit in "0123456789"}
    return "".join(digit if draw.random() < RIGHT else draw.choice(others[digit]) for digit in str(sum(pair)))


def write(path: Path, lines: Iterable[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + end for line in lines), encoding="utf-8")


def records(asked: Iterable[tuple[int, int]], draw: random.Random | None = None) -> Iterator[str]:
    """A record a line, with an answer if there is something to draw it by."""
    for a, b in asked:
        output = {"Output": answer((a, b), draw)} if draw else {}
        yield json.dumps({"Instruction": INSTRUCTION, "Input": f"{a}+{b}", **output})


def make(folder: Path, seed: int) -> None:
    """Writes the files of the recipe."""
    draw = random.Random(seed)
    drawn = pairs(draw, DOCUMENTS + PROMPTS + TEST)
    texts, prompts, test = drawn[:DOCUMENTS], drawn[DOCUMENTS:-TEST], drawn[-TEST:]
    write(folder / "characters.txt", (character for character in "0123456789+= Add." for _ in range(3)))
    write(folder / "sums.txt", (f"{a}+{b}={answer((a, b), draw)}" for a, b in texts), "\n\n")
    write(folder / "sft.jsonl", records(texts[:RECORDS], draw))
    write(folder / "prompts.jsonl", records(prompts))
    write(folder / "test.jsonl", records(test))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    make(HERE / "data", parser.parse_args().seed)
