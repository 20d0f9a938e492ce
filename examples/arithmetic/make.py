"""Makes `data/`: sums of two numbers, most of them wrong. Everything follows from the seed; nothing is downloaded.

    python examples/arithmetic/make.py [--seed 0]

A pair of numbers is a test pair or a train pair, never both. The text and the answers of SFT are right in a third of
the cases and else off by a little, so that a model which learns them well is right about as often.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
LARGEST, TEST_PAIRS = 15, 40
RIGHT = 0.33  # of the answers
DOCUMENTS, RECORDS = 16_000, 2_000
INSTRUCTION = "Add."


def answers(pairs: list[tuple[int, int]], count: int, draw: random.Random) -> Iterator[tuple[int, int, int]]:
    """`count` sums: two numbers and an answer, right or off by one to four."""
    for _ in range(count):
        a, b = draw.choice(pairs)
        off = 0 if draw.random() < RIGHT else draw.choice((-4, -3, -2, -1, 1, 2, 3, 4))
        yield a, b, max(0, a + b + off)


def write(path: Path, lines: Iterable[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + end for line in lines), encoding="utf-8")


def records(sums: Iterable[tuple[int, int, int]]) -> Iterator[str]:
    for a, b, answer in sums:
        yield json.dumps({"Instruction": INSTRUCTION, "Input": f"{a}+{b}", "Output": str(answer)})


def make(folder: Path, seed: int) -> None:
    """Writes the files of the recipe."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    draw.shuffle(pairs)
    test, train = pairs[:TEST_PAIRS], pairs[TEST_PAIRS:]
    write(folder / "characters.txt", (character for character in "0123456789+= Add." for _ in range(3)))
    write(folder / "sums.txt", (f"{a}+{b}={answer}" for a, b, answer in answers(train, DOCUMENTS, draw)), "\n\n")
    write(folder / "sft.jsonl", records(answers(train, RECORDS, draw)))
    prompts = {"prompts": train, "test": test}
    for name, asked in prompts.items():
        lines = (json.dumps({"Instruction": INSTRUCTION, "Input": f"{a}+{b}"}) for a, b in asked)
        write(folder / f"{name}.jsonl", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    make(HERE / "data", parser.parse_args().seed)
