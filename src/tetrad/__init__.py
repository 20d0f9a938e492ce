"""Tetrad: a causal language model from raw text to PPO. Importing it does not import torch.

`load` and `load_reward` open trained models, `generate` samples responses, `score` gives their rewards, `logprobs`
reads them with gradients, `save` writes a model, `run` trains by a recipe; `forward` gives loss and logits as
transformers does, `objectives` are the losses as pure functions. What a user can mend raises `UserError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tetrad.errors import Stopped as Stopped
from tetrad.errors import UserError as UserError

if TYPE_CHECKING:
    from tetrad.api import *  # noqa: F403

__version__ = "0.1.0"
_MODELS = ("Generation", "Output", "Policy", "RewardModel", "generate", "load", "load_reward", "logprobs", "prompt_ids")
_PUBLIC = (*_MODELS, "RunResult", "forward", "objectives", "run", "save", "score")


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: they need torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tetrad' has no attribute {name!r}")
    return getattr(importlib.import_module("tetrad.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
