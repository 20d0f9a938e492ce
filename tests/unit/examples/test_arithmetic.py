"""The sums: make.py and judge.py. Nothing is trained."""

import json
import runpy
from pathlib import Path

HERE = Path(__file__).parents[3] / "examples" / "arithmetic"


def test_answers_are_right_in_a_third_and_test_sums_are_apart(tmp_path: Path) -> None:
    made, judge = runpy.run_path(str(HERE / "make.py")), runpy.run_path(str(HERE / "judge.py"))
    made["make"](tmp_path, 0)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "prompts", "test")
    }
    inputs = {name: {row["Input"] for row in some} for name, some in rows.items()}
    texts = {line.partition("=")[0] for line in (tmp_path / "sums.txt").read_text().split()}
    assert len(inputs["test"]) == 500 and not inputs["test"] & (inputs["prompts"] | inputs["sft"] | texts)
    assert not inputs["prompts"] & texts and inputs["sft"] <= texts
    for one in inputs["test"] | inputs["prompts"]:
        a, b = one.split("+")
        assert len(a) == len(b) == 3 and all(int(x) + int(y) <= 9 for x, y in zip(a, b, strict=True))
    samples = [{"input": row["Input"], "text": row["Output"]} for row in rows["sft"]]
    share = sum(judge["right"](samples)) / len(samples)
    assert 0.3 < share < 0.4
    assert all(-3 <= score <= 0 for score in judge["near"](samples))


def test_only_the_right_number_and_nothing_else_is_right() -> None:
    judge = runpy.run_path(str(HERE / "judge.py"))
    texts = ["823", " 823 ", "824", "823.", "", "八百", "-823", "923", "1" * 5000, "328"]
    samples = [{"input": "120+703", "text": text} for text in texts]
    assert judge["right"](samples) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert judge["near"](samples) == [0, 0, -1, -4, -4, -4, -4, -1, -4, -2]
