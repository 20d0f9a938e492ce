"""Remembered hashes: right after every change, and quick after none."""

import hashlib
import os
from pathlib import Path

import pytest

from tetrad import storage
from tetrad.engine.hashes import Hashes


def settle(path: Path, seconds: float = 1e9) -> None:
    os.utime(path, (seconds, seconds))


def test_remembered_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "a", tmp_path / "cache" / "hashes.json"
    path.write_bytes(b"one")
    settle(path)
    hashes = Hashes(memory)
    assert hashes.of(path) == hashlib.sha256(b"one").hexdigest()
    hashes.save()
    reads: list[Path] = []
    real = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: (reads.append(path), real(path))[1])
    assert Hashes(memory).of(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == []
    path.write_bytes(b"two")
    settle(path, 1e9 + 1)
    assert Hashes(memory).of(path) == hashlib.sha256(b"two").hexdigest()


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
