"""Resident memory of a stage whose batches all have other lengths, seen from outside: it must not grow by the step."""

import json
import os
import random
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

import tiny
from tetrad.console import Console
from tetrad.pipeline import recipe, runner

STEPS, BATCH = 300, 4
MODEL = ("--model.hidden-size", "64", "--model.layers", "2", "--model.ff", "512", "--model.max-positions", "512")
WORDS = (*tiny.GOOD, *tiny.BAD, *tiny.THINGS)


def write_ragged(path: Path) -> None:
    """Rows of some 10 to 400 tokens."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(STEPS * BATCH):
            output = " ".join(draw.choices(WORDS, k=draw.randint(2, 100)))
            file.write(json.dumps({"Instruction": "Go on.", "Input": "the film", "Output": output}) + "\n")


def resident_by_step(words: list[str], metrics: Path) -> dict[int, int]:
    """The most KiB since the last entry, by finished steps."""
    as_users_do = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.Popen([sys.executable, "-m", "tetrad", *words], stdout=subprocess.DEVNULL, env=as_users_do)
    resident, most = {0: 0}, 0
    while child.poll() is None:
        time.sleep(0.02)
        status = Path(f"/proc/{child.pid}/status")
        rss = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
        most = max(most, int(rss[1]) if rss else 0)
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if steps > max(resident):
            resident[steps], most = most, 0
    assert child.returncode == 0
    return resident


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.timeout(900)
def test_memory_of_sft_is_flat(tmp_path: Path) -> None:
    path, ragged, runs = tiny.write_tiny(tmp_path / "data"), tmp_path / "ragged.jsonl", tmp_path / "runs"
    write_ragged(ragged)
    given = {"run.out": runs, "run.save_every": 10_000, "pretrain.tokens": 1024, "sft.data": ragged}
    given |= {"sft.batch_size": BATCH, "sft.epochs": 1}
    words = [str(path), *MODEL, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    for stage in ("tokenizer", "pretrain"):
        runner.run(recipe.read(path, words[1:]), Console(out=StringIO(), err=StringIO()), only=stage)
    resident = resident_by_step(["sft", *words], runs / "tiny/sft/metrics.jsonl")
    assert len(resident) > STEPS / 2
    early = next(kib for step, kib in sorted(resident.items()) if step >= 50)
    late = [kib for step, kib in sorted(resident.items()) if step >= STEPS - 20]
    assert max(late) <= 1.1 * early, (early >> 10, max(late) >> 10)
