"""Keys and values of replies in the making: fixed slots, so that rows may leave and others take their place."""

import torch
from torch import Tensor

from tetrad.model.attention import Attend, Plan, cached_attention, packed_attention
from tetrad.model.config import DecoderConfig
from tetrad.types import Packed


class Cache:
    """K and V per layer, [slots, kv_heads, positions, head_dim]."""

    def __init__(self, c: DecoderConfig, slots: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (slots, c.kv_heads, positions, c.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.layers)]

    def fill(self, packed: Packed, slots_D: Tensor, plan: Plan) -> Attend:
        """The `attend` of a prefill: attention inside each prompt, keys and values kept in the prompts' slots."""
        lengths = torch.tensor(packed.bounds, device=slots_D.device).diff()
        row_T = slots_D.repeat_interleave(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][row_T, :, packed.positions_T] = k
            self.values[layer][row_T, :, packed.positions_T] = v
            return packed_attention(q, k, v, plan)

        return attend

    def step(self, positions_N: Tensor, longest: int) -> Attend:
        """The `attend` of one decoding step: one token for each of the first N slots. longest: positions in use."""
        rows = torch.arange(len(positions_N), device=positions_N.device)
        unused = torch.arange(longest, device=positions_N.device) > positions_N[:, None]
        bias = torch.zeros(unused.shape, dtype=self.keys[0].dtype, device=unused.device)
        bias = bias.masked_fill_(unused, float("-inf"))[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions_N] = k
            values[rows, :, positions_N] = v
            return cached_attention(q, keys[: len(rows), :, :longest], values[: len(rows), :, :longest], bias)

        return attend

    def keep(self, rows: Tensor, longest: int) -> None:
        """Moves the given rows to the first slots."""
        for tensor in (*self.keys, *self.values):
            tensor[: len(rows), :, :longest] = tensor[rows, :, :longest]
