"""Lines that are on the disk when they are said to be, and the secret beside them."""

from pathlib import Path

import pytest

from tetrad.errors import UserError
from tetrad.journal import Journal, secret


def test_lines_that_belong_together(tmp_path: Path) -> None:
    log = Journal(tmp_path / "log.jsonl")
    log.commit({"a": 1}, {"b": "奖励"})
    with pytest.raises(UserError, match="E-NUM-NONFINITE"):
        log.commit({"a": 2}, {"b": float("nan")})
    log.commit({"a": 3})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n{"b": "奖励"}\n{"a": 3}\n'


@pytest.mark.parametrize(
    ("left", "kept"), [(b'{"a": 1}\n{"b', b'{"a": 1}\n'), (b'{"a": 1}', b'{"a": 1}\n'), (b"[1]", b""), (b"12", b"")]
)
def test_what_was_left_without_a_line_end(left: bytes, kept: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(left)
    Journal(tmp_path / "log.jsonl").close()
    assert (tmp_path / "log.jsonl").read_bytes() == kept


def test_a_secret_stays_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "folder/secret"
    first = secret(path)
    assert len(first) == 32 and secret(path) == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret(tmp_path / "other") != first
    path.chmod(0o640)
    with pytest.raises(UserError, match="E-IO-READ"):
        secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="E-IO-READ"):
        secret(path)
