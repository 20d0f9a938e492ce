"""Two writers want one run folder, a hundred times over: exactly one gets it, and the other is told who has it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrad.errors import UserError
from tetrad.storage import RunLock

pytestmark = pytest.mark.faults


def in_child(work: Callable[[], object]) -> tuple[int, int]:
    """Runs `work` in a forked child; returns its pid and the pipe on which its answer comes as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    return child, reader


def answer(child: int, reader: int) -> list[str]:
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return list(json.loads(text))


def test_a_hundred_races(tmp_path: Path) -> None:
    for race in range(100):
        ready, go = os.pipe()
        done, end = os.pipe()

        def work(race: int = race, ready: int = ready, end: int = end, done: int = done, go: int = go) -> list[str]:
            os.close(go)
            os.close(end)
            os.read(ready, 1)  # both wait for the same pipe to close
            try:
                with RunLock(tmp_path / str(race) / "lock"):
                    os.read(done, 1)  # holds it until both have tried
                    return ["got it"]
            except UserError as error:
                return [error.code, error.what, str(error.exit_code)]

        children = [in_child(work) for _ in range(2)]
        os.close(go)
        # The loser answers while the winner still holds the lock; then the winner is let go.
        first = next_answer(children)
        os.close(end)
        answers = [first[1], answer(*children[1 - first[0]])]
        os.close(ready)
        os.close(done)
        winner = children[1 - first[0]][0]
        assert answers[1] == ["got it"]
        assert answers[0][0] == "E-RUN-LOCKED"
        assert answers[0][2] == "7"
        for part in (f"pid {winner}", os.uname().nodename, "since 20"):
            assert part in answers[0][1]


def next_answer(children: list[tuple[int, int]]) -> tuple[int, list[str]]:
    import select

    readable, _, _ = select.select([reader for _, reader in children], [], [], 10)
    index = [reader for _, reader in children].index(readable[0])
    return index, answer(*children[index])


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(tmp_path / "lock"):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(UserError, match=f"E-RUN-LOCKED.*pid {child}"), RunLock(tmp_path / "lock"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(tmp_path / "lock") as lock:
        assert f"pid {child}" in lock.note
    with RunLock(tmp_path / "lock") as lock:
        assert lock.note == ""
    os.close(reader)
    os.close(writer)
