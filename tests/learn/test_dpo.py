"""DPO finds an optimum that is known. Three seeds, or as many as TETRAD_SEEDS says."""

from copy import deepcopy
from itertools import product

import pytest
import torch

import toys
from tetrad.model.transformer import CausalLM, frozen
from tetrad.reward.batches import Examples
from tetrad.settings.common import Optim
from tetrad.settings.dpo import Dpo
from tetrad.train.dpo import dpo_micros, dpo_terms
from tetrad.training.batches import response_logprobs
from tetrad.training.optimizer import Optimizer, lr_factor
from tetrad.training.step import update
from tetrad.types import Comparison, Prompt

pytestmark = pytest.mark.learn

# A vocabulary of 6, replies of exactly 2 tokens: all 36 can be counted, and so can their 630 pairs.
WORDS, STEPS = 6, 100
REPLIES = [toys.document([3, 4, *reply], 2) for reply in product(range(WORDS), repeat=2)]


def log_chances(model: CausalLM) -> torch.Tensor:
    """Of all 36 replies."""
    return torch.tensor([part.sum() for part in response_logprobs(model, REPLIES, 4096, toys.CPU)])


def preferred(rewards: torch.Tensor) -> Examples:
    """All replies in one list: with these votes each of its 630 pairs is chosen by Bradley and Terry's law."""
    votes = tuple(rewards.exp().tolist())
    ranks = tuple(1.0 + sum(other > vote for other in votes) for vote in votes)
    return Examples.of([Comparison(Prompt(()), ("",) * len(votes), ranks, votes=votes)], REPLIES)


def distance(learned: torch.Tensor, other: torch.Tensor) -> float:
    """KL(learned || other), in nats, of log-probabilities of all replies."""
    return float((learned.exp() * (learned - other)).sum())


def learned(seed: int, beta: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all replies: log-probabilities of the reference and of the trained policy, and rewards."""
    policy = toys.causal(seed, vocab_size=WORDS, layers=1, tied=False, eos_ids=(WORDS,))  # no token ends a reply
    reference, rewards = frozen(deepcopy(policy)), torch.randn(36, generator=torch.Generator().manual_seed(seed))
    optimizer, terms = Optimizer(policy, 5e-3, Optim()), dpo_terms(Dpo(beta=beta), reference)
    micros = dpo_micros(preferred(rewards), [0], 8192, toys.CPU)
    for step in range(STEPS):
        update(policy, optimizer, micros, terms, toys.CPU, factor=lr_factor(step, STEPS, 0.0, "linear"))
    return log_chances(reference), log_chances(policy), rewards


@pytest.mark.parametrize("seed", toys.SEEDS)
def test_finds_the_enumerated_optimum(seed: int) -> None:
    """pi_ref exp(r / beta) / Z, which is what reward - beta KL is maximal at, and PPO's optimum too."""
    reference, policy, rewards = learned(seed)
    goals = [torch.log_softmax(reference + rewards / price, 0) for price in (1.0, 0.5, 2.0)]
    gaps = [distance(policy, goal) for goal in goals]
    assert distance(reference, goals[0]) > 0.1
    assert gaps[0] <= 0.05
    assert min(gaps[1:]) > 3 * gaps[0]  # it is this beta's optimum
