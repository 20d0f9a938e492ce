"""The decoder against transformers, in float32, folders read and written both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from tetrad.model.huggingface import model_files, read_causal
from tetrad.model.transformer import CausalLM
from tetrad.types import IGNORE, Tokens

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 tied": ("Qwen2", {**HEADS, "tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {**HEADS, "tie_word_embeddings": False}),
    "qwen2 without groups": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "qwen2 one group": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "qwen2 long waves": ("Qwen2", {**HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {**HEADS, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 untied": ("Qwen3", {**HEADS, "head_dim": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama": ("Llama", {**HEADS, "tie_word_embeddings": False}),
    "llama3": ("Llama", {**HEADS, "rope_parameters": LLAMA3, "eos_token_id": [1, 5], "head_dim": 8}),
    "mistral": ("Mistral", {**HEADS, "sliding_window": None, "head_dim": 16}),
    "mistral tied": ("Mistral", {**HEADS, "sliding_window": None, "tie_word_embeddings": True}),
}
DOCUMENTS = [
    toys.document(toys.ids(length, length, 3, 99), prompt) for length, prompt in ((40, 3), (7, 1), (1, 1), (90, 30))
]


def theirs_of(kind: str) -> Any:
    name, changes = KINDS[kind]
    made = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(made).float().eval()
    toys.randomise(model, seed=3, std=0.2)
    return model


def assert_equal(ours: CausalLM, theirs: Any, documents: list[Tokens] = DOCUMENTS) -> None:
    """Logits of a packed batch against each document alone, and the loss of the labels."""
    packed = toys.packed(documents)
    ours.eval()
    with torch.no_grad():
        logits = ours(packed, "logits")
        nll = float(ours(packed, "nll")) / int((packed.targets_T != IGNORE).sum())
        alone = [torch.as_tensor(d.ids)[None].long() for d in documents]
        expected = [theirs(ids).logits[0] for ids in alone]
        labels = [
            torch.where(torch.as_tensor(d.train), i[0], IGNORE)[None] for d, i in zip(documents, alone, strict=True)
        ]
        long = max(range(len(documents)), key=lambda i: len(documents[i].ids))
        loss = float(theirs(alone[long], labels=labels[long]).loss)
        one = toys.packed([documents[long]])
        ours_one = float(ours(one, "nll")) / int((one.targets_T != IGNORE).sum())
    assert logits.std() > 0.3  # else closeness would say nothing
    assert (logits - torch.cat(expected)).abs().max() <= 1e-4
    assert abs(ours_one - loss) <= 1e-5
    whole = [
        torch.nn.functional.cross_entropy(e[:-1], t[0, 1:], reduction="sum")
        for e, t in zip(expected, labels, strict=True)
    ]
    assert abs(nll - float(sum(whole)) / int((packed.targets_T != IGNORE).sum())) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_their_folder_read_by_us(tmp_path: Path, kind: str, shards: bool) -> None:
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    assert_equal(read_causal(tmp_path), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_our_folder_read_by_them(tmp_path: Path, kind: str, shards: bool) -> None:
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_causal(tmp_path / "theirs")
    toys.write(tmp_path / "ours", model_files(ours, 20_000 if shards else 1 << 30))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or not shards
    read, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(read) is type(theirs)
    assert_equal(ours, read.eval())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "eos_token_id"):
        assert getattr(read.config, name) == getattr(theirs.config, name), name
    assert read.generation_config.eos_token_id == theirs.config.eos_token_id
    assert read.generation_config.pad_token_id == 2


@pytest.mark.parametrize("kind", ["qwen2 long waves", "llama3"])
@pytest.mark.parametrize("form", ["rope_theta", "rope_parameters"])
def test_both_forms_of_rope(tmp_path: Path, kind: str, form: str) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters; ours says both."""
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw.pop("rope_theta", None)
    if form == "rope_theta":
        raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if kind == "llama3" else None}
    else:
        raw["rope_parameters"] = rope
    path.write_text(json.dumps(raw))
    ours = read_causal(tmp_path)
    assert_equal(ours, theirs)
    written = json.loads(model_files(ours)["config.json"])
    assert (
        written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    )


def test_half_precision_folder(tmp_path: Path) -> None:
    """A bfloat16 folder is read as float32, without loss."""
    theirs_of("qwen2 tied").bfloat16().save_pretrained(tmp_path)
    ours = read_causal(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_equal(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_gradients_are_theirs(tmp_path: Path) -> None:
    theirs = theirs_of("qwen3")
    theirs.save_pretrained(tmp_path)
    ours, document = read_causal(tmp_path), DOCUMENTS[0]
    packed = toys.packed([document])
    (ours(packed, "nll") / int((packed.targets_T != IGNORE).sum())).backward()
    ids = torch.as_tensor(document.ids)[None].long()
    theirs(ids, labels=torch.where(torch.as_tensor(document.train)[None], ids, IGNORE)).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=name)
