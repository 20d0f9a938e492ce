"""The headers of safetensors files, read without torch: what a file holds, before any of it is loaded.

The library refuses what isn't whole: unknown types, holes, overlaps, tensors that don't end where the file does. Also
refused are repeated names, of which it takes the last, and dtypes that torch has no use for here.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tetrad import disk
from tetrad.errors import UserError

HEADER_BYTES = 2 << 20
"""The largest header: it would name fifteen thousand tensors, far more than a decoder and its optimizer have."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_CHUNK, _MOST_DIMENSIONS = 1 << 20, 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its type as safetensors names it, its shape, and where its bytes begin after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Raises UserError E-CKPT-FORMAT, with the file."""
    try:
        size, start = disk.start_of(path, 8)  # refuses pipes and devices
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        raw = disk.start_of(path, 8 + length)[1][8:]
        with safe_open(path, framework="np"):
            header = json.loads(raw, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        return {name: _entry(name, value) for name, value in header.items()}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise not_safetensors(path, error) from error


def same_numbers(first: tuple[Path, Entry], second: tuple[Path, Entry]) -> bool:
    """Whether two tensors have the same type, shape and bytes; each with its safetensors file, whose header has been
    read."""
    if first[1].dtype != second[1].dtype or first[1].shape != second[1].shape:
        return False
    with first[0].open("rb") as one, second[0].open("rb") as other:
        for file, (_, entry) in ((one, first), (other, second)):
            file.seek(8 + int.from_bytes(file.read(8), "little") + entry.start)
        left = first[1].nbytes
        while left:
            size = min(left, _CHUNK)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def not_safetensors(path: Path, error: Exception) -> UserError:
    """The error for a file that is not safetensors."""
    text = getattr(error, "strerror", None) or str(error)
    what = f"is not a whole safetensors file ({text!s:.200})"
    return UserError("E-CKPT-FORMAT", what, where=str(path), hint="get the file again; pickles are never read")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return unique


def _entry(name: str, value: dict[str, Any]) -> Entry:
    entry = Entry(value["dtype"], tuple(value["shape"]), value["data_offsets"][0])
    if entry.dtype not in BYTES or len(entry.shape) > _MOST_DIMENSIONS or len(value) > 3:
        raise ValueError(f"{name:.80} has an unknown dtype, more than {_MOST_DIMENSIONS} dimensions, or unknown fields")
    return entry
