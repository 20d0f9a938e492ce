"""A language model in the form for decoding: few large products in the compute type, for inference only.

q, k and v are one matrix, gate and up another; a norm's weight is folded into the matrix that follows; the two halves
of a rotary pair lie side by side, so that a rotation is one complex product. The function is the decoder's, equal up to
rounding. Some tensors are copies and some the model's own, so it is valid only for the weights it was built from:
`Current` rebuilds it when they have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.distributed.sharding import gathered
from tetrad.kernels.onednn import Product
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import Block, CausalLM, Linear

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q_THD, kv_T2GD: the keys' heads and then the values') -> [T, H, D]."""


@dataclass(frozen=True)
class _Layer:
    """qkv: [(H + 2G) D, hidden]; scale_HD: weights of the norms of q and k, where the family has them."""

    qkv: Product
    scale_HD: Tensor | None
    out: Product
    gate_up: Product
    down: Product

    def take(self, other: "_Layer") -> None:
        """The numbers of another one."""
        for name in ("qkv", "out", "gate_up", "down"):
            getattr(self, name).take(getattr(other, name))
        if self.scale_HD is not None and other.scale_HD is not None:
            self.scale_HD.copy_(other.scale_HD)


class Fused:
    """Weights in `dtype`. positions: the longest text, in tokens; 0 is the model's. A sharded model is gathered layer
    by layer, on every process that shares it."""

    @torch.no_grad()
    def __init__(self, model: CausalLM, dtype: torch.dtype, positions: int = 0) -> None:
        c = self.config = model.config
        self.dtype = dtype
        self.layers = [_fused(layer, c, dtype) for layer in model.model.layers]  # type: ignore[arg-type]
        with gathered(model) as copy:
            self.embedding = model.model.embed_tokens.weight.detach().to(dtype, copy=copy)
            self.head = Product(self.embedding if c.tied else model.head_weight.detach().to(dtype, copy=copy))
            self.last_norm = self._norm(model)
        self._floor, self._head_floor = (torch.tensor(sqrt(c.norm_eps * size)) for size in (c.hidden_size, c.head_dim))
        positions = min(positions or c.max_positions, c.max_positions)
        angle = torch.arange(positions, device=self.embedding.device)[:, None].float() * model.model.inv_freq
        self.rotations = torch.polar(torch.ones_like(angle), angle)  # [positions, D / 2], complex

    def _norm(self, model: CausalLM) -> Tensor:
        return (sqrt(self.config.hidden_size) * model.model.norm.weight.detach()).to(self.dtype)

    @torch.no_grad()
    def refill(self, model: CausalLM) -> None:
        """Takes the weights of this model, of the same shape, layer by layer and in the memory that there is: what was
        captured of it stays valid. Only where no tensor is the model's own: `dtype` is not that of its parameters."""
        for mine, layer in zip(self.layers, model.model.layers, strict=True):
            mine.take(_fused(layer, self.config, self.dtype))  # type: ignore[arg-type]
        with gathered(model):
            self.embedding.copy_(model.model.embed_tokens.weight)
            tied = self.config.tied
            self.head.take(Product(self.embedding if tied else model.head_weight.detach().to(self.dtype)))
            self.last_norm.copy_(self._norm(model))

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attend: Attend, wanted_N: Tensor | None = None) -> Tensor:
        """Normed hidden states [T, hidden]; only of the wanted tokens if some are given, [N, hidden]."""
        c, floor, tokens = self.config, self._floor, ids_T.shape[0]
        heads, parts = (tokens, c.heads + 2 * c.kv_heads, c.head_dim), [c.heads, 2 * c.kv_heads]
        x = F.embedding(ids_T, self.embedding)
        rotations = self.rotations.index_select(0, positions_T)[:, None]
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(_normed(x, floor)).view(heads)
            self._rotate(qkv.narrow(1, 0, c.heads + c.kv_heads), rotations, layer.scale_HD)
            attended = attend(number, *qkv.split(parts, 1))
            attended = attended.view(tokens, -1)
            if wanted_N is not None and number == len(self.layers) - 1:  # the others' keys and values are in the cache
                x, attended = x.index_select(0, wanted_N), attended.index_select(0, wanted_N)
            x = layer.out.added(attended, x)
            gate, up = layer.gate_up(_normed(x, floor)).chunk(2, -1)
            x = layer.down.added(F.silu(gate).mul_(up), x)
        return _normed(x, floor).mul_(self.last_norm)

    def _rotate(self, qk_THD: Tensor, rotations: Tensor, scale_HD: Tensor | None) -> None:
        """Norms of q and k if there are any, and rotary positions, in place."""
        if scale_HD is None and qk_THD.dtype == torch.float32:
            _pairs(qk_THD).mul_(rotations)
            return
        wide = qk_THD.float()
        if scale_HD is not None:
            wide = _normed(wide, self._head_floor) * scale_HD
        qk_THD.copy_(torch.view_as_real(_pairs(wide) * rotations).flatten(-2))

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V], float32."""
        return self.head.wide(hidden_NH)


class Current:
    """The fused form of a model that may be trained, replaced or moved between its uses.

    Whether the last one is still valid is checked on the numbers themselves, at the cost of about one token: PyTorch's
    addresses and version counters don't reveal a write through `.data` or numpy.
    """

    def __init__(self, model: CausalLM, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._last: tuple[tuple[Any, ...], list[Tensor], Fused] | None = None

    @torch.no_grad()
    def fused(self) -> Fused:
        """The form for the current weights."""
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        scales = [part.adapter.scale for part in self._model.modules() if isinstance(part, Linear) and part.adapter]
        shapes = [(name, x.shape, x.dtype, x.device) for name, x in tensors.items()]
        layout = (self._model.config, scales, shapes)
        marks = [mark for x in tensors.values() for mark in _marks(x.detach())]
        if self._last and self._last[0] == layout and all(map(torch.equal, self._last[1], marks)):
            return self._last[2]
        self._last = None  # two at once would be twice the memory
        fused = Fused(self._model, self._dtype)
        self._last = layout, marks, fused
        return fused


def _marks(x: Tensor) -> list[Tensor]:
    """A fingerprint of a tensor's numbers: vectors themselves; of a matrix the sums of its columns' bits, which any
    change of one number alters, and its product with a wave, which depends on positions and signs."""
    if x.dim() < 2:
        return [x.clone()]
    x = x.contiguous()
    wave = torch.arange(x.shape[1], dtype=torch.float32, device=x.device).cos().to(x.dtype)
    step = gcd(x.shape[1] * x.itemsize, x.storage_offset() * x.itemsize)
    word = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if step % kind.itemsize == 0)
    return [x.view(word).sum(0), x @ wave]


def _normed(x: Tensor, floor: Tensor) -> Tensor:
    """x / |x|, with a floor that keeps 0 from being divided by: the width's root is in the weight that follows."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    normed = x / length.hypot_(floor)
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)


