"""Losses of a reward model: pairs, lists of any length with ties, scores on a scale, fallible annotators.

Rewards are latent numbers r; a lower rank is better, equal ranks are ties, only the order of ranks counts. Many lists
lie in one flat tensor with `bounds` (list l is bounds[l] : bounds[l + 1]), and a loss comes per list or as a weighted
sum over pairs, so that micro-batches and ranks add up exactly. Sources: Bradley and Terry 1952; all pairs of a list,
averaged: Ouyang et al. 2022 (2203.02155); Plackett 1975 and Luce 1959, ties after Breslow 1974; margins, smoothing,
soft labels: 2401.06080; centring: 2312.09244; annotators: Chen et al., "Pairwise ranking aggregation in a crowdsourced
setting", 2013.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

PairTies = Literal["skip", "half"]
OrderTies = Literal["exact", "breslow", "auto"]
LARGEST_EXACT_TIE = 10  # 2^10 subsets


def pairs_of(ranks_N: Tensor, bounds: Sequence[int], ties: PairTies = "skip") -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of each list: indices of winners and losers into [N], and weights (float64) that sum to 1 over a list.

    Tied pairs are left out, or with `half` appear once each way at half the weight, which is a label of 0.5. A list
    without a pair (one answer, or all tied under `skip`) has none and no weight.
    """
    index, real = _padded(bounds, ranks_N.device)
    ranks = ranks_N[index]
    both = real[:, :, None] & real[:, None, :] & ~torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
    better = both & (ranks[:, :, None] < ranks[:, None, :])
    amount = better.double()
    if ties == "half":
        amount += 0.5 * (both & (ranks[:, :, None] == ranks[:, None, :]))
    lists, first, second = amount.nonzero().unbind(1)
    weights = amount[lists, first, second] / amount.sum((1, 2))[lists]
    return index[lists, first], index[lists, second], weights


def pair_loss_sum(
    rewards_N: Tensor,
    winners_P: Tensor,
    losers_P: Tensor,
    weights_P: Tensor,
    margins_P: Tensor | None = None,
    labels_P: Tensor | None = None,
    competence_P: Tensor | None = None,
) -> Tensor:
    """Weighted sum over pairs of the Bradley-Terry loss; with `pairs_of`'s weights, the sum of each list's mean.

    labels_P: how likely the winner is the better one, 1 by default. competence_P: as in `crowd_pair_losses`.
    """
    gap = rewards_N[winners_P] - rewards_N[losers_P]
    if margins_P is not None:
        gap = gap - margins_P
    label = torch.ones_like(gap) if labels_P is None else labels_P
    if competence_P is None:
        losses = _pair_losses(gap, label)
    else:
        losses = label * crowd_pair_losses(gap, competence_P) + (1 - label) * crowd_pair_losses(-gap, competence_P)
    return (weights_P.to(gap.dtype) * losses).sum()


def plackett_luce_losses(scores_N: Tensor, ranks_N: Tensor, bounds: Sequence[int], ties: OrderTies = "exact") -> Tensor:
    """-log probability of each list's order under Plackett-Luce, [lists].

    breslow: each of a tie is chosen from all not yet placed, its own tie included. exact: the sum over the orders of
    the tie; one at the bottom then contributes 0, and one of more than 10 above others raises ValueError. auto: exact,
    but Breslow for such a long tie.
    """
    index, real = _padded(bounds, scores_N.device)
    scores = torch.where(real, scores_N[index], 0)
    ranks = ranks_N[index]
    tied = (ranks[:, :, None] == ranks[:, None, :]) & real[:, None, :]
    worse = (ranks[:, None, :] > ranks[:, :, None]) & real[:, None, :]
    left = _log_sum(scores[:, None, :], tied | worse)
    losses = left - scores
    if ties == "breslow":
        return torch.where(real, losses, 0).sum(1)
    size = tied.sum(2)
    above = real & worse.any(2)
    alone = above & ((size == 1) | ((size > LARGEST_EXACT_TIE) & (ties == "auto")))
    total = torch.where(alone, losses, 0).sum(1)
    first = tied.int().argmax(2) == torch.arange(scores.shape[1], device=scores.device)
    leader = above & ~alone & first
    for width in size[leader].unique().tolist():
        lists, rows = (leader & (size == width)).nonzero().unbind(1)
        members = tied[lists, rows].nonzero()[:, 1].view(-1, width)
        rest = _log_sum(scores[lists], worse[lists, rows])
        total = total.index_add(0, lists, -_log_tie(scores[lists[:, None], members], rest))
    return total


