"""Rows of files: jsonl (an object per line), json (an array, or objects), csv and tsv, parquet; and paragraphs of txt.

A row is parsed on request, so that a reader may continue after a bad one. JSON is read strictly: no duplicate
keys, no NaN, no comments. Lines end at LF or CRLF only, so that U+2028 and the like stay inside their text; those of a
table may be CR too, and inside its cells all of them are read as LF.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from tetrad.data import parquet
from tetrad.data.filetype import check_format
from tetrad.data.source import MAX_LINE_BYTES, Counts, Span, decode, empty, kind, lines
from tetrad.errors import UserError

MAX_JSON_BYTES = 512 << 20  # a .json file is read as a whole
_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_CELLS = ("messages", "conversations", "choices", "history", "votes")
_NUMBER_CELLS = ("score", "margin", "rank", "spread")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(slots=True)
class Row:
    """One row. raw: its bytes as in the file, or empty; then `value` is the parsed value, or the error."""

    where: str
    raw: bytes = b""
    value: Any = None

    def read(self) -> Any:
        """The row's JSON value. Errors: E-DATA-*."""
        if isinstance(self.value, UserError):
            raise self.value
        if not self.raw:
            return self.value
        text = decode(self.raw, self.where).strip()
        value = parse(text, self.where, ends_file=not self.raw.endswith(b"\n"))
        if isinstance(value, list):
            hint = "name the file .json, or write one row per line"
            raise UserError("E-DATA-SYNTAX", "a JSON array in a .jsonl file", where=self.where, hint=hint)
        return value

    def text(self) -> str:
        """The row as a line of JSON, or verbatim where it is not JSON."""
        if self.raw:
            return self.raw.decode(errors="backslashreplace").rstrip("\r\n")
        return "" if isinstance(self.value, UserError) else json.dumps(self.value, ensure_ascii=False, default=str)


def rows(part: Path | Span, counts: Counts, rename: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a file or of a part of one. rename: aliases of a table's columns, which decide what cells are numbers
    or JSON. Errors: E-DATA-* of the file as a whole; those of a row come from `Row.read`."""
    span = part if isinstance(part, Span) else Span(part)
    path, suffix = span.path, kind(span.path)
    check_format(path)
    if suffix == ".txt":
        raise UserError("E-DATA-FORMAT", "a txt file holds documents, not records", where=str(path), hint="use jsonl")
    before, blank = counts.read, counts.blank
    match suffix:
        case ".json":
            stream = _json_values(path)
        case ".csv" | ".tsv":
            stream = _table_rows(path, "\t" if suffix == ".tsv" else ",", counts, rename or {})
        case ".parquet":
            stream = (Row(f"{path}:{n}", value=value) for n, value in enumerate(parquet.rows(path), 1))
        case _:
            stream = _json_lines(span, counts)
    for row in stream:
        counts.read += 1
        yield row
    if counts.read == before and not span.start:
        empty(path, counts.blank - blank)


def paragraphs(part: Path | Span, counts: Counts) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each paragraph of a txt file: lines up to a blank one, joined by LF."""
    span = part if isinstance(part, Span) else Span(part)
    path = span.path
    check_format(path)
    texts = ((number, _lf(decode(raw, f"{path}:{number}").rstrip("\r\n"))) for number, raw in lines(span))
    numbered = ((number, line) for number, text in texts for line in text.split("\n"))
    before, blank = counts.read, 0
    for is_text, group in groupby(numbered, lambda pair: bool(pair[1].strip())):
        if is_text:
            numbers, paragraph = zip(*group, strict=True)
            counts.read += 1
            yield f"{path}:{numbers[0]}", "\n".join(paragraph)
        else:
            blank += sum(1 for _ in group)
    if counts.read == before and not span.start:
        empty(path, blank)


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str, where: str, *, ends_file: bool = False) -> Any:
    """Parses one JSON value without surrounding space, strictly.

    No duplicate keys, NaN, lone surrogates, comments or raw control characters.

    ends_file: no newline follows, so that a truncated row can be distinguished from a pretty-printed one.
    """
    try:
        value, end = _DECODER.raw_decode(text)  # half the time of decode
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, _skip(text, end))
    except json.JSONDecodeError as error:
        _syntax(error, where, ends_file)
    except (ValueError, RecursionError) as error:
        _not_a_value(error, where)
    return _whole_text(value, text, where)


