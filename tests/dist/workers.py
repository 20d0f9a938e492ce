"""Starts programs as ranks: two by hand, as torchrun would, or whatever a command starts by itself.

What is started here is a fork of a process that has imported torch; the ranks that a command starts are not.
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import tetrad
from forks import Fork

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join((str(Path(tetrad.__file__).parents[1]), str(ROOT / "tests")))


def pair(*words: str) -> list[subprocess.Popen[str]]:
    """`python WORDS` as ranks 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [popen(words, **given, RANK=str(rank)) for rank in range(2)]


def popen(words: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    """`python WORDS` with its output in pipes."""
    given = {**os.environ, "PYTHONPATH": PYTHONPATH, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Fork(words, env=given, text=True, **pipes)


def children(parent: int) -> dict[int, int]:
    """The processes of the ranks that a launcher has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                words = (path.parent / "environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(path.parent.name) for word in words if word.startswith(b"RANK=")}
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    """Whether it runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
