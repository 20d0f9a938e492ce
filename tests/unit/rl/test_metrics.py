"""What an iteration of PPO is measured by."""

from dataclasses import replace

import pytest
import torch

import ppo_toys
import toys
from tetrad.rl.metrics import critic_metrics, texts_of_step
from tetrad.settings.ppo import Ppo

S = Ppo(batch_size=4, max_new_tokens=4)


def test_what_the_critic_explains_is_a_share_of_the_returns_variance_and_nothing_where_there_is_none() -> None:
    models = ppo_toys.four_models(S, toys.causal(seed=1), toys.scalar(seed=2), ppo_toys.by_ids(len))
    batch, _ = ppo_toys.experience(models, ppo_toys.sampled(models, ppo_toys.questions(4), S, (0, 0)), S)
    mask, device = batch.rollout.mask_BT, toys.CPU
    known = critic_metrics(batch, device)["explained_variance"]
    returns, values = (x[mask].double() for x in (batch.returns, batch.values))
    assert known == pytest.approx(float(1 - (returns - values).var(correction=0) / returns.var(correction=0)), abs=1e-5)
    equal = torch.full_like(batch.returns, 0.1, dtype=torch.float64)
    assert "explained_variance" not in critic_metrics(replace(batch, returns=equal), device)


def test_the_texts_of_a_step_are_those_of_its_completions() -> None:
    models = ppo_toys.four_models(S, toys.causal(seed=1), toys.scalar(seed=2), ppo_toys.by_ids(len))
    rollout = ppo_toys.sampled(models, ppo_toys.questions(4), S, (0, 0))
    first, second, *others = rollout.samples
    broken = (replace(first, valid_utf8=False, finished=False), replace(second, finished=True))
    rest = tuple(replace(sample, finished=True) for sample in others)
    metrics = texts_of_step(replace(rollout, samples=(*broken, *rest)))
    assert (metrics["invalid_utf8"], metrics["finished"]) == (0.25, 0.75)
    assert metrics["length"] == pytest.approx(sum(len(sample.response_ids) for sample in rollout.samples) / 4)
