"""The decoder, and the two models built on it: a language model and a scalar model (reward, critic).

It reads packed documents, for training and wherever log-probabilities or values are needed; decoding has a separate
form (fused_model.py). The head is applied inside `forward`, only at targets, and in chunks, so the matrix of all logits
never exists and sharded parameters work. Parameters are named as in Hugging Face folders. Frozen copies, dropout and
precision are the caller's choice; this module handles no text.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tetrad.kernels.onednn import linear, padded_training, widened
from tetrad.model.attention import Plan, packed_attention, plan_for
from tetrad.model.config import DecoderConfig
from tetrad.model.dropout import dropped, kept_tokens
from tetrad.objectives.language import nll_sum, token_logprobs
from tetrad.types import IGNORE, Packed


class _Rotate(torch.autograd.Function):
    """Rotary positions on [T, H, D] (Su et al. 2021); the gradient is the opposite rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    a, b = x.chunk(2, -1)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight in fewer passes over memory than autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
        normed: Tensor = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        to_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        share = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze_(-1)
        return grad.addcmul_(normed, share, value=-1).mul_(scale), to_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; silu(gate), a fourth of what an MLP would keep, is recomputed in the backward: the same bits."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


_rotate: Callable[..., Tensor] = _Rotate.apply
_normed: Callable[..., Tensor] = _Norm.apply
_gated: Callable[..., Tensor] = _SwiGLU.apply


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # it would take the sum of squares in 16 bit
            return _normed(x.to(wide), self.weight.to(wide), self.eps).to(x.dtype)


class Adapter(nn.Module):
    """B A scaled, a: [rank, in], b: [out, rank] (Hu et al. 2021)."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        """Its product with x, [T, in], added to `to`, [T, out]."""
        return torch.addmm(to, linear(x, self.a).mul(self.scale), self.b.t())


class Linear(nn.Linear):
    """torch's Linear, with the faster product if there is one, and an adapter if the model has some."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool) -> None:
        super().__init__(size_in, size_out, bias)
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias)
        return out if self.adapter is None else self.adapter(x, out)

    def whole(self) -> Tensor:
        """The weight with its adapter."""
        if self.adapter is None:
            return self.weight.detach()
        return torch.addmm(self.weight, self.adapter.b, self.adapter.a, alpha=self.adapter.scale).detach()


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = packed_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, plan)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.ff, bias=False)
        self.up_proj = Linear(c.hidden_size, c.ff, bias=False)
        self.down_proj = Linear(c.ff, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


M = TypeVar("M", "CausalLM", "ScalarModel")
Drop = Callable[[Tensor, int], Tensor]
"""Dropout of a branch of a block: 0 attention, 1 MLP."""


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan, drop: Drop) -> Tensor:
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin, plan), 0)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), 1)


class Decoder(nn.Module):
    """ids to hidden states. `dropout` (residual branches) and `token_dropout` (embeddings) act in training only, by the
    keys of the pack."""

    inv_freq: Tensor

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        # Not initialised here: on "meta" torch would load all of torch.compile for it, two seconds per model read.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(c.vocab_size, c.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.register_buffer("inv_freq", rope_frequencies(c), persistent=False)
        self.dropout = self.token_dropout = 0.0

    def forward(self, packed: Packed) -> Tensor:
        """Returns the normed hidden states [T, hidden]."""
        x = self.embed_tokens(packed.ids_T)
        tokens = len(x)
        # Rows of zeros that nothing reads; their gradients are zeros too.
        padding = padded_training(tokens, x.device) - tokens
        x = F.pad(x, (0, 0, 0, padding))
        keys_T = self._dropout_keys(packed, len(x))
        if keys_T is not None:
            x = x * kept_tokens(keys_T, self.token_dropout)[:, None]
        angle = F.pad(packed.positions_T, (0, padding))[:, None].float() * self.inv_freq
        cos, sin = (f(angle)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
        plan = plan_for(packed.bounds, x.device, packed.prefixes, packed.offsets)
        again = packed.recompute and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            inputs = (x, cos, sin, plan, self._drop(keys_T, number))
            x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False) if again else layer(*inputs)
        return self.norm(x)[:tokens]  # type: ignore[no-any-return]

    def _dropout_keys(self, packed: Packed, tokens: int) -> Tensor | None:
        """With zeros for padding; None if nothing is dropped. Raises ValueError if the pack has no keys."""
        if not (self.training and (self.dropout or self.token_dropout)):
            return None
        if packed.keys_T is None:
            raise ValueError("dropout needs a pack with keys")
        return F.pad(packed.keys_T, (0, tokens - len(packed.keys_T)))

    def _drop(self, keys_T: Tensor | None, layer: int) -> Drop:
        if keys_T is None or not self.dropout:
            return lambda x, _: x
        return lambda x, branch: dropped(x, keys_T, self.dropout, layer, branch)


def rope_frequencies(c: DecoderConfig) -> Tensor:
    """Inverse wavelengths [head_dim / 2], with Llama 3's smoothing between long and short waves where configured. On
    the CPU even where a model is made on "meta", since no file holds them."""
    inverse = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    s = c.rope_scaling
    if s is None:
        return inverse
    turns = s.original_max_position_embeddings * inverse / (2 * torch.pi)
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * inverse / s.factor + smooth * inverse


