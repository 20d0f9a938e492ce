"""Losses, advantages and metrics as pure functions of tensors. Imports torch and the products of `kernels` only.

Public as `tetrad.objectives.ppo`, `.dpo`, `.grpo`, `.preference`, `.language`, `.calibration` and `.ranks`, each
imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetrad.objectives import calibration, dpo, grpo, language, ppo, preference, ranks

__all__ = ["calibration", "dpo", "grpo", "language", "ppo", "preference", "ranks"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tetrad.objectives' has no attribute {name!r}")
    return importlib.import_module(f"tetrad.objectives.{name}")
