"""Tensors to and from safetensors files, streamed: one tensor is copied to the CPU at a time.

The format is 8 bytes of header length (little endian), the header as JSON padded with spaces to 8 bytes, then the
tensors' bytes without gaps, here in the order of their names (https://github.com/huggingface/safetensors, "Format").
Shared tensors are written once under each name; to write a tied weight only once, leave its second name out.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tetrad.model.headers import BYTES, not_safetensors, read_header


def tensor_chunks(
    tensors: Mapping[str, torch.Tensor], whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a header and then one chunk per tensor. whole: gives the numbers of a tensor
    when they are written, one after another by name. Raises ValueError for other dtypes."""
    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        dtype = _name(tensor.dtype)
        if dtype not in BYTES:
            raise ValueError(f"{name}: {tensor.dtype} can't be written")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(whole(tensors[name]))


def _name(dtype: torch.dtype) -> str:
    """As safetensors names it: F32, BF16, I64, U8, BOOL."""
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("uint", "u").replace("int", "i").upper()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors alone, on disk, without the header."""
    return sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, on the CPU. Raises E-CKPT-FORMAT for anything else."""
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise not_safetensors(path, error) from error
