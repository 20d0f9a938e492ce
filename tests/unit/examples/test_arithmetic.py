"""The sums: make.py and judge.py. Nothing is trained."""

import json
import runpy
from pathlib import Path

HERE = Path(__file__).parents[3] / "examples" / "arithmetic"


def test_answers_are_right_in_a_third_and_test_pairs_are_apart(tmp_path: Path) -> None:
    made, judge = runpy.run_path(str(HERE / "make.py")), runpy.run_path(str(HERE / "judge.py"))
    made["make"](tmp_path, 0)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "prompts", "test")
    }
    assert not {row["Input"] for row in rows["test"]} & {row["Input"] for row in rows["prompts"] + rows["sft"]}
    samples = [{"input": row["Input"], "text": row["Output"]} for row in rows["sft"]]
    share = sum(judge["right"](samples)) / len(samples)
    assert 0.3 < share < 0.4
    assert all(-4 <= score <= 0 for score in judge["near"](samples))


def test_only_the_right_number_and_nothing_else_is_right() -> None:
    judge = runpy.run_path(str(HERE / "judge.py"))
    texts = ["19", " 19 ", "18", "19.", "", "十九", "-19", "1" * 5000]
    samples = [{"input": "12+7", "text": text} for text in texts]
    assert judge["right"](samples) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert judge["near"](samples) == [0, 0, -1, -10, -10, -10, -10, -10]
