"""Causal attention over packed documents, and over a cache. The only module that knows kernels.

Packed: documents of one micro-batch lie one after another without padding. They are sorted into buckets of like length,
each bucket is one causal kernel call, and its few padded slots lie to the right, where no real query looks: so no mask
is needed, and no document sees another. On a GPU with 16-bit compute one variable-length kernel takes them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class Bucket:
    """Documents of like length. slots: [B * L] the token in each slot (the last one again where padded);
    tokens, valid: [n] each real token and its slot."""

    rows: int
    slots: Tensor
    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Plan:
    """How one packed micro-batch is attended; made once, used by every layer."""

    tokens: int
    buckets: tuple[Bucket, ...]
    offsets: Tensor
    longest: int
    rows: int  # of documents where all have one length, else 0


def plan_for(bounds: Sequence[int], device: torch.device) -> Plan:
    """bounds: the D + 1 offsets of the documents."""
    start = torch.tensor(bounds[:-1])
    length = torch.tensor(bounds[1:]) - start
    by_length = torch.argsort(length, descending=True, stable=True).tolist()
    sizes = length.tolist()
    groups: list[list[int]] = []
    for document in by_length:
        if sizes[document] == 0:
            continue
        # A bucket wastes at most a third of its slots; tiny documents share one, a call costs more than their padding.
        if groups and sizes[document] >= min(0.67 * (widest := sizes[groups[-1][0]]), max(widest - 24, 0)):
            groups[-1].append(document)
        else:
            groups.append([document])
    buckets = tuple(_bucket(torch.tensor(group), start, length, device) for group in groups)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(sizes, default=0)
    rows = len(sizes) if longest and sum(sizes) == len(sizes) * longest else 0
    return Plan(bounds[-1], buckets, offsets, longest, rows)


def _bucket(group: Tensor, start: Tensor, length: Tensor, device: torch.device) -> Bucket:
    width = int(length[group].max())
    place = torch.arange(width)
    inside = place < length[group, None]
    token = start[group, None] + torch.minimum(place[None], length[group, None] - 1)
    valid = inside.flatten().nonzero()[:, 0]
    slots = token.flatten()
    return Bucket(len(group), slots.to(device), slots[valid].to(device), valid.to(device))


class _ToBuckets(torch.autograd.Function):
    """[T, ...] to one [B * L, ...] a bucket. Padded slots copy a real token; no gradient comes back from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(x.index_select(0, bucket.slots) for bucket in plan.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0].new_empty(ctx.plan.tokens, *grads[0].shape[1:])
        for bucket, grad in zip(ctx.plan.buckets, grads, strict=True):
            out.index_copy_(0, bucket.tokens, grad.index_select(0, bucket.valid))
        return out, None


class _FromBuckets(torch.autograd.Function):
    """The inverse: the real tokens of every bucket, back in packed order."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *parts: Tensor) -> Tensor:
        ctx.plan = plan
        out = parts[0].new_empty(plan.tokens, *parts[0].shape[1:])
        for bucket, part in zip(plan.buckets, parts, strict=True):
            out.index_copy_(0, bucket.tokens, part.index_select(0, bucket.valid))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        parts = []
        for bucket in ctx.plan.buckets:
            part = grad.new_zeros(len(bucket.slots), *grad.shape[1:])
            parts.append(part.index_copy_(0, bucket.valid, grad.index_select(0, bucket.tokens)))
        return None, *parts


def _to_buckets(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():  # without the cost of a Function
        return tuple(x.index_select(0, bucket.slots) for bucket in plan.buckets)
    return _apply_to_buckets(x, plan)


_apply_to_buckets: Callable[..., tuple[Tensor, ...]] = _ToBuckets.apply
_from_buckets: Callable[..., Tensor] = _FromBuckets.apply


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, plan: Plan) -> Tensor:
    """Causal attention inside each document. H query heads, G key and value heads. Returns [T, H, D]."""
    if q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16):
        spread = q_THD.shape[1] // k_TGD.shape[1]
        k_THD, v_THD = (x.repeat_interleave(spread, 1) for x in (k_TGD, v_TGD))
        offsets, longest = plan.offsets, plan.longest
        varied = varlen_attn(q_THD, k_THD, v_THD, offsets, offsets, longest, longest, window_size=(-1, 0))
        return cast(Tensor, varied)
    if plan.rows:
        return _causal(q_THD, k_TGD, v_TGD, plan.rows)
    parts = zip(plan.buckets, *(_to_buckets(x, plan) for x in (q_THD, k_TGD, v_TGD)), strict=True)
    return _from_buckets(plan, *(_causal(q, k, v, bucket.rows) for bucket, q, k, v in parts))


def _causal(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rows: int) -> Tensor:
    """Causal attention in rows of one length."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def cached_attention(q_NHD: Tensor, k_BLD: Tensor, v_BLD: Tensor, bias_B1L: Tensor | None) -> Tensor:
    """One new token a row against its cache. B = N * G: the heads of keys and values of a row lie one after another.
    The bias is -inf where a row's cache is not filled. Returns [N, H, D]."""
    # The query heads of a group are laid along the time axis: no copy of keys and values, and a matrix, not a vector.
    q = q_NHD.reshape(k_BLD.shape[0], -1, q_NHD.shape[-1])
    if q.is_cuda or bias_B1L is None:
        mask = None if bias_B1L is None else bias_B1L[None]
        q, k, v = q.unsqueeze(0), k_BLD.unsqueeze(0), v_BLD.unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.reshape(q_NHD.shape)  # some kernels give it back transposed
    # Several rows on a CPU: two batched products are up to three times as fast as the one kernel.
    scores = torch.baddbmm(bias_B1L, q, k_BLD.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v_BLD).view(q_NHD.shape)
