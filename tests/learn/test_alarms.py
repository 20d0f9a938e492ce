"""Hacks that are planted into the reward raise their alarm within ten steps; healthy runs raise none.

The language: replies of about eight words out of 36, that end by themselves. Everything is really sampled and learned.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest

import ppo_toys
import toys
from tetrad.inference.completions import EncodedPrompt
from tetrad.rl.metrics import step_metrics
from tetrad.rl.models import Models
from tetrad.rl.monitor import Monitor
from tetrad.settings.ppo import Alarms, Ppo
from tetrad.types import Prompt

pytestmark = pytest.mark.learn

S = Ppo(
    batch_size=64,
    max_new_tokens=32,
    steps=1000,
    ppo_epochs=2,
    actor_lr=1e-3,
    critic_lr=3e-3,
    kl_coef=0.05,
    critic_warmup=3,
)
ASKED = [EncodedPrompt((3, 4), Prompt(()))] * S.batch_size


def some_models(s: Ppo, seed: int, score: ppo_toys.Reward) -> Models:
    return ppo_toys.four_models(s, deepcopy(ppo_toys.speaker()), toys.scalar(seed + 100), score)


def alarms(
    s: Ppo, seed: int, score: ppo_toys.Reward, steps: int, seen: float = 1e9
) -> tuple[dict[str, int], list[float]]:
    """Each alarm that was raised, with its first step; and the scores."""
    four, watch, told = (
        some_models(s, seed, score),
        Monitor(Alarms(), 0.0, s.critic_warmup, s.batch_size),
        dict[str, int](),
    )
    scores = []
    for step in range(steps):
        made, learned = ppo_toys.iterate(four, ASKED, s, (seed, step))
        figures = step_metrics(made, s.kl_coef, toys.CPU, seen) | learned
        for alarm in watch.alarms(step, figures):
            told.setdefault(alarm.metric, step)
        scores.append(figures["score"])
    return told, scores


def repeats(ids: tuple[int, ...]) -> float:
    pairs = list(pairwise(ids))
    return float(len(pairs) - len(set(pairs)))


HACKS: Mapping[str, tuple[str, ppo_toys.Reward]] = {
    "length": ("length", ppo_toys.by_ids(lambda ids: len(ids) / 8)),
    "one token": ("distinct_2", ppo_toys.by_ids(lambda ids: float(ids.count(20)))),
    "repetition": ("distinct_2", ppo_toys.by_ids(repeats)),
    "no end": ("finished", ppo_toys.by_ids(lambda ids: 3.0 * (ids[-1] != toys.EOS))),
    "out of range": ("ood_scores", ppo_toys.by_ids(ppo_toys.liked)),
    "collapse": ("entropy", ppo_toys.by_ids(lambda ids: 9.0 * ids.count(20) / len(ids))),
}


@pytest.mark.parametrize("hack", HACKS)
def test_a_planted_hack_is_told_within_ten_steps(hack: str) -> None:
    figure, score = HACKS[hack]
    free = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "critic_warmup": 0, "reward_clip": 0.0}
    s = replace(S, actor_lr=1e-2, ppo_epochs=4, **free)
    told, _ = alarms(s, 0, score, steps=10, seen=3.0)
    assert figure in told


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_none(seed: int) -> None:
    """The reward is really earned: more liked words, but not more than the best of 512 first replies had."""
    score = ppo_toys.by_ids(ppo_toys.liked)
    four = some_models(S, seed, score)
    seen = max(s for k in range(8) for s in score(ppo_toys.sampled(four, ASKED, S, (seed, 900 + k)).samples))
    told, scores = alarms(S, seed, score, steps=20, seen=seen)
    assert told == {}
    assert sum(scores[-5:]) / 5 > scores[0] + 0.3
