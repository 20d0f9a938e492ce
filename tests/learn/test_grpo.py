"""RLOO and GRPO work: they find an optimum that is known, GRPO's standard deviation moves it as predicted, and each
learns a rule (one seed). Three seeds, or as many as TETRAD_SEEDS says; ten: `benchmarks/optimum.py`."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import grpo_toys
import ppo_toys
import toys
from tetrad.inference.completions import EncodedPrompt
from tetrad.model.transformer import CausalLM
from tetrad.settings.grpo import Grpo
from tetrad.training.batches import response_logprobs
from tetrad.types import Prompt

pytestmark = pytest.mark.learn
RULE_SEEDS = toys.SEEDS if "TETRAD_SEEDS" in os.environ else range(1)


def asked(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt((3, 4), Prompt(()))] * count


# (i) a vocabulary of 6, replies of exactly 2 tokens: all 36 can be counted.
WORDS = 6
REPLIES = [(a, b) for a in range(WORDS) for b in range(WORDS)]
SMALL = Grpo(
    batch_size=1,
    samples_per_prompt=64,
    max_new_tokens=2,
    steps=60,
    actor_lr=3e-3,
    kl_coef=1.0,
    missing_eos_penalty=0.0,
    reward_clip=0.0,
    advantage="centred",
    kl_estimator="k2",
    loss_mean="constant",
)
RLOO = replace(SMALL, advantage="leave_one_out", kl_in="reward")
NORMALISED = replace(SMALL, advantage="normalised")


def log_chances(model: CausalLM) -> torch.Tensor:
    """Of all 36 replies, [6, 6]: the second word along the rows."""
    documents = [toys.document([3, 4, *reply], 2) for reply in REPLIES]
    return torch.tensor([part.sum() for part in response_logprobs(model, documents, 4096, toys.CPU)]).view(WORDS, WORDS)


def optimum(reference: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Log-probabilities of pi_ref exp(r / beta) / Z, at which reward - beta KL is maximal."""
    return torch.log_softmax((reference + rewards / beta).flatten(), 0).view(WORDS, WORDS)


def token_optimum(reference: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Where KL is a loss at each token: the second word as in the optimum, the first for its mean reward alone, without
    the KL that its second words cost."""
    second = torch.log_softmax(reference + rewards / beta, 1)
    first = reference.logsumexp(1) + (second.exp() * rewards).sum(1) / beta
    return torch.log_softmax(first, 0)[:, None] + second


def predicted_std(reference: torch.Tensor, rewards: torch.Tensor) -> float:
    """Of the rewards, under the policy that is optimal where KL costs so much."""
    std = 1.0
    for _ in range(100):
        chances = token_optimum(reference, rewards, std).exp()
        mean = (chances * rewards).sum()
        std = 0.5 * std + 0.5 * float((chances * (rewards - mean).square()).sum().sqrt())
    return std


def distance(learned: torch.Tensor, other: torch.Tensor) -> float:
    """KL(learned || other), in nats."""
    return float((learned.exp() * (learned - other)).sum())


def learned(s: Grpo, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all replies: log-probabilities of the reference and of the trained actor, and rewards. spread: of these."""
    shape = {"vocab_size": WORDS, "layers": 1, "tied": False, "eos_ids": (WORDS,)}  # no token ends a reply
    actor = toys.causal(seed, **shape)
    rewards = spread * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    models = grpo_toys.two_models(s, actor, ppo_toys.by_ids(lambda ids: float(rewards[ids])))
    for step in range(s.steps):
        grpo_toys.iterate(models, asked(s.batch_size), s, (seed, step))
    return log_chances(models.reference), log_chances(actor), rewards


@pytest.mark.parametrize("seed", toys.SEEDS)
@pytest.mark.parametrize(("s", "goal"), [(RLOO, optimum), (SMALL, token_optimum)], ids=["RLOO", "centred, k2"])
def test_finds_what_can_be_counted(s: Grpo, goal: Callable[..., torch.Tensor], seed: int) -> None:
    """pi_ref exp(r / beta) / Z is what reward - beta KL is maximal at; twice or half the price has another."""
    reference, actor, rewards = learned(s, seed)
    gaps = [distance(actor, goal(reference, rewards, beta)) for beta in (1.0, 0.5, 2.0)]
    assert distance(reference, goal(reference, rewards, 1.0)) > 0.1
    assert gaps[0] <= 0.05
    assert min(gaps[1:]) > 2 * gaps[0]


@pytest.mark.parametrize("seed", toys.SEEDS)
def test_the_standard_deviation_divides_beta(seed: int) -> None:
    """The reward's gradient is divided by the prompt's standard deviation, so that KL costs beta times that."""
    reference, actor, rewards = learned(NORMALISED, seed, spread=0.4)
    std = predicted_std(reference, rewards)
    assert 0.2 < std < 0.6
    assert distance(actor, token_optimum(reference, rewards, std)) <= 0.05
    assert distance(actor, optimum(reference, rewards, 1.0)) > 0.1


# (ii): a reply is right when it holds one word.
RULE = Grpo(
    batch_size=8,
    samples_per_prompt=8,
    max_new_tokens=4,
    steps=60,
    actor_lr=3e-3,
    kl_coef=0.02,
    missing_eos_penalty=0.0,
)
METHODS = {"GRPO": RULE, "RLOO": replace(RULE, advantage="leave_one_out", kl_in="reward", loss_mean="constant")}


@pytest.mark.parametrize("seed", RULE_SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_learns_a_rule(method: str, seed: int) -> None:
    """From about one reply in ten to nine in ten, within 60 steps."""
    s = METHODS[method]
    right = ppo_toys.by_ids(lambda ids: float(20 in ids))
    models = grpo_toys.two_models(s, toys.causal(seed), right)

    def share() -> float:
        """Of 200 replies with random numbers that no training used."""
        return sum(right(grpo_toys.sampled(models, asked(25), s, (seed, 10_000)).samples)) / 200

    assert 0.03 <= share() <= 0.17
    for step in range(s.steps):
        batch, _ = grpo_toys.iterate(models, asked(s.batch_size), s, (seed, step))
        if float(batch.scores.mean()) >= 0.97:
            break
    assert share() >= 0.9
