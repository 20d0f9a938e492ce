"""What GRPO and RLOO promise (and known systems got wrong): read off the stage's own functions, on small models."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import grpo_toys
import ppo_toys
import toys
from tetrad.model.lora import ALL, add_adapters, share_weights
from tetrad.model.transformer import CausalLM
from tetrad.objectives import ppo
from tetrad.rl.minibatches import PolicyBatch, minibatches
from tetrad.rl.models import PolicyModels
from tetrad.rl.rollout import read_logprobs
from tetrad.settings.common import Optim
from tetrad.settings.grpo import Grpo
from tetrad.train.grpo import learn, make_batch, terms
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import update

S = Grpo(batch_size=6, samples_per_prompt=4, max_new_tokens=10, num_minibatches=2, epochs=2, actor_lr=1e-3, steps=10)
VOCAB = 12  # so few that one reply in twelve ends at each token
ASKED = ppo_toys.questions(6, VOCAB)
SCORE = ppo_toys.by_ids(lambda ids: (sum(ids) % 7) / 2 - 1)


def some_models(s: Grpo = S, reward: ppo_toys.Reward = SCORE, other: bool = True) -> PolicyModels:
    reference = toys.causal(seed=3, vocab_size=VOCAB) if other else None
    return grpo_toys.two_models(s, toys.causal(seed=1, vocab_size=VOCAB), reward, reference)


def experience(models: PolicyModels, s: Grpo = S) -> PolicyBatch:
    return make_batch(models, grpo_toys.sampled(models, ASKED, s, (0, 0)), s)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss_mean", ["response", "token", "constant"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40])
def test_micro_batches_change_neither_loss_nor_gradient(loss_mean: str, micro_batch_tokens: int) -> None:
    """A mean over each micro-batch, averaged, is another loss where responses differ in length."""
    s = replace(S, loss_mean=loss_mean, num_minibatches=1, epochs=1, max_grad_norm=0.0)
    learned, moved = {}, {}
    for tokens in (4096, micro_batch_tokens):
        models = some_models(s)
        batch = experience(models, s)
        assert len(set(batch.rollout.mask_BT.sum(1).tolist())) > 3
        learned[tokens] = learn(replace(models, micro_batch_tokens=tokens), batch, s, (0, 0))
        moved[tokens] = weights(models.actor)
    for name, value in learned[4096].items():
        assert learned[micro_batch_tokens][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(moved[micro_batch_tokens], moved[4096], rtol=1e-4, atol=1e-5)


def test_each_mean_is_over_the_whole_batch() -> None:
    """By hand: the ratio is 1 before the first update. The three differ."""
    losses = {}
    for loss_mean in ("response", "token", "constant"):
        s = replace(S, loss_mean=loss_mean, num_minibatches=1, epochs=1)
        models = some_models(s)
        batch = experience(models, s)
        mask = batch.rollout.mask_BT
        k3 = ppo.kl_tokens(batch.logprobs, batch.ref_logprobs, mask, "k3")
        totals = torch.where(mask, -batch.advantages + s.kl_coef * k3, 0)
        exact = {
            "response": (totals.sum(1) / mask.sum(1)).mean(),
            "token": totals.sum() / mask.sum(),
            "constant": totals.sum() / (len(mask) * s.max_new_tokens),
        }
        (micros,) = minibatches(batch, s, (0, 0), 40, toys.CPU)
        assert len(micros) > 3
        stats = update(models.actor, models.actor_optimizer, micros, terms(s), toys.CPU)
        losses[loss_mean] = stats.loss
        assert stats.loss == pytest.approx(float(exact[loss_mean]), abs=1e-6)
    assert min(abs(losses[a] - losses[b]) for a in losses for b in losses if a < b) > 1e-4


@pytest.mark.parametrize("advantage", ["normalised", "centred", "leave_one_out"])
def test_a_group_of_equal_scores_teaches_nothing_and_counts(advantage: str) -> None:
    """Its advantages are exactly 0; the mean is over its responses too."""
    first = set()

    def score(ids: tuple[int, ...]) -> float:
        return 0.7 if ids in first else (sum(ids) % 7) / 2 - 1

    s = replace(S, advantage=advantage, kl_coef=0.0, num_minibatches=1, epochs=1, missing_eos_penalty=0.0)
    models = some_models(s, ppo_toys.by_ids(score))
    rollout = grpo_toys.sampled(models, ASKED, s, (0, 0))
    first |= {sample.response_ids for sample in rollout.samples[:4]}
    batch = make_batch(models, rollout, s)
    assert not batch.advantages[:4].any()
    assert batch.advantages[4:].any()
    mask = rollout.mask_BT
    loss = learn(models, batch, s, (0, 0))["policy_loss"]
    means = torch.where(mask, -batch.advantages, 0).sum(1) / mask.sum(1)
    assert loss == pytest.approx(float(means.sum()) / 24, abs=1e-6)
    equal = some_models(s, ppo_toys.by_ids(lambda ids: 0.95))
    before = weights(equal.actor)
    learned = learn(equal, experience(equal, s), s, (0, 0))
    assert learned["policy_loss"] == learned["actor_grad_norm"] == 0
    assert torch.equal(weights(equal.actor), before)


def test_dropout_stands_neither_between_actor_and_reference_nor_in_the_update() -> None:
    s = replace(S, num_minibatches=1, epochs=1)
    models = some_models(s, other=False)
    for model in (models.actor, models.reference):
        model.model.dropout = 0.5
        model.train()
    batch = experience(models, s)
    assert torch.equal(batch.logprobs, batch.ref_logprobs)
    gap = (batch.logprobs - batch.rollout.sampler_logprobs_BT).abs().max()
    assert gap <= 1e-4
    plain = some_models(s, other=False)
    assert torch.equal(batch.logprobs, experience(plain, s).logprobs)
    learned = learn(models, batch, s, (0, 0))
    assert learned["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert learned["kl_loss"] <= 1e-9


def test_the_reference_is_the_base_without_its_adapters() -> None:
    """It shares the base's tensors; nothing but the adapters trains, so that it stays what it was, to the bit."""
    base = toys.causal(seed=1, vocab_size=VOCAB).requires_grad_(False)
    actor = share_weights(CausalLM, base)
    add_adapters(actor, 4, 8.0, ALL, 0)
    kept = deepcopy(base.state_dict())
    models = replace(some_models(), actor=actor, reference=base, actor_optimizer=Optimizer(actor, 1e-2, Optim()))
    batch = experience(models)
    assert torch.equal(batch.logprobs, batch.ref_logprobs)
    learn(models, batch, S, (0, 0))
    after = make_batch(models, batch.rollout, S)
    assert torch.equal(after.ref_logprobs, batch.ref_logprobs)
    assert not torch.equal(after.logprobs, batch.logprobs)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
    untouched = grpo_toys.two_models(S, toys.causal(seed=1, vocab_size=VOCAB), SCORE)
    again = read_logprobs(untouched.actor, batch.rollout, 4096, toys.CPU, 1.0)
    assert torch.equal(again, after.ref_logprobs)


