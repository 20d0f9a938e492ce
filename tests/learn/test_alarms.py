"""Planted hacks raise their alarm within ten iterations of real PPO on a toy model, and healthy runs raise none."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

import ppo_toys
import toys
from tetrad.settings.alarms import Alarms
from tetrad.settings.ppo import Ppo
from tetrad.train.alarms import Watch
from tetrad.train.ppo import figures_of_step, learn

pytestmark = pytest.mark.learn
STEPS = 10
Ids = tuple[int, ...]


def alarms(
    score: Callable[[Ids], float], seed: int = 0, seen: float = math.inf, steps: int = STEPS, **settings: object
) -> set[str]:
    """The figures that raised an alarm."""
    given = {"batch": 48, "max_new": 48, "kl_coefficient": 0.01, "actor_lr": 6e-3, "critic_lr": 6e-3, **settings}
    s = Ppo(steps=steps, score_clip=0.0, missing_eos_penalty=0.0, **given)  # type: ignore[arg-type]
    actor = toys.causal(seed, vocab_size=24)
    with torch.no_grad():  # an end is as likely as other tokens
        actor.model.embed_tokens.weight[toys.EOS] = 0
    four = ppo_toys.four_models(s, actor, toys.scalar(seed + 50, vocab_size=24), ppo_toys.by_ids(score))
    watch, found = Watch(Alarms(), 0.0, s.critic_warmup), set[str]()
    asked = ppo_toys.questions(s.batch, 24)
    for step in range(steps):
        rollout = ppo_toys.sampled(four, asked, s, (seed, step))
        made, rewards = ppo_toys.experience(four, rollout, s)
        scores = torch.tensor(four.reward(rollout.samples))
        figures = figures_of_step(made, scores, rewards, s.kl_coefficient, seen)
        figures |= learn(four, made, s, (seed, step), 4096, toys.CPU)
        found |= {alarm.figure for alarm in watch.look(step, figures)}
    return found


def liked(ids: Ids) -> float:
    """What a healthy reward may pay for: the share of six tokens."""
    return sum(10 <= token < 16 for token in ids) / len(ids)


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_raise_none(seed: int) -> None:
    """The critic, which knows nothing here, learns for five iterations first."""
    assert alarms(liked, seed, actor_lr=3e-4, critic_lr=1e-2, kl_coefficient=0.05, critic_warmup=5, steps=15) == set()


def test_length() -> None:
    assert "length" in alarms(lambda ids: len(ids) / 4)


def test_ends_are_avoided() -> None:
    assert "ended" in alarms(lambda ids: -3.0 * (ids[-1] == toys.EOS))


def test_one_token() -> None:
    found = alarms(lambda ids: 8.0 * sum(token == 7 for token in ids) / len(ids))
    assert found & {"entropy", "distinct_2"}


def test_repetition() -> None:
    assert "distinct_2" in alarms(lambda ids: 6.0 * sum(a == b for a, b in pairwise(ids)) / len(ids))


def test_scores_that_the_reward_model_never_gave() -> None:
    assert "unseen_scores" in alarms(lambda ids: 5 * liked(ids), seen=3.0)


def test_a_reward_that_tells_nothing_apart() -> None:
    assert "score_std" in alarms(lambda ids: 1.0)
