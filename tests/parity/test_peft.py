"""Adapters of ours in PEFT: the folder loads onto the same base, gives the same numbers, and merges."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from tetrad.model.lora import ALL, adapter_config, adapter_tensors, add_adapters, share_weights
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel, initial_head

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed"),
]

IDS = [[*toys.ids(length, length), toys.EOS] for length in (30, 4, 17)]


@pytest.fixture(scope="module")
def peft_model() -> Any:
    """PEFT's class. Its import takes five seconds, which the collection of other tests is spared."""
    return importlib.import_module("peft").PeftModel


def written(folder: Path, model: CausalLM | ScalarModel, base: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(adapter_config(model, base, {"base_sha256": "0"}))
    weights = b"".join(bytes(chunk) for chunk in tensor_chunks(adapter_tensors(model)))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def adapted(model: CausalLM | ScalarModel) -> None:
    add_adapters(model, 3, 6.0, ALL, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_an_actors_adapter(tmp_path: Path, peft_model: Any, family: str) -> None:
    base = toys.causal(seed=1, family=family).requires_grad_(False)
    place = toys.saved(tmp_path / "base", base)
    model = share_weights(CausalLM, base)
    adapted(model)
    folder = written(tmp_path / "adapter", model, str(place))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    theirs = peft_model.from_pretrained(theirs, folder).eval()
    plain = theirs.merge_and_unload() if family == "qwen3" else theirs
    for ids in IDS:
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0]
            ours = model(toys.packed([toys.document(ids)]), "logits")
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_models_adapter_with_its_head(tmp_path: Path, peft_model: Any) -> None:
    base = toys.causal(seed=1).requires_grad_(False)
    place = toys.saved(tmp_path / "base", base)
    model = share_weights(ScalarModel, base)
    model.score.weight = torch.nn.Parameter(initial_head(32, 3))
    model.bias = torch.zeros(())
    adapted(model)
    folder = written(tmp_path / "adapter", model, str(place))
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32)
    theirs.config.pad_token_id = toys.PAD
    theirs = peft_model.from_pretrained(theirs, folder).eval()
    for ids in IDS:
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0, 0]
            ours = model(toys.packed([toys.document(ids)]), "scores")[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
