"""The only module that writes into run folders: whole folders, whole files, lines of logs, and the lock.

A folder is written beside its place (`.tmp-<name>-<id>`), every file is flushed to the disk, `manifest.json` with the
size and sha256 of each comes last, and one rename puts it all in place: after any kill or power cut there is the
old folder or the new one, never half of one. Reading trusts nothing that the manifest doesn't vouch for, the manifest's
own checksum included. Every system call goes through `disk.calls`, so that tests can fail or kill each of them.
It knows nothing of tensors or of stages, and never opens a link or a path outside the folder it was given.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeAlias

from tetrad import disk
from tetrad.errors import UserError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Content: TypeAlias = bytes | Iterable[bytes | memoryview]

MANIFEST = "manifest.json"
VERSION = 1
_MANIFEST_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")
_STEP = re.compile(r"step-(\d+)")
_NEW_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_HINT = "put back a copy of it, or remove the folder and run the stage again"
_READ_BY_LOADERS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".pkl", ".py")


# Writing


def make_folder(path: Path) -> None:
    """Creates the folder and its parents; each new name is flushed to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with disk.explained(path):
        with suppress(FileExistsError):
            disk.calls.mkdir(path)
        disk.sync_folder(path.parent)


def write_folder(
    path: Path, files: Mapping[str, Content], meta: Mapping[str, Json], unlisted: Mapping[str, Content] | None = None
) -> None:
    """Writes a whole folder, with a manifest {version, files, sha256, **meta}; an existing one is replaced.

    Contents may be iterators of chunks, so that a model is never held twice. unlisted: files for people, which the
    manifest doesn't vouch for, so that each can be rewritten in a finished folder. Raises UserError E-IO-SPACE or
    E-IO-WRITE; then `path` is unchanged. Raises ValueError for a file name that no manifest may hold.
    """
    unlisted = unlisted or {}
    for name in (*files, *unlisted):
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"not a file name for a manifest: {name!r}")
    with _begun_beside(path) as temp:
        disk.calls.mkdir(temp)
        entries = {name: _write_new(temp / name, content) for name, content in files.items()}
        for name, content in unlisted.items():
            _write_new(temp / name, content)
        manifest = _render({**meta, "version": VERSION, "files": entries})
        _write_new(temp / MANIFEST, manifest)
        disk.sync_folder(temp)
        _put_in_place(temp, path)
    if _read_file(path / MANIFEST) != manifest:
        raise UserError("E-IO-WRITE", "the disk gave back other bytes than were written", where=str(path / MANIFEST))


def write_file(path: Path, content: Content, mode: int = 0o666) -> None:
    """Writes one whole file: the old one stays until the new one is on the disk. Raises E-IO-SPACE, E-IO-WRITE."""
    with _begun_beside(path) as temp:
        _write_new(temp, content, mode)
        disk.calls.rename(temp, path)
        disk.sync_folder(path.parent)


@contextmanager
def _begun_beside(path: Path) -> Iterator[Path]:
    """The path of a new file or folder that will replace `path`; after an error what was begun is deleted."""
    make_folder(path.parent)
    temp = _beside(path, "tmp")
    with disk.explained(path):
        try:
            yield temp
        except BaseException:
            _discard(temp)
            raise


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}-{uuid.uuid4().hex[:8]}")


def _put_in_place(temp: Path, path: Path) -> None:
    old = _beside(path, "old") if os.path.lexists(path) else None
    if old:
        disk.calls.rename(path, old)
    try:
        disk.calls.rename(temp, path)
    except BaseException:
        if old:  # if this fails as well, or we are killed here, remove_leftovers puts it back
            disk.calls.rename(old, path)
        raise
    disk.sync_folder(path.parent)
    if old:
        _discard(old)


def _write_new(path: Path, content: Content, mode: int = 0o666) -> dict[str, Json]:
    digest, size = hashlib.sha256(), 0
    descriptor = disk.calls.open(path, _NEW_FLAGS, mode)
    try:
        for chunk in (content,) if isinstance(content, bytes) else content:
            view = memoryview(chunk).cast("B")
            disk.write_all(descriptor, view)
            digest.update(view)
            size += len(view)
        disk.calls.fsync(descriptor)
    finally:
        disk.calls.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


# Removing


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            _delete(entry)
        disk.calls.rmdir(path)
    elif os.path.lexists(path):
        disk.calls.unlink(path)


def _discard(path: Path) -> None:
    """Deletes what is no longer needed; what can't be deleted now is left to remove_leftovers."""
    with suppress(OSError):
        _delete(path)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that it is never seen half deleted under its name. Does nothing if it doesn't exist."""
    if os.path.lexists(path):
        temp = _beside(path, "tmp")
        with disk.explained(path):
            disk.calls.rename(path, temp)
            _delete(temp)


