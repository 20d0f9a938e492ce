"""Keys and values of responses in progress: fixed slots, so that rows may join and leave, in one tensor."""

import math
import mmap
from functools import partial

import torch
from torch import Tensor

from tetrad.inference.fused_model import Attend
from tetrad.model.attention import Plan, cached_attention, packed_attention
from tetrad.model.config import DecoderConfig


def cache_bytes(c: DecoderConfig, slots: int, positions: int, dtype: torch.dtype) -> int:
    """The memory of a cache of this size."""
    return 2 * c.layers * slots * c.kv_heads * positions * c.head_dim * dtype.itemsize


class Cache:
    """kv: [layers, keys and values, slots, kv_heads, positions, head_dim]. The rows in use are the first ones."""

    def __init__(self, c: DecoderConfig, slots: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self._groups = c.kv_heads
        self.kv = _zeros((c.layers, 2, slots, c.kv_heads, positions, c.head_dim), dtype, device)
        self._vectors = [layer.view(-1, c.head_dim) for layer in self.kv]
        self._heads = self.kv.flatten(2, 3).flatten(0, 1)  # [layers * 2, slots * kv_heads, positions, head_dim]
        # Where the keys and values of slot 0 begin among a layer's vectors.
        first = torch.arange(2, device=device)[:, None] * slots * c.kv_heads + torch.arange(c.kv_heads, device=device)
        self._first = first.flatten() * positions
        self._positions = torch.arange(positions, device=device)
        self._slot_starts = torch.arange(slots, device=device) * (c.kv_heads * positions)  # where each begins

    def fill(self, slots_T: Tensor, positions_T: Tensor, plan: Plan) -> Attend:
        """The `attend` of a prefill: attention inside each prompt; keys and values are kept in each token's slot. What
        follows the last prompt is padding."""
        return partial(self._filled, self._rows(self._slot_starts[slots_T], positions_T), len(slots_T), plan)

    def _filled(self, at: Tensor, tokens: int, plan: Plan, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        self._keep(layer, at, kv[:tokens])
        return packed_attention(q, kv[:, : self._groups], kv[:, self._groups :], plan)

    def step(self, positions_N: Tensor, length: int, *, full: bool = False) -> Attend:
        """The `attend` of one decoding step: a token for each of the first N slots. length: most positions read;
        full: every row reads them all."""
        rows = positions_N.shape[0]
        at = self._rows(self._slot_starts[:rows], positions_N)
        every, bias = self._heads[:, : rows * self._groups, :length].unbind(), None
        if not full:
            bias = torch.zeros(rows, length, dtype=self.kv.dtype, device=self.kv.device)
            bias.masked_fill_(self._positions[:length] > positions_N[:, None], -torch.inf)
            bias = bias.repeat_interleave(self._groups, 0)[:, None]
        return partial(self._stepped, at, every, bias)

    def _stepped(
        self, at: Tensor, every: tuple[Tensor, ...], bias: Tensor | None, layer: int, q: Tensor, kv: Tensor
    ) -> Tensor:
        self._keep(layer, at, kv)
        return cached_attention(q, every[2 * layer], every[2 * layer + 1], bias)

    def copy(self, row: int, to: int, length: int) -> None:
        """The first positions of a row, to another one."""
        self.kv[:, :, to, :, :length] = self.kv[:, :, row, :, :length]

    def _rows(self, starts: Tensor, positions: Tensor) -> Tensor:
        """The numbers of the vectors of each token's keys and values."""
        return ((starts + positions)[:, None] + self._first).view(-1)

    def _keep(self, layer: int, at: Tensor, kv: Tensor) -> None:
        self._vectors[layer].index_copy_(0, at, kv.reshape(-1, kv.shape[-1]))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU straight from the system, which gives a page when it is first written to: positions that no
    response reaches take no memory."""
    size = math.prod(shape)
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype).view(shape)
