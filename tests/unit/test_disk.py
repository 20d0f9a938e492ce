import errno
import os
from pathlib import Path

import pytest

from tetrad import disk
from tetrad.errors import UserError


@pytest.mark.parametrize(
    ("number", "asked", "code"),
    [
        (errno.ENOSPC, "E-IO-WRITE", "E-IO-SPACE"),
        (errno.EDQUOT, "E-IO-WRITE", "E-IO-SPACE"),
        (errno.EACCES, "E-IO-WRITE", "E-IO-WRITE"),
        (errno.EIO, "E-IO-READ", "E-IO-READ"),
    ],
)
def test_failures_have_names(number: int, asked: str, code: str) -> None:
    with pytest.raises(UserError) as caught, disk.explained(Path("runs/a"), asked):
        raise OSError(number, "why")
    assert caught.value.code == code
    assert caught.value.exit_code == 6
    assert caught.value.where == "runs/a"


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    written = bytearray()

    def two_at_most(descriptor: int, view: memoryview) -> int:
        written.extend(view[:2])
        return len(view[:2])

    monkeypatch.setattr(disk.Calls, "write", staticmethod(two_at_most))
    disk.write_all(0, memoryview(b"abcde"))
    assert written == b"abcde"


def test_a_write_that_writes_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Calls, "write", staticmethod(lambda descriptor, view: 0))
    with pytest.raises(OSError, match="nothing was written"):
        disk.write_all(0, memoryview(b"a"))


def test_free_bytes_of_a_place_to_come(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "a/b") > 0


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="E-CKPT-PATH"):
        disk.scan(tmp_path)
    with pytest.raises(UserError, match="E-IO-READ"):
        disk.scan(tmp_path / "absent")


def test_the_start_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("x")
    assert disk.start_of(tmp_path / "x", 4) == (10, b"0123")
    assert disk.start_of(tmp_path / "link", 99) == (10, b"0123456789")
    assert disk.start_of(tmp_path / "x", 0) == (10, b"")


def test_what_is_no_plain_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / "zero\0", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"plain file|folder|No such|null byte"):
            disk.start_of(path, 4)