def test_kl_in_the_reward_is_the_whole_responses() -> None:
    s = replace(S, kl_in="reward", kl_coef=0.3, advantage="centred", missing_eos_penalty=0.0)
    models = some_models(s)
    batch = experience(models, s)
    kl = (batch.logprobs - batch.ref_logprobs).sum(1)
    rewards = (batch.scores - 0.3 * kl).view(-1, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)).flatten()
    assert kl.abs().max() > 0.1
    for row, mask, value in zip(batch.advantages, batch.rollout.mask_BT, expected, strict=True):
        torch.testing.assert_close(row[mask], value.expand(int(mask.sum())), rtol=1e-4, atol=1e-5)
    (micro, *_), *_ = minibatches(batch, s, (0, 0), 4096, toys.CPU)
    assert "kl_loss" not in {term.name for term in terms(s)(models.actor, micro)}


def test_clipping_goes_further_upwards_where_asked() -> None:
    """DAPO: a ratio of 1.25 is within 1 + 0.28 and beyond 1 + 0.2."""
    models = some_models()
    batch = experience(models)
    (micro, *_), *_ = minibatches(batch, replace(S, num_minibatches=1), (0, 0), 4096, toys.CPU)
    data = replace(micro.data, old_logprobs=micro.data.old_logprobs - 0.2231, advantages=micro.data.advantages.abs())
    clipped = {
        high: float(terms(replace(S, clip_high=high))(models.actor, replace(micro, data=data))[1].sum)
        for high in (0.0, 0.28)
    }
    assert clipped[0.28] == 0 < clipped[0.0]
