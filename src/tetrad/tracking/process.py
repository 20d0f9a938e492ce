"""The process of a run's trackers: it reads what the stages log, from their files, and passes it on.

Its standard input is a socket. Lines of JSON come through it: {"sinks": a module, "names", "nice", "poll"}, for each
stage {"begin": a place, "logs": the path and size of each} and {"end": did it finish?}, at last {"close": seconds of
patience, "longest": seconds}; lines of text for the user go back. Each tracker has a thread, which waits for no other
and reads at its own pace: nothing waits for it, and nothing is dropped. How far it is stands in its folder: from there
it goes on with a stage that resumes. The process ends at once with the other end of its socket.
"""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from tetrad import storage
from tetrad.tracking.sinks import Place, Sink

BUSY = 0.1
"""Of a processor: this process moves if it uses more, as in imports."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Not for this process, which ends when the run has."""

Record = dict[str, Any]


class Log:
    """The records of a file that grows. at: the byte where the next one begins."""

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at
        self._file: BinaryIO | None = None
        self._line = b""

    def peek(self) -> Record | None:
        """The next one; None while there is none."""
        if not self._file and self.path.exists():
            self._file = self.path.open("rb")
        if self._file and not self._line:
            self._file.seek(self.at)
            line = self._file.readline()
            self._line = line if line.endswith(b"\n") else b""  # the rest is being written
        return json.loads(self._line) if self._line else None

    def take(self) -> None:
        """What was peeked is done with."""
        self.at, self._line = self.at + len(self._line), b""

    def left(self) -> int:
        """Records that were not taken."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self.at)
            return sum(line.endswith(b"\n") for line in file)


class Stage:
    """A stage to be followed. ended: it writes no more; finished: to its end, once it has ended."""

    def __init__(self, place: Place, logs: Sequence[tuple[str, int]]) -> None:
        """logs: each with its size as it begins or resumes, to which it may have been cut."""
        self.place, self.ended, self.finished = place, threading.Event(), False
        self._saved = place.folder / f"{place.stage}.{place.identity}.json"
        begins = json.loads(self._saved.read_bytes()) if self._saved.exists() else (0, 0)
        paths = [Path(path) for path, _ in logs]
        begins = [_line_at(path, min(at, size)) for path, at, (_, size) in zip(paths, begins, logs, strict=True)]
        self.metrics, self.samples = (Log(path, at) for path, at in zip(paths, begins, strict=True))
        self._before, self._written = begins, list[int]()
        self.save()  # a log that was cut grows again, whether anybody reads it or not

    def pass_on(self, sink: Sink, *, last: bool) -> bool:
        """What is next in the order of steps, all samples of a step after its metrics; False if there is nothing. last:
        nothing follows."""
        numbers, sample = self.metrics.peek(), self.samples.peek()  # then no earlier sample is missing
        if sample and (sample["step"] < numbers["step"] if numbers else last):
            step, texts = sample["step"], list[str]()
            while sample and sample["step"] == step:
                texts.append(storage.json_bytes(sample).decode(errors="replace"))
                self.samples.take()
                sample = self.samples.peek()
            sink.samples(step, texts)
        elif numbers:
            plain = {name: float(n) for name, n in numbers.items() if name != "step" and isinstance(n, int | float)}
            sink.metrics(numbers["step"], plain)
            self.metrics.take()
        else:
            return False
        return True

    def save(self) -> None:
        """How far it was at the last time: a tracker's own threads write what it has got soon after."""
        if self._before != self._written:
            storage.write_file(self._saved, storage.json_bytes(list(self._before)))
            self._written = self._before
        self._before = [self.metrics.at, self.samples.at]


def _line_at(path: Path, at: int) -> int:
    """`at` if a line begins there, else 0: the log is another one."""
    if not (at and path.exists()):
        return 0
    with path.open("rb") as file:
        file.seek(at - 1)
        return at if file.read(1) == b"\n" else 0


