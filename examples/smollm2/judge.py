"""`people`: the judgement of a reward model that learned from other people's ratings than the recipe's own.

It is trained by `tetrad run people.toml` on the valid and test sentences of reviews-en, which the recipe's reward model
never learns from; its points are people's rating points in its own standard deviations. `ridge` and `lexicon` are those
of `../reviews-en/judge.py`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tetrad

MODEL = Path("runs/smollm2-people/reward")


@cache
def model() -> Any:
    if not MODEL.is_dir():
        raise FileNotFoundError(f"{MODEL} is missing: tetrad run examples/smollm2/people.toml")
    return tetrad.load_reward(MODEL)


def people(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rewards per sample, a dict with `prompt` (Instruction and first words), `input` (these words) and `text`."""
    prompts = [(instruction(sample), str(sample["input"])) for sample in samples]
    return tetrad.score(model(), prompts, [str(sample["text"]) for sample in samples])


def instruction(sample: Mapping[str, Any]) -> str:
    """The prompt's first line."""
    return str(sample["prompt"]).partition("\n")[0]
