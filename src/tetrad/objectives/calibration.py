"""How far a reward model can be trusted: pair accuracy, calibration, rank correlation, intervals.

No gradients. Ties are averaged, never broken by position, and randomness comes from a seed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tetrad.objectives.ranks import centred_ranks

MOST_DRAWN = 1_000_000  # rows at a time
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


def ece(confidence_N: Tensor, correct_N: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error, a scalar: |accuracy - confidence| of equal-width bins, weighted by their counts.

    Bin b is [b, b + 1) / bins; a confidence of 1 falls into the last (Naeini et al. 2015). Raises ValueError without
    values, or if a confidence lies outside [0, 1].
    """
    if confidence_N.numel() == 0 or not bool(((confidence_N >= 0) & (confidence_N <= 1)).all()):
        raise ValueError("confidences must lie in [0, 1], and there must be some")
    bin_N = (confidence_N * bins).long().clamp(max=bins - 1)
    gap = correct_N.to(confidence_N.dtype) - confidence_N
    return torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add(0, bin_N, gap).abs().sum() / len(gap)


def brier(confidence_N: Tensor, correct_N: Tensor) -> Tensor:
    """Mean squared gap between a probability and what happened (0, 1; 0.5 for a tie). Raises ValueError if empty."""
    if confidence_N.numel() == 0:
        raise ValueError("no values: their mean is undefined")
    return (confidence_N - correct_N.to(confidence_N.dtype)).square().mean()


def fit_temperature(logits_P: Tensor, labels_P: Tensor) -> float:
    """The T in [0.01, 100] under which sigmoid(logits / T) has the least cross-entropy against labels in [0, 1].

    In 1 / T the cross-entropy is convex, so its slope is bisected; data without a minimum (every pair right, or no
    better than chance) gives an end of the range. Raises ValueError without values or if one is not finite (Guo et
    al. 2017).
    """
    logits, labels = logits_P.detach().double(), labels_P.detach().double()
    if logits.numel() == 0 or not bool(logits.isfinite().all() & labels.isfinite().all()):
        raise ValueError("a temperature needs finite values")
    low, high = -math.log(HIGHEST_TEMPERATURE), -math.log(LOWEST_TEMPERATURE)  # of log(1 / T)
    for _ in range(60):
        middle = (low + high) / 2
        sharper = logits * math.exp(middle)
        # sigmoid(x) - label, without the cancellation that would flatten the slope where every pair is right.
        slope = float((logits * ((1 - labels) * torch.sigmoid(sharper) - labels * torch.sigmoid(-sharper))).sum())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Rank correlation, ties given their mean rank; NaN (undefined) if either side is constant or has one value."""
    x, y = (torch.from_numpy(centred_ranks(values_N.detach().cpu().double().numpy())) for values_N in (x_N, y_N))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else math.nan


def kendall(x_N: Tensor, y_N: Tensor) -> float:
    """tau-b: concordant minus discordant pairs, over the pairs untied on each side (Kendall 1945); NaN if either side
    is constant. Time grows as N^2."""
    both, untied_x, untied_y = 0.0, 0.0, 0.0
    for rows in torch.arange(len(x_N)).split(256):
        x, y = (torch.sign(v[rows, None] - v[None]) for v in (x_N.detach(), y_N.detach()))
        both += float((x * y).sum())
        untied_x, untied_y = untied_x + float(x.abs().sum()), untied_y + float(y.abs().sum())
    scale = math.sqrt(untied_x * untied_y)
    return both / scale if scale else math.nan


def bootstrap_interval(
    values_N: Tensor,
    statistic: Callable[[Tensor], Tensor | float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of the rows of `values`, the mean by default (Efron 1979).

    Raises ValueError without values.
    """
    if len(values_N) == 0:
        raise ValueError("no values: their interval is undefined")
    generator, values, size = torch.Generator().manual_seed(seed), values_N.detach().cpu().double(), len(values_N)
    stats: list[float] = []
    while count := min(resamples - len(stats), 1 + MOST_DRAWN // size):
        drawn = torch.randint(size, (count, size), generator=generator)
        stats += values[drawn].mean(1).tolist() if statistic is None else [float(statistic(values[n])) for n in drawn]
    low, high = torch.tensor(stats, dtype=torch.float64).quantile(torch.tensor([1 - level, 1 + level]).double() / 2)
    return float(low), float(high)
