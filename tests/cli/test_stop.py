"""Ctrl-C and SIGTERM to real processes: answered within a second, whatever sits in a long call of C; then exit 75."""

import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forks import Fork
from tetrad import storage
from tiny import Chain

ROOT = Path(__file__).parents[2]
BUSY = """\
import hashlib

def busy(samples):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})  # one call of C, which no handler interrupts
    return [0.0] * len(samples)
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.run("--ppo.prompts", "[]", "--evaluate.prompts", "[]")
    began = time.perf_counter()
    scope: dict[str, object] = {}
    exec(BUSY.format(rounds=100_000), scope)
    scope["busy"]([])  # type: ignore[operator]
    rounds = round(100_000 * 4 / (time.perf_counter() - began))  # about four seconds
    (chain.path.parent / "busy.py").write_text(BUSY.format(rounds=rounds))
    return chain


class Process:
    """A command that runs, and its lines as they come."""

    def __init__(self, *words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = Fork(["-m", "tetrad", *words], env=environment, text=True, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))

    def wait_for(self, text: str, seconds: float) -> str:
        """The first line with this text. Fails where there is none in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.seen.append(self.lines.get(timeout=max(0.01, end - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"no line with {text!r} in {seconds} s: {self.seen}")
            if text in self.seen[-1]:
                return self.seen[-1]

    def end(self) -> int:
        return self.process.wait(60)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def ppo(chain: Chain) -> Iterator[Process]:
    """In a step of PPO, whose reward takes four seconds in one call."""
    shutil.rmtree(chain.home / "ppo", ignore_errors=True)
    words = ("--run.out", str(chain.runs), "--ppo.rewards", '["busy.py:busy"]', "--evaluate.prompts", "[]")
    with Process("ppo", str(chain.path), *words) as process:
        process.wait_for("busy", 60)
        time.sleep(0.2)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_step_is_waited_for_and_says_so(chain: Chain, ppo: Process, number: int) -> None:
    ppo.process.send_signal(number)
    line = ppo.wait_for("stopping", 2.0)
    assert line == (
        "stopping after step 1 of 8, with a checkpoint; a second Ctrl-C stops at once and loses this step and "
        "0 finished steps since the last checkpoint"
    )
    assert ppo.process.poll() is None
    assert ppo.end() == 75
    assert ppo.wait_for("stopped", 5).startswith("stopped: stopped after 1 of 8 steps, all saved")
    assert list(storage.step_folders(chain.home / "ppo/checkpoints")) == [1]


def test_a_second_interrupt_ends_a_long_step_at_once(chain: Chain, ppo: Process) -> None:
    ppo.process.send_signal(signal.SIGINT)
    ppo.wait_for("stopping", 2.0)
    ppo.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert ppo.end() == 130
    assert time.monotonic() - began < 2
    ppo.wait_for("interrupted: lost is this step", 1)


def test_what_follows_the_steps_ends_at_once_and_loses_none(chain: Chain) -> None:
    """The reward model's evaluation: a stop saves nothing, as all steps are saved, and the stage goes on from there."""
    words = ["run", str(chain.path), "--run.out", str(chain.runs), "--ppo.prompts", "[]", "--evaluate.prompts", "[]"]
    words += ["--reward.baselines", '["busy.py:busy"]']
    with Process(*words) as process:
        process.wait_for("busy", 120)
        time.sleep(0.2)
        process.process.send_signal(signal.SIGINT)
        assert "what follows step" in process.wait_for("stopping", 2.0)
        assert process.end() == 75
        line = process.wait_for("stopped:", 5)
    steps = max(storage.step_folders(chain.home / "reward/checkpoints"))
    assert f"after {steps} of {steps} steps, in what follows them; the last checkpoint is of step {steps}" in line
    with Process(*words) as process:
        process.wait_for(f"resumes after step {steps} of {steps}", 60)
        assert process.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_steps_a_stop_is_at_once(chain: Chain, number: int) -> None:
    with Process("pretrain", str(chain.path), "--run.out", str(chain.runs), "--seed", str(6 + number)) as process:
        process.wait_for("pretrain   starts", 60)
        process.process.send_signal(number)
        assert process.wait_for("stopped:", 2).startswith("stopped: in pretrain")
        assert process.end() == 75
