"""The losses of papers, means of one batch: by their formula, or made of the sums that training uses."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tetrad.objectives import ppo, preference


def bt_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label: Tensor | None = None) -> Tensor:
    """-label logsigmoid(d) - (1 - label) logsigmoid(-d), d = chosen - rejected - margin: the formula itself."""
    gap = chosen - rejected - (0 if margin is None else margin)
    label = torch.ones_like(gap) if label is None else label
    return (-label * logsigmoid(gap) - (1 - label) * logsigmoid(-gap)).mean()


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label: Tensor | None = None) -> Tensor:
    """The same by the sum over pairs."""
    n = len(chosen)
    pairs = torch.arange(n), torch.arange(n, 2 * n), torch.full((n,), 1 / n, dtype=torch.float64)
    return preference.pair_loss_sum(torch.cat((chosen, rejected)), *pairs, margin, label)


def kwise_loss(scores: Tensor, ranks: Tensor, ties: preference.PairTies = "skip") -> Tensor:
    """Over the pairs of one list."""
    return preference.pair_loss_sum(scores, *preference.pairs_of(ranks, (0, len(ranks)), ties))


def plackett_luce_loss(scores: Tensor, ranks: Tensor, ties: preference.OrderTies = "exact") -> Tensor:
    """Of one list."""
    return preference.plackett_luce_losses(scores, ranks, (0, len(scores)), ties)[0]


def policy_loss(
    arrays: Sequence[Tensor], mask: Tensor, dual_clip: float | None = None
) -> tuple[Tensor, ppo.PolicySums]:
    """arrays: new and old log-probabilities, advantages. Everything is a mean over tokens but the largest ratio."""
    sums = ppo.policy_loss_sum(*(x[mask] for x in arrays), dual_clip=dual_clip)
    means = ppo.PolicySums(*(total / mask.sum() for total in sums))._replace(highest_ratio=sums.highest_ratio)
    return means.loss, means
