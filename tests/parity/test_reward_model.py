"""A reward model of ours in transformers: AutoModelForSequenceClassification gives the same numbers, less the constant
that config.json names, in batches padded on either side; and one that transformers made is read by us."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from tetrad.model.huggingface import read_scalar
from tetrad.model.transformer import grow_vocabulary
from tetrad.reward.model import score_sequences
from tetrad.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

# Of different lengths, all ending in an end token, one holding another in the middle.
IDS = [[*toys.ids(length, length), toys.EOS] for length in (30, 4, 17, 1, 9)]
IDS[2][5] = toys.EOS
FAMILIES = ["qwen2", "qwen3", "llama", "mistral"]


def padded(side: str, pad: int = toys.PAD) -> dict[str, torch.Tensor]:
    longest = max(map(len, IDS))
    fill = [[pad] * (longest - len(ids)) for ids in IDS]
    rows = [f + i if side == "left" else i + f for f, i in zip(fill, IDS, strict=True)]
    ones = [[0 if token == pad else 1 for token in row] for row in rows]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(ones)}


def read(folder: Path) -> tuple[Any, float]:
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), json.loads((folder / "config.json").read_text())["tetrad"]["reward_bias"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_in_transformers(tmp_path: Path, family: str, side: str) -> None:
    model = toys.scalar(seed=5, bias=-0.75, family=family)
    theirs, bias = read(toys.saved(tmp_path, model))
    assert bias == -0.75
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == toys.PAD
    ours = torch.tensor(score_sequences(model, [toys.document(ids) for ids in IDS], toys.CPU, 64))
    with torch.no_grad():
        logits = theirs(**padded(side)).logits
        alone = [theirs(torch.tensor([ids])).logits[0, 0].item() for ids in IDS]
    assert logits.shape == (len(IDS), 1)
    assert ours.std() > 0.3
    assert (logits[:, 0] + bias - ours).abs().max() <= 1e-5
    assert (torch.tensor(alone) + bias - ours).abs().max() <= 1e-5


@pytest.mark.parametrize("spare", [0, 3])
def test_without_a_pad_to_spare_it_gets_one(tmp_path: Path, spare: int) -> None:
    """GPT-2 has one control token, and a reward is read at the last token that is no pad: a row is added, or a spare
    one taken, and no score changes."""
    spec = json.loads(toys.tokenizer().text)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] == toys.EOS]
    tokenizer = Tokenizer(json.dumps(spec))
    model = toys.scalar(seed=5, vocab_size=40 + spare, pad_id=None)
    before = score_sequences(model, [toys.document(ids) for ids in IDS], toys.CPU, 64)
    grown, own = model, tokenizer.with_pad()
    grow_vocabulary(grown, own.size)
    assert (own.pad_id, grown.config.vocab_size) == (40, max(41, 40 + spare))
    grown.config = replace(grown.config, pad_id=own.pad_id)
    theirs, bias = read(toys.saved(tmp_path, grown))
    for side in ("left", "right"):
        with torch.no_grad():
            logits = theirs(**padded(side, own.pad_id)).logits[:, 0]
        assert (logits + bias - torch.tensor(before)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_after_gain_and_bias(tmp_path: Path, family: str) -> None:
    """Normalised as the reward stage does it: the gain is in score.weight, the constant in config.json."""
    model = toys.scalar(seed=6, family=family)
    documents = [toys.document(ids) for ids in IDS]
    raw = torch.tensor(score_sequences(model, documents, toys.CPU, 64))
    with torch.no_grad():
        model.score.weight /= raw.std(correction=0).float()
        model.bias.copy_(-(raw.mean() / raw.std(correction=0)))
    theirs, bias = read(toys.saved(tmp_path, model))
    with torch.no_grad():
        scores = theirs(**padded("right")).logits[:, 0] + bias
    assert abs(float(scores.mean())) < 1e-5
    assert abs(float(scores.std(correction=0)) - 1) < 1e-5


def test_theirs_in_ours(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=1,
        eos_token_id=toys.EOS,
        pad_token_id=toys.PAD,
    )
    theirs = transformers.Qwen2ForSequenceClassification(config).eval()
    toys.randomise(theirs, seed=9)
    theirs.save_pretrained(tmp_path)
    ours = score_sequences(read_scalar(tmp_path), [toys.document(ids) for ids in IDS], toys.CPU, 64)
    with torch.no_grad():
        expected = theirs(**padded("right")).logits[:, 0]
    assert (torch.tensor(ours) - expected).abs().max() <= 1e-5
