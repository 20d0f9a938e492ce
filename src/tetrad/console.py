"""The only writer to the terminal: text and tables on stdout, progress on stderr.

On a terminal progress is a bar with rate and time left; in a log it is plain lines. Steps get one after the first and
then every `log_every`. Anything else that takes time is a phase: after two seconds a thread shows the progress of the
innermost one, in a log every ten seconds and in a stage of hours every minute, so that nothing ever looks hung.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import StringIO
from itertools import zip_longest
from typing import Any, TextIO, TypeVar

from rich import progress as bars
from rich.cells import cell_len, set_cell_size
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from tetrad.streams import guarded

T = TypeVar("T")
PHASE_SECONDS = 2.0  # a shorter phase is not shown
LINE_SECONDS = (10.0, 60.0)  # between lines by time: at least, and at most
_TICK_SECONDS = 0.25
_RECENT = 10, 60.0, 4096  # steps and seconds that the rate is measured over, whichever are more, and the most steps


class Console:
    """Writes for people. Nothing here is read back by a program. quiet: for all torchrun processes but the first.
    outlives: for a run, which continues when its output can no longer be written."""

    def __init__(
        self,
        log_every: int = 10,
        out: TextIO | None = None,
        err: TextIO | None = None,
        *,
        quiet: bool = False,
        outlives: bool = False,
    ) -> None:
        self.log_every = log_every
        self._out: TextIO = StringIO() if quiet else guarded(out or sys.stdout, outlives=outlives)
        self._err: TextIO = StringIO() if quiet else guarded(err or sys.stderr, outlives=True)
        self._live: Terminal | None = None
        self._screen: bars.Progress | None = None
        self._open: list[Progress] = []  # the innermost last
        self._lock = threading.RLock()
        self._last_line = -LINE_SECONDS[1]

    def say(self, text: str) -> None:
        """One or more lines."""
        if self._live and self._out.isatty():
            self._live.print(Text(text), soft_wrap=True)  # above the bar
        else:
            self._out.write(text + "\n")

    def write(self, text: str) -> None:
        """A piece of a line, shown at once."""
        self._out.write(text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; numbers are shown with four significant digits. Plain columns in a log."""
        cells = [[_text(cell) for cell in row] for row in rows]
        if self._out.isatty():
            drawn = Table(title=Text(title), title_justify="left")
            for column in columns:
                drawn.add_column(Text(column))
            for row in cells:
                drawn.add_row(*map(Text, row))
            (self._live or Terminal(file=self._out)).print(drawn)
            return
        widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
        lines = ["  ".join(map(set_cell_size, row, widths)) for row in [columns, *cells]]
        self.say("\n".join([title, *("  " + line.rstrip() for line in lines)]))

    def marked(self, title: str, runs: Iterable[tuple[str, bool]]) -> None:
        """Text with some runs marked: in colour on a terminal, between ⟦ and ⟧ in a log."""
        if self._out.isatty():
            text = Text(title, style="bold")
            for run, mark in runs:
                text.append(run, style="black on green" if mark else "default")
            Terminal(file=self._out).print(text, soft_wrap=True)
            return
        self.say(title + "".join(f"⟦{run}⟧" if mark else run for run, mark in runs if run))

    def warn(self, text: str) -> None:
        """A line beside the progress, from any thread."""
        with self._lock:
            if self._live:
                self._live.print(Text(text), soft_wrap=True)
            else:
                self._err.write(text + "\n")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While it lasts, phases of this thread are shown here."""
        token, over = _in_use.set(self), threading.Event()

        def show() -> None:
            while not over.wait(_TICK_SECONDS):
                self.tick()

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            _in_use.reset(token)

    def progress(self, label: str, total: int, start: int = 0, *, evaluations: int = 0) -> "Progress":
        """Progress of `total` steps, `start` of them already done. evaluations: validation passes still to come."""
        return Progress(self, label, total, start, self.log_every, evaluations)

    @property
    def doing(self) -> str:
        """What is being done, the whole before its parts."""
        within = zip_longest(self._open, self._open[1:])  # steps of a stage stand for the stage
        return ": ".join(item.heading for item, inner in within if not inner or inner.label != item.label)

    def tick(self) -> None:
        """Shows the innermost phase, if it is due."""
        with self._lock:
            now = time.monotonic()
            if not self._open or now - self._open[-1].began < PHASE_SECONDS:
                return
            if self._err.isatty():
                self._draw(self._open[-1])
                return
            low, high = LINE_SECONDS
            pause = min(high, max(low, (now - self._open[0].began) / 20))
            moved = max((item.moved for item in self._open if item.every), default=-high)
            if now - max(self._last_line, moved) >= pause:
                self._line(self._open[-1])

    def _opened(self, item: "Progress") -> None:
        with self._lock:
            self._open.append(item)
            if item.every and self._err.isatty():
                self._draw(item)

    def _closed(self, item: "Progress") -> None:
        with self._lock:
            self._open.remove(item)
            if not self._screen or any(other.every and other.task is not None for other in self._open):
                self._erase(item)
            elif item.task is not None:
                self._screen.live.transient = not item.every
                self._screen.stop()
                self._screen = self._live = None

    def _advanced(self, item: "Progress", due: bool) -> None:
        with self._lock:
            if item.every and self._err.isatty():
                self._draw(item)
            elif item.every and due:
                self._line(item)

    def _line(self, item: "Progress") -> None:
        label = item.heading if item.every else self.doing
        self._err.write("  ".join(part for part in (label, item.numbers, item.pace()) if part) + "\n")
        self._last_line = time.monotonic()

    def _draw(self, item: "Progress") -> None:
        if self._screen is None:
            label, beside = (bars.TextColumn(f"{{task.{n}}}", markup=False) for n in ("description", "fields[beside]"))
            self._live = Terminal(file=self._err)
            self._screen = bars.Progress(label, bars.BarColumn(24), beside, console=self._live)
            self._screen.start()
        for other in self._open:
            if other is not item and not other.every:
                self._erase(other)
        if item.task is None:
            item.task = self._screen.add_task("", beside="")
        self._screen.update(
            item.task,
            description=item.heading,
            completed=item.done,
            total=item.total or None,
            beside=f"{item.pace()}  {item.numbers}",
            refresh=not item.every,
        )

    def _erase(self, item: "Progress") -> None:
        if self._screen and item.task is not None:
            self._screen.remove_task(item.task)
            item.task = None


class Progress:
    """Progress of something: steps of a stage, shown by their number, or a phase, shown by time.

    total: 0 if unknown. every: steps between log lines, 0 for a phase.
    """

    def __init__(
        self, console: Console, label: str, total: int = 0, start: int = 0, every: int = 0, evaluations: int = 0
    ) -> None:
        self.label, self.total, self.done, self.every = label, total, start, every
        self.began, self.moved = time.monotonic(), -LINE_SECONDS[1]
        self.task: bars.TaskID | None = None
        self._numbers: dict[str, float | str] = {}
        self._console, self._start, self._evaluations_left = console, start, evaluations
        self._evaluation_seconds: list[float] = []  # seconds of each validation pass
        self._evaluation_began: float | None = None
        self._marks = deque([(self.began, start)], _RECENT[2])

    def __enter__(self) -> "Progress":
        self._console._opened(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._console._closed(self)

    @property
    def heading(self) -> str:
        """The label, and how much is done."""
        count = f"{self.done}/{self.total}" if self.total else str(self.done or "")
        return f"{self.label} {count}".rstrip()

    @property
    def numbers(self) -> str:
        """What was last reported beside the count."""
        return "  ".join(f"{name} {_text(value)}" for name, value in self._numbers.items())

    def advance(self, n: int = 1, **numbers: float | str) -> None:
        """n more steps are done; the numbers are shown with them."""
        self._numbers = numbers
        if not n:
            return
        before, self.done = self.done, self.done + n
        self.moved = time.monotonic()
        self._marks.append((self._clock(), self.done))
        while len(self._marks) > _RECENT[0] and self._marks[-1][0] - self._marks[1][0] > _RECENT[1]:
            self._marks.popleft()
        if self.every:
            first_or_last = before == self._start or self.done >= self.total
            self._console._advanced(self, first_or_last or before // self.every < self.done // self.every)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A validation pass between two steps: not part of their rate, but of the time left."""
        self._evaluation_began = time.monotonic()
        yield
        self._evaluation_seconds.append(time.monotonic() - self._evaluation_began)
        self._evaluations_left, self._evaluation_began = self._evaluations_left - 1, None

    def pace(self) -> str:
        """The recent rate, and the time left at that rate, validation passes included."""
        whole, steps = time.monotonic() - self.began, self.done - self._marks[0][1]
        if not steps:
            return _duration(whole)
        first, last, now = self._marks[0][0], self._marks[-1][0], self._clock()
        each = max((last - first) / steps, (now - first) / (steps + 1), 1e-9)  # the current step may be a long one
        often, seldom = ("steps/s", "s/step") if self.every else ("a second", "s each")
        rate = f"{1 / each:.3g} {often}" if each < 1 else f"{each:.3g} {seldom}"
        if self.done >= self.total:
            return f"{rate}  took {_duration(whole)}"
        evaluating = self._evaluations_left * sum(self._evaluation_seconds) / max(1, len(self._evaluation_seconds))
        more = "over " if self._evaluations_left > 0 and not self._evaluation_seconds else ""
        return f"{rate}  {more}{_duration((self.total - self.done) * each + evaluating)} left"

    def _clock(self) -> float:
        """Seconds without those of validation passes."""
        return (self._evaluation_began or time.monotonic()) - sum(self._evaluation_seconds)


_nowhere = Console(quiet=True)
_in_use = ContextVar("console", default=_nowhere)


def phase(label: str, total: int = 0) -> Progress:
    """Something that may take long, on the console in use, if any. `with phase("scoring", 400) as bar: ...`"""
    return Progress(_in_use.get(), label, total)


def counted(label: str, items: Iterable[T], total: int, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The items of a loop that is a phase. total: of their sizes; 0 if unknown."""
    with phase(label, total) as bar:
        for item in items:
            yield item
            bar.advance(size(item))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
