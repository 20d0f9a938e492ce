"""Remembered hashes: right after every change, and quick after none."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrad import storage
from tetrad.pipeline.hashes import Hashes


def settle(path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 1e9) -> None:
    """Sets the time that can be set, and lets the other one grow old."""
    os.utime(path, (seconds, seconds))
    later = path.stat().st_ctime + 60
    monkeypatch.setattr("tetrad.pipeline.hashes.time.time", lambda: later)


def test_remembered_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "a", tmp_path / "cache" / "hashes.json"
    path.write_bytes(b"one")
    settle(path, monkeypatch)
    hashes = Hashes(memory)
    assert hashes.of(path) == hashlib.sha256(b"one").hexdigest()
    hashes.save()
    reads: list[Path] = []
    real = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: (reads.append(path), real(path))[1])
    assert Hashes(memory).of(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == []
    path.write_bytes(b"two")
    settle(path, monkeypatch, 1e9 + 1)
    assert Hashes(memory).of(path) == hashlib.sha256(b"two").hexdigest()


def edit(path: Path) -> None:
    """In place, as `rsync --inplace --times` does."""
    with path.open("r+b") as file:
        file.write(b"two")


def restore(path: Path) -> None:
    """A backup of the same size, with its old time, is put over the file."""
    backup = path.with_name("backup")
    backup.write_bytes(b"two")
    os.utime(backup, (1e9, 1e9))
    backup.replace(path)


def link(path: Path) -> None:
    """The file is changed under another name of it."""
    path.with_name("other").hardlink_to(path)
    edit(path.with_name("other"))


def swap(path: Path) -> None:
    """The name becomes a link to another file."""
    other = path.with_name("other")
    other.write_bytes(b"two")
    os.utime(other, (1e9, 1e9))
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [edit, restore, link, swap])
def test_a_change_of_the_same_size_and_time_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    path, hashes = tmp_path / "a", Hashes(tmp_path / "hashes.json")
    path.write_bytes(b"one")
    settle(path, monkeypatch)
    assert hashes.of(path) == hashlib.sha256(b"one").hexdigest()
    time.sleep(0.02)  # a tick of the file system's clock
    change(path)
    os.utime(path, (1e9, 1e9))
    assert hashes.of(path) == hashlib.sha256(b"two").hexdigest()


def test_a_file_with_an_old_time_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    path, hashes = tmp_path / "a", Hashes(tmp_path / "hashes.json")
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
        assert hashes.of(path) == hashlib.sha256(content).hexdigest()


def test_a_young_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    hashes = Hashes(tmp_path / "hashes.json")
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert hashes.of(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("memory", ["", "[1]", "{", '{"x": 3}'])
def test_a_broken_memory_is_an_empty_one(tmp_path: Path, memory: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    (tmp_path / "hashes.json").write_text(memory.replace("x", str(path)))
    assert Hashes(tmp_path / "hashes.json").of(path) == hashlib.sha256(b"one").hexdigest()