def score_losses(pred_N: Tensor, share_N: Tensor, kind: Literal["mse", "bce"] = "mse") -> Tensor:
    """Squared errors, or binary cross-entropies with sigmoid(pred); [N]."""
    if kind == "mse":
        return (pred_N - share_N).square()
    return binary_cross_entropy_with_logits(pred_N, share_N, reduction="none")


def center_loss_sum(rewards_N: Tensor, winners_P: Tensor, losers_P: Tensor, weights_P: Tensor) -> Tensor:
    """Weighted sum over pairs of (winner + loser)^2, which draws rewards to 0."""
    return (weights_P * (rewards_N[winners_P] + rewards_N[losers_P]).square()).sum()


def crowd_losses(losses: Tensor, flipped: Tensor, competence: Tensor) -> Tensor:
    """-log(c p + (1 - c) q), c = sigmoid(competence), the probability that an annotator is right: losses are -log p of
    what was stated, flipped are -log q of the opposite. Broadcasts; as exact for large numbers as for small ones."""
    return -torch.logaddexp(logsigmoid(competence) - losses, logsigmoid(-competence) - flipped)


def crowd_pair_losses(gap_P: Tensor, competence_P: Tensor) -> Tensor:
    """The same of a pair, p = sigmoid(gap): the annotator says that the first is better (Chen et al. 2013)."""
    return crowd_losses(-logsigmoid(gap_P), -logsigmoid(-gap_P), competence_P)


def _pair_losses(gap: Tensor, label: Tensor) -> Tensor:
    return -label * logsigmoid(gap) - (1 - label) * logsigmoid(-gap)


def _padded(bounds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index [lists, longest] into the flat tensor, and where it is real; padding points to 0."""
    edges = torch.as_tensor(bounds, device=device)
    lengths = edges.diff()
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise ValueError("bounds must rise: every list needs an answer")
    columns = torch.arange(int(lengths.max()), device=device)
    real = columns < lengths[:, None]
    return torch.where(real, edges[:-1, None] + columns, 0), real


def _log_sum(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, -torch.inf).logsumexp(-1)


def _log_tie(members_GM: Tensor, rest_G: Tensor) -> Tensor:
    """Log probability that the M of a tie come first, in any order, before a rest of log-weight `rest`; [G].

    P(S) = sum over i in S of P(S without i) e^{s_i} / (rest + sum of S), from the empty set to all: i is S's first.
    """
    log_p = torch.zeros_like(rest_G)[:, None]
    for subsets, parents in _subset_levels(members_GM.shape[1]):
        chosen = members_GM[:, subsets.to(members_GM.device)]
        norm = torch.logaddexp(chosen.logsumexp(-1), rest_G[:, None])
        log_p = (chosen + log_p[:, parents.to(members_GM.device)]).logsumexp(-1) - norm
    return log_p[:, 0]


@lru_cache
def _subset_levels(size: int) -> list[tuple[Tensor, Tensor]]:
    """For n = 1 .. size: the subsets of n members [C, n], and for each member the index of the subset without it."""
    if size > LARGEST_EXACT_TIE:
        raise ValueError(f'{size} answers tied above others: exact goes up to {LARGEST_EXACT_TIE}; use ties="breslow"')
    levels: list[tuple[Tensor, Tensor]] = []
    index_of: dict[tuple[int, ...], int] = {(): 0}
    for count in range(1, size + 1):
        subsets = list(combinations(range(size), count))
        parents = [[index_of[s[:n] + s[n + 1 :]] for n in range(count)] for s in subsets]
        levels.append((torch.tensor(subsets), torch.tensor(parents)))
        index_of = {subset: index for index, subset in enumerate(subsets)}
    return levels
