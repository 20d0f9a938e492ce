import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tetrad import disk, storage
from tetrad.errors import UserError

MEBI = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    storage.write_folder(tmp_path / "a" / "model", {"x.json": b"{}", "y.bin": (b"a", memoryview(b"bc"))}, {"key": "k"})
    return tmp_path / "a" / "model"


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        storage.verify_folder(path)
    return caught.value


def rewrite(folder: Path, **changes: Any) -> None:
    """A manifest that says something else but is whole in itself."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(storage._render({**manifest, **changes}))


def test_a_written_folder_verifies(folder: Path) -> None:
    manifest = storage.verify_folder(folder)
    assert manifest["key"] == "k"
    assert manifest["version"] == 1
    assert manifest["files"]["y.bin"] == {
        "size": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2: "abc"
    }
    assert (folder / "y.bin").read_bytes() == b"abc"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    storage.write_folder(tmp_path / "b", {"y.bin": b"abc", "x.json": b"{}"}, {"key": "k"})
    assert (tmp_path / "b/manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    storage.write_folder(folder, {"z": b"new"}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "z"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failing_iterator_leaves_the_old_folder(folder: Path) -> None:
    def contents() -> Any:
        yield b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_folder(folder, {"z": contents()}, {})
    assert storage.verify_folder(folder)["key"] == "k"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".hidden", "manifest.json", "a\n", "a\0b"])
def test_names_that_are_no_file_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file name"):
        storage.write_folder(tmp_path / "m", {name: b""}, {})


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "..", "manifest.json"])
def test_a_manifest_that_points_elsewhere(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, files={name: {"size": 1, "sha256": "00"}})
    opened: list[str] = []

    def watched(path: Path, *rest: int) -> int:
        opened.append(os.fspath(path))
        return os.open(path, *rest)

    monkeypatch.setattr(disk.Calls, "open", staticmethod(watched))
    assert refusal(folder).code == "E-CKPT-PATH"
    assert opened == [str(folder / "manifest.json")]


@pytest.mark.parametrize("name", ["x.json", "manifest.json", "stranger"])
def test_links_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "away").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "away")
    assert refusal(folder).code == "E-CKPT-PATH"


def test_a_pipe_neither_hangs_nor_passes(folder: Path) -> None:
    (folder / "x.json").unlink()
    os.mkfifo(folder / "x.json")
    assert refusal(folder).code == "E-CKPT-PATH"


def test_what_a_loader_would_read_must_be_in_the_manifest(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    storage.verify_folder(folder)
    (folder / "model-00002.safetensors").write_bytes(b"")
    error = refusal(folder)
    assert error.code == "E-CKPT-MANIFEST"
    assert "model-00002.safetensors" in error.where


def test_missing_short_and_changed_files(folder: Path) -> None:
    (folder / "y.bin").write_bytes(b"abd")
    error = refusal(folder)
    assert error.code == "E-CKPT-HASH"
    assert "ba7816bf" in error.what  # expected
    assert "a52d159f" in error.what  # actual: sha256 of "abd"
    (folder / "y.bin").write_bytes(b"abcd")
    assert "4 bytes, the manifest says 3" in str(refusal(folder))
    assert refusal(folder).code == "E-CKPT-SIZE"
    (folder / "y.bin").unlink()
    assert refusal(folder).code == "E-CKPT-MISSING"
    (folder / "manifest.json").unlink()
    assert refusal(folder).code == "E-CKPT-MANIFEST"


def test_a_manifest_of_the_future(folder: Path) -> None:
    rewrite(folder, version=99)
    assert refusal(folder).code == "E-CKPT-VERSION"


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"null", b"[]", b"{}", b'{"version": 1}', b'{"version": 1, "files": []}', b"\xff\xfe", b"[" * 100_000),
        *(
            b'{"version": 1, "files": {"a": 3}}',
            b'{"version": 1, "files": {}, "x": NaN}',
            b'{"version": 1, "files": {}}',
        ),
    ],
)
def test_what_is_no_manifest(raw: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(raw)
    assert refusal(folder).code == "E-CKPT-MANIFEST"


def test_a_giant_manifest_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(folder / "manifest.json", 1 << 30)
    read = 0

    def counted(descriptor: int, count: int) -> bytes:
        nonlocal read
        read += count
        return os.read(descriptor, count)

    monkeypatch.setattr(disk.Calls, "read", staticmethod(counted))
    assert refusal(folder).code == "E-CKPT-SIZE"
    assert read < 32 * MEBI


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    storage.write_file(tmp_path / "f", b"old")
    storage.write_file(tmp_path / "f", [b"n", b"ew"])
    assert (tmp_path / "f").read_bytes() == b"new"
    assert storage.sha256_file(tmp_path / "f")[:8] == "11507a0e"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_prune_goes_by_number_and_keeps_two(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100, 1000000):
        storage.write_folder(tmp_path / f"step-{step:06d}", {}, {})
    (tmp_path / "other").mkdir()
    storage.prune(tmp_path, 3)
    assert list(storage.step_folders(tmp_path)) == [10, 100, 1000000]
    storage.prune(tmp_path, 0)
    assert list(storage.step_folders(tmp_path)) == [100, 1000000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-000100", "step-1000000"]


def test_no_half_of_a_deleted_folder_keeps_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(disk.Calls, "unlink", staticmethod(refuses))
    with pytest.raises(UserError, match="E-IO-WRITE"):
        storage.remove_folder(folder)
    assert not folder.exists()


def test_move_aside_never_overwrites(tmp_path: Path) -> None:
    for number, name in ((1, "old/sft"), (2, "old/sft-2"), (3, "old/sft-3")):
        storage.write_file(tmp_path / "sft/f", str(number).encode())
        assert storage.move_aside(tmp_path / "sft", tmp_path / "old/sft") == tmp_path / name
    assert (tmp_path / "old/sft/f").read_bytes() == b"1"


def test_leftovers(tmp_path: Path) -> None:
    storage.write_folder(tmp_path / ".tmp-step-000002-0a1b2c3d", {"a": b""}, {})
    storage.write_folder(tmp_path / ".old-model-0a1b2c3d", {"a": b"1"}, {})
    storage.write_folder(tmp_path / ".old-kept-0a1b2c3d", {"a": b"1"}, {})
    storage.write_folder(tmp_path / "kept", {"a": b"2"}, {})
    assert len(storage.remove_leftovers(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"]
    assert (tmp_path / "kept/a").read_bytes() == b"2"


def test_free_space_names_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Calls, "free_bytes", staticmethod(lambda path: 3_000_000))
    storage.free_space_check(tmp_path / "not/yet/there", 3_000_000)
    with pytest.raises(UserError, match=r"E-IO-SPACE.*needs 3\.1 MB, has 3\.0 MB"):
        storage.free_space_check(tmp_path, 3_100_000)


def test_a_log_grows_line_by_line(tmp_path: Path) -> None:
    log = storage.LineLog(tmp_path / "log.jsonl")
    log.append({"step": 0, "loss": 0.1})
    size = log.size()
    log.append({"text": "奖励\n\ud800"})
    log.sync()
    assert (tmp_path / "log.jsonl").read_bytes() == '{"step": 0, "loss": 0.1}\n{"text": "奖励\\n\\ud800"}\n'.encode()
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1]) == {"text": "奖励\n\ud800"}
    log.truncate(size)
    log.append({"step": 1})
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 0, "loss": 0.1}\n{"step": 1}\n'
    with pytest.raises(ValueError, match="has 37 bytes, not 38"):
        log.truncate(log.size() + 1)
    log.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_log_refuses_what_is_no_number(number: float, tmp_path: Path) -> None:
    log = storage.LineLog(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="E-NUM-NONFINITE") as caught:
        log.append({"step": 3, "loss": number})
    assert caught.value.exit_code == 5
    assert "'step': 3" in caught.value.what
    assert log.size() == 0
    log.close()


@pytest.mark.parametrize("torn", [b"", b'{"step"', b"x" * 200_000])
def test_a_torn_line_is_cut(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"step": 0}\n' + torn)
    log = storage.LineLog(tmp_path / "log")
    assert log.size() == 12
    log.append({"step": 1})
    log.close()
    assert (tmp_path / "log").read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_a_line_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = storage.LineLog(tmp_path / "log")
    log.append({"step": 0})
    room = [4, 0]

    def fills_up(descriptor: int, view: memoryview) -> int:
        if not (count := room.pop(0)):
            raise OSError(errno.ENOSPC, "full")
        return os.write(descriptor, view[:count])

    monkeypatch.setattr(disk.Calls, "write", staticmethod(fills_up))
    with pytest.raises(UserError, match="E-IO-SPACE"):
        log.append({"step": 1})
    monkeypatch.undo()
    log.append({"step": 2})
    log.close()
    assert (tmp_path / "log").read_bytes() == b'{"step": 0}\n{"step": 2}\n'


def test_a_second_lock_names_the_holder(tmp_path: Path) -> None:
    with storage.RunLock(tmp_path / "run/lock") as lock:
        assert lock.note == ""
        with (
            pytest.raises(UserError, match=f"E-RUN-LOCKED.*in use by pid {os.getpid()} on .* since 2") as caught,
            storage.RunLock(tmp_path / "run/lock"),
        ):
            pass
        assert caught.value.exit_code == 7
    with storage.RunLock(tmp_path / "run/lock") as lock:
        assert lock.note == ""


def test_a_disk_that_lies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.read
    monkeypatch.setattr(disk.Calls, "read", staticmethod(lambda fd, count: real(fd, count).replace(b"key", b"kex")))
    with pytest.raises(UserError, match=r"E-IO-WRITE.*other bytes"):
        storage.write_folder(tmp_path / "m", {"a": b""}, {"key": 1})


def test_json_that_would_fill_the_memory() -> None:
    assert storage.json_of(b'{"a": [1, 2]}') == {"a": [1, 2]}
    assert storage.json_of(b"[[], {}]", parts=3) == [[], {}]
    for raw, parts in ((b"[[], {}]", 2), (b"[" + b"0," * 30 + b"0]", 2), (b"[NaN", 9), (b"\xff", 9)):
        with pytest.raises(ValueError, match=r".+"):
            storage.json_of(raw, parts)


def test_what_a_stage_measured_is_read_by_its_earlier_name_too() -> None:
    assert storage.metrics_of({"metrics": {"a": 1}}) == storage.metrics_of({"figures": {"a": 1}}) == {"a": 1}
    assert storage.metrics_of({"key": "k"}) == {}
