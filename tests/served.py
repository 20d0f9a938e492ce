"""Model folders as a run leaves them, untrained: a learned tokenizer, Chinese text included, and random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import toys
from tetrad.inference import policy
from tetrad.inference.completions import Completion, EncodedPrompt
from tetrad.model.huggingface import model_files
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.reward import model as reward_model
from tetrad.reward.model import RewardModel
from tetrad.settings import use
from tetrad.storage import write_folder
from tetrad.text.bpe import learn
from tetrad.text.chat_template import TEMPLATES
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Tokens

TEXT = [
    "the plot is a warm and funny story with a dull ending",
    "what a bright film, slow but moving",
    "请帮我翻译一句话:这部电影很好看",
]


def tokenizer(size: int = 300) -> Tokenizer:
    return learn(TEXT * 3, size)


def write_model(
    folder: Path, form: str = "instruction", *, reward: bool = False, size: int = 300, seed: int = 0, **changes: Any
) -> Path:
    """A stage's folder with `model` in it, manifest included. form: empty for a folder that names no template."""
    words, template = tokenizer(size), TEMPLATES.get(form)
    end = template.end_id(words) if template else words.document_end
    given = {"vocab_size": words.size, "eos_ids": (end,), "pad_id": words.pad_id, "max_positions": 96, **changes}
    kind = ScalarModel if reward else CausalLM
    model = kind(toys.config(**given))
    toys.randomise(model, seed, std=0.25)
    write_folder(folder / "model", {**model_files(model), **words.files(template)}, {"key": "k"})
    return folder


def completed(
    model: policy.Policy, prompts: Sequence[EncodedPrompt], settings: use.Sample, samples_per_prompt: int = 1
) -> list[Completion]:
    """The completions of all prompts, one after another."""
    groups = policy.completions(model, prompts, settings, samples_per_prompt)
    return [completion for group in groups for completion in group]


def documents_from_text(
    judge: RewardModel, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]
) -> list[Tokens]:
    """Prompts and answers as the judge's documents."""
    samples = [
        Completion((), (), p.turns, text, p.where, e) for p, text, e in zip(prompts, texts, finished, strict=True)
    ]
    return reward_model.documents_from_text(judge.template, judge.tokenizer, samples)


def score_documents(judge: RewardModel, documents: Sequence[Tokens]) -> list[float]:
    """Rewards of a judge that is one model."""
    (rewards,) = reward_model.score_documents(judge, documents).tolist()
    found: list[float] = rewards
    return found
