"""PPO's options: each does what it says, and nothing where it is off. The stage's functions, small random models."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import ppo_toys
import toys
from tetrad.objectives import ppo
from tetrad.reward.model import reward_function
from tetrad.reward.sources import RewardSource, RewardSources, named
from tetrad.rl.minibatches import minibatches
from tetrad.rl.models import EMA, Models, SharedActorCritic, _shared
from tetrad.rl.prompts import PtxBatch
from tetrad.rl.rewards import RunningStd, token_rewards
from tetrad.settings.common import Optim
from tetrad.settings.ppo import Ppo
from tetrad.train.ppo import actor_terms, learn
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import Microbatch

S = Ppo(batch_size=12, max_new_tokens=10, ppo_epochs=2, num_minibatches=3, actor_lr=1e-3, critic_lr=1e-3, steps=10)
VOCAB = 12
ASKED = ppo_toys.questions(12, VOCAB)


def some_models(s: Ppo = S, other: bool = True) -> Models:
    reward = reward_function([toys.scalar(seed=2, vocab_size=VOCAB)], toys.CPU, 256)
    reference = toys.causal(seed=3, vocab_size=VOCAB) if other else None
    models = toys.causal(seed=1, vocab_size=VOCAB), toys.scalar(seed=4, vocab_size=VOCAB)
    return ppo_toys.four_models(s, *models, reward, reference)


def shared_models(s: Ppo) -> Models:
    actor = toys.causal(seed=1, vocab_size=VOCAB)
    critic = _shared(actor, 4)
    both = SharedActorCritic(actor, critic)
    optimizer = Optimizer(
        both, s.actor_lr, replace(Optim(), weight_decay=0.1), lr_overrides={"critic.score": s.critic_lr}
    )
    reward = RewardSources(
        {"reward": RewardSource(reward_function([toys.scalar(seed=2, vocab_size=VOCAB)], toys.CPU, 256))}
    )
    return Models(
        actor=actor,
        critic=critic,
        reference=deepcopy(actor).requires_grad_(False),
        reward=reward,
        actor_optimizer=optimizer,
        critic_optimizer=None,
        tokenizer=ppo_toys.TOKENIZER,
        device=toys.CPU,
        micro_batch_tokens=4096,
        actor_critic=both,
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rolled(four: Models, s: Ppo = S):
    return ppo_toys.sampled(four, ASKED, s, (0, 0))


def test_shared_trunk_learns_both_in_one_step():
    """Actor and critic read one trunk; its gradient is the policy's plus the coefficient times the value's."""
    found = {}
    for coefficient in (0.0, 0.5):
        s = replace(S, critic="shared", value_coef=coefficient, max_grad_norm=0.0)
        four = shared_models(s)
        assert four.critic.model is four.actor.model
        made, _ = ppo_toys.experience(four, rolled(four, s), s)
        (micro,) = next(minibatches(made, s, (0, 0), 4096, toys.CPU))
        terms = {t.name: t for t in actor_terms(s)(four.actor_critic, micro)}
        assert terms["value_loss"].coefficient == coefficient
        before = weights(four.actor)
        learned = learn(four, made, s, (0, 0))
        assert learned["actor_updates"] == 6
        assert not torch.equal(weights(four.actor), before)
        found[coefficient] = weights(four.actor)
    assert not torch.equal(found[0.0], found[0.5])


def test_shared_trunk_stands_still_while_the_critic_warms_up():
    s = replace(S, critic="shared", critic_warmup=2)
    four = shared_models(s)
    before, head = weights(four.actor), four.critic.score.weight.detach().clone()
    for step in (0, 1):
        _, learned = ppo_toys.iterate(four, ASKED, s, (0, step))
        assert learned["actor_updates"] == 0
        assert torch.equal(weights(four.actor), before)
    assert not torch.equal(four.critic.score.weight, head)
    ppo_toys.iterate(four, ASKED, s, (0, 2))
    assert not torch.equal(weights(four.actor), before)


def test_a_checkpoint_of_a_shared_trunk_has_the_head_alone_beside_the_actor():
    parts = shared_models(replace(S, critic="shared")).parts()
    assert tuple(parts) == ("actor", "actor_optimizer", "critic")
    assert list(parts["critic"].tensors()) == ["score.weight"]


def test_warm_up_learns_whole_returns():
    """lambda is 1 then, so that a wrong value says nothing about its own target."""
    s = replace(S, critic_warmup=1, gae_lambda=0.5, kl_coef=0.3)
    four = some_models(s)
    rollout = rolled(four, s)
    for step, whole in ((0, True), (1, False)):
        made, rewards = ppo_toys.experience(four, rollout, s, step=step)
        left = torch.where(rollout.mask_BT, rewards.flip(1).cumsum(1).flip(1), 0)
        assert torch.allclose(made.returns, left, atol=1e-5) == whole


def test_a_cut_reply_goes_on_in_its_value_where_asked():
    four = some_models()
    rollout = rolled(four)
    cut = ~rollout.finished_B
    assert 0 < int(cut.sum()) < len(cut)
    plain, rewards = ppo_toys.experience(four, rollout, S)
    found, _ = ppo_toys.experience(four, rollout, replace(S, bootstrap_truncated=True))
    last = rollout.mask_BT.sum(1) - 1
    returns = [made.returns.gather(1, last[:, None])[:, 0] for made in (plain, found)]
    last_reward = rewards.gather(1, last[:, None])[:, 0]
    assert torch.allclose(returns[0], last_reward, atol=1e-6)
    assert torch.equal(returns[1][~cut], returns[0][~cut])
    assert (returns[1][cut] - returns[0][cut]).abs().min() > 1e-4


def test_an_update_stops_when_the_policy_has_moved():
    """The critic goes on."""
    for limit, updates in ((0.0, 6), (1e9, 6), (1e-12, 2)):
        s = replace(S, early_stop_kl=limit)
        four = some_models(s)
        made, _ = ppo_toys.experience(four, rolled(four, s), s)
        learned = learn(four, made, s, (0, 0))
        assert learned["actor_updates"] == updates
        assert "value_loss" in learned


def test_reduction_by_sequence_is_the_mean_of_the_replies_means():
    s = replace(S, num_minibatches=1, ppo_epochs=1, reduction="sequence")
    four = some_models(s)
    made, _ = ppo_toys.experience(four, rolled(four, s), s)
    mask = made.rollout.mask_BT
    learned = {}
    for micro_batch_tokens in (4096, 40):
        losses = []
        for micros in minibatches(made, s, (0, 0), micro_batch_tokens, toys.CPU):
            terms = [{t.name: float(t.sum.detach()) for t in actor_terms(s)(four.actor, m)} for m in micros]
            losses.append(sum(t["policy_loss"] for t in terms) / sum(m.counts["losses"] for m in micros))
        learned[micro_batch_tokens] = losses[0]
    expected = torch.where(mask, -made.advantages, 0).sum(1) / mask.sum(1)  # the ratio is 1
    assert learned[4096] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert learned[40] == pytest.approx(learned[4096], abs=1e-6)
    by_token = float(torch.where(mask, -made.advantages, 0).sum() / mask.sum())
    assert abs(learned[4096] - by_token) > 1e-3


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    old = torch.zeros(2)
    new, advantages = torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 1.0])
    plain = ppo.policy_loss_sum(new, old, advantages)
    dual = ppo.policy_loss_sum(new, old, advantages, dual_clip=3.0)
    assert float(plain.loss) == pytest.approx(float(new.exp()[0]) - 1.2, rel=1e-6)
    assert float(dual.loss) == pytest.approx(3 - 1.2, rel=1e-6)
    s = replace(S, dual_clip=3.0)
    four = some_models(s)
    made, _ = ppo_toys.experience(four, rolled(four, s), s)
    assert "dual_clip_fraction" in learn(four, made, s, (0, 0))


def test_running_spread_is_that_of_all_scores():
    found, scores = RunningStd(), torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for row, batch in enumerate(scores, start=1):
        assert found.update(batch, toys.CPU) == pytest.approx(float(scores[:row].std(correction=0)), rel=1e-5)
    again = RunningStd()
    again.restore(found.state())
    assert again == found
    assert RunningStd().update(torch.full((4,), 2.0), toys.CPU) == 1.0


def test_running_scaling_divides_before_the_clip():
    four = some_models()
    rollout, zeros = rolled(four), torch.zeros_like(rolled(four).sampler_logprobs_BT)
    made, rewards = ppo_toys.experience(four, rollout, replace(S, reward_scaling="running", kl_coef=0.0))
    unit = made.scores.std(correction=0)
    expected = (made.scores / unit).clamp(-5, 5) - (~rollout.finished_B).float()
    torch.testing.assert_close(rewards.sum(1), expected, rtol=1e-5, atol=1e-6)
    paid = token_rewards(replace(S, rewards=("f.py:f",)), torch.full((12,), 100.0), zeros, zeros, rollout, 0.0)
    assert float(paid.sum(1).max()) == 100  # a function's own scale is not cut


def test_a_sum_of_sources_is_weighed_and_told_in_parts():
    count = ppo_toys.by_ids(lambda ids: float(len(ids)))
    high = ppo_toys.by_ids(lambda ids: 9.0)
    found = RewardSources({"count": RewardSource(count, 0.5), "high": RewardSource(high, 2.0, clip=5.0)})
    samples = rolled(some_models()).samples
    by_source = found.by_source(samples)
    assert by_source["high"] == [9.0] * len(samples)
    assert found.total(by_source) == [0.5 * len(s.response_ids) + 10 for s in samples]


def test_no_two_sources_of_a_reward_share_a_name():
    given = ("reward", "a/f.py:judge", "b/f.py:judge", "http://127.0.0.1:8/score")
    assert named(given) == ["reward", "judge", "judge_2", "127_0_0_1_8"]
    assert named(("a.py:judge_2", "b.py:judge", "c.py:judge")) == ["judge_2", "judge", "judge_3"]
    assert named(("a.py:reward", "reward", "b.py:std")) == ["reward_2", "reward", "std_2"]
    assert named(("a.py:reward", "b.py:std"), ()) == ["reward", "std"]
    assert named(("https://user:secret@host.net/x?key=secret",)) == ["host_net"]


def test_several_replies_to_a_prompt_are_learned_from_once_each():
    s = replace(S, batch_size=4, samples_per_prompt=3)
    four = some_models(s)
    repeated = [question for question in ASKED[:4] for _ in range(3)]
    rollout = ppo_toys.sampled(four, repeated, s, (0, 0))
    texts = {sample.response_ids for sample in rollout.samples[:3]}
    assert len(texts) == 3
    made, _ = ppo_toys.experience(four, rollout, s)
    parts = [[len(micro.packed.where) for micro in micros] for micros in minibatches(made, s, (0, 0), 9999, toys.CPU)]
    assert parts == [[4]] * 6


def test_text_beside_ppo_holds_the_language_model():
    """Its loss is added with its coefficient, and is lower afterwards."""
    documents = toys.documents(6)
    vocab = 40
    found = {}
    for coefficient in (0.0, 5.0):
        s = replace(S, actor_lr=3e-3)
        actor, critic = toys.causal(seed=1, vocab_size=vocab), toys.scalar(seed=4, vocab_size=vocab)
        four = ppo_toys.four_models(
            s, actor, critic, reward_function([toys.scalar(seed=2, vocab_size=vocab)], toys.CPU, 256)
        )
        made, _ = ppo_toys.experience(four, ppo_toys.sampled(four, ppo_toys.questions(12, vocab), s, (0, 0)), s)
        packed = toys.packed(documents)
        count = float((packed.targets_T != -100).sum())

        def text(update: int, packed=packed, count=count, coefficient=coefficient) -> list[Microbatch]:
            return [Microbatch(packed, {"ptx_tokens": count}, PtxBatch(coefficient))]

        learned = learn(four, made, s, (0, 0), text)
        assert learned["ptx_loss"] > 0
        with torch.no_grad():
            found[coefficient] = float(four.actor(packed, "nll")) / count
    assert found[5.0] < found[0.0] - 0.01


def test_moving_average_follows_the_actor():
    actor = toys.causal(seed=1, vocab_size=VOCAB)
    average = EMA(actor, 0.75)
    start = average.average["model.norm.weight"].clone()
    with torch.no_grad():
        actor.model.norm.weight += 4.0
    average.update()
    torch.testing.assert_close(average.average["model.norm.weight"], start + 1.0)
    again = EMA(toys.causal(seed=2, vocab_size=VOCAB), 0.75)
    again.load_tensors(average.tensors())
    assert torch.equal(again.average["model.norm.weight"], average.average["model.norm.weight"])


def test_ratio_max_is_the_largest_of_all_micro_batches():
    s = replace(S, num_minibatches=1, ppo_epochs=2, actor_lr=5e-3)
    found = []
    for micro_batch_tokens in (4096, 30):
        four = some_models(s)
        made, _ = ppo_toys.experience(four, rolled(four, s), s)
        found.append(learn(replace(four, micro_batch_tokens=micro_batch_tokens), made, s, (0, 0)))
    assert found[0]["ratio_max"] > found[0]["ratio"]
    assert found[1]["ratio_max"] == pytest.approx(found[0]["ratio_max"], rel=1e-4)