class _Refused(ValueError):
    """A JSON value that is legal for Python's parser but not here: (code, what)."""


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
    """Refuses half of a surrogate pair: it can be neither written as UTF-8 nor tokenized."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("E-DATA-ENCODING", "half of a surrogate pair (\\ud800 to \\udfff)", where=where) from None
    return value


def _syntax(error: json.JSONDecodeError, where: str, ends_file: bool) -> NoReturn:
    """Reports the usual mistake behind a row that is not JSON."""
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


def _json_lines(span: Span, counts: Counts) -> Iterator[Row]:
    place = f"{span.path}:"
    for number, raw in lines(span):
        if not raw.isspace():
            yield Row(f"{place}{number}", raw)
        else:
            counts.blank += 1


def _json_values(path: Path) -> Iterator[Row]:
    """The elements of an array, or objects one after another, each with the line that it starts on."""
    if path.stat().st_size > MAX_JSON_BYTES:
        what, hint = f"over {MAX_JSON_BYTES >> 20} MiB of JSON in one piece", "write jsonl: it is read line by line"
        raise UserError("E-DATA-HUGE", what, where=str(path), hint=hint)
    text = "".join(decode(raw, f"{path}:{number}") for number, raw in lines(Span(path)))
    at, line, counted = _skip(text, 0), 1, 0
    inside = text.startswith("[", at)
    at = _skip(text, at + 1) if inside else at
    closed = text.startswith("]", at)
    while at < len(text) if not inside else not closed:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, end = _DECODER.raw_decode(text, at)
            yield Row(where, value=_whole_text(value, text[at:end], where))
            at = _skip(text, end)
            closed = text.startswith("]", at)
            if inside and not closed:
                if not text.startswith(",", at):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                at = _skip(text, at + 1)
        except json.JSONDecodeError as error:
            _syntax(error, f"{path}:{error.lineno}", ends_file=True)
        except (_Refused, ValueError, RecursionError) as error:
            _not_a_value(error, where)
    if inside and _skip(text, at + 1) < len(text):
        _syntax(json.JSONDecodeError("Extra data", text, _skip(text, at + 1)), f"{path}:{line}", ends_file=True)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _table_rows(path: Path, separator: str, counts: Counts, rename: Mapping[str, str]) -> Iterator[Row]:
    """Rows of csv or tsv below their header line; empty cells are null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_table_lines(path), delimiter=separator, strict=True)
    names: list[str] = []
    meant: list[str] = []
    before = 0
    try:
        for cells in reader:
            where, before = f"{path}:{before + 1}", reader.line_num
            if not "".join(cells).strip():
                counts.blank += 1
            elif not names:
                names = _column_names(cells, where)
                meant = [rename.get(name.lower(), name.lower()) for name in names]
            else:
                yield _table_row(names, meant, cells, where)
    except csv.Error as error:
        hint = "put quotes around a text with line ends, and write a quote inside it twice"
        what = f"not a table: {error} (in the row that starts here)"
        raise UserError("E-DATA-SYNTAX", what, where=f"{path}:{before + 1}", hint=hint) from None


def _table_lines(path: Path) -> Iterator[str]:
    """The lines of a table, all ending in LF: the line ends inside a cell differ by system only."""
    for number, raw in lines(Span(path)):
        text = _lf(decode(raw, f"{path}:{number}")).removesuffix("\n")
        yield from (line + "\n" for line in text.split("\n"))


def _column_names(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    other = next((c for c in (";", "\t", ",", "|") if len(names) == 1 and c in names[0]), "")
    if other:
        what = f"the columns seem to be separated by {other!r}"
        raise UserError("E-DATA-FORMAT", what, where=where, hint="save .csv with commas, .tsv with tabs")
    folded = [name.lower() for name in names]
    twice = next((name for name in folded if folded.count(name) > 1), None)
    if twice is not None:
        raise UserError("E-DATA-DUPKEY", f'the column "{twice}" stands twice', where=where)
    return names


def _table_row(names: list[str], meant: list[str], cells: list[str], where: str) -> Row:
    try:
        if len(cells) != len(names):
            hint = "put quotes around a cell that holds the separator"
            what = f"{len(cells)} cells where the first line names {len(names)} columns"
            raise UserError("E-DATA-SYNTAX", what, where=where, hint=hint)
        values = [_cell(name, cell, where) if cell else None for name, cell in zip(meant, cells, strict=True)]
    except UserError as error:
        return Row(where, value=error)
    return Row(where, value=dict(zip(names, values, strict=True)))


def _cell(name: str, text: str, where: str) -> Any:
    if name in _JSON_CELLS:
        return parse(text, where)
    plain = text.strip()
    number = name in _NUMBER_CELLS and len(plain) < 400 and _NUMBER.fullmatch(plain)
    return float(plain) if number else text