class Feed(threading.Thread):
    """One tracker, stage by stage. moved: when it last took something."""

    def __init__(self, row: str, sinks: str, poll: float, say: Callable[[str], None]) -> None:
        """poll: seconds between two looks at logs with nothing new. say: to the user."""
        super().__init__(name=f"tracker {row}", daemon=True)
        self._row, self._sinks, self._poll, self._say = row, sinks, poll, say
        self._queue = SimpleQueue[Stage | None]()
        self._left, self.moved = list[Stage](), time.monotonic()
        self.start()

    def follow(self, place: Place, logs: Sequence[tuple[str, int]]) -> None:
        """A stage, after those before it."""
        stage = Stage(place._replace(folder=place.folder / self._row), logs)
        self._left.append(stage)
        self._queue.put(stage)

    def stage_ended(self, *, finished: bool) -> None:
        """The last of them."""
        self._left[-1].finished = finished
        self._left[-1].ended.set()

    def no_more(self) -> None:
        """No stage follows."""
        self._queue.put(None)

    def run(self) -> None:
        try:
            open_run = import_module(self._sinks).SINKS[self._row]
            while stage := self._queue.get():
                self._pass_on(stage, open_run(stage.place))
                self._left.remove(stage)
        except BaseException as error:  # also SystemExit: it is the tracker's own end
            self._say(f"{self.name} fails and is off, the run goes on: {type(error).__name__}: {error}")

    def _pass_on(self, stage: Stage, sink: Sink) -> None:
        saved, last, moves = time.monotonic(), False, True
        while moves or not last:
            last = stage.ended.is_set()  # before the look
            moves = stage.pass_on(sink, last=last)
            self.moved = time.monotonic()
            if self.moved - saved >= self._poll:
                sink.flush()
                stage.save()
                saved = self.moved
            if not (moves or last):
                stage.ended.wait(self._poll)
        sink.flush()
        sink.close(stage.finished)
        for _ in range(2):  # now all of it is there
            stage.save()

    def report(self) -> None:
        """What it has not got."""
        left = sum(log.left() for stage in self._left for log in (stage.metrics, stage.samples))
        self._say(f"{self.name} does not answer or is too slow: {left} lines have not reached it")


class Feeds:
    """Those of a run."""

    def __init__(self, given: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._feeds = [Feed(row, given["sinks"], given["poll"], say) for row in given["names"]]

    def obey(self, messages: Iterable[str]) -> bool:
        """To the end of the run. False if that was not said, or not all could end."""
        for message in map(json.loads, messages):
            if "close" in message:
                threading.Thread(target=_end_with, args=(messages,), daemon=True).start()
                return self._end(message["close"], message["longest"])
            for feed in self._feeds:
                if "begin" in message:
                    begin = message["begin"]
                    feed.follow(Place(**{**begin, "folder": Path(begin["folder"])}), message["logs"])
                else:
                    feed.stage_ended(finished=message["end"])
        return False

    def _end(self, patience: float, longest: float) -> bool:
        """Lets them end as long as they move."""
        for feed in self._feeds:
            feed.no_more()
        began = moved = time.monotonic()
        used = time.process_time()
        while waiting := [feed for feed in self._feeds if feed.is_alive()]:
            looked = time.monotonic()
            if looked >= began + longest or looked >= max(moved, *(feed.moved for feed in waiting)) + patience:
                break
            waiting[0].join(0.2)
            before, used = used, time.process_time()
            if used - before > BUSY * (time.monotonic() - looked):
                moved = time.monotonic()
        for feed in waiting:
            feed.report()
        return not waiting


def _end_with(messages: Iterable[str]) -> None:
    for _ in messages:
        pass
    os._exit(0)


def main() -> None:
    """What the process does."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # what a tracker starts is not to inherit that they are ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    wire, writing = socket.socket(fileno=os.dup(0)), threading.Lock()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor the socket

    def say(text: str) -> None:
        line = re.sub(r"://[^/@\s]+@", "://***@", " ".join(text.split("\n")))  # a password in an address
        with writing, suppress(OSError):
            wire.sendall(f"{line}\n".encode(errors="replace"))

    messages = iter(wire.makefile())
    given = json.loads(next(messages))
    os.nice(given["nice"])
    if not Feeds(given, say).obey(messages):
        os._exit(0)  # else what trackers do at exit would be waited for


if __name__ == "__main__":
    main()
