"""Which files a setting names, and their lines: globs, gzip, hub datasets, weights, and parts of large files.

Everything that can be wrong with a file has one error that names the file, the line and a fix. A file is checked before
it is opened, because opening a pipe would block forever, and memory stays within one line.
"""

import glob
import gzip
import os
import shlex
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from tetrad.data import hub
from tetrad.data.fields import MARKS
from tetrad.errors import UserError
from tetrad.hub import SCHEMES

MAX_LINE_BYTES = 64 << 20
LINES = (".txt", ".jsonl", ".ndjson")  # formats that can be split into parts at a line
SUFFIXES = (*LINES, ".json", ".csv", ".tsv", ".parquet")
_SCAN = 1 << 24


@dataclass(slots=True)
class Counts:
    """What became of the rows of one reading, so that nothing is lost silently.

    read: rows seen, of which `kept` became records and `refused` were set aside. blank: blank lines. cut, dropped:
    records that are too long. tied: fully tied comparisons. excluded: records marked as not to be trained on at all;
    masked: answers that are marked so. control_strings: places where user text spells a control token (it stays plain
    text). long: records that are too long, with the longest and the first. forms: the format each record was read as.
    unknown: fields that no format reads, each with its first location.
    """

    read: int = 0
    kept: int = 0
    refused: int = 0
    blank: int = 0
    cut: int = 0
    dropped: int = 0
    tied: int = 0
    excluded: int = 0
    masked: int = 0
    control_strings: int = 0
    long: int = 0
    longest: int = 0
    first_long: str = ""
    forms: Counter[str] = field(default_factory=Counter)
    unknown: dict[str, str] = field(default_factory=dict)

    def add(self, new: Mapping[str, Any]) -> None:
        """Adds another reading's counts, as `told` gives them."""
        firsts = {"first_long": self.first_long or new["first_long"], "unknown": {**new["unknown"], **self.unknown}}
        combined = {"longest": max(self.longest, new["longest"]), "forms": self.forms + Counter(new["forms"]), **firsts}
        for name in (f.name for f in fields(self)):
            setattr(self, name, combined[name] if name in combined else getattr(self, name) + new[name])

    def told(self) -> dict[str, Any]:
        """The counts as JSON."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "forms": dict(self.forms)}

    @property
    def notes(self) -> list[str]:
        """What a user should know: recognised formats, what is not trained on, and fields that are not read."""
        notes = []
        if self.forms:
            notes.append("read as " + ", ".join(f"{form} ({n})" for form, n in self.forms.most_common()))
        if self.masked:
            marks = ", ".join(f'"{mark}"' for mark in MARKS)
            notes.append(f"answers that are marked as not to be learned ({marks}): {self.masked}")
        if self.excluded:
            notes.append(f'records left out, because of a false "label" or with no answer to learn: {self.excluded}')
        if self.unknown:
            listed = ", ".join(f'"{name}" (first at {where})' for name, where in sorted(self.unknown.items()))
            notes.append(f"fields that are not read: {listed}")
        return notes


@dataclass(frozen=True)
class DataFiles:
    """The files of one setting. entry: the index in the setting of what named each; weights: how often an epoch reads
    the records of each entry; rename: aliases of fields, as {"question": "instruction"}."""

    paths: tuple[Path, ...]
    entry: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    def only(self, *paths: Path) -> Self:
        """The same with only these files, an epoch reading each once."""
        return type(self)(paths, rename=self.rename)

    def mixture(self, where: Iterable[str]) -> tuple[tuple[int, float], ...]:
        """(records, weight) of each run of records that share a weight. where: the locations of the records, in order.

        Errors: E-DATA-EMPTY where all records have a weight of 0.
        """
        if all(weight == 1 for weight in self.weights):
            return ((sum(1 for _ in where), 1.0),)
        entry_of = {str(p): e for p, e in zip(self.paths, self.entry, strict=True)}
        counts = Counter(entry_of[place.rpartition(":")[0]] for place in where)
        mixture = tuple((counts[entry], self.weights[entry]) for entry in sorted(counts))
        if not any(n * weight for n, weight in mixture):
            what, hint = "the entries with a weight above 0 have no records", "give more data, or raise the weights"
            raise UserError("E-DATA-EMPTY", what, where=str(self.paths[0]), hint=hint)
        return mixture


@dataclass(frozen=True)
class Span:
    """Bytes start to stop of a file (stop 0: to its end); `line` is the number of its first line."""

    path: Path
    start: int = 0
    stop: int = 0
    line: int = 1


def files(patterns: Iterable[str | Path]) -> list[Path]:
    """The files named, globs (`data/*.jsonl`, `**`) expanded in name order, `hf://` names downloaded.

    A name is taken literally where such a file exists, and so is each folder before a glob: a folder may be called
    `exp[1]`. Errors: E-DATA-PATH, E-DATA-HUB, E-DATA-OVERLAP (named twice).
    """
    return list(sources(patterns).paths)


def sources(
    patterns: Iterable[str | Path], weights: Sequence[float] = (), rename: Mapping[str, str] | None = None
) -> DataFiles:
    """The same with each file's index in the setting, its weight, and aliases of fields. weights: one per pattern."""
    matches: list[tuple[Path, int]] = []
    given = list(map(str, patterns))
    for number, pattern in enumerate(given):
        matches += [(path, number) for path in _matches(pattern)]
    seen: set[tuple[int, int]] = set()
    for path, _ in matches:
        status = check_file(path)
        if (status.st_dev, status.st_ino) in seen:
            raise UserError("E-DATA-OVERLAP", "the same file is given twice", where=str(path), hint="name it once")
        seen.add((status.st_dev, status.st_ino))
    weights = tuple(weights) or (1.0,) * len(given)
    return DataFiles(tuple(p for p, _ in matches), tuple(n for _, n in matches), weights, dict(rename or {}))


