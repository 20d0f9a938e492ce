"""PPO's arithmetic: KL, shaped rewards, advantages, whitening, and the two clipped losses.

Arrays are [B, T] and already shifted: position t belongs to response token t; `mask` is True on response tokens (rows
may be padded on either side and have holes). The losses for training come as sums with a number of tokens, so that
micro-batches and ranks add up exactly; they take arrays of any one shape, flat ones too. The mean forms are for a
batch that is complete in one place. Nothing is clamped but what PPO clips. Sources: the losses, the place of the score
and the adaptive coefficient: Ziegler et al. 2019 (1909.08593), GAE: Schulman et al. 2016 (1506.02438).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tetrad.objectives.masks import How, require_any, select, token_weights

WHITEN_EPS = 1e-8  # inside the root


class PolicySums(NamedTuple):
    """Sums over the masked-in tokens, `loss` with gradient; divide by `tokens`. Only `highest_ratio` is a maximum."""

    loss: Tensor
    clipped: Tensor
    half_square: Tensor
    k1: Tensor
    k3: Tensor
    ratio: Tensor
    dual_clipped: Tensor
    highest_ratio: Tensor
    tokens: Tensor


class PolicyStats(NamedTuple):
    """Means over tokens. approx_kl is half the mean squared log-ratio; k1 and k3 estimate KL(old || new)."""

    clipfrac: Tensor
    approx_kl: Tensor
    approx_kl_k1: Tensor
    approx_kl_k3: Tensor
    ratio_mean: Tensor
    dual_clipfrac: Tensor


class ValueSums(NamedTuple):
    """Sums over the masked-in tokens, `loss` with gradient; divide by `tokens`."""

    loss: Tensor
    clipped: Tensor
    tokens: Tensor


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
    spread = (squares - total.square() / count).clamp(min=0)
    return about + total / count, spread / (count - 1 if unbiased else count)


def whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    unbiased: bool = False,
    mean_and_variance: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask, plus the mean again unless `shift_mean`; 0 where masked.

    mean_and_variance: those of the whole batch, from all ranks' `moments`; else they are computed from x.
    Raises ValueError on an empty mask.
    """
    if mean_and_variance is None:
        require_any(mask)
        first, _ = mean_variance(moments(x, mask))
        mean_and_variance = mean_variance(moments(x, mask, first), first, unbiased)
    mean, variance = (number.to(x.dtype) for number in mean_and_variance)
    whitened = (select(x, mask) - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return select(whitened if shift_mean else whitened + mean, mask)


def explained_variance(
    returns_mean: Tensor | float, returns_variance: Tensor | float, residual_variance: Tensor | float
) -> Tensor:
    """1 - Var(returns - values) / Var(returns); NaN (undefined) where all returns are equal but for rounding."""
    mean, variance, rest = (torch.as_tensor(x).double() for x in (returns_mean, returns_variance, residual_variance))
    return torch.where(variance <= (1e-12 * mean).square(), torch.nan, 1 - rest / variance)


def policy_loss_sum(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicySums:
    """Sum over tokens of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(logp - old_logp).

    dual_clip c > 1: where A < 0 a token's loss is at most -c A (Ye et al. 2020). weights: a factor for each token's
    loss.
    """
    advantages = select(advantages, mask)
    log_ratio = select(logprobs, mask) - select(old_logprobs, mask)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    worse = clipped > plain
    losses = torch.where(worse, clipped, plain)
    capped = torch.zeros_like(mask)
    if dual_clip is not None:
        capped = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(capped, -dual_clip * advantages, losses)
    if weights is not None:
        losses = losses * select(weights, mask)
    with torch.no_grad():
        k3 = torch.expm1(log_ratio) - log_ratio
        shown = select(ratio, mask)
        parts = (worse & mask, log_ratio.square() / 2, -log_ratio, k3, shown, capped & mask)
        clips, half_square, k1, k3, ratios, caps = (part.to(losses.dtype).sum() for part in parts)
        highest = shown.amax() if shown.numel() else losses.new_zeros(())
    return PolicySums(select(losses, mask).sum(), clips, half_square, k1, k3, ratios, caps, highest, mask.sum())


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduction: How = "token",
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """`policy_loss_sum` as a mean over tokens, or over rows of each row's mean. Raises ValueError on an empty mask."""
    weights = token_weights(mask_BT, reduction, logprobs_BT.dtype)
    sums = policy_loss_sum(
        logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_low, clip_high, dual_clip, weights
    )
    return sums.loss, PolicyStats(*(total / sums.tokens for total in sums[1:7]))


def value_loss_sum(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    weights: Tensor | None = None,
) -> ValueSums:
    """Sum over tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2; with clip = None only the first."""
    values, old_values, returns = select(values, mask), select(old_values, mask), select(returns, mask)
    losses = (values - returns).square()
    worse = torch.zeros_like(mask)
    if clip is not None:
        near = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square()
        worse = near > losses
        losses = torch.where(worse, near, losses)
    if weights is not None:
        losses = losses * select(weights, mask)
    return ValueSums(0.5 * losses.sum(), (worse & mask).to(losses.dtype).sum(), mask.sum())


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    reduction: How = "token",
    clip: float | None = 0.2,
) -> tuple[Tensor, Tensor]:
    """The mean of `value_loss_sum`, and the share of tokens where the clipped error was the larger one."""
    weights = token_weights(mask_BT, reduction, values_BT.dtype)
    sums = value_loss_sum(values_BT, old_values_BT, returns_BT, mask_BT, clip, weights)
    return sums.loss, sums.clipped / sums.tokens
