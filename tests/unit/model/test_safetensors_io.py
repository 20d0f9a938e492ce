import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from tetrad.errors import UserError
from tetrad.model.safetensors_io import file_bytes, read_tensors, tensor_chunks

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.weight": torch.tensor([1.5, -2.0, 3.0e38]).bfloat16(),
    "half": torch.tensor([[0.5]], dtype=torch.float16),
    "double": torch.tensor([1e-300], dtype=torch.float64),
    "steps": torch.tensor([2**62, -1]),
    "small": torch.tensor([-7], dtype=torch.int8),
    "flag": torch.tensor(True),
    "empty": torch.zeros(0, 3),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(b"".join(tensor_chunks(tensors)))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    read = read_tensors(write(tmp_path / "x.safetensors", TENSORS))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_library_agrees(tmp_path: Path) -> None:
    """Our bytes are read by `safetensors`, and ours reads what it writes; the metadata is that of `save`."""
    (tmp_path / "theirs").write_bytes(save(TENSORS, metadata={"format": "pt"}))
    theirs = read_tensors(tmp_path / "theirs")
    with safe_open(write(tmp_path / "ours", TENSORS), framework="pt") as ours:
        assert ours.metadata() == {"format": "pt"}
        assert all(torch.equal(ours.get_tensor(name), theirs[name]) for name in TENSORS)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    tensors = {"turned": TENSORS["b.weight"].T, "cut": TENSORS["b.weight"][1:, ::2]}
    read = read_tensors(write(tmp_path / "x", tensors))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert not read_tensors(write(tmp_path / "x", {"weight": weight}))["weight"].requires_grad


def test_bytes_do_not_depend_on_the_order_of_names() -> None:
    turned = dict(reversed(TENSORS.items()))
    assert b"".join(tensor_chunks(TENSORS)) == b"".join(tensor_chunks(turned))


def test_one_chunk_a_tensor_and_an_aligned_header() -> None:
    header, *chunks = tensor_chunks(TENSORS)
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert [len(chunk) for chunk in chunks] == [TENSORS[n].numel() * TENSORS[n].element_size() for n in sorted(TENSORS)]
    assert file_bytes(TENSORS) == sum(map(len, chunks))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z: torch\.complex64"):
        list(tensor_chunks({"z": torch.zeros(1, dtype=torch.complex64)}))


def hostile() -> dict[str, bytes]:
    """Headers of the corpus of bad inputs (K014): none may pass for a file with tensors in it."""

    def file(header: object, body: bytes = bytes(8), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + body

    def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    return {
        "empty": b"",
        "length": file({}, length=2**63),
        "longer than the file": file({}, length=200 << 20),
        "not json": file(b"\x80\x04pickle"),
        "list": file([]),
        "deep": file(b'{"a":' + b"[" * 100_000),
        "duplicate": file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)),
        "overlap": file({"a": entry(), "b": entry()}),
        "hole": file({"a": entry(offsets=(0, 8)), "b": entry(offsets=(16, 24))}, bytes(24)),
        "negative": file({"a": entry(shape=(-2,))}),
        "overflow": file({"a": entry(shape=(2**62, 4))}),
        "dtype": file({"a": entry(dtype="PICKLE")}),
        "beyond": file({"a": entry(offsets=(0, 1 << 40))}),
        "backwards": file({"a": entry(offsets=(8, 0))}),
        "appended": file({"a": entry()}, bytes(9)),
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(hostile()[name])
    start = time.perf_counter()
    with pytest.raises(UserError, match="E-CKPT-FORMAT") as caught:
        read_tensors(tmp_path / "x")
    assert caught.value.where == str(tmp_path / "x")
    assert time.perf_counter() - start < 1


def test_damaged_headers_never_crash(tmp_path: Path) -> None:
    whole = b"".join(tensor_chunks({"a": torch.ones(2), "b": torch.ones(3).bfloat16()}))
    length = int.from_bytes(whole[:8], "little")
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(8 + length)] = draw.randrange(256)
        (tmp_path / "x").write_bytes(damaged)
        try:
            read_tensors(tmp_path / "x")
        except UserError as error:
            refused += error.code == "E-CKPT-FORMAT"
    assert refused > 1000
