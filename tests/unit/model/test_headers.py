"""Headers of safetensors files without torch. The hostile ones are in test_safetensors_io and tests/faults."""

import time
from pathlib import Path

import pytest
import torch

from tetrad.errors import UserError
from tetrad.model.headers import HEADER_BYTES, Entry, read_header
from tetrad.model.safetensors_io import tensor_chunks


def test_what_is_written_is_told(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, 3), "a": torch.tensor(1).bfloat16(), "none": torch.zeros(0, 4)}
    (tmp_path / "x").write_bytes(b"".join(tensor_chunks(tensors)))
    found = read_header(tmp_path / "x")
    assert found == {"a": Entry("BF16", (), 0), "b": Entry("F32", (2, 3), 2), "none": Entry("F32", (0, 4), 26)}
    assert {name: entry.nbytes for name, entry in found.items()} == {n: t.nbytes for n, t in tensors.items()}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"".join(tensor_chunks({"a": torch.ones(2)})))
    (tmp_path / "link").symlink_to("x")
    assert read_header(tmp_path / "link") == read_header(tmp_path / "x")


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path, length: int) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(1 << 30)
    began = time.perf_counter()
    with pytest.raises(UserError, match="E-CKPT-FORMAT") as caught:
        read_header(tmp_path / "x")
    assert time.perf_counter() - began < 1
    assert caught.value.where == str(tmp_path / "x")
    assert caught.value.hint


def test_no_file(tmp_path: Path) -> None:
    for name in ("none", "folder", "zero\0"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="E-CKPT-FORMAT"):
            read_header(tmp_path / name)
