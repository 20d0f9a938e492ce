"""All stages by one process and by two: the figures agree to rounding, dropout and early stopping included."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist.workers import popen
from tiny import Chain

pytestmark = pytest.mark.dist
DROPOUT = (
    "--reward.dropout",
    "0.2",
    "--reward.token-dropout",
    "0.1",
    "--ppo.samples-per-prompt",
    "2",
    "--ppo.eval-every",
    "4",
)


def rows(home: Path, stage: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / stage / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """What one process makes."""
    made = Chain(tmp_path_factory.mktemp("one"))
    made.run(*DROPOUT)
    return made


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_give_the_figures_of_one(chain: Chain, tmp_path: Path, shard: str) -> None:
    """Sharded, from the reward model on: what is before it is one process's own."""
    words = ["run", str(chain.path), "--nproc", "2", "--run.out", str(tmp_path / "two"), *DROPOUT]
    if shard == "full":
        shutil.copytree(chain.runs, tmp_path / "two")
        for stage in ("reward", "ppo", "evaluate"):
            shutil.rmtree(tmp_path / "two/tiny" / stage)
    two = popen(["-m", "tetrad", *words, "--run.shard", shard])
    out, err = two.communicate(timeout=170)
    assert two.returncode == 0, out + err
    other = tmp_path / "two/tiny"
    for stage in ("pretrain", "sft", "reward", "ppo"):
        one, both = rows(chain.home, stage), rows(other, stage)
        assert len(one) == len(both)
        for left, right in zip(one, both, strict=True):
            assert left == pytest.approx(right, rel=2e-3, abs=2e-5), stage
        figures = [
            json.loads((home / stage / "model/manifest.json").read_text())["metrics"] for home in (chain.home, other)
        ]
        alarms = [figure.pop("alarms", None) for figure in figures], [figure.pop("gate", None) for figure in figures]
        assert all(one == both for one, both in alarms), stage
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-4), stage
    texts = [
        [row.get("text", row.get("greedy")) for row in rows(h, "ppo", "samples.jsonl")] for h in (chain.home, other)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 18
