"""What PPO promises (and known systems got wrong): read off the stage's own functions, on small random models."""

from dataclasses import replace

import pytest
import torch

import ppo_toys
import toys
from tetrad.inference.completions import Completion
from tetrad.objectives import ppo
from tetrad.reward.model import reward_function, score_sequences
from tetrad.rl.minibatches import minibatches
from tetrad.rl.models import Models
from tetrad.rl.rewards import token_rewards, whitened
from tetrad.rl.rollout import read_logprobs, read_values
from tetrad.settings.ppo import Ppo
from tetrad.train.ppo import actor_terms, learn

S = Ppo(batch_size=12, max_new_tokens=10, ppo_epochs=2, num_minibatches=3, actor_lr=1e-3, critic_lr=1e-3, steps=10)
VOCAB = 12  # so few that one reply in twelve ends at each token
ASKED = ppo_toys.questions(12, VOCAB)


def some_models(s: Ppo = S, pad: int = toys.PAD, other: bool = False) -> Models:
    """Rewards are a random reward model's. other: the reference is not the actor."""
    actor = toys.causal(seed=1, pad_id=pad, vocab_size=VOCAB)
    reward = reward_function([toys.scalar(seed=2, vocab_size=VOCAB)], toys.CPU, 256)
    reference = toys.causal(seed=3, vocab_size=VOCAB) if other else None
    return ppo_toys.four_models(s, actor, toys.scalar(seed=4, vocab_size=VOCAB), reward, reference)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_first_mini_batch(temperature, dropout):
    """Before the first step the ratio is 1, however the mini-batch is packed, and dropout is off."""
    s = replace(S, temperature=temperature)
    four = some_models(s)
    four.actor.model.dropout = dropout
    four.actor.train()
    made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, s, (0, 0)), s)
    for micro_batch_tokens in (32, 4096):
        for micro in next(minibatches(made, s, (0, 0), micro_batch_tokens, toys.CPU)):
            logprobs, _ = four.actor(micro.packed, "logprobs", s.temperature)
            assert (torch.exp(logprobs - micro.data.old_logprobs) - 1).abs().max() <= 1e-5
            terms = {term.name: term for term in actor_terms(s)(four.actor, micro)}
            assert float(terms["ratio"].sum) == pytest.approx(micro.counts["tokens"], rel=1e-5)
            assert float(terms["clip_fraction"].sum) == 0
            assert float(terms["approx_kl"].sum) <= 1e-8


def test_dropout_is_off_in_all_four():
    """Each function that reads with a model sees to it itself."""
    four = some_models()
    rollout = ppo_toys.sampled(four, ASKED, S, (0, 0))
    scorer = toys.scalar(seed=2, vocab_size=VOCAB)
    found = []
    for dropout in (0.0, 0.5):
        for model in (four.actor, four.reference, four.critic, scorer):
            model.model.dropout = dropout
            model.train()
        scores = torch.tensor(reward_function([scorer], toys.CPU, 256)(rollout.samples))
        made, _ = ppo_toys.experience(four, rollout, S)
        four.actor.train()
        again = ppo_toys.sampled(four, ASKED, S, (0, 0)).sampler_logprobs_BT
        found.append((scores, made.logprobs, made.ref_logprobs, made.values, again))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 4096])
def test_kl_to_the_reference_starts_at_exactly_nothing(micro_batch_tokens):
    four = some_models()
    made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, S, (0, 0)), S, micro_batch_tokens)
    assert made.logprobs.abs().max() > 0
    assert torch.equal(made.logprobs, made.ref_logprobs)
    learn(replace(four, micro_batch_tokens=micro_batch_tokens), made, S, (0, 0))
    after, _ = ppo_toys.experience(four, made.rollout, S, micro_batch_tokens)
    assert not torch.equal(after.logprobs, made.logprobs)
    assert torch.equal(after.ref_logprobs, made.ref_logprobs)


