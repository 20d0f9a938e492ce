"""Python processes that do not pay for their imports: a server that has done them forks each command.

    with Fork(["-m", "tetrad", "run", "recipe.toml"], cwd=folder, env=env, stdout=PIPE) as process: ...

A `Fork` is a `subprocess.Popen`: the child has its own pid, arguments, environment, working folder, streams and
session, takes signals, and ends as a program ends. It differs from one that was started in what comes before a
program's first line: the interpreter's own start, imports, the seed of hashes, memory that these left behind. So what
is tested about the start (its time, what is imported, encodings, closed streams, allocators) is tested with a started
process. For an environment with other values of what Python, glibc or torch read at their start there is another
server.

The server has one thread. Of Popen it overrides how a child is made and how its end is learned; these are private
names of the standard library, the same from Python 3.11 to 3.14.
"""

import atexit
import gc
import importlib
import io
import json
import os
import re
import resource
import runpy
import selectors
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tetrad

HERE = Path(__file__).resolve()
SRC = str(Path(tetrad.__file__).parents[1])  # what the tests import: of a planted fault not this checkout's
READ_AT_START = re.compile(r"PYTHON(?!PATH$)|LC_|LANG|LD_|GLIBC_|MALLOC_|OMP_|MKL_|GOMP_|KMP_|OPENBLAS_|TORCH_|ATEN_")
LIGHT = "cli.main console datacheck.check inference.model_folder pipeline.recipe pipeline.runner settings.use"
HEAVY = (
    "cli.generate cli.score cli.chat distributed.launch eval.compare train.pretrain train.ppo train.reward train.sft"
)


class Fork(subprocess.Popen[Any]):
    """`python WORDS`, without its own start. WORDS: `-m tetrad ...` or a program's path, and its arguments.

    light: of a server that has not imported torch. address_space: in bytes, at most. After its end `seconds` is the CPU
    time that it took, `mib` its peak memory, of which the server's is a part."""

    seconds = mib = 0.0

    def __init__(
        self, words: Sequence[str], light: bool = False, address_space: int = 0, env: Mapping[str, str] = {}, **how: Any
    ) -> None:
        self._light, self._address_space = light, address_space
        super().__init__(words, env={**(env or os.environ)}, **how)

    def _execute_child(self, words: Sequence[str], *given: Any) -> None:
        cwd, env, new_session = given[4], given[5], given[-2]
        pipes = given[9:15]  # for stdin, stdout and stderr the child's end and ours, ours first of the last two
        streams = [own if own >= 0 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        start = tuple(sorted((name, value) for name, value in env.items() if READ_AT_START.match(name)))
        self._ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(self._light, start), [b"f"], [*streams, theirs.fileno()])
        self.pid = json.loads(self._ours.recv(256))
        self._child_created = True
        if self._address_space:
            resource.prlimit(self.pid, resource.RLIMIT_AS, (self._address_space,) * 2)
        request = {"words": list(words), "cwd": os.fspath(cwd or os.getcwd()), "env": env, "session": new_session}
        self._ours.sendall(json.dumps(request).encode())
        self._ours.shutdown(socket.SHUT_WR)
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """As waitpid answers. The server tells it once."""
        with selectors.DefaultSelector() as ready:
            ready.register(self._ours, selectors.EVENT_READ)
            if not ready.select(0 if flags else None):
                return 0, 0
        with self._ours:
            status, self.seconds, self.mib = json.loads(self._ours.recv(256))
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


@cache
def _server(light: bool, start: tuple[tuple[str, str], ...]) -> socket.socket:
    """The socket of a server that was started with these of its variables; it ends with this process."""
    ours, theirs = socket.socketpair()
    kept = {name: value for name, value in os.environ.items() if not READ_AT_START.match(name)}
    words = [sys.executable, str(HERE), str(theirs.fileno()), *LIGHT.split(), *([] if light else HEAVY.split())]
    with theirs, open(os.devnull, "r+b") as null:
        given = {**kept, **dict(start), "PYTHONPATH": SRC}
        server = subprocess.Popen(words, env=given, pass_fds=[theirs.fileno()], stdin=null, stdout=null)
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def serve(control: socket.socket) -> list[int]:
    """Forks a child for each message; returns in the child, with its three streams and the socket to its owner."""
    assert len(os.listdir("/proc/self/task")) == 1, "a thread of this process would be missing in its children"
    waiting = selectors.DefaultSelector()
    waiting.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.data is None:
                message, given, _, _ = socket.recv_fds(control, 1, 4)
                if not message:
                    sys.exit()
                child = os.fork()
                if not child:
                    waiting.close()
                    control.close()
                    return list(given)
                os.write(given[3], f"{child}\n".encode())
                waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (child, given[3]))
                for stream in given[:3]:
                    os.close(stream)
            else:
                child, owner = key.data
                _, status, used = os.wait4(child, 0)
                waiting.unregister(key.fd)
                os.close(key.fd)
                told = json.dumps([status, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024])
                with suppress(BrokenPipeError), socket.socket(fileno=owner) as waits:  # or is no more itself
                    waits.send(f"{told}\n".encode())


def become(given: Sequence[int]) -> list[str]:
    """Makes this child what its owner wants; returns the program and its arguments."""
    with open(given[3], "rb") as owner:
        request = json.load(owner)
    for number, (stream, name) in enumerate(zip(given, ("stdin", "stdout", "stderr"), strict=False)):
        os.dup2(stream, number)
        setattr(sys, name, reopened(number, getattr(sys, name)))
    os.closerange(3, 1 << 16)
    os.chdir(request["cwd"])
    if request["session"]:
        os.setsid()
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    rest = [path for path in sys.path[1:] if path not in own]
    os.environ.clear()
    os.environ.update(request["env"])
    words: list[str] = request["words"]
    first = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0]))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *rest]
    sys.orig_argv[:] = [sys.executable, *words]
    program, *arguments = words[words[0] == "-m" :]
    sys.argv[:] = [program, *arguments]
    return words


def reopened(number: int, server: io.TextIOWrapper) -> io.TextIOWrapper:
    """A standard stream as Python makes it at its start, for what its number stands for now."""
    raw = io.FileIO(number, "w" if number else "r", closefd=False)
    buffered: Any = io.BufferedWriter if number else io.BufferedReader
    binary = raw if number and server.write_through else buffered(raw)
    lines = server.line_buffering or binary.isatty()
    end = "\n" if number else None
    return io.TextIOWrapper(binary, server.encoding, server.errors, end, lines, server.write_through)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as every command does before it imports torch
    for name in sys.argv[2:]:
        importlib.import_module(name if name.startswith("torch.") else f"tetrad.{name}")
    gc.collect()
    gc.freeze()
    option, *_ = become(serve(socket.socket(fileno=int(sys.argv[1]))))
    if option == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
