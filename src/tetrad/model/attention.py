"""Causal attention over packed documents, and over a cache. The only module that calls attention kernels.

Packed: documents of one micro-batch lie one after another, followed by padding, if any. They are sorted into buckets
of similar length, each bucket is one causal kernel call, and its few padded slots lie to the right, where no real query
looks: so no mask is needed, and no document sees another. On a GPU with 16-bit compute one variable-length kernel takes
them all.

A prefix that documents share (on a CPU only) adds one more call for all that continue it: their queries against its
keys, in buckets of records of similar sizes. Two partial softmaxes are merged by their log-sum-exps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tetrad.types import Prefix

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length. slots: [B * L] the token in each slot (the last one again where padded);
    tokens, valid: [n] each real token and its slot."""

    rows: int
    slots: Tensor
    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Part:
    """One of the calls that make up the attention: each document to itself, causally, if keys and queries are the same
    bucket; else all that continues a prefix, one row each, to the prefix. bias: -inf at padded keys, if there are
    any."""

    queries: Bucket
    keys: Bucket
    bias: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.queries is self.keys


@dataclass(frozen=True)
class Plan:
    """How attention runs on one packed micro-batch; built once, used by every layer."""

    bounds: Sequence[int]
    offsets: Tensor
    parts: tuple[Part, ...] = ()  # on a CPU; single documents come first, then shared prefixes

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @cached_property
    def longest(self) -> int:
        return max((stop - start for start, stop in pairwise(self.bounds)), default=0)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Made where a kernel reads them: the variable-length one does not."""
        return _buckets(self.bounds, self.offsets.device)


def plan_for(
    bounds: Sequence[int], device: torch.device, prefixes: Sequence[Prefix] = (), offsets: Tensor | None = None
) -> Plan:
    """bounds: the D + 1 offsets of the documents; offsets: the same as int32 on the device, if they are there."""
    plan = Plan(bounds, torch.tensor(bounds, dtype=torch.int32, device=device) if offsets is None else offsets)
    if device.type != "cpu" and not prefixes:
        return plan
    alone = (Part(bucket, bucket) for bucket in plan.buckets)
    return replace(plan, parts=(*alone, *_shared(bounds, prefixes, device)))


def _buckets(bounds: Sequence[int], device: torch.device) -> tuple[Bucket, ...]:
    start = torch.tensor(bounds[:-1])
    length = torch.tensor(bounds[1:]) - start
    by_length = torch.argsort(length, descending=True, stable=True).tolist()
    sizes = length.tolist()

    def joins(group: Sequence[int], document: int) -> bool:
        # A bucket wastes at most a third of its slots; tiny documents share one: a call costs more than their padding.
        widest: int = sizes[group[0]]
        return int(sizes[document]) >= min(0.67 * widest, max(widest - 24, 0))

    groups = _grouped([document for document in by_length if sizes[document]], joins)
    return tuple(_bucket(torch.tensor(group), start, length, device) for group in groups)


def _shared(bounds: Sequence[int], prefixes: Sequence[Prefix], device: torch.device) -> Iterator[Part]:
    """Calls from what continues a prefix to the prefix: records of similar sizes in one."""
    if not prefixes:
        return
    start = torch.tensor([(bounds[p.document + 1], bounds[p.document]) for p in prefixes])
    length = torch.tensor([(bounds[p.last + 1], bounds[p.document] + p.length) for p in prefixes]) - start
    by_length = torch.argsort(length[:, 1], descending=True, stable=True).tolist()
    groups = _grouped(by_length, lambda group, record: _alike(length[[*group, record]]))
    for group in map(torch.tensor, groups):
        queries, keys = (_bucket(group, start[:, side], length[:, side], device) for side in (0, 1))
        bias = torch.full((len(keys.slots),), -torch.inf, device=device).index_fill_(0, keys.valid, 0.0)
        padded = len(keys.valid) < len(keys.slots)
        yield Part(queries, keys, bias.view(len(group), 1, 1, -1) if padded else None)


def _grouped(items: Iterable[int], joins: Callable[[list[int], int], bool]) -> list[list[int]]:
    """Each item in the group of the one before it if it joins that, else in a new one."""
    groups: list[list[int]] = []
    for item in items:
        if groups and joins(groups[-1], item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _alike(sizes_N2: Tensor) -> bool:
    """Whether rows with these queries and keys waste at most a sixth as one call, or less than separate calls cost."""
    rows, products = len(sizes_N2), int(sizes_N2.prod(1).sum())
    return rows * int(sizes_N2.amax(0).prod()) <= max(1.2 * products, products + 2048 * rows)


def _bucket(group: Tensor, start: Tensor, length: Tensor, device: torch.device) -> Bucket:
    width = int(length[group].max())
    offset = torch.arange(width)
    inside = offset < length[group, None]
    token = start[group, None] + torch.minimum(offset[None], length[group, None] - 1)
    valid = inside.flatten().nonzero()[:, 0]
    slots = token.flatten()
    return Bucket(len(group), slots.to(device), slots[valid].to(device), valid.to(device))


class _InParts(torch.autograd.Function):
    """Attention of all parts of a plan, on [T, H, D] and [T, G, D]; what follows the last document is padding and gets
    zeros. A part's own backward, given the overall output and log-sum-exp, is that part's share of the gradient (ring
    attention, Liu et al. 2023). Rows of buckets, whose sizes differ each time, are laid out again for it: nothing kept
    has their size."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        out = _unfilled(q, plan)
        logsum = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in plan.parts:
            attended, sums = _flash(*_rows_of(part, q, k, v), 0.0, part.causal, attn_mask=_bias(part, q))
            if not part.causal:
                own, own_sums = (_in_rows(x, part.queries) for x in (out, logsum))
                attended = own.lerp_(attended, torch.sigmoid(sums - own_sums).unsqueeze_(-1))
                sums = torch.logaddexp(own_sums, sums)
            for x, rows_of_x in ((out, attended), (logsum, sums)):
                x.index_copy_(0, part.queries.tokens, _of_rows(rows_of_x, part.queries))
        ctx.save_for_backward(q, k, v, out, logsum)
        ctx.plan = plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsum = ctx.saved_tensors
        to = [_unfilled(x, ctx.plan) for x in (q, k, v)]
        for part in ctx.plan.parts:
            whole = (_in_rows(x, part.queries) for x in (out, logsum))
            given = _in_rows(grad, part.queries, padding=False)
            rows = _rows_of(part, q, k, v)
            grads = _flash_backward(given, *rows, *whole, 0.0, part.causal, attn_mask=_bias(part, out))
            for x, rows_of_x, bucket in zip(to, grads, (part.queries, part.keys, part.keys), strict=True):
                new = _of_rows(rows_of_x.unflatten(1, (x.shape[1], -1)).sum(2), bucket)
                if not part.causal:
                    new += x.index_select(0, bucket.tokens)
                x.index_copy_(0, bucket.tokens, new)
        return *to, None