def _matches(pattern: str) -> list[Path]:
    if pattern.startswith(SCHEMES):
        return hub.fetch(pattern, SUFFIXES)
    folder, rest = "", pattern
    while rest:
        name, slash, below = rest.partition("/")
        if not os.path.lexists(folder + name + slash):
            break
        folder, rest = folder + name + slash, below
    if not glob.has_magic(rest):
        return [Path(pattern)]
    matches = [Path(m) for m in sorted(glob.glob(glob.escape(folder) + rest, recursive=True)) if not os.path.isdir(m)]
    if not matches:
        raise UserError("E-DATA-PATH", "no file matches", where=repr(pattern))
    return matches


def kind(path: Path) -> str:
    """The suffix that decides how a file is read, `.gz` aside."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def spans(path: Path, size: int) -> list[Span]:
    """Parts of about `size` bytes that can be read independently; a file that can't be split is one part.

    A part ends at a line end, in a txt file at a blank line. Errors: E-DATA-PATH.
    """
    total = check_file(path).st_size
    if kind(path) not in LINES or path.suffix.lower() == ".gz" or total <= size:
        return [Span(path)]
    parts: list[Span] = []
    at, line = 0, 1
    with path.open("rb") as file:
        while at < total:
            stop = _boundary(file, min(at + size, total), blank=kind(path) == ".txt")
            parts.append(Span(path, at, stop, line))
            line += _newlines(file, at, stop) if stop < total else 0
            at = stop
    return parts


def _boundary(file: IO[bytes], at: int, *, blank: bool) -> int:
    """The first position from `at` on where a part may end."""
    file.seek(max(at - 1, 0))
    raw = file.readline()
    while blank and raw:
        raw = file.readline()
        if raw and not raw.strip():
            break
    return file.tell()


def _newlines(file: IO[bytes], start: int, stop: int) -> int:
    file.seek(start)
    return sum(file.read(min(_SCAN, stop - at)).count(b"\n") for at in range(start, stop, _SCAN))


def lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """(number, bytes with the line end) of each line of a part. Errors: E-DATA-HUGE, E-DATA-PATH, E-DATA-FORMAT."""
    path, number = span.path, span.line - 1
    left = span.stop - span.start if span.stop else -1
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            file.seek(span.start)
            while left and (raw := file.readline(MAX_LINE_BYTES + 1)):
                number, left = number + 1, left - len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    what = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
                    raise UserError("E-DATA-HUGE", what, where=f"{path}:{number}", hint="split it into several records")
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip file is damaged or cut off after line {number} ({error})"
        raise UserError("E-DATA-FORMAT", what, where=str(path), hint="was the copy complete?") from None
    except OSError as error:
        raise UserError("E-DATA-PATH", f"cannot be read: {error.strerror}", where=str(path)) from None


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text of a line. Errors: E-DATA-ENCODING with the byte and the probable encoding."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        hint, path = "save the file as UTF-8", where.rpartition(":")[0]
        if encoding := _probable(raw):
            hint += f"; if it is {encoding}: iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > NEW-FILE"
        raise UserError("E-DATA-ENCODING", what, where=where, hint=hint) from None


def _probable(raw: bytes) -> str:
    """The most likely encoding of a line that is not UTF-8: Chinese text has high bytes in pairs, Western European
    languages single ones among letters."""
    high = sum(byte > 127 for byte in raw)
    paired = sum(a > 127 and b > 127 for a, b in pairwise(raw))
    for encoding, likely in (("GB18030", paired >= high / 2), ("WINDOWS-1252", paired < high / 4)):
        with suppress(UnicodeDecodeError):
            if likely and raw.decode(encoding):
                return encoding
    return ""


def check_file(path: Path) -> os.stat_result:
    """Checks that a path is a readable regular file. Errors: E-DATA-PATH."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        what = "a link to nothing" if os.path.islink(path) else getattr(error, "strerror", None) or str(error)
        raise UserError("E-DATA-PATH", what, where=str(path)) from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        hint = "name its files, for example with *.jsonl" if stat.S_ISDIR(status.st_mode) else ""
        raise UserError("E-DATA-PATH", what, where=str(path), hint=hint)
    if not os.access(path, os.R_OK):
        raise UserError("E-DATA-PATH", "may not be read (permission denied)", where=str(path))
    return status


def refuse_none_learned(excluded: int, read: int, where: str) -> None:
    """Errors: E-DATA-EMPTY where all records are marked as not to be trained on."""
    if excluded and excluded == read:
        what = f"all {read} records are marked as not to be learned from"
        hint = 'leave the file out, or give answers with a "label" of true or without one'
        raise UserError("E-DATA-EMPTY", what, where=where, hint=hint)


def empty(path: Path, blank: int) -> NoReturn:
    """Errors: E-DATA-EMPTY."""
    seen = f" ({blank} blank lines seen)" if blank else ""
    raise UserError("E-DATA-EMPTY", f"no rows{seen}", where=str(path))
