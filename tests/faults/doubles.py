"""Stand-ins for `disk.calls`: one counts and fails, cuts short or kills call k; one also loses what was not flushed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tetrad import disk

REAL = disk.Calls()
NAMES = ("open", "read", "write", "fsync", "truncate", "close", "mkdir", "rename", "unlink", "rmdir", "free_bytes")
FAULTS = ("ENOSPC", "EIO", "EACCES", "short")


@contextmanager
def using(calls: Any) -> Iterator[None]:
    disk.calls = calls
    try:
        yield
    finally:
        disk.calls = REAL


class Counting:
    """Counts calls and does them; nothing waits for the real disk, whose loss `PowerCut` plays instead."""

    def __init__(self) -> None:
        self.count = 0
        self.trace: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in NAMES:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.count += 1
            self.trace.append(name)
            return self.on_call(name, *arguments)

        return call

    def on_call(self, name: str, *arguments: Any) -> Any:
        return None if name == "fsync" else getattr(REAL, name)(*arguments)


class Failing(Counting):
    """Call k fails with an errno, or writes half; with `for_good`, every later call that needs the disk fails too."""

    def __init__(self, k: int, fault: str, for_good: bool = False) -> None:
        super().__init__()
        self.k, self.fault, self.for_good = k, fault, for_good

    def on_call(self, name: str, *arguments: Any) -> Any:
        hit = self.count == self.k or (self.for_good and self.count > self.k)
        if hit and self.fault == "short" and name == "write":
            return REAL.write(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
        if hit and self.fault != "short":
            if name == "close":
                REAL.close(*arguments)  # Linux frees the descriptor whatever close answers
            raise OSError(getattr(errno, self.fault), self.fault)
        return super().on_call(name, *arguments)


class Killing(Counting):
    """The process is gone at call k, after half of the bytes if it is a write."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def on_call(self, name: str, *arguments: Any) -> Any:
        if self.count == self.k:
            if name == "write":
                REAL.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(9)
        return super().on_call(name, *arguments)


class PowerCutError(BaseException):
    """The machine is off."""


class PowerCut(Counting):
    """At call k the power goes: `settle` then takes back what no fsync had made safe.

    lose: "data" cuts files back to what was flushed but keeps all names; "names" takes back each change of a name that
    no fsync of its folder followed, newest first; "both" does both.
    """

    def __init__(self, k: int, lose: str, folder: Path, grave: Path) -> None:
        super().__init__()
        self.k, self.lose, self.folder, self.grave = k, lose, folder, grave
        self.files: dict[int, Path] = {}
        self.flushed: dict[int, int] = {}  # inode -> bytes that are safe
        self.undo: list[tuple[Path, Callable[[], None]]] = []

    def on_call(self, name: str, *arguments: Any) -> Any:
        if self.count >= self.k:
            raise PowerCutError
        own = getattr(self, f"_{name}", None)
        return own(*arguments) if own else getattr(REAL, name)(*arguments)

    def _open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        new = bool(flags & os.O_CREAT) and not path.exists()
        descriptor = REAL.open(path, flags, mode)
        self.files[descriptor] = Path(path)
        if new:
            inode = os.fstat(descriptor).st_ino
            self.flushed[inode] = 0
            self.undo.append((path.parent, lambda: self._forget(inode)))
        return descriptor

    def _forget(self, inode: int) -> None:
        """A file may have got another name since, or its folder another."""
        for path in self.folder.rglob("*"):
            if path.lstat().st_ino == inode:
                path.unlink()

    def _close(self, descriptor: int) -> None:
        del self.files[descriptor]
        REAL.close(descriptor)

    def _fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = self.files[descriptor]
        if path.is_dir():
            self.undo = [(parent, undo) for parent, undo in self.undo if parent != path]
        else:
            self.flushed[status.st_ino] = status.st_size

    def _mkdir(self, path: Path) -> None:
        REAL.mkdir(path)
        self.undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def _rename(self, old: Path, new: Path) -> None:
        if new.is_file():
            self._unlink(new)
        REAL.rename(old, new)
        self.undo.append((new.parent, lambda: os.rename(new, old)))

    def _unlink(self, path: Path) -> None:
        self._bury(path)

    def _rmdir(self, path: Path) -> None:
        assert not any(path.iterdir())
        self._bury(path)

    def _bury(self, path: Path) -> None:
        tomb = self.grave / str(len(list(self.grave.iterdir())))
        os.rename(path, tomb)
        self.undo.append((path.parent, lambda: os.rename(tomb, path)))

    def settle(self) -> None:
        for descriptor in self.files:
            os.close(descriptor)
        if self.lose in ("names", "both"):
            for _, undo in reversed(self.undo):
                with suppress(FileNotFoundError):  # its folder itself was taken back
                    undo()
        if self.lose in ("data", "both"):
            for path in self.folder.rglob("*"):
                if path.is_file() and path.stat().st_size > self.flushed.get(path.stat().st_ino, 1 << 60):
                    os.truncate(path, self.flushed[path.stat().st_ino])