def remove_leftovers(folder: Path) -> list[str]:
    """Clears what a killed writer left in `folder`; call it only with the run's lock held. Returns the names cleared.

    A folder that was moved aside for a new one that never arrived is put back.
    """
    leftovers = sorted(folder.glob(".tmp-*")) + sorted(folder.glob(".old-*")) if folder.is_dir() else []
    for path in leftovers:
        home = path.with_name(path.name[len(".old-") : -len("-12345678")])
        with disk.explained(path):
            if path.name.startswith(".old-") and not os.path.lexists(home):
                disk.calls.rename(path, home)
            else:
                _delete(path)
    return [path.name for path in leftovers]


def move_aside(path: Path, to: Path) -> Path:
    """Renames `path` to `to`, or to `to`-2, -3 ... if that is taken, and returns the new path."""
    make_folder(to.parent)
    numbered = (to.with_name(f"{to.name}-{number}") for number in itertools.count(2))
    target = next(path for path in itertools.chain((to,), numbered) if not os.path.lexists(path))
    with disk.explained(path):
        disk.calls.rename(path, target)
        disk.sync_folder(target.parent)
        disk.sync_folder(path.parent)
    return target


def step_folders(folder: Path) -> dict[int, Path]:
    """The folders `step-<number>` of a folder by ascending step number; clock and file times are ignored."""
    if not folder.is_dir():
        return {}
    matches = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return dict(sorted((int(match[1]), path) for match, path in matches))


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` highest `step-*` folders (at least two)."""
    steps = step_folders(folder)
    for step in list(steps)[: -max(2, keep)]:
        remove_folder(steps[step])


# Reading


def json_of(raw: bytes, parts: int = 300_000) -> Any:
    """The value of JSON from elsewhere. Raises ValueError, also for what would fill the memory: more lists and
    objects than `parts`, or ten times as many values. RecursionError for deep nesting."""
    if raw.count(b"[") + raw.count(b"{") > parts or raw.count(b",") > 10 * parts:
        raise ValueError("it has more parts than any in use")
    return json.loads(raw.decode())


def json_bytes(value: Json) -> bytes:
    """A file of JSON that people can read too. Raises ValueError for a number that is not finite."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder, itself checked; the files it names are not read.

    Raises UserError E-CKPT-{MANIFEST,VERSION,PATH,SIZE}.
    """
    where = str(path / MANIFEST)
    if not os.path.lexists(where):
        raise UserError("E-CKPT-MANIFEST", "has no manifest.json: it is not whole", where=str(path), hint=_HINT)
    raw = _read_file(path / MANIFEST)
    try:
        manifest = json_of(raw)
        version = manifest["version"]
        if version != VERSION:
            what = f"format version {version} can't be read here, only {VERSION}"
            raise UserError("E-CKPT-VERSION", what, where=where, hint="use the release of Tetrad that wrote it")
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        whole = raw == _render(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("E-CKPT-MANIFEST", "this is not a manifest", where=where, hint=_HINT) from error
    for name in files:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise UserError("E-CKPT-PATH", f"the manifest names {name!r:.80}, which is no plain file name", where=where)
    if not whole:
        raise UserError("E-CKPT-MANIFEST", "is damaged: its own checksum differs", where=where, hint=_HINT)
    return dict(manifest)


def metrics_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage measured; an earlier version called it figures."""
    return dict(manifest.get("metrics", manifest.get("figures", {})))


def verify_folder(path: Path) -> dict[str, Any]:
    """Reads every file of a folder and compares it with the manifest. Returns the manifest.

    Raises UserError E-CKPT-{MANIFEST,VERSION,PATH,MISSING,SIZE,HASH}; E-IO-READ if the disk refuses.
    """
    manifest = read_manifest(path)
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():
            raise UserError("E-CKPT-PATH", "is a link; a checkpoint holds files only", where=str(entry))
        if entry.suffix in _READ_BY_LOADERS and entry.name not in {MANIFEST, *manifest["files"]}:
            raise UserError("E-CKPT-MANIFEST", "is not named in the manifest", where=str(entry), hint="remove it")
    for name, entry in manifest["files"].items():
        where = str(path / name)
        if not os.path.lexists(where):
            raise UserError("E-CKPT-MISSING", "is missing", where=where, hint=_HINT)
        size, sha256 = disk.scan(path / name)
        if size != entry["size"]:
            what = f"has {size} bytes, the manifest says {entry['size']}"
            raise UserError("E-CKPT-SIZE", what, where=where, hint=_HINT)
        if sha256 != entry["sha256"]:
            what = f"is damaged: sha256 {sha256}, the manifest says {entry['sha256']}"
            raise UserError("E-CKPT-HASH", what, where=where, hint=_HINT)
    return manifest


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises E-IO-READ."""
    return disk.scan(path)[1]


def digest_of(path: Path) -> str:
    """The same, read once in this process as long as size, inode and both times stay. Raises E-IO-READ, OSError."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _digest(path: Path, *_status: int) -> str:
    return sha256_file(path)


def free_space_check(path: Path, needed_bytes: int) -> None:
    """Raises E-IO-SPACE, with both numbers, if the disk of `path` (which need not exist) has less room than that."""
    free = disk.free_bytes(path)
    if free < needed_bytes:
        what = f"not enough disk space: needs {needed_bytes / 1e6:,.1f} MB, has {free / 1e6:,.1f} MB"
        raise UserError("E-IO-SPACE", what, where=str(path), hint="free some space, or put the runs on a larger disk")


def _read_file(path: Path) -> bytes:
    """A small file as it is; no more than the largest manifest is ever read."""
    if path.is_symlink():
        raise UserError("E-CKPT-PATH", "is a link; a checkpoint holds files only", where=str(path))
    raw = bytearray()
    for chunk in disk.chunks(path):
        raw += chunk
        if len(raw) > _MANIFEST_BYTES:
            raise UserError("E-CKPT-SIZE", f"is larger than any manifest ({_MANIFEST_BYTES} bytes)", where=str(path))
    return bytes(raw)


def _render(manifest: Mapping[str, Json]) -> bytes:
    """The bytes of a manifest: one canonical form, so that a changed bit anywhere shows; `sha256` covers the rest."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, allow_nan=False, indent=1).encode() + b"\n"


# Logs and the lock


class LineLog:
    """An append-only file of JSON lines. A line cut short by a kill is removed when the log is opened again, and kept
    in `torn`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        with disk.explained(path):
            self._descriptor = disk.calls.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._size = os.fstat(self._descriptor).st_size
            raw = path.read_bytes()
        end_of_last_line = raw.rfind(b"\n") + 1
        self.torn = raw[end_of_last_line:]
        if self.torn:
            self.truncate(end_of_last_line)

    def append(self, *records: Mapping[str, Json]) -> None:
        """Adds a line each, in one write; or raises E-NUM-NONFINITE (NaN, infinity), E-IO-SPACE, E-IO-WRITE and adds
        none."""
        try:
            texts = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        except ValueError as error:
            what = f"a number to be logged is not finite: {records!s:.200}"
            raise UserError("E-NUM-NONFINITE", what, where=str(self.path)) from error
        lines = "".join(texts).encode(errors="backslashreplace")
        with disk.explained(self.path):
            try:
                disk.write_all(self._descriptor, memoryview(lines))
            except OSError:
                with suppress(OSError):
                    disk.calls.truncate(self._descriptor, self._size)
                raise
        self._size += len(lines)

    def size(self) -> int:
        """Bytes up to the end of the last line."""
        return self._size

    def truncate(self, size: int) -> None:
        """Cuts the log to `size` bytes. Raises ValueError if it is shorter."""
        if size > self._size:
            raise ValueError(f"{self.path} has {self._size} bytes, not {size}")
        with disk.explained(self.path):
            disk.calls.truncate(self._descriptor, size)
        self._size = size

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        with disk.explained(self.path):
            disk.calls.fsync(self._descriptor)

    def close(self) -> None:
        """What must survive was flushed by `sync`, so a failure here loses nothing."""
        with suppress(OSError):
            disk.calls.close(self._descriptor)


class RunLock:
    """One writer per run folder: a lock on a file, held by the kernel for the process, so it ends with the process.

    `note` says whose lock was taken over if the last holder died without releasing it. Raises E-RUN-LOCKED on entering.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.note = path, ""

    def __enter__(self) -> Self:
        make_folder(self.path.parent)
        with disk.explained(self.path), ExitStack() as stack:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = descriptor = disk.calls.open(self.path, flags, 0o666)
            stack.callback(disk.calls.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "wait for it, stop it, or give this run another name"
                what = f"the run folder is in use by {self._holder(descriptor)}"
                raise UserError("E-RUN-LOCKED", what, where=str(self.path.parent), hint=hint) from error
            if before := os.pread(descriptor, 1000, 0).decode(errors="replace"):
                self.note = f"took over the lock of {before.strip()}, which ended without leaving it"
            holder = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            disk.calls.truncate(descriptor, 0)
            disk.write_all(descriptor, memoryview(holder.encode()))
            stack.pop_all()
        return self

    @staticmethod
    def _holder(descriptor: int) -> str:
        for _ in range(100):  # the holder writes its name right after it has the lock
            if text := os.pread(descriptor, 1000, 0).decode(errors="replace").strip():
                return text
            time.sleep(0.01)
        return "another process"

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            disk.calls.truncate(self._descriptor, 0)
        with suppress(OSError):
            disk.calls.close(self._descriptor)
