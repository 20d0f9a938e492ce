"""Rows of parquet files, read group by group. The only user of pyarrow, an optional dependency.

Parquet holds what JSON can't: times, decimals, bytes, non-finite numbers. Such a value is never an error in a
field that is not read; `plain` converts it to text or null where a row is written.
"""

import datetime
import importlib
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tetrad.errors import UserError

_BATCH_ROWS = 1024


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Each row as a dictionary. Errors: E-DATA-FORMAT (damaged, or pyarrow is missing)."""
    try:
        reader: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        hint = "pip install pyarrow, or convert it to jsonl"
        raise UserError(
            "E-DATA-FORMAT", "parquet is read by pyarrow, which is missing", where=str(path), hint=hint
        ) from None
    try:
        with reader.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                names, columns = batch.schema.names, [_values(column) for column in batch.columns]
                yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    except (OSError, ValueError, TypeError, MemoryError, OverflowError) as error:  # pyarrow's errors are among these
        first = str(error).partition("\n")[0]
        raise UserError("E-DATA-FORMAT", f"this is no whole parquet file ({first:.200})", where=str(path)) from None


def _values(column: Any) -> list[Any]:
    """A column as Python values; those that Python can't represent, for example a time in the year 20,000, as text."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raise  # damaged text
    except (ValueError, OverflowError, LookupError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    for read in (scalar.as_py, lambda: scalar.cast("string").as_py()):
        with suppress(ValueError, OverflowError, LookupError, NotImplementedError):
            return read()
    return f"<{scalar.type}>"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: times, decimals, bytes and anything else foreign to it as text, NaN and infinity as
    null."""
    match value:
        case dict():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bool() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else None
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes():
            return value.decode(errors="backslashreplace")
    return str(value).encode(errors="backslashreplace").decode()
