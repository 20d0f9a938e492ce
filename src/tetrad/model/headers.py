"""The headers of safetensors files, read without torch: what a file holds, before any of it is loaded.

A header is trusted only if it is complete: no duplicate names, known types, and tensors that cover the whole file one
after another, each as long as its shape says (https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tetrad import disk
from tetrad.errors import UserError

HEADER_BYTES = 2 << 20
"""The largest header: it would name fifteen thousand tensors, far more than a decoder and its optimizer have."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LARGEST = 2**48
_CHUNK = 1 << 20


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
        size, start = disk.start_of(path, 8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        raw = disk.start_of(path, 8 + length)[1][8:]
        header = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_no_number)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        json.dumps(header, ensure_ascii=False).encode()  # halves of surrogate pairs raise UnicodeEncodeError
        _metadata(header.pop("__metadata__", {}))
        entries = {name: _entry(name, value) for name, value in header.items()}
        _refuse_gaps(entries, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise not_safetensors(path, error) from error
    return entries


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


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata are no texts")


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name:.80} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{name:.80} has the unknown dtype {dtype!s:.20}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise ValueError(f"{name:.80} has an impossible shape or place")
    entry = Entry(dtype, tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"{name:.80} has another number of bytes than its shape says")
    return entry


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in value)


def _refuse_gaps(entries: Mapping[str, Entry], size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise ValueError(f"{name:.80} overlaps another tensor, or leaves a hole before it")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file {size}")