def _unfilled(like: Tensor, plan: Plan) -> Tensor:
    """Room for the output of the parts; zeros at padded tokens."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    out[plan.tokens :].zero_()
    return out


def _rows_of(part: Part, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[B, H, L, D] each: heads of keys and values repeated for each query head that reads them."""
    spread = q.shape[1] // k.shape[1]
    rows = (_in_rows(x, part.keys) for x in (k, v))
    return [_in_rows(q, part.queries), *(x.repeat_interleave(spread, 1) if spread > 1 else x for x in rows)]


def _bias(part: Part, like: Tensor) -> Tensor | None:
    return None if part.bias is None else part.bias.to(like.dtype)


def _in_rows(x: Tensor, bucket: Bucket, *, padding: bool = True) -> Tensor:
    """[T, H, ...] to [B, H, L, ...]. padding: a real token in padded slots, else zeros."""
    if padding or len(bucket.valid) == len(bucket.slots):
        slots = x.index_select(0, bucket.slots)
    else:
        slots = x.new_zeros(len(bucket.slots), *x.shape[1:])
        slots.index_copy_(0, bucket.valid, x.index_select(0, bucket.tokens))
    rows: Tensor = slots.unflatten(0, (bucket.rows, -1))
    return rows.transpose(1, 2)


def _of_rows(rows: Tensor, bucket: Bucket) -> Tensor:
    """[B, H, L, ...] to [n, H, ...], without what was padded."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, bucket.valid)


_in_parts: Callable[..., Tensor] = _InParts.apply


def packed_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, plan: Plan) -> Tensor:
    """Causal attention inside each document. H query heads, G key and value heads. Returns [T, H, D]."""
    if plan.parts:  # 16-bit kernels of a CPU have a backward that is seven times slower
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        return _in_parts(*(x.to(wide) for x in (q_THD, k_TGD, v_TGD)), plan).to(q_THD.dtype)
    if q_THD.is_cuda and q_THD.dtype in (torch.float16, torch.bfloat16):
        return _variable(q_THD, k_TGD, v_TGD, plan)
    attended = [_causal(bucket, *(_in_rows(x, bucket) for x in (q_THD, k_TGD, v_TGD))) for bucket in plan.buckets]
    tokens = torch.cat([bucket.tokens for bucket in plan.buckets])
    return q_THD.new_empty(plan.tokens, *q_THD.shape[1:]).index_copy(0, tokens, torch.cat(attended))


def _variable(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The variable-length kernel, which reads each head of keys and values once for its group where it can."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - loads all of torch.compile: two seconds

    spread, grouped = q.shape[1] // k.shape[1], dict[str, Any]()
    if spread > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        grouped = {"enable_gqa": True}
    elif spread > 1:
        k, v = (x.repeat_interleave(spread, 1) for x in (k, v))
    offsets, longest = plan.offsets, plan.longest
    varied = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **grouped)
    return cast(Tensor, varied)


def _causal(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in the rows of a bucket, [n, H, D]. From padded slots, which no query reads, zeros come back."""
    spread = q.shape[1] // k.shape[1]
    if q.is_cuda and spread > 1:  # in float32 grouped heads have no kernel there but one that takes O(L^2) memory
        k, v = (x.repeat_interleave(spread, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return _of_rows(out, bucket)


def cached_attention(q_NHD: Tensor, k_BLD: Tensor, v_BLD: Tensor, bias_B1L: Tensor | None) -> Tensor:
    """One new token a row against its cache. B = N * G: a row's heads of keys and values lie one after another.
    The bias is -inf where a row's cache is not filled. Returns [N, H, D]."""
    # The query heads of a group are laid along the time axis: no copy of keys and values, and a matrix, not a vector.
    q = q_NHD.reshape(k_BLD.shape[0], -1, q_NHD.shape[-1])
    if q.is_cuda or bias_B1L is None:
        mask = None if bias_B1L is None else bias_B1L[None]
        q, k, v = q.unsqueeze(0), k_BLD.unsqueeze(0), v_BLD.unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.reshape(q_NHD.shape)  # some kernels return it transposed
    # Several rows on a CPU: two batched products are up to three times as fast as the one kernel.
    scores = torch.baddbmm(bias_B1L, q, k_BLD.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v_BLD).view(q_NHD.shape)
