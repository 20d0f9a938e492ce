"""Low-rank adapters."""

from typing import Literal

from tetrad.settings.base import Count, Positive, settings


@settings
class Lora:
    """Adapters on the decoder's matrices (Hu et al. 2021), for the stages that set `adapters`."""

    rank: Count = 16
    """Width of an adapter."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    targets: Literal["all", "attention"] = "all"
    """Which matrices get one: all of the blocks, or attention's four."""
