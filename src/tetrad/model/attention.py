"""Causal attention over packed documents, and over a cache. The only module that knows kernels.

Packed: documents of one micro-batch lie one after another without padding. They are sorted into buckets of like length,
each bucket is one causal kernel call, and its few padded slots lie to the right, where no real query looks: so no mask
is needed, and no document sees another. On a GPU with 16-bit compute one variable-length kernel takes them all.

A prefix that documents share (on a CPU only) is one more call for all that continue it: their queries, without a mask,
against its keys. Two partial softmaxes become one by their log-sum-exps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tetrad.types import Prefix

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """Documents of like length. slots: [B * L] the token in each slot (the last one again where padded);
    tokens, valid: [n] each real token and its slot."""

    rows: int
    slots: Tensor
    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Shared:
    """Where the tokens of a prefix lie, and those of all documents that continue it."""

    prefix: slice
    tails: slice


@dataclass(frozen=True)
class Plan:
    """How one packed micro-batch is attended; made once, used by every layer."""

    tokens: int
    buckets: tuple[Bucket, ...]
    offsets: Tensor
    longest: int
    rows: int  # of documents where all have one length, else 0
    shared: tuple[Shared, ...] = ()


def plan_for(bounds: Sequence[int], device: torch.device, prefixes: Sequence[Prefix] = ()) -> Plan:
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
    shared = tuple(
        Shared(
            slice(bounds[prefix.document], bounds[prefix.document] + prefix.length),
            slice(bounds[prefix.document + 1], bounds[prefix.last + 1]),
        )
        for prefix in prefixes
    )
    return Plan(bounds[-1], buckets, offsets, longest, rows, shared)


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


class _ToPrefixes(torch.autograd.Function):
    """Attention inside documents and to their prefixes, on [T, H, D]. A part's own backward, given the whole's output
    and log-sum-exp, is that part's share of the gradient (ring attention, Liu et al. 2023)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        out, logsum = torch.empty_like(q), q.new_empty(q.shape[:2])
        for bucket in plan.buckets:
            found = _flash(*(_in_rows(x, bucket) for x in (q, k, v)), 0.0, True)
            _put_back((out, logsum), found, bucket)
        for shared in plan.shared:
            part, sums = _flash(_as_row(q[shared.tails]), *(_as_row(x[shared.prefix]) for x in (k, v)), 0.0, False)
            own, sums = logsum[shared.tails], sums[0].transpose(0, 1)
            out[shared.tails].lerp_(part[0].transpose(0, 1), torch.sigmoid(sums - own).unsqueeze_(-1))
            torch.logaddexp(own, sums, out=own)
        ctx.save_for_backward(q, k, v, out, logsum)
        ctx.plan = plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsum = ctx.saved_tensors
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, v))
        for bucket in ctx.plan.buckets:
            rows = (_in_rows(x, bucket) for x in (q, k, v, out, logsum))
            found = _flash_backward(_in_rows(grad, bucket, padding=False), *rows, 0.0, True)
            _put_back((to_q, to_k, to_v), found, bucket)
        for shared in ctx.plan.shared:
            q_, out_, logsum_, grad_ = (_as_row(x[shared.tails]) for x in (q, out, logsum, grad))
            keys = (_as_row(x[shared.prefix]) for x in (k, v))
            found = _flash_backward(grad_, q_, *keys, out_, logsum_, 0.0, False)
            places = (shared.tails, shared.prefix, shared.prefix)
            for to, part, place in zip((to_q, to_k, to_v), found, places, strict=True):
                to[place] += part[0].transpose(0, 1)
        return to_q, to_k, to_v, None


def _in_rows(x: Tensor, bucket: Bucket, *, padding: bool = True) -> Tensor:
    """[T, H, ...] to [B, H, L, ...]. padding: a real token in padded slots, else zeros."""
    if padding:
        slots = x.index_select(0, bucket.slots)
    else:
        slots = x.new_zeros(len(bucket.slots), *x.shape[1:])
        slots.index_copy_(0, bucket.valid, x.index_select(0, bucket.tokens))
    return slots.unflatten(0, (bucket.rows, -1)).transpose(1, 2)


def _put_back(to: Sequence[Tensor], rows: Sequence[Tensor], bucket: Bucket) -> None:
    """The inverse, written into place."""
    for x, found in zip(to, rows, strict=True):
        x.index_copy_(0, bucket.tokens, found.transpose(1, 2).flatten(0, 1).index_select(0, bucket.valid))


def _as_row(x: Tensor) -> Tensor:
    """[n, H, ...] to [1, H, n, ...]."""
    return x.transpose(0, 1).unsqueeze(0)


_to_prefixes: Callable[..., Tensor] = _ToPrefixes.apply


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, plan: Plan) -> Tensor:
    """Causal attention inside each document. H query heads, G key and value heads. Returns [T, H, D]."""
    if plan.shared:
        spread = q_THD.shape[1] // k_TGD.shape[1]
        return _to_prefixes(q_THD, *(x.repeat_interleave(spread, 1) for x in (k_TGD, v_TGD)), plan)
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