def test_sampling_and_logprobs_have_one_temperature():
    s = replace(S, temperature=0.7)
    four = some_models(s)
    rollout = ppo_toys.sampled(four, ASKED, s, (0, 0))
    mask = rollout.mask_BT
    gap = (read_logprobs(four.actor, rollout, 4096, toys.CPU, 0.7) - rollout.sampler_logprobs_BT).abs()
    assert gap.max() <= 1e-4
    assert (read_logprobs(four.actor, rollout, 4096, toys.CPU, 1.0) - rollout.sampler_logprobs_BT).abs()[
        mask
    ].max() > 0.05


def test_layout_of_a_rollout():
    """Position t of a row is reply token t; the document's labels are exactly the reply's tokens."""
    four = some_models()
    rollout = ppo_toys.sampled(four, ASKED, S, (0, 0))
    lengths = [len(sample.response_ids) for sample in rollout.samples]
    assert min(lengths) < max(lengths) == rollout.mask_BT.shape[1] == S.max_new_tokens
    assert rollout.mask_BT.sum(1).tolist() == lengths
    for sample, document, finished, question in zip(
        rollout.samples, rollout.documents, rollout.finished_B.tolist(), ASKED, strict=True
    ):
        assert sample.prompt_ids == question.ids
        assert document.ids[document.train].tolist() == list(sample.response_ids)
        assert tuple(document.ids.tolist()) == question.ids + sample.response_ids
        assert finished == (sample.response_ids[-1] == toys.EOS)
        assert toys.EOS not in sample.response_ids[:-1]
    assert 0 < rollout.finished_B.sum() < len(ASKED)


def test_values_stand_before_their_tokens():
    """The value of token t is the critic's number after the prompt and t tokens: it hasn't seen the token."""
    four = some_models()
    rollout = ppo_toys.sampled(four, ASKED[:4], S, (0, 0))
    values, after = read_values(four.critic, rollout, 64, toys.CPU)
    whole = torch.tensor(
        score_sequences(
            four.critic, [toys.document(s.prompt_ids + s.response_ids) for s in rollout.samples], toys.CPU, 64
        )
    )
    torch.testing.assert_close(after, whole.float(), rtol=0, atol=1e-5)
    for row, sample in enumerate(rollout.samples):
        cut = [toys.document(sample.prompt_ids + sample.response_ids[:t]) for t in range(len(sample.response_ids))]
        expected = torch.tensor(score_sequences(four.critic, cut, toys.CPU, 64)).float()
        torch.testing.assert_close(values[row, : len(cut)], expected, rtol=0, atol=1e-5)
        assert not values[row, len(cut) :].any()


def test_score_lands_on_the_last_token_and_moves_with_the_end():
    four = some_models(other=True)
    rollout = ppo_toys.sampled(four, ASKED, S, (0, 0))
    made, rewards = ppo_toys.experience(four, rollout, replace(S, kl_coef=0.0, missing_eos_penalty=0.0))
    scores = torch.tensor(four.reward.total(four.reward.by_source(rollout.samples))).float()
    last = torch.tensor([len(sample.response_ids) - 1 for sample in rollout.samples])
    assert len(last.unique()) > 2
    expected = torch.zeros_like(rewards).scatter_(1, last[:, None], scores[:, None].clamp(-5, 5))
    assert torch.equal(rewards, expected)
    kl = made.logprobs - made.ref_logprobs
    priced = token_rewards(replace(S, missing_eos_penalty=0.0), scores, made.logprobs, made.ref_logprobs, rollout, 0.25)
    torch.testing.assert_close(priced, torch.where(rollout.mask_BT, expected - 0.25 * kl, 0), rtol=0, atol=1e-6)


def test_the_end_is_terminal():
    """With gamma = lambda = 1 every return is the sum of the rewards that are left: nothing is bootstrapped."""
    s = replace(S, gamma=1.0, gae_lambda=1.0)
    four = some_models(other=True)
    made, rewards = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, s, (0, 0)), s)
    left = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(made.returns, torch.where(made.rollout.mask_BT, left, 0), rtol=0, atol=1e-4)


