"""Attention over packed documents and over a cache, against the formula."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tetrad.model.attention import cached_attention, packed_attention, plan_for

CPU = torch.device("cpu")
LENGTHS = [(7,), (1,), (5, 5, 5), (40, 1, 3, 90, 2), (1, 1, 1), (200, 100, 60, 30, 10, 5, 2), (25, 24, 49, 1, 50)]


def bounds_of(lengths):
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def by_formula(q, k, v, bounds):
    """softmax(q k / sqrt(D)) v, each document alone, one head after another."""
    spread = q.shape[1] // k.shape[1]
    out = []
    for start, stop in pairwise(bounds):
        heads = []
        for head in range(q.shape[1]):
            a, b, c = (x[start:stop, h] for x, h in ((q, head), (k, head // spread), (v, head // spread)))
            scores = a @ b.T / a.shape[1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ c)
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


def inputs(tokens, heads=4, groups=2, width=6):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packed_is_the_formula(lengths, groups, device):
    """Values and gradients; a padded slot would show in either. A GPU plan has no parts, which works here too."""
    bounds = bounds_of(lengths)
    ours, theirs = (inputs(bounds[-1], groups=groups) for _ in range(2))
    weight = torch.randn(bounds[-1], 4, 6, dtype=torch.float64)
    plan = plan_for(bounds, CPU)
    a = packed_attention(*ours, replace(plan, parts=()) if device == "cuda" else plan)
    b = by_formula(*theirs, bounds)
    torch.testing.assert_close(a, b)
    for x in (a, b):
        (x * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_plan_holds_every_token_once_and_little_else(lengths):
    plan = plan_for(bounds_of(lengths), CPU)
    tokens = torch.cat([bucket.tokens for bucket in plan.buckets])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert plan.longest == max(lengths)
    assert plan.offsets.tolist() == list(bounds_of(lengths))
    for bucket in plan.buckets:
        width = len(bucket.slots) // bucket.rows
        assert torch.equal(bucket.slots[bucket.valid], bucket.tokens)
        assert len(bucket.tokens) >= bucket.rows * min(0.67 * width, max(width - 24, 0))


def test_an_empty_document_takes_no_slot():
    plan = plan_for((0, 3, 3, 5), CPU)
    assert sorted(torch.cat([bucket.tokens for bucket in plan.buckets]).tolist()) == [0, 1, 2, 3, 4]
    assert sum(bucket.rows for bucket in plan.buckets) == 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cached_is_the_last_row(groups):
    """Rows of 5, 1 and 8 filled positions; what lies beyond may be anything finite."""
    filled, longest = [5, 1, 8], 8
    q, k, v = (torch.randn(3, n, 6, *rest) for n, rest in ((4, ()), (groups, ()), (groups, ())))
    k, v = (torch.randn(3, groups, longest, 6) for _ in range(2))
    bias = torch.zeros(3, groups, 1, longest)
    for row, n in enumerate(filled):
        bias[row, ..., n:] = -torch.inf
    out = cached_attention(q, k.flatten(0, 1), v.flatten(0, 1), bias.flatten(0, 1))
    for row, n in enumerate(filled):
        whole = torch.cat([torch.zeros(n - 1, 4, 6), q[row][None]])
        keys, values = (x[row, :, :n].transpose(0, 1) for x in (k, v))
        torch.testing.assert_close(out[row], by_formula(whole, keys, values, (0, n))[-1], rtol=1e-5, atol=1e-6)
        alone = cached_attention(q[row][None], k[row, :, :n], v[row, :, :n], None)
        torch.testing.assert_close(out[row], alone[0], rtol=1e-5, atol=1e-6)
