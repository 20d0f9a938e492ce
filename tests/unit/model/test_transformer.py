"""The decoder's own backward passes, its ways to be asked, and how it begins and grows."""

import math
from dataclasses import replace

import pytest
import torch

import toys
from tetrad.data.pack import pack_groups
from tetrad.model.config import RopeScaling
from tetrad.model.transformer import (
    CausalLM,
    RMSNorm,
    ScalarModel,
    _normed,
    _rotate,
    grow_vocabulary,
    initial_head,
    initialise,
    rope_frequencies,
)
from tetrad.types import IGNORE


def test_rotation_and_its_gradient():
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(5, 1, 3, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    assert torch.autograd.gradcheck(lambda x: _rotate(x, cos, sin), (x,))
    out = _rotate(x, cos, sin)
    a, b = x[..., :3], x[..., 3:]
    torch.testing.assert_close(out, torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


def test_norm_and_its_gradient():
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _normed(x, w, 1e-2), (x, weight))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    torch.testing.assert_close(_normed(x, weight, 1e-2), expected)


def test_norm_of_half_precision_is_taken_in_float32():
    norm = RMSNorm(64, 1e-6)
    x = torch.randn(3, 64).bfloat16() * 300  # squares of which bfloat16 would round away
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, norm(x.float()).bfloat16())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_gradients_are_differences(family):
    """The whole model in float64 against finite differences, along random directions."""
    model = toys.causal(seed=1, family=family, tied=False).double()
    packed = toys.packed(toys.documents(4))
    model(packed, "nll").backward()
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for sign in (1e-5, -2e-5, 1e-5):
                parameter += sign * direction
                ends.append(float(model(packed, "nll")))
        slope = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ways_to_ask_agree(temperature):
    model = toys.causal(seed=1)
    packed = toys.packed(toys.documents(5))
    logits = model(packed, "logits") / temperature
    at = (packed.targets_T != IGNORE).nonzero()[:, 0]
    expected = logits[at].log_softmax(-1)
    logprobs, entropy = model(packed, "logprobs", temperature)
    torch.testing.assert_close(logprobs, expected.gather(1, packed.targets_T[at, None])[:, 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    if temperature == 1:
        torch.testing.assert_close(model(packed, "nll"), -logprobs.sum())


def test_scalar_reads_last_tokens_or_each_before_a_label():
    model = toys.scalar(seed=1, bias=0.5)
    documents = toys.documents(5)
    packed = toys.packed(documents)
    every = (model.model(packed) @ model.score.weight[0]) + 0.5
    last = torch.tensor(packed.bounds[1:]) - 1
    torch.testing.assert_close(model(packed), every[last])
    torch.testing.assert_close(model(packed, "values"), every[packed.targets_T != IGNORE])
    assert "bias" not in dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["dropout", "token_dropout"])
def test_dropout_acts_in_training_only(kind):
    model = toys.causal(seed=1)
    packed, again, other = (toys.CPU.put(pack_groups([toys.documents(5)], [0], [key])) for key in (1, 1, 2))
    model.eval()
    before = model(packed, "logits")
    setattr(model.model, kind, 0.5)
    assert torch.equal(model(packed, "logits"), before)
    model.train()
    first = model(packed, "logits")
    assert not torch.equal(first, before)
    assert torch.equal(model(again, "logits"), first)
    assert not torch.equal(model(other, "logits"), first)


def test_token_dropout_takes_whole_tokens():
    model = toys.causal(seed=1, layers=1).train()
    model.model.token_dropout = 1.0
    packed = toys.CPU.put(pack_groups([[toys.document(toys.ids(6, i)) for i in range(2)]], [0], [1]))
    logits = model(packed, "logits")
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))  # no token is seen: all positions are alike


def test_llama3_frequencies():
    """Short waves as they are, long ones slowed by the factor, a ramp between (Llama 3's rope_scaling)."""
    plain = toys.config("llama", head_dim=64, rope_theta=500_000.0)
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    base = rope_frequencies(plain)
    scaled = rope_frequencies(replace(plain, rope_scaling=scaling))
    for before, after in zip(base.tolist(), scaled.tolist(), strict=True):
        wave = 2 * math.pi / before
        if wave < 8192 / 4:
            assert after == pytest.approx(before)
        elif wave > 8192:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (8192 / wave - 1) / 3
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before, rel=1e-5)
    assert torch.equal(base[:2], scaled[:2])


def test_positions_are_relative():
    """Rotary positions: what counts is the distance, so a document's place in a pack can't."""
    model = toys.causal(seed=1)
    packed = toys.packed([toys.document(toys.ids(9, 1))])
    moved = replace(packed, positions_T=packed.positions_T + 17)
    torch.testing.assert_close(model(moved, "logits"), model(packed, "logits"), rtol=0, atol=1e-5)
    mixed = replace(packed, positions_T=packed.positions_T.flip(0))
    assert (model(mixed, "logits") - model(packed, "logits")).abs().max() > 1e-2


def test_initial_weights():
    model, again, other = (CausalLM(toys.config(vocab_size=500, init_std=0.02)) for _ in range(3))
    for found, seed in ((model, 1), (again, 1), (other, 2)):
        initialise(found, seed)
    weight = model.model.embed_tokens.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(weight, again.model.embed_tokens.weight)
    assert not torch.equal(weight, other.model.embed_tokens.weight)
    attention = model.model.layers[0].self_attn
    assert not attention.q_proj.bias.any()
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_initial_head():
    head = initial_head(400, 3)
    assert head.shape == (1, 400)
    assert float(head.std()) == pytest.approx(401**-0.5, rel=0.1)
    assert torch.equal(head, initial_head(400, 3))


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows(tied):
    model = toys.causal(seed=1, tied=tied)
    packed = toys.packed(toys.documents(3))
    before = model(packed, "logits")
    mean = model.model.embed_tokens.weight.mean(0)
    grow_vocabulary(model, 43)
    assert model.config.vocab_size == 43
    after = model(packed, "logits")
    assert after.shape[1] == 43
    torch.testing.assert_close(after[:, :40], before)
    torch.testing.assert_close(model.model.embed_tokens.weight[42], mean)
    assert model.head_weight.shape == (43, 32)
    model(packed, "nll").backward()
    assert model.model.embed_tokens.weight.grad is not None
    grow_vocabulary(model, 20)
    assert model.config.vocab_size == 43


def test_tied_models_share_one_matrix():
    model = toys.causal()
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.head_weight is model.model.embed_tokens.weight
    assert isinstance(toys.scalar(), ScalarModel)