def test_missing_end_is_paid_after_the_clip():
    """Else a score far above the clip would hide the penalty."""
    four = some_models()
    rollout = ppo_toys.sampled(four, ASKED, S, (0, 0))
    zeros = torch.zeros_like(rollout.sampler_logprobs_BT)
    s = replace(S, reward_clip=5.0, missing_eos_penalty=1.5)
    for score, end in ((100.0, 5.0), (-100.0, -5.0), (2.0, 2.0)):
        paid = token_rewards(s, torch.full((12,), score), zeros, zeros, rollout, 0.1).sum(1)
        assert torch.equal(paid, torch.where(rollout.finished_B, end, end - 1.5))
    off = token_rewards(replace(s, reward_clip=0.0), torch.full((12,), 100.0), zeros, zeros, rollout, 0.1).sum(1)
    assert torch.equal(off, torch.where(rollout.finished_B, 100.0, 98.5))


def test_kl_coefficient_has_an_effect():
    found = {}
    for beta in (0.0, 1.0):
        s = replace(S, kl_coef=beta)
        four = some_models(s, other=True)
        made, _ = ppo_toys.iterate(four, ASKED, s, (0, 0))
        assert (made.logprobs - made.ref_logprobs).abs().max() > 0.1
        found[beta] = weights(four.actor)
    assert relative(found[0.0], found[1.0]) > 1e-3


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    four = some_models(other=True)
    made, rewards = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, S, (0, 0)), S)
    mask = made.rollout.mask_BT
    assert abs(float(made.advantages[mask].mean())) < 1e-6
    assert float(made.advantages[mask].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float((made.returns - made.values)[mask].mean())) > 1e-2  # returns are those before whitening
    white = whitened(rewards + 3, mask, toys.CPU, shift_mean=shift_mean)[mask]
    assert float(white.mean()) == pytest.approx(0 if shift_mean else float(rewards[mask].mean()) + 3, abs=1e-5)
    assert float(white.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_end_token_counts_when_it_is_also_the_pad():
    """A mask made of `ids != pad` would hide the end token: ours goes by length."""
    found = []
    for pad in (toys.PAD, toys.EOS):
        four = some_models(pad=pad)
        made, learned = ppo_toys.iterate(four, ASKED, S, (0, 0))
        finished = made.rollout.finished_B
        last = made.rollout.mask_BT.sum(1) - 1
        assert made.logprobs[finished, last[finished]].abs().min() > 0
        found.append((made, learned, weights(four.actor)))
    assert torch.equal(found[0][0].logprobs, found[1][0].logprobs)
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("mini", [1, 3])
def test_micro_batch_size_changes_rounding_only(mini):
    s = replace(S, num_minibatches=mini, entropy_coef=0.01)
    found = []
    for micro_batch_tokens in (4096, 48, 1):
        four = some_models(s, other=True)
        made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, s, (0, 0)), s)
        learned = learn(replace(four, micro_batch_tokens=micro_batch_tokens), made, s, (0, 0))
        found.append((learned, weights(four.actor), weights(four.critic)))
    for learned, actor, critic in found[1:]:
        assert relative(actor, found[0][1]) <= 1e-5
        assert relative(critic, found[0][2]) <= 1e-5
        for name in ("policy_loss", "value_loss", "entropy", "actor_grad_norm", "critic_grad_norm"):
            assert learned[name] == pytest.approx(found[0][0][name], rel=1e-5, abs=1e-6), name


def test_epochs_read_every_row_once_in_fresh_order():
    four = some_models()
    made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, S, (0, 0)), S)

    def parts(key: tuple[int, int]) -> list[tuple[str, ...]]:
        found = minibatches(made, S, key, 4096, toys.CPU)
        return [tuple(place for micro in micros for place in micro.packed.where) for micros in found]

    first = parts((0, 0))
    assert len(first) == S.ppo_epochs * S.num_minibatches
    assert {len(part) for part in first} == {4}
    for epoch in (first[:3], first[3:]):
        assert sorted(place for part in epoch for place in part) == sorted(str(i) for i in range(12))
    assert set(first[:3]) != set(first[3:])
    assert parts((0, 0)) == first
    assert parts((0, 1)) != first
    assert parts((1, 0)) != first


