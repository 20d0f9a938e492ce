"""Keys and values of replies in the making: fixed slots, so that rows may join and leave, in one tensor."""

import torch
from torch import Tensor

from tetrad.model.attention import Plan, cached_attention, packed_attention
from tetrad.model.config import DecoderConfig
from tetrad.model.fused import Attend


def cache_bytes(c: DecoderConfig, slots: int, positions: int, dtype: torch.dtype) -> int:
    """The memory of a cache of this size."""
    return 2 * c.layers * slots * c.kv_heads * positions * c.head_dim * dtype.itemsize


class Cache:
    """kv: [layers, slots, keys and values, kv_heads, positions, head_dim]. The rows in use are the first ones."""

    def __init__(self, c: DecoderConfig, slots: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.positions = c, positions
        shape = (c.layers, slots, 2, c.kv_heads, positions, c.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self._heads = torch.arange(2 * c.kv_heads, device=device)
        self._places = torch.arange(positions, device=device)

    def fill(self, slots_T: Tensor, positions_T: Tensor, plan: Plan) -> Attend:
        """The `attend` of a prefill: attention inside each prompt; keys and values are kept in each token's slot."""
        groups, at = self.config.kv_heads, self._rows(slots_T, positions_T)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            self._keep(layer, at, kv)
            return packed_attention(q, kv[:, :groups], kv[:, groups:], plan)

        return attend

    def step(self, positions_N: Tensor, length: int) -> Attend:
        """The `attend` of one decoding step: a token for each of the first N slots. length: positions read at most."""
        rows = len(positions_N)
        at = self._rows(torch.arange(rows, device=positions_N.device), positions_N)
        unused = self._places[:length] > positions_N[:, None]
        bias = torch.zeros_like(unused, dtype=self.kv.dtype).masked_fill_(unused, -torch.inf)[:, None, None]

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            self._keep(layer, at, kv)
            keys, values = self.kv[layer, :rows, :, :, :length].unbind(1)
            return cached_attention(q, keys, values, bias)

        return attend

    def copy(self, source: "Cache", row: int, to: int, length: int) -> None:
        """The first positions of a row, perhaps of another cache, to a row of this one."""
        self.kv[:, to, :, :, :length] = source.kv[:, row, :, :, :length]

    def _rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where in a layer's vectors [slots * 2 * kv_heads * positions, head_dim] each token's keys and values lie."""
        heads = slots[:, None] * len(self._heads) + self._heads
        return (heads * self.positions + positions[:, None]).flatten()

    def _keep(self, layer: int, at: Tensor, kv: Tensor) -> None:
        width = kv.shape[-1]
        self.kv[layer].view(-1, width).index_copy_(0, at, kv.reshape(-1, width))
