"""Tetrad: a causal language model from raw text to PPO. Importing it does not import torch.

`tetrad.load(folder)` opens a trained model, `tetrad.generate(model, prompts)` samples responses, and
`tetrad.forward(model.model, input_ids, attention_mask, labels)` gives loss and logits as transformers does.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {"load": "tetrad.inference.policy", "generate": "tetrad.inference.policy", "forward": "tetrad.model.padded"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: they need torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tetrad' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
