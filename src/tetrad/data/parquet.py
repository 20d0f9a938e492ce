"""Rows of parquet files, read group by group. The only door to pyarrow, which is an extra.

Columns without a value are left out, as a table has no other way to say that a field is missing.
"""

import importlib
from collections.abc import Iterator
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
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except (OSError, ValueError, TypeError, MemoryError, OverflowError) as error:  # pyarrow's errors are among these
        first = str(error).partition("\n")[0]
        raise UserError("E-DATA-FORMAT", f"this is no whole parquet file ({first:.200})", where=str(path)) from None
