"""What a file is by its opening bytes, whatever its name says: what is plainly something else is called by its name,
with the way to make records of it. One table for every command that reads data."""

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
_TEXT = "records are text: copy what it says into a jsonl or txt file"
_SIGNS: tuple[tuple[int, bytes, str, str], ...] = (  # where the sign stands, the sign, what has it, what to do
    (0, b"version https://git-lfs", "a pointer of git-lfs, not the file itself", "fetch the file: git lfs pull"),
    (0, b"PAR1", "parquet", "give it its own ending, .parquet"),
    (0, b"\x1f\x8b", "gzip", "name it {name}.gz"),
    (0, b"PK\x03\x04\x14\x00\x06\x00", "an Excel sheet (.xlsx)", _SHEET),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel sheet or Word text (.xls, .doc)", _SHEET),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstandard", _UNPACK),
    (0, b"BZh", "bzip2", _UNPACK),
    (0, b"\xfd7zXZ", "xz", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"ARROW1", "Arrow or Feather", "write it as parquet, which is read"),
    (0, b"FEA1", "Feather", "write it as parquet, which is read"),
    (0, b"\xff\xff\xff\xff", "a stream of Arrow", "write it as parquet: Dataset.to_parquet(FILE) of datasets"),
    (0, b"SQLite format 3\0", "an SQLite database", _EXPORT),
    (0, b"\x89HDF", "HDF5", _EXPORT),
    (0, b"\x93NUMPY", "an array of numpy", _EXPORT),
    (0, b"GGUF", "a model file (gguf)", _MODEL),
    (8, b'{"', "a model file (safetensors)", _MODEL),
    (0, b"%PDF", "PDF", _TEXT),
    (0, b"\x89PNG", "a PNG picture", _TEXT),
    (0, b"\xff\xd8\xff", "a JPEG picture", _TEXT),
    (0, b"GIF8", "a GIF picture", _TEXT),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\s{]")
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head")
_CSV = re.compile(rb'^[^{}\[\]]*[\w"][,\t][\w"][^{}\[\]]*$')


def check_format(path: Path) -> None:
    """Refuses what is plainly another kind of file than its name says. Errors: E-DATA-*."""
    check_file(path)
    head = _head(path)
    what, hint = _signed(head)
    if what == "parquet" and kind(path) == ".parquet":
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
    """What has this opening, and what to do; nothing where it may be text."""
    for at, sign, what, hint in _SIGNS:
        if head.startswith(sign, at) and (at != 8 or head[3:8] == bytes(5)):  # safetensors: a length before the JSON
            return what, hint
    return ("a pickle of Python, which is never read", _EXPORT) if _PICKLE.match(head) else ("", "")


def _other_text(path: Path, head: bytes) -> tuple[str, str]:
    """What a text is that should hold records of another kind; nothing where it may hold them."""
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
    """The first bytes of a file, of a gzip file those inside."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        _no_gzip(path, error)
    except OSError as error:
        raise UserError("E-DATA-PATH", f"cannot be read: {error.strerror}", where=str(path)) from None


def _no_gzip(path: Path, error: Exception) -> NoReturn:
    """A name that ends in .gz: what the bytes are instead, or that they are damaged."""
    with path.open("rb") as file:
        what, hint = _signed(file.read(_HEAD_BYTES))
    if what and what != "gzip":
        raise UserError("E-DATA-FORMAT", f"this is {what}", where=str(path), hint=hint) from None
    raise UserError("E-DATA-FORMAT", f"this is no gzip file ({error})", where=str(path), hint=hint) from None
