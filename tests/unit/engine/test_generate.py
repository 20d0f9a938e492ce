"""Replies: where they end, what they hold, and the random numbers of each request."""

import numpy as np
import pytest
import torch

import toys
from tetrad.engine.generate import generate, noise
from tetrad.errors import UserError
from tetrad.seeds import generator_for
from tetrad.settings.common import Sampling

PROMPTS = [toys.ids(1 + i % 5, i) for i in range(9)]


def replies(model=None, prompts=PROMPTS, max_new=6, eos=(toys.EOS,), **sampling):
    how = Sampling(max_new=max_new, **sampling)
    uniforms = noise(0, "test", 0, range(len(prompts)), max_new)
    return generate(model or toys.causal(seed=1), prompts, uniforms, how, eos, toys.CPU)


def test_noise_is_each_requests_own():
    rows = noise(3, "rollout", 7, [0, 1, 2], 5)
    assert rows.shape == (3, 5)
    assert torch.equal(noise(3, "rollout", 7, [2], 5)[0], rows[2])
    assert torch.equal(noise(3, "rollout", 7, [2], 3)[0], rows[2, :3])
    expected = generator_for(3, "rollout", 7, 1).random(5, dtype=np.float32)
    assert np.array_equal(rows[1].numpy(), expected)
    for other in (noise(4, "rollout", 7, [0], 5), noise(3, "x", 7, [0], 5), noise(3, "rollout", 8, [0], 5)):
        assert not torch.equal(other[0], rows[0])
    assert noise(3, "rollout", 7, [], 5).shape == (0, 5)


def test_replies_end_at_an_end_token_or_at_their_longest():
    found = replies(eos=(toys.EOS, 7, 9, 11, 13))
    assert {reply.ended for reply in found} == {True, False}
    for reply in found:
        assert reply.ended == (reply.ids[-1] in (toys.EOS, 7, 9, 11, 13))
        assert not set(reply.ids[:-1]) & {toys.EOS, 7, 9, 11, 13}
        assert reply.ended or len(reply.ids) == 6
        assert len(reply.logprobs) == len(reply.ids)


@pytest.mark.parametrize("eos", [(), (999,)])
def test_without_an_end_token_all_are_longest(eos):
    assert {(len(reply.ids), reply.ended) for reply in replies(eos=eos)} == {(6, False)}


def test_every_token_ends():
    assert {(len(reply.ids), reply.ended) for reply in replies(eos=tuple(range(40)))} == {(1, True)}


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_one_token(slots):
    found = replies(max_new=1, slots=slots)
    assert [reply.ids for reply in found] == [reply.ids[:1] for reply in replies()]


def test_no_prompts():
    assert replies(prompts=[]) == []


def test_room():
    """Prompt and reply fill the model's positions to the last; one more is refused before anything is computed."""
    model = toys.causal(seed=1, max_positions=12)
    whole = replies(model, [toys.ids(6, 1)], eos=())
    assert len(whole[0].ids) == 6
    assert [reply.ids for reply in whole] == [r.ids for r in replies(toys.causal(seed=1), [toys.ids(6, 1)], eos=())]
    with pytest.raises(UserError) as raised:
        replies(model, [toys.ids(3, 1), toys.ids(7, 1)])
    assert raised.value.code == "E-DATA-LONG"
    assert "12" in raised.value.what


def test_order_of_replies_is_that_of_prompts():
    model = toys.causal(seed=1)
    together = replies(model, temperature=0.0, slots=2)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        assert replies(model, [prompt], temperature=0.0)[0].ids == reply.ids


def test_weights_are_left_alone():
    model = toys.causal(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replies(model)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
