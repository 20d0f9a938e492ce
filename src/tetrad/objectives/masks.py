"""Masks: True on the tokens that count. Other positions may hold anything, even NaN.

Values are selected with `where` before any arithmetic, never multiplied by the mask: 0 * NaN is NaN, in gradients too.
An empty mask has no mean: it is an error, not NaN and not 0.
"""

from typing import Literal

import torch
from torch import Tensor

How = Literal["token", "seq"]


def select(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask`, exactly 0 elsewhere; neither the result nor a gradient sees what was there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def require_any(mask: Tensor) -> None:
    """Raises ValueError when no position counts."""
    if not bool(mask.any()):
        raise ValueError("the mask is empty: a mean over no tokens is undefined")


def token_weights(mask: Tensor, reduction: How, dtype: torch.dtype) -> Tensor:
    """Weights [B, T] whose weighted sum is a mean: `token` over all tokens, `seq` over rows of each row's own mean.

    Rows without a token are left out. Raises ValueError on an empty mask.
    """
    require_any(mask)
    weights = mask.to(dtype)
    if reduction == "token":
        return weights / weights.sum()
    lengths = weights.sum(-1, keepdim=True)
    return weights / lengths.clamp(min=1) / (lengths > 0).sum()
