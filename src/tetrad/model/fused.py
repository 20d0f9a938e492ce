"""A language model as decoding wants it: few large products in the compute type, for inference alone.

q, k and v are one matrix, gate and up another; a norm's weight is folded into the matrix that follows; the two halves
of a rotary pair lie side by side, so that a rotation is one complex product. The function is the decoder's, equal up to
rounding; the tensors are copies, so it is made anew when weights have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.model.config import DecoderConfig
from tetrad.model.decoder import Block, CausalLM

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q_THD, kv_T2GD: the keys' heads and then the values') -> [T, H, D]."""


@dataclass(frozen=True)
class _Layer:
    """qkv: [(H + 2G) D, hidden]; scale_HD: weights of the norms of q and k, where the family has them."""

    qkv: Tensor
    bias: Tensor | None
    scale_HD: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Fused:
    """Weights in `dtype`. positions: the longest text; more are refused by whoever asks for a cache."""

    @torch.no_grad()
    def __init__(self, model: CausalLM, dtype: torch.dtype, positions: int = 0) -> None:
        c = self.config = model.config
        self.dtype = dtype
        self.layers = [_fused(layer, c, dtype) for layer in model.model.layers]  # type: ignore[arg-type]
        self.embedding = model.model.embed_tokens.weight.detach().to(dtype)
        self.head = self.embedding if c.tied else model.head_weight.detach().to(dtype)
        self._floor, self._head_floor = (torch.tensor(sqrt(c.norm_eps * size)) for size in (c.hidden_size, c.head_dim))
        self.last_norm = (sqrt(c.hidden_size) * model.model.norm.weight.detach()).to(dtype)
        positions = min(positions or c.max_positions, c.max_positions)
        angle = torch.arange(positions, device=self.embedding.device)[:, None].float() * model.model.inv_freq
        self.turns = torch.polar(torch.ones_like(angle), angle)  # [positions, D / 2], complex

    @property
    def place(self) -> torch.device:
        return self.embedding.device

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Normed hidden states [T, hidden]."""
        c = self.config
        x = F.embedding(ids_T, self.embedding)
        turns = self.turns[positions_T][:, None]
        for number, layer in enumerate(self.layers):
            qkv = F.linear(_normed(x, self._floor), layer.qkv, layer.bias).view(len(x), -1, c.head_dim)
            self._turn(qkv[:, : c.heads + c.kv_heads], turns, layer.scale_HD)
            attended = attend(number, qkv[:, : c.heads], qkv[:, c.heads :])
            x.addmm_(attended.view(len(x), -1), layer.out.t())
            gate, up = F.linear(_normed(x, self._floor), layer.gate_up).chunk(2, -1)
            x.addmm_(F.silu(gate).mul_(up), layer.down.t())
        return _normed(x, self._floor).mul_(self.last_norm)

    def _turn(self, qk_THD: Tensor, turns: Tensor, scale_HD: Tensor | None) -> None:
        """Norms of q and k where there are any, and rotary positions, in place."""
        wide = qk_THD.float()
        if scale_HD is not None:
            wide = _normed(wide, self._head_floor) * scale_HD
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        if wide.data_ptr() == qk_THD.data_ptr():
            pairs.mul_(turns)
        else:
            qk_THD.copy_(torch.view_as_real(pairs * turns).flatten(-2))

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V], float32."""
        logits: Tensor = F.linear(hidden_NH, self.head).float()
        return logits


def _normed(x: Tensor, floor: Tensor) -> Tensor:
    """x / |x|, with a floor that keeps 0 from being divided by: the width's root is in the weight that follows."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / length.hypot_(floor)).to(x.dtype)


def _fused(layer: Block, c: DecoderConfig, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    before = sqrt(c.hidden_size) * layer.input_layernorm.weight
    between = sqrt(c.hidden_size) * layer.post_attention_layernorm.weight
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    qk = [_paired(x.weight.unflatten(0, (-1, c.head_dim))).flatten(0, 1) for x in (q, k)]
    bias = scale = None
    if c.qkv_bias:
        paired = [_paired(x.bias.unflatten(0, (-1, c.head_dim))).flatten() for x in (q, k)]
        bias = torch.cat((*paired, v.bias)).to(dtype)
    if c.qk_norm:
        norms = ((attention.q_norm, c.heads), (attention.k_norm, c.kv_heads))
        scale = torch.cat([_paired(n.weight[None]).expand(times, -1) for n, times in norms]) * sqrt(c.head_dim)
    return _Layer(
        (torch.cat((*qk, v.weight)) * before).to(dtype),
        bias,
        scale,
        attention.o_proj.weight.detach().to(dtype),
        (torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) * between).to(dtype),
        mlp.down_proj.weight.detach().to(dtype),
    )


def _paired(heads: Tensor) -> Tensor:
    """[heads, D, ...] with the first and second half of each head interleaved: one pair, one complex number."""
    pairs: Tensor = heads.unflatten(1, (2, -1)).transpose(1, 2)
    return pairs.flatten(1, 2)
