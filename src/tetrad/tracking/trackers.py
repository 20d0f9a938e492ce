"""Trackers: where others look at a run. What the logs of a stage get goes to each of `run.trackers` too.

They are in a process of their own, of the lowest priority, which follows metrics.jsonl and samples.jsonl: whatever a
tracker does, it neither stops nor slows the run. One that raises is off from then on, with one warning. The end of the
run waits for them, for 5 seconds without progress or a hundredth of its time (at most a minute), whichever is more, and
for one that is slow but moves several times that, unless the run fails or is stopped; a warning counts what has not
reached it, and a stage that resumes goes on from there.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tetrad import storage
from tetrad.console import phase
from tetrad.errors import UserError
from tetrad.storage import Json
from tetrad.tracking.process import SIGNALS
from tetrad.tracking.sinks import Place

LEAST, SHARE, MOST = 5.0, 0.01, 60.0
"""Of the patience at the end of a run: seconds, share of the run, seconds."""
LONGEST = 7
"""Times as long for a tracker that is slow but moves as for one that does not."""
SLACK = 10.0
"""More seconds for the process itself."""
SINKS = "tetrad.tracking.sinks"
NICENESS = 19
"""Training comes first."""
POLL = 1.0
"""Seconds between two looks at the logs."""
OUTPUT = "output.txt"
"""What trackers print, in their folder."""


class Trackers:
    """Those of a run. Their process starts with the first stage that is followed."""

    def __init__(self, names: Sequence[str], project: str, folder: Path, warn: Callable[[str], None]) -> None:
        """folder: for what they write. warn: prints a line, from any thread."""
        self._names, self._project, self._folder, self._warn = tuple(names), project, folder, warn
        self._process: _Process | None = None
        self._began = time.monotonic()

    @contextmanager
    def following(self, stage: Path, key: str, settings: Mapping[str, Json], step: int) -> Iterator[None]:
        """Passes on what the logs in a stage's folder get in between, and what earlier did not reach a tracker. step:
        where it begins or resumes."""
        if self._names and not self._process:
            try:
                self._process = _Process(self._names, self._folder.resolve(), self._warn)
            except (OSError, UserError) as error:
                self._names = ()
                self._warn(f"trackers are off, the run goes on: {error}")
        if not self._process:
            yield
            return
        identity = hashlib.sha256(f"{stage.resolve()} {key}".encode()).hexdigest()[:16]
        place = Place(self._folder.resolve(), self._project, stage.name, identity, settings, step)
        paths = [stage.resolve() / name for name in ("metrics.jsonl", "samples.jsonl")]
        logs = [(path, path.stat().st_size if path.exists() else 0) for path in paths]
        self._process.tell({"begin": place._asdict(), "logs": logs})
        finished = False
        try:
            yield
            finished = True
        finally:
            self._process.tell({"end": finished})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Waits for those that move; not for long where the run did not end well, and not at all at a second Ctrl-C."""
        process, self._names, self._process = self._process, (), None
        if not process:
            return
        patience = min(max(LEAST, SHARE * (time.monotonic() - self._began)), MOST)
        if error:
            patience = 0.0 if issubclass(error, KeyboardInterrupt) else min(LEAST, patience)
        with phase("waiting for trackers"):
            process.close(patience, patience if error else LONGEST * patience)


class _Process:
    """Of `tetrad.tracking.process`."""

    def __init__(self, names: Sequence[str], folder: Path, warn: Callable[[str], None]) -> None:
        """Raises OSError, UserError E-IO-*."""
        self._output, self._warn, self._closing = folder / OUTPUT, warn, False
        storage.write_file(self._output, b"", 0o600)
        self._wire, theirs = socket.socketpair()
        with theirs:
            self._id = os.posix_spawn(
                sys.executable,
                [sys.executable, "-u", "-P", "-m", "tetrad.tracking.process"],
                {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self._output), os.O_WRONLY | os.O_APPEND, 0),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setpgroup=0,  # Ctrl-C is for the run
                setsigmask=SIGNALS,  # until it can ignore them
            )
        self.tell({"sinks": SINKS, "names": names, "nice": NICENESS, "poll": POLL})
        self._over = threading.Event()  # to join a thread is not safe where a signal interrupts it
        threading.Thread(target=self._read, name="trackers", daemon=True).start()

    def tell(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # it is gone, as the reader says
            self._wire.sendall(json.dumps(message, default=str).encode() + b"\n")

    def _read(self) -> None:
        with suppress(OSError), self._wire.makefile(errors="replace") as lines:
            for line in lines:
                self._warn(line.rstrip("\n"))
        code = os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])
        if code or not self._closing:
            self._warn(f"the trackers' process ended with {code}: they are off, the run goes on; see {self._output}")
        self._over.set()

    def close(self, patience: float, longest: float) -> None:
        """Gives it so many seconds without progress to end, and so many in all."""
        self._closing = True
        self.tell({"close": patience, "longest": longest})
        try:
            self._over.wait(longest + SLACK if patience else 0)
        finally:  # also where a signal ends the wait
            if not self._over.is_set():
                with suppress(ProcessLookupError):
                    os.killpg(self._id, signal.SIGKILL)
                with suppress(OSError):
                    self._wire.shutdown(socket.SHUT_RDWR)
                self._over.wait(SLACK)
            self._wire.close()
