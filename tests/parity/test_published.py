"""Folders in the shape in which the families are published, small and with random weights, against transformers.

Weights are bfloat16 in shards with an index, the vocabulary has more rows than the tokenizer has tokens, and one of the
end tokens is named in generation_config.json alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tetrad
import toys
from tetrad.inference import policy
from tetrad.inference.completions import complete
from tetrad.model.huggingface import model_files, read_causal
from tetrad.settings import use
from tetrad.settings.common import Sampling

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NEW, TURN_END = 24, 5
SIZES = {
    "vocab_size": 64,  # of which the tokenizer has 40
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": toys.EOS,
    "rms_norm_eps": 1e-5,
}
FOUR = {"torch_dtype": "bfloat16", "transformers_version": "4.43.1", "rope_theta": 500_000.0}
QWEN = FOUR | {"max_window_layers": 1, "sliding_window": 16, "use_sliding_window": False, "rms_norm_eps": 1e-6}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
FIVE = {"dtype": "bfloat16", "transformers_version": "5.0.0"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5 0.5B": QWEN | {"model_type": "qwen2", "tie_word_embeddings": True, "use_mrope": False},
    "Qwen2.5 7B": QWEN | {"model_type": "qwen2", "tie_word_embeddings": False, "rope_scaling": None},
    "Qwen3 0.6B": QWEN | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16, "attention_bias": False},
    "Qwen3 8B": QWEN | {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 8, "sliding_window": None},
    "Qwen3, transformers 5": FIVE
    | {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "pad_token_id": None,
    },
    "Llama 2": FOUR | {"model_type": "llama", "num_key_value_heads": None, "pretraining_tp": 1, "rope_scaling": None},
    "Llama 3 8B": FOUR | {"model_type": "llama", "tie_word_embeddings": False, "mlp_bias": False},
    "Llama 3.1 8B": FOUR | {"model_type": "llama", "rope_scaling": LLAMA3, "eos_token_id": [toys.EOS, 7]},
    "Llama 3.2 1B": FOUR
    | {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 8, "mlp_bias": False},
    "Llama 3.2, transformers 5": FIVE
    | {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "Mistral 7B v0.3": FOUR | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
    "Mistral Nemo": FOUR | {"model_type": "mistral", "sliding_window": None, "head_dim": 16, "rope_theta": 1e6},
    "Mistral, a window over all": FOUR | {"model_type": "mistral", "sliding_window": 96},
}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}


def published(folder: Path, name: str) -> Path:
    """A folder with this config.json, to the letter: what transformers adds to it when it saves is taken away again."""
    raw: dict[str, Any] = {**SIZES, **PUBLISHED[name]}
    raw = {key: value for key, value in raw.items() if key != "num_key_value_heads" or value is not None}
    raw["architectures"] = [f"{CLASSES[raw['model_type']]}ForCausalLM"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float()
    toys.randomise(model, seed=3, std=0.25)
    with torch.no_grad():
        model.get_output_embeddings().weight[TURN_END] *= 1.3
    model.bfloat16().save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "config.json").write_text(json.dumps(raw))
    ends = {"bos_token_id": 0, "eos_token_id": [toys.EOS, TURN_END, 7], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return toys.write(folder, toys.tokenizer().files())


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_as_published(tmp_path: Path, name: str) -> None:
    """Logits, greedy responses up to any of the end tokens, and the folder that we write."""
    folder = published(tmp_path / "theirs", name)
    theirs, model = theirs_of(folder), tetrad.load(folder, template="instruction")
    documents = [toys.document(toys.ids(length, length)) for length in (90, 12, 1)]
    expected = torch.cat([theirs(torch.as_tensor(d.ids)[None].long()).logits[0] for d in documents])
    logits = model.model(toys.packed(documents), "logits")
    assert logits.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-4

    texts = [" ".join(f"w{i}" for i in toys.ids(3 + n % 5, n)) for n in range(12)]
    prompts = [policy.encode_prompt(model, policy.instruction_prompt(text)) for text in texts]
    responses = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": toys.PAD}
        responses.append(theirs.generate(ids, do_sample=False, **given)[0, ids.shape[1] :].tolist())
    assert any(ids[-1] == TURN_END for ids in responses) and any(len(ids) == NEW for ids in responses)
    settings = use.Sample(temperature=0.0, max_new_tokens=NEW)
    assert [list(c.response_ids) for (c,) in policy.completions(model, prompts, settings)] == responses
    greedy = Sampling(temperature=0.0, max_new_tokens=NEW)  # as PPO and `evaluate` sample
    rolled = complete(model.model, prompts, range(12), (0, "t", 0), greedy, model.tokenizer, model.device)
    assert [list(c.response_ids) for c in rolled] == responses
    assert [c.finished for c in rolled] == [ids[-1] in (toys.EOS, TURN_END, 7) for ids in responses]

    again = theirs_of(toys.write(tmp_path / "ours", model_files(read_causal(folder), 20_000)))
    assert type(again) is type(theirs)
    for tokens in documents:
        ids = torch.as_tensor(tokens.ids)[None].long()
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert set(again.generation_config.eos_token_id) == {toys.EOS, TURN_END, 7}
