"""The one writer to the terminal: words and tables on stdout, progress on stderr.

On a terminal progress is a bar with rate and time left; in a log it is plain lines, the first after the first step and
then every `log_every` steps, so that a long run can be followed with `tail -f`.
"""

import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, TextIO

from rich import progress as bars
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text

from tetrad.engine.streams import guarded


class Console:
    """Writes for people. Nothing here is read back by a program. quiet: for all processes of torchrun but the first.
    outlives: of a run, which goes on where its words can't be written any more."""

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

    def say(self, text: str) -> None:
        """One or more lines."""
        if self._live and self._out.isatty():
            self._live.print(Text(text), soft_wrap=True)  # above the bar
        else:
            self._out.write(text + "\n")
            self._out.flush()

    def write(self, text: str) -> None:
        """A piece of a line, shown at once."""
        self._out.write(text)
        self._out.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; numbers are shown with four digits. Plain columns in a log."""
        cells = [[_text(cell) for cell in row] for row in rows]
        if self._out.isatty():
            drawn = Table(title=Text(title), title_justify="left")
            for column in columns:
                drawn.add_column(Text(column))
            for row in cells:
                drawn.add_row(*map(Text, row))
            (self._live or Terminal(file=self._out)).print(drawn)
            return
        widths = [max(map(_width, column)) for column in zip(columns, *cells, strict=True)]
        lines = ["  ".join(_padded(c, w) for c, w in zip(row, widths, strict=True)) for row in [columns, *cells]]
        self.say("\n".join([title, *("  " + line.rstrip() for line in lines)]))

    def marked(self, title: str, runs: Iterable[tuple[str, bool]]) -> None:
        """Text of which some runs are marked: in colour on a terminal, between ⟦ and ⟧ in a log."""
        if self._out.isatty():
            text = Text(title, style="bold")
            for run, mark in runs:
                text.append(run, style="black on green" if mark else "default")
            Terminal(file=self._out).print(text, soft_wrap=True)
            return
        self.say(title + "".join(f"⟦{run}⟧" if mark else run for run, mark in runs if run))

    @contextmanager
    def progress(self, label: str, total: int, start: int = 0) -> Iterator["Progress"]:
        """Progress of `total` steps, of which `start` were done before."""
        if self._live or not self._err.isatty():
            yield Progress(self._err, self.log_every, label, total, start)
            return
        words = [bars.TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[numbers]")]
        pace = bars.TextColumn("{task.fields[pace]}", markup=False)
        columns = (words[0], bars.BarColumn(24), bars.MofNCompleteColumn(), pace, words[1])
        self._live = Terminal(file=self._err)
        try:
            with bars.Progress(*columns, console=self._live) as bar:
                task = bar.add_task(label, total=total, completed=start, pace="", numbers="")
                yield _Bar(bar, task, label, total, start)
        finally:
            self._live = None


class Progress:
    """Steps of one stage, as lines of a log."""

    def __init__(self, file: TextIO, every: int, label: str, total: int, start: int) -> None:
        self._file, self._every, self._label, self._total = file, every, label, total
        self._start = self._done = start
        self._began = time.monotonic()

    def advance(self, n: int = 1, **numbers: float | str) -> None:
        """n more steps are done; the numbers are shown with them."""
        before, self._done = self._done, self._done + n
        due = before == self._start or self._done >= self._total or before // self._every < self._done // self._every
        if due:
            self._show("  ".join(f"{name} {_text(value)}" for name, value in numbers.items()))

    def _show(self, numbers: str) -> None:
        parts = [f"{self._label} {self._done}/{self._total}", numbers, self._pace()]
        self._file.write("  ".join(part for part in parts if part) + "\n")
        self._file.flush()

    def _pace(self) -> str:
        steps, seconds = self._done - self._start, max(time.monotonic() - self._began, 1e-6)
        rate = f"{steps / seconds:.3g} steps/s" if steps > seconds else f"{seconds / max(steps, 1):.3g} s/step"
        left = (self._total - self._done) * seconds / max(steps, 1)
        return f"{rate}  {_duration(left)} left" if self._done < self._total else f"{rate}  took {_duration(seconds)}"


class _Bar(Progress):
    """The same on a terminal: drawn anew at every step."""

    def __init__(self, bar: bars.Progress, task: bars.TaskID, label: str, total: int, start: int) -> None:
        super().__init__(sys.stderr, 1, label, total, start)
        self._bar, self._task = bar, task

    def _show(self, numbers: str) -> None:
        self._bar.update(self._task, completed=self._done, pace=self._pace(), numbers=numbers)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _width(text: str) -> int:
    """Columns on a terminal: Han characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
