"""The few system calls on files that storage uses, in one swappable object, and the errors for their failures.

Tests put another object in `disk.calls` to fail, cut short or kill any one of them. An OSError becomes a UserError:
E-IO-SPACE for a full disk, else E-IO-WRITE or E-IO-READ. Nothing outside `storage` uses this module to write.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tetrad.errors import UserError

_CHUNK = 1 << 20


class Calls:
    """The system calls in use; a test puts another object in `disk.calls`."""

    open = staticmethod(os.open)
    read = staticmethod(os.read)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    truncate = staticmethod(os.ftruncate)
    close = staticmethod(os.close)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)

    @staticmethod
    def free_bytes(path: Path) -> int:
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize


calls = Calls()


@contextmanager
def explained(path: Path, code: str = "E-IO-WRITE") -> Iterator[None]:
    """Turns an OSError into a UserError with this code, or E-IO-SPACE for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run the same command again; what was saved before is untouched"
            raise UserError("E-IO-SPACE", "the disk is full", where=str(path), hint=hint) from error
        verb = "read" if code == "E-IO-READ" else "written"
        hint = "check the disk and who may write there, then run the same command again"
        raise UserError(code, f"can't be {verb}: {error.strerror or error}", where=str(path), hint=hint) from error


def write_all(descriptor: int, view: memoryview) -> None:
    """Writes all of it, in as many calls as the system needs."""
    while len(view):
        written = calls.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        view = view[written:]


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = calls.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        calls.close(descriptor)


def sync_folder(path: Path) -> None:
    """Returns when the folder's names (not its files' contents) are on the disk."""
    with _opened(path, os.O_DIRECTORY) as descriptor:
        calls.fsync(descriptor)


def chunks(path: Path) -> Iterator[bytes]:
    """A file piece by piece. Raises E-IO-READ; E-CKPT-PATH for what is not a plain file."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a link is refused, a pipe doesn't hang
    with explained(path, "E-IO-READ"), _opened(path, flags) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError("E-CKPT-PATH", "is not a plain file", where=str(path))
        while chunk := calls.read(descriptor, _CHUNK):
            yield chunk


def start_of(path: Path, limit: int) -> tuple[int, bytes]:
    """The size of a plain file and its first bytes, at most `limit`; a link is followed. Raises OSError.

    For files from elsewhere, which may be anything: a pipe or device is refused and never waited for.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "embedded null byte")
    with _opened(path, os.O_NONBLOCK) as descriptor:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a plain file")
        raw = bytearray()
        while len(raw) < limit and (chunk := calls.read(descriptor, min(_CHUNK, limit - len(raw)))):
            raw += chunk
        return status.st_size, bytes(raw)


def scan(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written to the disk of `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    with explained(place, "E-IO-READ"):
        return calls.free_bytes(place)
