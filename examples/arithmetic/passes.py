"""What there is to find: of the test's sums, how many a model gets right at once, and in sixteen tries.

    python examples/arithmetic/passes.py runs/arithmetic/sft runs/arithmetic/grpo

Between the two lies what GRPO can earn without learning anything new: right answers that are sampled, but seldom.
"""

import json
import sys
from pathlib import Path

from judge import total

import tetrad

TEST, TRIES = Path(__file__).parent / "data" / "test.jsonl", 16


def main(folders: list[str]) -> None:
    asked = [json.loads(line) for line in TEST.read_text(encoding="utf-8").splitlines()]
    prompts = [(row["Instruction"], row["Input"]) for row in asked]
    for folder in folders:
        groups = tetrad.generate(tetrad.load(folder), prompts, n=TRIES, max_new_tokens=6, temperature=1.0, top_p=1.0)
        right = [
            [output.text.strip() == total(row["Input"]) for output in group.outputs]
            for row, group in zip(asked, groups, strict=True)
        ]
        once, ever = sum(map(sum, right)) / (TRIES * len(right)), sum(map(any, right)) / len(right)
        print(f"{folder}: pass@1 {once:.1%}, pass@{TRIES} {ever:.1%}, {len(right)} sums")


if __name__ == "__main__":
    main(sys.argv[1:])
