"""What the models compute on a GPU, as far as it shows without one: precision, and what is waited for."""

import dataclasses
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from fake_cuda import CUDA, fake_cuda
from tetrad.model.attention import Bucket, packed_attention, plan_for
from tetrad.model.transformer import CausalLM, RMSNorm, ScalarModel, narrowed, on_meta
from tetrad.types import Packed
from toys import config, documents, randomise, scalar
from toys import packed as pack


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def on_gpu(kind, packed: Packed, **changes) -> tuple[nn.Module, Packed]:
    """A model without numbers and a pack as it stands on a GPU."""
    model = on_meta(kind, config(**changes))
    for owner in model.modules():
        for name, x in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(torch.empty(x.shape, device=CUDA), requires_grad=False))
        for name, x in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.empty(x.shape, device=CUDA))

    def like(x: Tensor, dtype=torch.int64) -> Tensor:
        return torch.empty(len(x), dtype=dtype, device=CUDA)

    tensors = {name: like(getattr(packed, name)) for name in ("ids_T", "positions_T", "targets_T", "labelled_N")}
    return model, dataclasses.replace(packed, **tensors, offsets=like(packed.offsets, torch.int32))


@pytest.fixture
def packed() -> Packed:
    return pack(documents(4))


def test_norms_are_float32_under_autocast():
    norm, x = RMSNorm(64, 1e-6), torch.randn(50, 64) * 3
    with torch.no_grad(), bf16():
        narrow = norm(x)
    torch.testing.assert_close(narrow, norm(x), rtol=0, atol=0)


def test_scalars_are_float32_under_autocast(packed):
    """Rounded to 16 bit, two of three close scores are the same."""
    model = scalar(seed=1)
    with torch.no_grad(), bf16():
        hidden = model.model(packed)
        read = model(packed, "both")
    expected = model.read(hidden, packed, "both")
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    assert not torch.equal(read, read.bfloat16().float())


@pytest.mark.parametrize("want", ["nll", "logprobs"])
def test_a_forward_waits_for_nothing(packed, want):
    """Nothing is counted, listed or copied to the GPU within it; logits are no rounded numbers; keys and values are
    not repeated for the query heads that share them."""
    with fake_cuda() as calls:
        model, moved = on_gpu(CausalLM, packed)
        calls.calls.clear()
        model(moved, want)
    assert not calls.copies_to_gpu()
    assert not calls.named("nonzero") and not calls.named("repeat_interleave")
    [(given, (logits,))] = calls.named("mm.dtype")
    assert given[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    attended = calls.named("varlen")
    assert len(attended) == 2 and all(out[0].dtype == torch.bfloat16 for _, out in attended)
    assert not calls.named("scaled_dot_product")


def test_a_scalar_model_waits_for_nothing(packed):
    with fake_cuda() as calls:
        model, moved = on_gpu(ScalarModel, packed)
        calls.calls.clear()
        assert model(moved, "both").dtype == torch.float32
    assert not calls.copies_to_gpu() and not calls.named("nonzero")


def test_float32_has_a_kernel_without_the_square(monkeypatch):
    """Grouped heads would leave only the one that holds all scores."""
    given, real = [], nn.functional.scaled_dot_product_attention

    def attended(q, k, v, **how):
        given.append((q.shape[1], k.shape[1], how.get("enable_gqa", False)))
        return real(q, k, v, **how)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attended)
    bounds = (0, 5, 12, 14)
    plan = dataclasses.replace(plan_for(bounds, torch.device("cpu")), parts=())
    sizes = [(bucket.rows, *(len(x) for x in (bucket.slots, bucket.tokens, bucket.valid))) for bucket in plan.buckets]
    with fake_cuda(torch.float32):
        q, k = (torch.empty(14, heads, 8, device=CUDA) for heads in (4, 2))
        fakes = (torch.empty(n, dtype=torch.int64, device=CUDA) for _, *counts in sizes for n in counts)
        plan.__dict__["buckets"] = tuple(Bucket(rows, *islice(fakes, 3)) for rows, *_ in sizes)
        assert packed_attention(q, k, k, plan).shape == q.shape
    assert set(given) == {(4, 4, False)}


@pytest.mark.parametrize(("kind", "want"), [(CausalLM, "logprobs"), (ScalarModel, "scores")])
def test_frozen_matrices_in_16_bit_are_the_same_numbers(packed, kind, want):
    """Autocast rounds them to the same ones each time; embeddings, norms and heads are what they were."""
    read, sizes = [], []
    for narrow in (False, True):
        model = kind(config(tied=False) if kind is CausalLM else config())
        randomise(model, seed=4)
        model.requires_grad_(False)
        if narrow:
            narrowed(model, torch.bfloat16)
        sizes.append(sum(p.nbytes for p in model.model.layers.parameters()))
        with bf16():
            out = model(packed, want)
        read.append(out[0] if isinstance(out, tuple) else out)
    assert torch.equal(*read)
    assert sizes[1] < 0.6 * sizes[0]
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
