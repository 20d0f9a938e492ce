"""config.json of Hugging Face: every form that is read, and what is refused with which code."""

import json
from dataclasses import replace

import pytest

import toys
from tetrad.errors import UserError
from tetrad.model.config import RopeScaling, config_json, read_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def folder(tmp_path, base=None, drop=(), **values):
    raw = {**config_json(base or toys.config(), "CausalLM"), **values}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))
    return tmp_path


def refused(tmp_path, **values):
    with pytest.raises(UserError) as raised:
        read_config(folder(tmp_path, **values))
    assert raised.value.where.endswith("config.json")
    assert raised.value.exit_code == 4
    return raised.value


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"use_sliding_window": True, "sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "layer_types": ["full_attention"] * 2},
        {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 4097},  # the window that isn't named
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
        {"architectures": []},
        {"architectures": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    ],
    ids=str,
)
def test_unsupported(tmp_path, values):
    drop = ["sliding_window"] if "sliding_window" not in values else []
    error = refused(tmp_path, drop=drop, **values)
    assert error.code == "E-MODEL-UNSUPPORTED"
    assert error.hint


def test_another_architecture_is_told_which_there_are(tmp_path):
    error = refused(tmp_path, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text")
    assert "Gemma3ForCausalLM" in error.what
    for name in ("Qwen2", "Qwen3", "Llama", "Mistral"):
        assert f"{name}ForCausalLM" in error.hint and f"{name}ForSequenceClassification" in error.hint


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SLIDING = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize("values", [{**MISTRAL, "sliding_window": None}, MISTRAL, SLIDING], ids=str)
@pytest.mark.parametrize("window", [128, 4096])
def test_a_window_over_all_positions_is_none(tmp_path, values, window):
    """A Mistral that names none has transformers' 4096."""
    drop = [] if "sliding_window" in values else ["sliding_window"]
    windows = {} if values is MISTRAL else {"sliding_window": window}
    given = folder(tmp_path, **{**values, **windows}) if windows else folder(tmp_path, drop=drop, **values)
    assert read_config(given).max_positions == 128


def test_code_of_the_folder_is_not_run(tmp_path):
    assert refused(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"}).code == "E-MODEL-CODE"


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_number_is_missing(tmp_path, name):
    error = refused(tmp_path, drop=[name])
    assert error.code == "E-MODEL-FORMAT"
    assert name in error.what


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", ""])
def test_not_json(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="E-MODEL-FORMAT"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(UserError, match="E-MODEL-MISSING"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification"])
def test_what_is_written_is_read(tmp_path, family, kind):
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192) if family == "llama" else None
    bias = 0.5 if kind == "SequenceClassification" else 0.0
    config = toys.config(
        family, head_dim=16, rope_theta=5e5, rope_scaling=scaling, norm_eps=1e-5, tied=False, eos_ids=(1, 7), bos_id=0
    )
    config = replace(
        config, reward_bias=bias, max_positions=8192
    )  # more than the window that transformers assumes for Mistral
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, kind)))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (5, (5,)), ([5, 9], (5, 9)), (0, (0,)), ([], ())])
def test_end_tokens(tmp_path, value, expected):
    assert read_config(folder(tmp_path, eos_token_id=value)).eos_ids == expected


def test_end_tokens_of_generation_config(tmp_path):
    """Llama 3's end of a turn is named there alone; the others keep their order."""
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [9, 5, 8]}')
    assert read_config(folder(tmp_path, eos_token_id=5)).eos_ids == (5, 9, 8)
    assert read_config(folder(tmp_path, eos_token_id=None)).eos_ids == (9, 5, 8)
    path.write_text('{"eos_token_id": "9"}')
    with pytest.raises(UserError, match=r"E-MODEL-FORMAT.*generation_config\.json.*'9'"):
        read_config(tmp_path)
    path.write_text("[")
    with pytest.raises(UserError, match=r"E-MODEL-FORMAT.*generation_config\.json"):
        read_config(tmp_path)


def test_forms_of_rope(tmp_path):
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    both = ("rope_theta", "rope_scaling", "rope_parameters")
    base = config_json(toys.config("llama"), "CausalLM")
    for form in (old, new, {**old, **new}):
        raw = {k: v for k, v in base.items() if k not in both} | form
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = read_config(tmp_path)
        assert config.rope_theta == 5e5
        assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert read_config(folder(tmp_path, drop=both)).rope_theta == 10_000
    assert read_config(folder(tmp_path, drop=both)).rope_scaling is None


def test_what_is_left_out_has_their_default(tmp_path):
    config = read_config(
        folder(tmp_path, drop=["head_dim", "num_key_value_heads", "tie_word_embeddings", "pad_token_id"])
    )
    assert config.head_dim == 8
    assert config.kv_heads == 4
    assert not config.tied
    assert config.pad_id is None
    left_out = ["head_dim", "num_key_value_heads", "sliding_window"]
    wide = {"hidden_size": 128, "num_attention_heads": 16}
    assert read_config(folder(tmp_path, drop=left_out, architectures=["Qwen3ForCausalLM"], **wide)).head_dim == 128
    mistral = read_config(folder(tmp_path, drop=left_out, architectures=["MistralForCausalLM"], **wide))
    assert (mistral.head_dim, mistral.kv_heads) == (8, 8)
