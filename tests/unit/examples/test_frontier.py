"""What the picture of all methods is drawn from: the figures of a report, and the way of each training."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def frontier(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return script("../benchmarks/frontier")


def test_rows(frontier: ModuleType, tmp_path: Path) -> None:
    run, other = tmp_path / "one", "one-rloo/grpo"
    plain = dict.fromkeys(frontier.PLAIN, 0.5)
    costs = {"minutes": 2.004, "reward_minutes": 3.0, "peak_mib": None}
    systems = {
        name: plain | {"reward": {"mean": at}, "ridge_gain": {"mean": at, "low": at - 1, "high": at + 1}}
        for at, name in enumerate(("sft", "best of 2", "ppo", other), start=1)
    }
    report = {
        "systems": systems,
        "costs": dict.fromkeys(systems, costs),
        "frontier": [[1, 0.0, 1.0], [2, 0.2, 1.5]],
    }
    for folder, scores in ((run / "ppo", (2, 4, 6, 8, 10, 30)), (tmp_path / other, (3,))):
        folder.mkdir(parents=True)
        lines = [json.dumps({"kl": score / 2, "score": score}) for score in scores]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    (run / "evaluate/report").mkdir(parents=True)
    (run / "evaluate/report/report.json").write_text(json.dumps(report))
    sft, best, ppo, rloo = frontier.rows_of(run)
    assert "path" not in sft and best["path"] == [[0.0, 0.0], [0.2, 0.5]]
    assert ppo["path"] == [[3.0, 5.0], [15.0, 29.0]] and ppo["ridge_gain"] == [3, 2, 4]
    assert rloo["method"] == "rloo" and rloo["path"] == [[1.5, 2.0]]
    assert ppo["minutes"] == 2.0 and ppo["peak_mib"] is None and ppo["kl"] == 0.5
