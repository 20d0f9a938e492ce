"""Ranks for rank correlations, without torch."""

from typing import Any

import numpy as np

Ranks = np.ndarray[Any, np.dtype[np.float64]]


def centred_ranks(values_N: Any) -> Ranks:
    """Ranks less their mean, ties given their mean rank: multiples of 1/2, so sums of their products are exact."""
    _, index_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ranks: Ranks = (np.cumsum(counts) - (counts - 1) / 2)[index_N]
    ranks -= ranks.mean()
    return ranks
