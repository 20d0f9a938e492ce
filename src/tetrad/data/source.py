"""Opens data files and gives their rows: txt (paragraphs), jsonl (one object a line), json (an array, or objects).

Everything that could be wrong with a file has one error that names the file, the line and the way out. Lines end at
LF or CRLF only, so that U+2028 and its kin stay inside their text. Compressed and tabular files are not read yet.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tetrad.errors import UserError

MAX_LINE_BYTES = 64 << 20
MAX_JSON_BYTES = 512 << 20  # a .json file is held whole
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x89PNG": "a PNG picture",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"%PDF": "PDF",
}
_CSV = re.compile(rb'^[^{}\[\]]*[\w"][,\t][\w"][^{}\[\]]*$')
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class Counts:
    """What became of the rows of one reading, so that nothing is lost in silence.

    read: rows seen. kept: rows that came out. blank: blank lines. cut, dropped: over-long records. tied: comparisons
    without an order. control_strings: places where user text spells a control token (it stays plain text).
    """

    read: int = 0
    kept: int = 0
    blank: int = 0
    cut: int = 0
    dropped: int = 0
    tied: int = 0
    control_strings: int = 0
    notes: list[str] = field(default_factory=list)


def files(patterns: Iterable[str | Path]) -> list[Path]:
    """The files named, globs (`data/*.jsonl`, `**`) expanded in the order of their names.

    A name is taken literally where such a file exists. Errors: E-DATA-PATH, E-DATA-OVERLAP (a file named twice).
    """
    found: list[Path] = []
    for pattern in map(str, patterns):
        if any(c in pattern for c in "*?[") and not os.path.lexists(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise UserError("E-DATA-PATH", "no file matches", where=repr(pattern))
            found += [Path(m) for m in matches if not os.path.isdir(m)]
        else:
            found.append(Path(pattern))
    seen: set[tuple[int, int]] = set()
    for path in found:
        status = _check_file(path)
        if (status.st_dev, status.st_ino) in seen:
            raise UserError("E-DATA-OVERLAP", "the same file is given twice", where=str(path), hint="name it once")
        seen.add((status.st_dev, status.st_ino))
    return found


def rows(path: Path, counts: Counts) -> Iterator[tuple[str, Any]]:
    """(`file:line`, JSON value) of each row of a .jsonl or .json file. Errors: E-DATA-*."""
    _check_format(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        raise UserError("E-DATA-FORMAT", "a txt file holds documents, not records", where=str(path), hint="use jsonl")
    before, blank = counts.read, counts.blank
    for where, value in _json_values(path) if suffix == ".json" else _json_lines(path, counts):
        counts.read += 1
        yield where, value
    if counts.read == before:
        _empty(path, counts.blank - blank)


def paragraphs(path: Path, counts: Counts) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each paragraph of a txt file: lines up to a blank one, joined by LF."""
    _check_format(path)
    before, blank, first = counts.read, 0, 0
    held: list[str] = []
    for number, raw in _lines(path):
        for part in _decode(raw, path, number).rstrip("\r\n").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            if part.strip():
                first = first if held else number
                held.append(part)
                continue
            blank += 1
            if held:
                counts.read += 1
                yield f"{path}:{first}", "\n".join(held)
                held = []
    if held:
        counts.read += 1
        yield f"{path}:{first}", "\n".join(held)
    if counts.read == before:
        _empty(path, blank)


def parse(text: str, where: str, *, ends_file: bool = False) -> Any:
    """One JSON value, strictly: no duplicate keys, NaN, lone surrogates, comments or raw control characters.

    ends_file: no newline follows, so that a half row may be told from a pretty-printed one.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        _syntax(error, where, ends_file)
    except (ValueError, RecursionError) as error:
        _not_a_value(error, where)
    return _whole_text(value, text, where)


class _Refused(ValueError):
    """A JSON value that is legal for Python's parser and not here: (code, what)."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused("E-DATA-DUPKEY", f'the key "{twice}" stands twice in one object')
    return value


def _constant(name: str) -> NoReturn:
    raise _Refused("E-DATA-NUMBER", f"{name} is not a number that can be learned from")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _not_a_value(error: Exception, where: str) -> NoReturn:
    if isinstance(error, _Refused):
        raise UserError(error.args[0], error.args[1], where=where) from None
    if isinstance(error, RecursionError):
        raise UserError("E-DATA-SYNTAX", "brackets nest too deeply", where=where) from None
    raise UserError("E-DATA-NUMBER", "a number has too many digits", where=where) from None


