import errno
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
    with pytest.raises(UserError) as caught, disk.told(Path("runs/a"), asked):
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
