"""A model as a part of a checkpoint, and what a finished reward model reads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import served
import toys
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.model.huggingface import read_members
from tetrad.reward.model import documents_from_ids, documents_from_text, reward_model, score_sequences
from tetrad.settings.sft import Sft
from tetrad.text.chat_template import TEMPLATES
from tetrad.training.stage import Weights
from tetrad.types import Turn


def test_weights_come_back() -> None:
    one, other = toys.causal(seed=1), toys.causal(seed=2)
    Weights(other).load_tensors({name: t.clone() for name, t in Weights(one).tensors().items()})
    for name, tensor in Weights(one).tensors().items():
        assert torch.equal(tensor, Weights(other).tensors()[name])
    assert Weights(one).full_bytes() == sum(p.nbytes for p in one.parameters())


def test_foreign_weights_are_refused() -> None:
    weights = Weights(toys.causal(seed=1))
    tensors = dict(weights.tensors())
    name, tensor = tensors.popitem()
    with pytest.raises(UserError) as missing:
        weights.load_tensors(tensors)
    assert missing.value.code == "E-CKPT-KEYS" and name in missing.value.what
    with pytest.raises(UserError) as misshapen:
        weights.load_tensors({**tensors, name: tensor[:1] if tensor.dim() > 1 else tensor[:-1]})
    assert misshapen.value.code == "E-CKPT-SHAPE" and name in misshapen.value.what


def test_a_reward_model_reads_sampled_ids_in_training_and_the_text_elsewhere(tmp_path: Path) -> None:
    folders = {name: served.write_model(tmp_path / name, reward=name == "reward") for name in ("sft", "reward")}
    parents = {name: folder / "model" for name, folder in folders.items()}
    ctx: Any = SimpleNamespace(
        parents=parents, recipe=SimpleNamespace(sft=Sft(), run=SimpleNamespace(micro_batch_tokens=1000))
    )
    words, form, turns = served.tokenizer(), TEMPLATES["instruction"], (Turn("instruction", "Go on."),)
    ids = tuple(token for letter in "the plot" for token in words.encode(letter))  # not as the tokenizer cuts it
    samples = [Completion(tuple(form.prompt(words, turns)), ids, turns, "the plot", finished=False)]
    (member,) = read_members(parents["reward"])
    read = {"ids": documents_from_ids(samples), "text": documents_from_text(form, words, samples)}
    scores = {name: score_sequences(member, documents, toys.CPU, 1000) for name, documents in read.items()}
    assert scores["ids"] != scores["text"]
    assert reward_model(ctx, parents["reward"], toys.CPU, words)(samples) == scores["ids"]
    assert reward_model(ctx, parents["reward"], toys.CPU)(samples) == scores["text"]