def _whole_text(value: Any, text: str, where: str) -> Any:
    """Refuses half of a surrogate pair: it cannot be written as UTF-8 nor turned into tokens."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("E-DATA-ENCODING", "half of a surrogate pair (\\ud800 to \\udfff)", where=where) from None
    return value


def _syntax(error: json.JSONDecodeError, where: str, ends_file: bool) -> NoReturn:
    """Says what people usually did when a row is not JSON."""
    text, at = error.doc, error.pos
    rest = text[at:].lstrip()
    broken_off = not rest or error.msg.startswith("Unterminated string")
    what, hint = f"not JSON: {error.msg} (column {error.colno})", "write one JSON object per line"
    if rest.startswith(("//", "/*", "#")):
        column = error.colno + len(text[at:]) - len(rest)
        what, hint = "JSON has no comments", f"delete the comment that starts at column {column}"
    elif rest.startswith("'"):
        hint = "JSON needs double quotes"
    elif error.msg == "Extra data" and "\r" in text:
        what, hint = "1 line with 2 objects; CR line ends", "save the file with LF line ends"
    elif error.msg == "Extra data":
        what, hint = f"1 line with 2 values (the second at column {error.colno})", "write one row per line"
    elif broken_off and ends_file:
        what, hint = "file ends inside a row", "was the copy complete?"
    elif broken_off:
        what, hint = "the line ends inside an object", "write one row per line (or name a JSON array .json)"
    elif "trailing comma" in error.msg or rest.startswith(("}", "]")):
        hint = "delete the comma before the bracket"
    elif "control character" in error.msg:
        hint = 'write it as an escape ("\\t", "\\u0000")'
    raise UserError("E-DATA-SYNTAX", what, where=where, hint=hint) from None


def _json_lines(path: Path, counts: Counts) -> Iterator[tuple[str, Any]]:
    for number, raw in _lines(path):
        if not raw.strip():
            counts.blank += 1
            continue
        where, ends_file = f"{path}:{number}", not raw.endswith(b"\n")
        value = parse(_decode(raw, path, number).strip(), where, ends_file=ends_file)
        if isinstance(value, list):
            hint = "name the file .json, or write one row per line"
            raise UserError("E-DATA-SYNTAX", "a JSON array in a .jsonl file", where=where, hint=hint)
        yield where, value


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, or objects one after another, each with the line that it starts on."""
    if path.stat().st_size > MAX_JSON_BYTES:
        what, hint = f"over {MAX_JSON_BYTES >> 20} MiB of JSON in one piece", "write jsonl: it is read line by line"
        raise UserError("E-DATA-HUGE", what, where=str(path), hint=hint)
    text = "".join(_decode(raw, path, number) for number, raw in _lines(path))
    at, line, counted = _skip(text, 0), 1, 0
    inside = text[at : at + 1] == "["
    at = _skip(text, at + 1) if inside else at
    first = True
    while inside or at < len(text):
        if inside and first and text[at : at + 1] == "]":
            break
        line, counted, first = line + text.count("\n", counted, at), at, False
        where = f"{path}:{line}"
        try:
            value, end = _DECODER.raw_decode(text, at)
            yield where, _whole_text(value, text[at:end], where)
            at = _skip(text, end)
            if inside and text[at : at + 1] == "]":
                break
            if inside and text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _skip(text, at + 1) if inside else at
        except json.JSONDecodeError as error:
            _syntax(error, f"{path}:{error.lineno}", ends_file=True)
        except (_Refused, ValueError, RecursionError) as error:
            _not_a_value(error, where)
    if inside and _skip(text, at + 1) < len(text):
        _syntax(json.JSONDecodeError("Extra data", text, _skip(text, at + 1)), f"{path}:{line}", ends_file=True)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes with the line end) of each line; memory stays within one line."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    what = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
                    raise UserError("E-DATA-HUGE", what, where=f"{path}:{number}", hint="split it into several records")
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    except OSError as error:
        raise UserError("E-DATA-PATH", f"cannot be read: {error.strerror}", where=str(path)) from None


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise UserError("E-DATA-ENCODING", what, where=f"{path}:{number}", hint="save the file as UTF-8") from None


def _check_file(path: Path) -> os.stat_result:
    """A regular file that may be read; asks before opening, because opening a FIFO would wait for ever."""
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


def _check_format(path: Path) -> None:
    """Looks at the name and the first bytes, so that a wrong kind of file is called by its name."""
    _check_file(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[1:2] == b"\0" or head[:1] == b"\0":
        raise UserError("E-DATA-ENCODING", "this is UTF-16", where=str(path), hint="save as UTF-8")
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
    if not kind and path.suffix.lower() not in SUFFIXES:
        kind = f"a file of the kind {path.suffix!r}" if path.suffix else "a file without an ending"
    if not kind and path.suffix.lower() != ".txt":
        first = head.lstrip().partition(b"\n")[0].strip()
        if first.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
            kind = "HTML"
        elif first[:1] not in b"'/#" and _CSV.match(first) and not _is_json(first):
            kind = "CSV"
    if kind:
        hint = "convert it to jsonl (one object per line), .json or .txt"
        raise UserError("E-DATA-FORMAT", f"this is {kind}", where=str(path), hint=hint)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def _empty(path: Path, blank: int) -> NoReturn:
    seen = f" ({blank} blank lines seen)" if blank else ""
    raise UserError("E-DATA-EMPTY", f"no rows{seen}", where=str(path))
