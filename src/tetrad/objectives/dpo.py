"""Losses of a policy on preferences: its log-probabilities over a reference's are implicit rewards.

    reward(answer) = beta (log policy - log reference), each the sum over the answer's tokens and its end token

The reward for which the policy is the optimum of "reward minus beta KL" is this one, up to a constant of the prompt
(Rafailov et al. 2023), so the losses of `preference` apply to it: DPO is the Bradley-Terry loss of a pair, ranked DPO
the Plackett-Luce loss of a list (appendix A.3). IPO (Azar et al. 2023, eq. 17) asks for a fixed difference instead.
"""

from torch import Tensor


def implicit_rewards(logprobs_D: Tensor, ref_logprobs_D: Tensor, beta: float) -> Tensor:
    """From summed log-probabilities of D answers."""
    return beta * (logprobs_D - ref_logprobs_D)


def ipo_loss_sum(
    rewards_D: Tensor, winners_P: Tensor, losers_P: Tensor, weights_P: Tensor, labels_P: Tensor, beta: float
) -> Tensor:
    """Weighted sum over pairs of (h - 1 / (2 beta))^2; h, the difference of the pair's log-ratios, is of sums over
    tokens, not of means. labels_P: how likely the winner is the better one; the expectation over both is taken."""
    h, target = (rewards_D[winners_P] - rewards_D[losers_P]) / beta, 1 / (2 * beta)
    losses = labels_P * (h - target).square() + (1 - labels_P) * (h + target).square()
    return (weights_P.to(h.dtype) * losses).sum()


def pair_sums(rewards_D: Tensor, winners_P: Tensor, losers_P: Tensor, weights_P: Tensor) -> tuple[Tensor, ...]:
    """Weighted sums over pairs of rewards, or of any other number per answer, without gradients: pairs in order (equal
    ones count half), the winners' lead, the winners' numbers, the losers'."""
    chosen, rejected, weights = rewards_D.detach()[winners_P], rewards_D.detach()[losers_P], weights_P.to(rewards_D)
    gap = chosen - rejected
    right = (gap > 0).to(gap) + 0.5 * (gap == 0).to(gap)
    return tuple((weights * each).sum() for each in (right, gap, chosen, rejected))