def _pairs(x_THD: Tensor) -> Tensor:
    """Two numbers side by side as one complex number: [T, H, D / 2]."""
    tokens, heads, width = x_THD.shape
    return torch.view_as_complex(x_THD.view(tokens, heads, width // 2, 2))


def _fused(layer: Block, c: DecoderConfig, dtype: torch.dtype) -> _Layer:
    with gathered(layer) as copy:
        return _joined(layer, c, dtype, copy)


def _joined(layer: Block, c: DecoderConfig, dtype: torch.dtype, copy: bool) -> _Layer:
    """copy: whether none of the layer's tensors may be kept."""
    attention, mlp = layer.self_attn, layer.mlp
    before = sqrt(c.hidden_size) * layer.input_layernorm.weight
    between = sqrt(c.hidden_size) * layer.post_attention_layernorm.weight
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    qk = [_paired(x.whole().unflatten(0, (-1, c.head_dim))).flatten(0, 1) for x in (q, k)]
    bias = scale = None
    if c.qkv_bias:
        paired = [_paired(x.bias.unflatten(0, (-1, c.head_dim))).flatten() for x in (q, k)]
        bias = torch.cat((*paired, v.bias)).to(dtype)
    if c.qk_norm:
        norms = ((attention.q_norm, c.heads), (attention.k_norm, c.kv_heads))
        scale = torch.cat([_paired(n.weight[None]).expand(times, -1) for n, times in norms]) * sqrt(c.head_dim)
    return _Layer(
        Product((torch.cat((*qk, v.whole())) * before).to(dtype), bias),
        scale,
        Product(attention.o_proj.whole().to(dtype, copy=copy)),
        Product((torch.cat((mlp.gate_proj.whole(), mlp.up_proj.whole())) * between).to(dtype)),
        Product(mlp.down_proj.whole().to(dtype, copy=copy)),
    )


def _paired(heads: Tensor) -> Tensor:
    """[heads, D, ...] with the first and second half of each head interleaved: one pair, one complex number."""
    pairs: Tensor = heads.unflatten(1, (2, -1)).transpose(1, 2)
    return pairs.flatten(1, 2)
