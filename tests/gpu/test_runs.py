"""A whole recipe on a GPU, stopped and gone on with; and a group of one rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.place import KIND, needs_gpu
from tetrad.errors import Stopped
from tiny import STAGES, Chain, stop_at

pytestmark = [needs_gpu, pytest.mark.timeout(110)]
ON_GPU = ("--run.device", "cuda" if KIND == "cuda" else "cpu", "--run.deterministic", "true")


def test_a_recipe_with_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages; stopped in the fifth iteration of PPO, it goes on to the same digits."""
    whole, stopped = Chain(tmp_path / "whole"), Chain(tmp_path / "stopped")
    assert whole.run(*ON_GPU) == STAGES
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Stopped):
            stopped.run(*ON_GPU)
    assert stopped.run(*ON_GPU) == STAGES[-2:]
    rows = [[{n: row[n] for n in ("score", "kl", "policy_loss")} for row in c.lines("ppo")] for c in (whole, stopped)]
    assert rows[0] == rows[1]
    weights = [(c.home / "ppo/model/model.safetensors").read_bytes() for c in (whole, stopped)]
    assert weights[0] == weights[1]


def test_one_rank() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0"}
    given["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("one_rank.py"), KIND],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
