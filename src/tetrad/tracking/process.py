"""The process of a run's trackers: it reads what the stages log, from their files, and passes it on.

Its standard input is a socket. Lines of JSON come through it: {"sinks": a module, "names", "nice", "poll"}, for each
stage {"begin": a place, "logs": the path and size of each} and {"end"}, at last {"close": seconds of patience}; lines
of text for the user go back. Each tracker has a thread, which waits for no other and reads at its own pace: nothing
waits for it, and nothing is dropped. How far it is stands in its folder: from there it goes on with a stage that
resumes. The process ends with the other end of its socket.
"""

import json
import os
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

LONGEST = 6
"""At the end, times as long for a tracker that is slow but moves as for one that does not."""
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
    """A stage to be followed. ended: it writes no more."""

    def __init__(self, place: Place, logs: Sequence[tuple[str, int]]) -> None:
        """logs: each with its size as it begins or resumes, to which it may have been cut."""
        self.place, self.ended = place, threading.Event()
        self._saved = place.folder / f"{place.stage}.{place.identity}.json"
        begins = json.loads(self._saved.read_bytes()) if self._saved.exists() else (0, 0)
        self.metrics, self.samples = (
            Log(Path(path), min(at, size)) for at, (path, size) in zip(begins, logs, strict=True)
        )

    def pass_on(self, sink: Sink, *, last: bool) -> bool:
        """The next record in the order of steps, metrics before samples; False if there is none. last: none follows."""
        numbers, sample = self.metrics.peek(), self.samples.peek()  # then no earlier sample is missing
        if sample and (sample["step"] < numbers["step"] if numbers else last):
            sink.sample(sample["step"], storage.json_bytes(sample).decode(errors="replace"))
            self.samples.take()
        elif numbers:
            plain = {name: float(n) for name, n in numbers.items() if name != "step" and isinstance(n, int | float)}
            sink.metrics(numbers["step"], plain)
            self.metrics.take()
        else:
            return False
        return True

    def save(self) -> None:
        """How far it is passed on."""
        storage.write_file(self._saved, storage.json_bytes([self.metrics.at, self.samples.at]))


class Feed(threading.Thread):
    """One tracker, stage by stage. say: to the user."""

    def __init__(self, row: str, sinks: str, poll: float, say: Callable[[str], None]) -> None:
        """poll: seconds between two looks at logs with nothing new."""
        super().__init__(name=f"tracker {row}", daemon=True)
        self._row, self._sinks, self._poll, self._say = row, sinks, poll, say
        self._queue = SimpleQueue[Stage | None]()
        self._left, self._moved = list[Stage](), time.monotonic()
        self.start()

    def follow(self, place: Place, logs: Sequence[tuple[str, int]]) -> None:
        """A stage, after those before it."""
        self._left.append(Stage(place._replace(folder=place.folder / self._row), logs))
        self._queue.put(self._left[-1])

    def stage_ended(self) -> None:
        """The last of them."""
        self._left[-1].ended.set()

    def run(self) -> None:
        try:
            open_run = import_module(self._sinks).SINKS[self._row]
            while stage := self._queue.get():
                storage.make_folder(stage.place.folder)
                self._pass_on(stage, open_run(stage.place))
                self._left.remove(stage)
        except BaseException as error:  # also SystemExit: it is the tracker's own end
            self._say(f"{self.name} fails and is off, the run goes on: {type(error).__name__}: {error}")

    def _pass_on(self, stage: Stage, sink: Sink) -> None:
        last = False
        while not last:
            last, moved = stage.ended.is_set(), False  # before the look
            while stage.pass_on(sink, last=last):
                self._moved, moved = time.monotonic(), True
            if moved:
                sink.flush()
                stage.save()
            if not last:
                stage.ended.wait(self._poll)
        sink.close()

    def end(self, patience: float, began: float) -> None:
        """Lets it end as long as it moves."""
        self._queue.put(None)
        latest, used = began + LONGEST * patience, time.process_time()
        while self.is_alive() and time.monotonic() < min(max(began, self._moved), latest) + patience:
            looked = time.monotonic()
            self.join(0.2)
            before, used = used, time.process_time()
            if used - before > BUSY * (time.monotonic() - looked):
                self._moved = time.monotonic()
        if self.is_alive():
            left = sum(log.left() for stage in self._left for log in (stage.metrics, stage.samples))
            self._say(f"{self.name} does not answer or is too slow: {left} lines have not reached it")


class Feeds:
    """Those of a run."""

    def __init__(self, given: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._feeds = [Feed(row, given["sinks"], given["poll"], say) for row in given["names"]]

    def obey(self, messages: Iterable[str]) -> bool:
        """To the end of the run. False if that was not said, or not all could end."""
        for message in map(json.loads, messages):
            if "begin" in message:
                begin = message["begin"]
                place = Place(**{**begin, "folder": Path(begin["folder"])})
                for feed in self._feeds:
                    feed.follow(place, message["logs"])
            elif "end" in message:
                for feed in self._feeds:
                    feed.stage_ended()
            else:
                began = time.monotonic()
                for feed in self._feeds:
                    feed.end(message["close"], began)
                return not any(feed.is_alive() for feed in self._feeds)
        return False


def main() -> None:
    """What the process does."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # what a tracker starts is not to inherit that they are ignored
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    wire, writing = socket.socket(fileno=os.dup(0)), threading.Lock()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor the socket

    def say(text: str) -> None:
        with writing, suppress(OSError):
            wire.sendall((" ".join(text.split("\n")) + "\n").encode(errors="replace"))

    messages = iter(wire.makefile())
    given = json.loads(next(messages))
    os.nice(given["nice"])
    if not Feeds(given, say).obey(messages):
        os._exit(0)  # else what trackers do at exit would be waited for


if __name__ == "__main__":
    main()