def test_micro_batches_carry_their_own_numbers():
    """A permuted, packed token must meet its own advantage, old log-probability, value and return."""
    four = some_models(other=True)
    made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, S, (0, 0)), S)
    mask = made.rollout.mask_BT
    arrays = {
        "old_logprobs": made.logprobs,
        "values": made.values,
        "advantages": made.advantages,
        "returns": made.returns,
    }
    for micros in minibatches(made, S, (0, 0), 64, toys.CPU):
        for micro in micros:
            rows = [int(place) for place in micro.packed.where]
            for name, whole in arrays.items():
                assert torch.equal(getattr(micro.data, name), torch.cat([whole[i][mask[i]] for i in rows])), name
            assert micro.counts["tokens"] == int(mask[rows].sum())


def test_critic_warms_up_alone():
    s = replace(S, critic_warmup=2)
    four = some_models(s)
    actor, critic = weights(four.actor), weights(four.critic)
    for step in (0, 1):
        _, learned = ppo_toys.iterate(four, ASKED, s, (0, step))
        assert torch.equal(weights(four.actor), actor)
        assert not torch.equal(weights(four.critic), critic)
        assert "policy_loss" not in learned
    ppo_toys.iterate(four, ASKED, s, (0, 2))
    assert not torch.equal(weights(four.actor), actor)


def test_the_frozen_stay_frozen():
    four = some_models(other=True)
    before = weights(four.reference)
    actor, critic = weights(four.actor), weights(four.critic)
    for step in range(3):
        ppo_toys.iterate(four, ASKED, S, (0, step))
    assert torch.equal(weights(four.reference), before)
    assert all(p.grad is None for p in four.reference.parameters())
    assert not torch.equal(weights(four.actor), actor)
    assert not torch.equal(weights(four.critic), critic)


def test_replies_are_scored_as_sampled():
    """By their ids: a text that would be tokenised otherwise, or look finished, must not be read again."""
    reward = reward_function([toys.scalar(seed=2)], toys.CPU, 64)
    plain = Completion((5, 6), (7, 8, 9), (), "w7 w8 w9")
    assert reward([plain]) == reward([replace(plain, text="w9 w9 <|endoftext|>")])
    assert reward([plain]) != reward([replace(plain, response_ids=(7, 8, 9, toys.EOS))])


@pytest.mark.parametrize("micro_batch_tokens", [1, 23, 4096])
def test_score_does_not_depend_on_batch_or_packing(micro_batch_tokens):
    model = toys.scalar(seed=2)
    documents = toys.documents(17)
    expected = [score_sequences(model, [document], toys.CPU, 4096)[0] for document in documents]
    assert len({round(score, 3) for score in expected}) > 10
    assert score_sequences(model, documents, toys.CPU, micro_batch_tokens) == pytest.approx(expected, abs=1e-5)
    backwards = score_sequences(model, documents[::-1], toys.CPU, micro_batch_tokens)
    assert backwards[::-1] == pytest.approx(expected, abs=1e-5)


def test_entropy_bonus_has_an_effect():
    found = []
    for bonus in (0.0, 0.5):
        s = replace(S, entropy_coef=bonus, actor_lr=5e-3)
        four = some_models(s)
        made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, s, (0, 0)), s)
        learn(four, made, s, (0, 0))
        packed = toys.packed(made.rollout.documents)
        found.append(float(four.actor(packed, "logprobs")[1].detach().mean()))
    assert found[1] > found[0] + 0.01


def test_kl_is_summed_over_tokens():
    four = some_models(other=True)
    made, rewards = ppo_toys.experience(four, ppo_toys.sampled(four, ASKED, S, (0, 0)), S, beta=1.0)
    scores = (
        torch.tensor(four.reward.total(four.reward.by_source(made.rollout.samples))).float().clamp(-5, 5)
        - (~made.rollout.finished_B).float()
    )
    kl = ppo.kl_tokens(made.logprobs, made.ref_logprobs, made.rollout.mask_BT).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - kl, rtol=1e-5, atol=1e-5)
