"""The arithmetic of RLOO and GRPO: advantages within a prompt's group of responses, and KL to the reference as a loss.

No critic: the baseline of a response is its group. The clipped ratio is `ppo.policy_loss_sum`. Sources: leave-one-out
(RLOO): Kool et al. 2019, Ahmadian et al. 2024 (2402.14740); normalised (GRPO): Shao et al. 2024 (2402.03300); centred
(Dr. GRPO): Liu et al. 2025 (2503.20783).
"""

from typing import Literal

import torch
from torch import Tensor

from tetrad.objectives import ppo

STD_EPS = 1e-4  # beside the standard deviation

Advantage = Literal["normalised", "centred", "leave_one_out"]


def group_advantages(
    scores_B: Tensor, groups_B: Tensor, kind: Advantage, eps: float = STD_EPS, unbiased: bool = True
) -> Tensor:
    """The advantage of each response among those of its group, [B], in float64 and back; groups_B: equal numbers are a
    group.

    centred: score - mean; leave_one_out: score - mean of the others; normalised: (score - mean) / (std + eps), the
    standard deviation unbiased, or of the population. Equal scores give exactly 0. Raises ValueError for a group of
    one, which has nothing to be compared with.
    """
    _, group, sizes = torch.unique(groups_B, return_inverse=True, return_counts=True)
    if not len(sizes) or int(sizes.min()) < 2:
        raise ValueError("a group needs at least 2 responses")
    scores, size = scores_B.detach().double(), sizes[group]

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(sizes, dtype=x.dtype).index_add_(0, group, x)[group]

    lowest = torch.full_like(sizes, torch.inf, dtype=scores.dtype).scatter_reduce(0, group, scores, "amin")[group]
    above = scores - lowest  # so that equal scores are zeros, whose mean has no rounding
    centred: Tensor = above - total(above) / size
    if kind == "leave_one_out":
        centred = centred * size / (size - 1)  # = score - mean of the others, without a sum that leaves one out
    elif kind == "normalised":
        centred = centred / ((total(centred.square()) / (size - int(unbiased))).sqrt() + eps)
    return centred.to(scores_B.dtype)


def kl_loss_sum(
    logprobs_N: Tensor, ref_logprobs_N: Tensor, kind: Literal["k1", "k2", "k3"], weights_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of an estimate of KL(actor || reference) to be minimised. weights_N: a factor for each token.

    The gradient of k2 is, on samples of the actor, that of each token's KL(actor || reference), k3's that of
    KL(reference || actor); what a token does to the KL of later ones is in neither (it is where KL is in the reward).
    Raises ValueError for k1: the expectation of its gradient, that of log pi, is 0, so it would hold nothing back.
    """
    if kind == "k1":
        raise ValueError("k1 as a loss has no gradient on average; use k2 or k3, or k1 in the reward")
    losses = ppo.kl_tokens(logprobs_N, ref_logprobs_N, torch.ones_like(logprobs_N, dtype=torch.bool), kind)
    return (losses if weights_N is None else losses * weights_N).sum()