class CausalLM(nn.Module):
    """A language model. `head_weight` is the embedding's if tied."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, packed: Packed, want: str = "nll", temperature: float = 1.0) -> Any:
        """want: "nll", the summed negative log-likelihood of the targets, with a cheap gradient; "logprobs", a pair of
        [N] log-probabilities of the N targets and entropies (float32, differentiable); "logits", [T, V] for tests;
        "hidden", the decoder's states [T, H]; "hidden, logprobs", a pair of the two."""
        hidden = self.model(packed)
        if want.startswith("hidden"):
            hidden = hidden.clone()  # what a sharded model returns must be no view
            return (hidden, self._read(hidden, packed, "logprobs", temperature)) if "," in want else hidden
        return self._read(hidden, packed, want, temperature)

    def _read(self, hidden: Tensor, packed: Packed, want: str, temperature: float) -> Any:
        if want == "logits":
            return widened(hidden, self.head_weight.t()).float()
        at = _labelled(packed)
        hidden, targets = hidden.index_select(0, at), packed.targets_T[at]
        if want == "nll":
            return nll_sum(hidden, self.head_weight, targets)
        return token_logprobs(hidden, self.head_weight, targets, temperature)


class ScalarModel(nn.Module):
    """A decoder with one number per token: the reward model reads it at the last, the critic before each token.

    `bias` is a constant of the reward's normalisation, not trained.
    """

    bias: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.register_buffer("bias", torch.tensor(config.reward_bias), persistent=False)

    def forward(self, packed: Packed, want: str = "scores") -> Tensor:
        """want: "scores", [D] at the last token of each document; "values", [N] at the positions that have a target;
        "both", [D + N], one after the other."""
        return self.read(self.model(packed), packed, want)

    def read(self, hidden: Tensor, packed: Packed, want: str) -> Tensor:
        """The same from the decoder's hidden states."""
        at = [_last(packed, hidden.device)] if want in ("scores", "both") else []
        at += [_labelled(packed)] if want in ("values", "both") else []
        chosen = hidden.index_select(0, torch.cat(at) if len(at) > 1 else at[0])
        wide = torch.promote_types(chosen.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # in 16 bit different answers would get equal scores
            read = F.linear(chosen.to(wide), self.score.weight.to(wide))
        scores: Tensor = read[:, 0].float() + self.bias
        return scores


def _labelled(packed: Packed) -> Tensor:
    """The places of the labels."""
    if packed.labelled_N is not None:
        return packed.labelled_N  # type: ignore[no-any-return]
    return (packed.targets_T != IGNORE).nonzero()[:, 0]  # type: ignore[no-any-return]


def _last(packed: Packed, device: torch.device) -> Tensor:
    """The places of the documents' last tokens."""
    offsets = torch.tensor(packed.bounds, device=device) if packed.offsets is None else packed.offsets
    return offsets[1:].long() - 1


def on_meta(kind: type[M], config: DecoderConfig) -> M:
    """A model whose parameters have no memory yet."""
    with torch.device("meta"):
        return kind(config)


def initialise(model: CausalLM, seed: int) -> None:
    """Normal weights as in transformers; norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, model.config.init_std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def initial_head(hidden_size: int, seed: int) -> Tensor:
    """A scalar head [1, hidden] with std 1/sqrt(hidden + 1) (Ziegler et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    return nn.init.normal_(torch.empty(1, hidden_size), 0.0, (hidden_size + 1) ** -0.5, generator=generator)


def give_head(model: ScalarModel, seed: int) -> None:
    """A fresh head and no bias, beside the decoder."""
    device = model.model.norm.weight.device
    model.score.weight = nn.Parameter(initial_head(model.config.hidden_size, seed).to(device))
    model.bias = torch.zeros((), device=device)


@torch.no_grad()
def grow_vocabulary(model: CausalLM | ScalarModel, size: int) -> None:
    """Rows for new tokens up to `size` in embedding and output head, each the mean of the old ones; spare rows are
    used first."""
    old = model.config.vocab_size
    if size <= old:
        return
    owners: list[nn.Embedding | nn.Linear] = [model.model.embed_tokens]
    if isinstance(model, CausalLM) and not model.config.tied:
        owners.append(model.lm_head)
    for owner in owners:
        weight = owner.weight
        new = weight.mean(0, keepdim=True).expand(size - old, -1)
        owner.weight = nn.Parameter(torch.cat((weight, new)))
    model.config = replace(model.config, vocab_size=size)


def frozen(model: CausalLM) -> CausalLM:
    """The model without gradients."""
    return model.requires_grad_(False).eval()


def narrowed(model: M, dtype: torch.dtype) -> M:
    """A frozen model with its matrices in the type that autocast would round them to each time: the same products from
    half the memory. What is added up in float32, embeddings and norms, stays so."""
    matrices = [part for _, part in model.named_modules() if isinstance(part, Linear)]
    for part in matrices:
        part.to(dtype)
    return model
