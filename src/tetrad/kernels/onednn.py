"""Products with a weight matrix on a CPU, by oneDNN where it is faster than torch's own. The only file that uses it.

In training that is on processors with AVX-512, which the library of torch's own products may not use: up to 1.6 times
as fast. With AVX2 it is no faster (benchmarks/product.py), and each new number of rows costs time and memory. In
decoding, with few and rarely new row counts, it is used everywhere. On a GPU, in other types than float32, and where
torch lacks these operators, the products are torch's own.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.kernels.cpu import multiplies_bfloat16

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_IN_TRAINING = _HAS_ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()
_FEW_ROWS = 64  # below, converting the weight's layout doesn't pay off
_LEAST_STEP = 16  # between two row counts
_NARROW = 256  # a weight's gradient, a product over all tokens, is no faster where one side is smaller
_SMALL = 160_000  # weights that fit a core's own cache: plain up to twice as many multiplications
# Compiled products to keep, about 16 per micro-batch size: in oneDNN, half a MiB and half a millisecond each, and in
# the layer between it and torch, 0.14 MiB. Both keep 1,024 by default; they read this at the first one.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")


def padded(rows: int, device: torch.device) -> int:
    """The row count that `Product` computes instead: on a CPU the next of eight sizes in each doubling. For each size
    it sees oneDNN keeps a compiled product, which lies between tensors, so their memory can't serve larger ones."""
    return rows + -rows % _step(rows - 1) if device.type == "cpu" else rows


def padded_training(rows: int, device: torch.device) -> int:
    """The same for `linear`: more than `rows` only if oneDNN computes it."""
    return padded(rows, device) if _IN_TRAINING else rows


def pieces(rows: int, most: int, device: torch.device) -> list[slice]:
    """The same rows in slices of at most `most`, without padding: if `linear` uses oneDNN all of such a size, but
    for a last one of few rows."""
    slices, start = [], 0
    while start < rows:
        size = min(most, rows - start)
        if _IN_TRAINING and device.type == "cpu" and size >= _FEW_ROWS:
            size -= size % _step(size)
        slices.append(slice(start, start + size))
        start += size
    return slices


def _step(rows: int) -> int:
    """Between two row counts: an eighth of the largest power of two in them."""
    return max(_LEAST_STEP, 1 << max(rows.bit_length() - 4, 0))


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W' + b, differentiable once. x: [T, I]."""
    plain = not _fits(weight_OI) or x.dtype != torch.float32 or x.shape[0] < _FEW_ROWS
    if plain or not _IN_TRAINING or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return _linear(x, weight_OI, bias_O)
    return _apply_linear(x, weight_OI, bias_O)


def widened(x: Tensor, weight_IO: Tensor) -> Tensor:
    """x W in float32 or wider. On a GPU a 16-bit product is not rounded to 16 bit first; a CPU has no such product."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.mm(x, weight_IO.to(x.dtype), out_dtype=torch.float32)
    out = x @ weight_IO
    return out.to(torch.promote_types(out.dtype, torch.float32))


class Product:
    """x W' + b with a fixed weight, in oneDNN's layout; the smallest stay plain, as a oneDNN call costs 10
    microseconds."""

    def __init__(self, weight_OI: Tensor, bias: Tensor | None = None) -> None:
        self._bias, self._weight, self._packed = bias, weight_OI.t(), torch.empty(0)
        self._plain_rows = 2**62
        if _fits(weight_OI, multiplies_bfloat16()):
            size = weight_OI.numel()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
            self._plain_rows = 2 * _SMALL // size if size <= _SMALL else 0
            if not self._plain_rows:
                self._weight = torch.empty(0)  # one copy is enough

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self._plain_rows:
            return _linear(x, self._packed, self._bias)
        return x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)

    def take(self, other: "Product") -> None:
        """The numbers of another one of this size, in the same memory, but for oneDNN's own layout."""
        self._weight.copy_(other._weight)
        self._packed = other._packed
        if self._bias is not None and other._bias is not None:
            self._bias.copy_(other._bias)

    def wide(self, x: Tensor) -> Tensor:
        """The product without bias, in float32."""
        return widened(x, self._weight) if x.is_cuda else self(x).float()

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """The product without bias, plus `to`."""
        if x.shape[0] > self._plain_rows:
            return torch.ops.mkldnn._linear_pointwise.binary(x, to, self._packed, None, "add")  # type: ignore[no-any-return]
        return torch.addmm(to, x, self._weight)


def _fits(weight: Tensor, bfloat16: bool = False) -> bool:
    dtypes = (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
    return _HAS_ONEDNN and weight.device.type == "cpu" and weight.dtype in dtypes


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        wide = min(weight.shape) >= _NARROW
        return (
            _linear(grad, weight.t(), None) if to_x else None,
            (_linear(grad.t(), x.t(), None) if wide else grad.t() @ x) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


_apply_linear: Callable[..., Tensor] = _Linear.apply
