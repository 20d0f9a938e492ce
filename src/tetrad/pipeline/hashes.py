"""sha256 of files, cached by path, size, inode, mtime and ctime, so that a large file is read once.

mtime can be set by anyone (touch, rsync, a restored backup); ctime is the system's own.
"""

import json
import time
from pathlib import Path

from tetrad import storage
from tetrad.console import phase

_SETTLED_SECONDS = 2.0  # a younger file may change again within one tick of the file system's clock


class Hashes:
    """A cache in one file; one that can't be read counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            known = {}
        self._known: dict[str, list[str]] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """The sha256 of a file's content. Raises UserError E-IO-READ."""
        status = path.stat()
        name = str(path.resolve())
        seen = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 2 and known[0] == seen:
            return str(known[1])
        with phase(f"hashing {path.name}"):
            digest = storage.digest_of(Path(name))
        if min(abs(time.time() - changed) for changed in (status.st_mtime, status.st_ctime)) > _SETTLED_SECONDS:
            self._known[name] = [seen, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes the cache, if there is anything new."""
        if self._changed:
            storage.write_file(self._path, json.dumps(self._known).encode())
            self._changed = False
