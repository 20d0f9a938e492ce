"""Dropout by keys: a mask is a function of each token's key, the place in the network, and the channel.

So it depends neither on the rest of the micro-batch, nor on padding, order or the process that computes it. A key is
multiplied by a channel's and mixed (Steele et al. 2014): a few integer operations per number, the same on any device.
"""

import torch
from torch import Tensor

from tetrad.seeds import STRIDE, seed_for


def dropped(x: Tensor, keys_T: Tensor, rate: float, layer: int, branch: int) -> Tensor:
    """x, [T, H], with a share `rate` of its numbers zeroed and the others scaled up to compensate."""
    channels_H = _mixed(torch.arange(x.shape[-1], device=x.device) * STRIDE) | 1
    bits = _keys_at(keys_T, layer, branch)[:, None] * channels_H
    bits.bitwise_xor_(bits >> 32).mul_(STRIDE)
    return x * ((bits < _limit(rate)).to(x.dtype) * (1 / (1 - rate)))


def kept_tokens(keys_T: Tensor, rate: float) -> Tensor:
    """True, [T], for all but a share `rate` of the tokens."""
    return _keys_at(keys_T, -1, 0) < _limit(rate)


def _limit(rate: float) -> int:
    """The bound below which all but a share `rate` of the signed 64-bit numbers lie."""
    return min(round((1 - rate) * 2**64), 2**64 - 1) - 2**63


def _keys_at(keys_T: Tensor, layer: int, branch: int) -> Tensor:
    return _mixed(keys_T + seed_for(layer, "dropout", branch))


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's last steps on signed numbers; masks make its shifts unsigned."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
