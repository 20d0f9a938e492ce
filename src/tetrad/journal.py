"""What must survive a power cut line by line: an append-only file of records, and a secret that stays the same."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tetrad import disk
from tetrad.errors import UserError
from tetrad.storage import Json, LineLog, json_of, write_file


class Journal(LineLog):
    """A log of which nothing is lost once `commit` has returned, its own name included.

    A last line that a kill has cut short is removed; a whole one that only lacks its end, as editors leave it, stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._failed = False
        with disk.explained(path):
            disk.sync_folder(path.parent)
        with suppress(ValueError, RecursionError):
            if isinstance(record := json_of(self.torn), dict):
                self.commit(record)

    def commit(self, *records: Mapping[str, Json]) -> None:
        """Adds these lines and returns when they are on the disk, or raises as `append` does and adds none."""
        before = self.size()
        if self._failed:
            self.truncate(before)
        self._failed = True
        try:
            self.append(*records)
            self.sync()
        except BaseException:
            self._size = before
            with suppress(UserError):  # else the next commit cuts what is left of this one
                self.truncate(before)
            raise
        self._failed = False


def secret(path: Path) -> bytes:
    """32 random bytes of a file that its owner alone can read; it is made where it is missing.

    Raises E-IO-READ for another file, or one that others can read; E-IO-WRITE, E-IO-SPACE.
    """
    if not os.path.lexists(path):
        write_file(path, secrets.token_bytes(32), 0o600)
    raw = b"".join(disk.chunks(path))
    if len(raw) != 32 or path.stat().st_mode & 0o077:
        what = "is not a secret of 32 bytes that its owner alone can read"
        raise UserError("E-IO-READ", what, where=str(path), hint="remove it: a new one is made, and old links end")
    return raw
