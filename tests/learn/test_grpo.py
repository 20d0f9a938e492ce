"""RLOO and GRPO work: they find an optimum that is known, GRPO's standard deviation moves it as predicted, and each
learns a rule. Three seeds each, or as many as TETRAD_SEEDS says."""

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


def asked(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt((3, 4), Prompt(()))] * count


# (i) a vocabulary of 6, replies of exactly 2 tokens: all 36 can be counted.
WORDS = 6
REPLIES = [(a, b) for a in range(WORDS) for b in range(WORDS)]
SMALL = Grpo(
    batch_size=2,
    samples_per_prompt=64,
    max_new_tokens=2,
    steps=80,
    actor_lr=3e-3,
    kl_coef=1.0,
    missing_eos_penalty=0.0,
    reward_clip=0.0,
    advantage="centred",
    kl_estimator="k2",
    loss_mean="constant",
)
RLOO = replace(SMALL, advantage="leave_one_out", kl_in="reward")


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


def distance(learned: torch.Tensor, other: torch.Tensor) -> float:
    """KL(learned || other), in nats."""
    return float((learned.exp() * (learned - other)).sum())


def learned(s: Grpo, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all replies: log-probabilities of the reference and of the trained actor, and rewards."""
    shape = {"vocab_size": WORDS, "layers": 1, "tied": False, "eos_ids": (WORDS,)}  # no token ends a reply
    actor = toys.causal(seed, **shape)
    rewards = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    models = grpo_toys.two_models(s, actor, ppo_toys.by_ids(lambda ids: float(rewards[ids])))
    for step in range(s.steps):
        grpo_toys.iterate(models, asked(s.batch_size), s, (seed, step))
    return log_chances(models.reference), log_chances(actor), rewards
