"""PPO's arithmetic: KL, shaped rewards, advantages, whitening, and the two clipped losses.

Arrays are [B, T] and already shifted: position t belongs to response token t; `mask` is True on response tokens (rows
may be padded on either side and have holes). Other positions may hold anything, even NaN: values are selected before
any arithmetic, never multiplied by the mask. The losses take the N response tokens alone and are sums over them, so
that micro-batches and ranks add up exactly. Nothing is clamped but what PPO clips. Sources: the losses, the place of
the score and the adaptive coefficient: Ziegler et al. 2019 (1909.08593), GAE: Schulman et al. 2016 (1506.02438).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # inside the root


def select(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask`, exactly 0 elsewhere; neither the result nor a gradient sees what was there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


class PolicySums(NamedTuple):
    """Sums over tokens, `loss` with gradient; only `highest_ratio` is a maximum.

    half_square: of the log-ratios, an estimate of KL(old || new).
    """

    loss: Tensor
    clipped: Tensor
    half_square: Tensor
    ratio: Tensor
    dual_clipped: Tensor
    highest_ratio: Tensor


class ValueSums(NamedTuple):
    """Sums over tokens, `loss` with gradient."""

    loss: Tensor
    clipped: Tensor


def kl_tokens(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """Estimates of KL(actor || reference) from each sampled token, [B, T], 0 where masked.

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, Approximating KL divergence, 2020).
    """
    gap = select(logprobs_BT, mask_BT) - select(ref_logprobs_BT, mask_BT)
    if kind == "k1":
        return gap
    return gap.square() / 2 if kind == "k2" else torch.expm1(-gap) + gap


def adaptive_kl(beta: float, kl: float, sequences: int, target: float, horizon: float) -> float:
    """The next beta: beta * (1 + e * sequences / horizon), e = kl / target - 1 clipped to 0.2.

    kl: nats per sequence, the mean over sequences of the sum over tokens. Raises ValueError unless target, horizon > 0.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError("target and horizon must be greater than 0")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * sequences / horizon)


def normalize_scores(
    scores_B: Tensor,
    mean: float,
    std: float,
    clip: float | None,
    missing_eos_B: Tensor,
    eos_penalty: float,
) -> Tensor:
    """(score - mean) / std, clipped to +-clip (None: not), then minus the penalty if the response has no end token."""
    scores = (scores_B - mean) / std
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return torch.where(missing_eos_B, scores - eos_penalty, scores)


def shape_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """-beta * KL at each token, plus the score at the last token of the response; [B, T], 0 where masked.

    Raises ValueError if a row has no token: its score would be lost.
    """
    if not bool(mask_BT.any(-1).all()):
        raise ValueError("a response without a token has no place for its score")
    after = mask_BT.flip(-1).cumsum(-1).flip(-1)
    rewards = -beta * select(kl_BT, mask_BT)
    return torch.where(mask_BT & (after == 1), rewards + scores_B[:, None], rewards)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantage + value), [B, T], without gradient, 0 where masked.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}. Masked positions are skipped: t + 1
    means the mask's next token. After the last one the value is 0 (the response ended) or `bootstrap` (it was cut).
    """
    rewards, values = select(rewards_BT, mask_BT).detach(), select(values_BT, mask_BT).detach()
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_B is None else bootstrap_B.detach()
    later = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask_BT[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(here, delta + gamma * lam * later, later)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = later
    advantages = select(advantages, mask_BT)
    return advantages, advantages + values


def moments(x: Tensor, mask: Tensor, about: Tensor | float = 0.0) -> Tensor:
    """[count, sum of (x - about), sum of (x - about)^2] over the mask, float64: those of several ranks add up.

    With `about` near the mean nothing cancels; a second pass about the first pass's mean is exact.
    """
    distance = select(x.detach(), mask).double() - torch.as_tensor(about, dtype=torch.float64, device=x.device)
    distance = select(distance, mask)
    return torch.stack([mask.sum().double(), distance.sum(), distance.square().sum()])


def mean_variance(moments_3: Tensor, about: Tensor | float = 0.0, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (population, or unbiased) from (summed) `moments`. Raises ValueError with too few values."""
    count, total, squares = moments_3.unbind()
    if float(count) < 1 + unbiased:
        raise ValueError(f"{int(count)} values are too few for their variance")
    squares = (squares - total.square() / count).clamp(min=0)
    return about + total / count, squares / (count - 1 if unbiased else count)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask, plus the mean again unless `shift_mean`; 0 where masked.

    mean, variance: those of the whole batch, from all ranks' `moments`.
    """
    mean, variance = mean.to(x.dtype), variance.to(x.dtype)
    whitened = (select(x, mask) - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return select(whitened if shift_mean else whitened + mean, mask)


def explained_variance(
    returns_mean: Tensor | float, returns_variance: Tensor | float, residual_variance: Tensor | float
) -> Tensor:
    """1 - Var(returns - values) / Var(returns); NaN (undefined) where all returns are equal but for rounding."""
    mean, variance, residual = (
        torch.as_tensor(x).double() for x in (returns_mean, returns_variance, residual_variance)
    )
    return torch.where(variance <= (1e-12 * mean).square(), torch.nan, 1 - residual / variance)


def policy_loss_sum(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights_N: Tensor | None = None,
) -> PolicySums:
    """Sum over tokens of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(logp - old_logp).

    dual_clip c > 1: where A < 0 a token's loss is at most -c A (Ye et al. 2020). weights_N: a factor for each token's
    loss.
    """
    log_ratio = logprobs_N - old_logprobs_N
    ratio = log_ratio.exp()
    plain, clipped = -advantages_N * ratio, -advantages_N * ratio.clamp(1 - clip_low, 1 + clip_high)
    worse = clipped > plain
    losses = torch.where(worse, clipped, plain)
    capped = torch.zeros_like(worse)
    if dual_clip is not None:
        capped = (advantages_N < 0) & (losses > -dual_clip * advantages_N)
        losses = torch.where(capped, -dual_clip * advantages_N, losses)
    if weights_N is not None:
        losses = losses * weights_N
    with torch.no_grad():
        metrics = (worse, log_ratio.square() / 2, ratio, capped)
        clips, half_square, ratios, caps = (values.to(losses.dtype).sum() for values in metrics)
        highest = ratio.amax() if ratio.numel() else losses.new_zeros(())
    return PolicySums(losses.sum(), clips, half_square, ratios, caps, highest)


def value_loss_sum(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    clip: float | None = 0.2,
    weights_N: Tensor | None = None,
) -> ValueSums:
    """Sum over tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2; with clip = None only the first."""
    losses = (values_N - returns_N).square()
    worse = torch.zeros_like(losses, dtype=torch.bool)
    if clip is not None:
        near = (torch.clamp(values_N, old_values_N - clip, old_values_N + clip) - returns_N).square()
        worse = near > losses
        losses = torch.where(worse, near, losses)
    if weights_N is not None:
        losses = losses * weights_N
    return ValueSums(0.5 * losses.sum(), worse.to(losses.dtype).sum())
