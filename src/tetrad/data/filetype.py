"""Detects a file's format from its first bytes, whatever its name: a file that is plainly something else is reported
as such, with a way to turn it into records. One table for every command that reads data."""

import gzip
import json
import re
import shlex
import zlib
from pathlib import Path
from typing import NoReturn

from tetrad.data.source import SUFFIXES, check_file, kind
from tetrad.errors import UserError

_HEAD_BYTES = 4096
_UNPACK = "unpack it and name the files inside"
_SHEET = "in the spreadsheet: save as CSV UTF-8 (comma delimited), and name that file"
_EXPORT = "export its rows as jsonl, one JSON object a line"
_MODEL = "this belongs to a model; name the files of records"
_ARROW = "write it as parquet, which is read, for example with Dataset.to_parquet(FILE) of datasets"
_PARQUET, _GZIP = "parquet", "gzip"
_TEXT = "records are text: copy what it says into a jsonl or txt file"
_OFFICE = rb"PK\x03\x04.*?(\[Content_Types\]|docProps/|xl/|word/)"
_PACKED = rb"\x28\xb5\x2f\xfd|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!\x1a"
_SIGNS = (  # first bytes, what the file is, what to do
    (rb"version https://git-lfs", "a pointer of git-lfs, not the file itself", "fetch the file: git lfs pull"),
    (rb"PAR1", _PARQUET, "give it its own ending, .parquet"),
    (rb"\x1f\x8b", _GZIP, "name it {name}.gz"),
    (_OFFICE, "an Excel sheet or Word text (.xlsx, .docx)", _SHEET),
    (rb"\xd0\xcf\x11\xe0", "an old Excel sheet or Word text (.xls, .doc)", _SHEET),
    (rb"PK[\x03\x05][\x04\x06]", "a zip archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (_PACKED, "compressed (zstandard, bzip2, xz, 7z or RAR)", _UNPACK),
    (rb"ARROW1|FEA1", "Arrow or Feather", _ARROW),
    (rb"\xff{4}.{3}\0", "a stream of Arrow", _ARROW),
    (rb"SQLite format 3\0", "an SQLite database", _EXPORT),
    (rb"\x89HDF|\x93NUMPY", "an array (HDF5 or numpy)", _EXPORT),
    (rb"\x80[\x02-\x05][^\s{]", "a pickle of Python, which is never read", _EXPORT),
    (rb"GGUF|.{3}\0{5}\{", "a model file (safetensors or gguf)", _MODEL),
    (rb"%PDF", "PDF", _TEXT),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture (PNG, JPEG or GIF)", _TEXT),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")
_CSV = re.compile(rb'^[^{}\[\]]*[\w"][,\t][\w"][^{}\[\]]*$')


def check_format(path: Path) -> None:
    """Refuses a file whose content plainly does not match its name. Errors: E-DATA-*."""
    check_file(path)
    head = _head(path)
    what, hint = _signed(head)
    if what == _PARQUET and kind(path) == ".parquet":
        return
    if not what and (head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[1:2] == b"\0" or head[:1] == b"\0"):
        name = shlex.quote(str(path))
        hint = f"save as UTF-8: iconv -f UTF-16 -t UTF-8 {name} > {shlex.quote(path.stem)}.utf8{path.suffix}"
        raise UserError("E-DATA-ENCODING", "this is UTF-16", where=str(path), hint=hint)
    if not what and kind(path) not in SUFFIXES:
        what = f"a file of the kind {path.suffix!r}" if path.suffix else "a file without an ending"
        hint = f"give it its own ending ({' '.join(SUFFIXES)})"
    if not what and kind(path) != ".txt":
        what, hint = _other_text(path, head)
    if what:
        raise UserError("E-DATA-FORMAT", f"this is {what}", where=str(path), hint=hint.replace("{name}", path.name))


def _signed(head: bytes) -> tuple[str, str]:
    """The format with these first bytes, and what to do; empty where it may be text."""
    return next(((what, hint) for sign, what, hint in _SIGNS if re.match(sign, head, re.DOTALL)), ("", ""))


def _other_text(path: Path, head: bytes) -> tuple[str, str]:
    """The format of a text file whose name promises another one; empty where the name may be right."""
    first = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0].strip()
    if first.lower().startswith(_MARKUP):
        return "HTML", "this is a page of the web, perhaps of an error: download the file itself"
    if kind(path) == ".parquet":
        return "not parquet", "name it .jsonl if it is JSON, or was the copy complete?"
    if kind(path) in (".csv", ".tsv"):
        return ("JSON", "name it .jsonl") if first.startswith(b"{") and _is_json(first) else ("", "")
    is_table = first[:1] not in b"'/#" and _CSV.match(first) and not _is_json(first)
    return ("CSV", "name it .csv, or .tsv where tabs separate the cells") if is_table else ("", "")


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _head(path: Path) -> bytes:
    """The first bytes of a file; of a gzip file, those of its content."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        _no_gzip(path, error)
    except OSError as error:
        raise UserError("E-DATA-PATH", f"cannot be read: {error.strerror}", where=str(path)) from None


def _no_gzip(path: Path, error: Exception) -> NoReturn:
    """For a name that ends in .gz: reports what the bytes are instead, or that they are damaged."""
    with path.open("rb") as file:
        what, hint = _signed(file.read(_HEAD_BYTES))
    if what not in ("", _GZIP):
        raise UserError("E-DATA-FORMAT", f"this is {what}", where=str(path), hint=hint) from None
    hint = "was the copy complete?" if what else "name it without .gz, if it is not compressed"
    raise UserError("E-DATA-FORMAT", f"this is no gzip file ({error})", where=str(path), hint=hint) from None
