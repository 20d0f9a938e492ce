"""A folder told without torch: the table of parameters is the decoder's own. What is refused is in test_weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import toys
from tetrad.errors import UserError
from tetrad.model.huggingface import read_causal
from tetrad.model.inspect import INDEX, inspect, parameter_shapes
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scalar", [True, False])
def test_the_table_is_the_decoders(family: str, tied: bool, scalar: bool) -> None:
    config = toys.config(family, tied=tied, head_dim=16, ff=20, layers=3)
    model = ScalarModel(config) if scalar else CausalLM(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(parameter_shapes(config, scalar=scalar)) == wanted


def test_facts(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path, toys.causal(), shard_bytes=10_000)
    facts = inspect(folder)
    assert facts.config == toys.causal().config
    assert not facts.reward
    assert [path.name for path in facts.files] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(facts.files) > 1
    assert facts.tensors.keys() == dict(parameter_shapes(facts.config)).keys()


def test_a_head_may_be_new_for_a_critic_but_not_for_a_reward_model(tmp_path: Path) -> None:
    assert not inspect(toys.saved(tmp_path / "a", toys.causal()), scalar=True).reward
    folder = toys.saved(tmp_path / "b", toys.scalar())
    assert inspect(folder, scalar=True).reward
    (folder / "model.safetensors").write_bytes((tmp_path / "a/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"E-CKPT-KEYS.*score\.weight"):
        inspect(folder, scalar=True)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path, toys.causal(), shard_bytes=10_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"E-CKPT-KEYS.*two of the folder's files"):
        inspect(folder)


def test_old_buffers_are_passed_over(tmp_path: Path) -> None:
    model = toys.causal(family="llama")
    folder = toys.saved(tmp_path, model)
    tensors = read_tensors(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = model.model.inv_freq
    toys.write(folder, {"model.safetensors": tensor_chunks(tensors)})
    assert inspect(folder).tensors.keys() == dict(parameter_shapes(model.config)).keys()


# --- two sets of weights


def second_set(folder: Path) -> object:
    return toys.saved(folder, toys.causal(seed=2))


def adapter(folder: Path) -> object:
    return toys.write(folder, {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})


@pytest.mark.parametrize(
    ("shard_bytes", "change", "code", "named"),
    [
        (10_000, second_set, "E-MODEL-FORMAT", ("model.safetensors,", INDEX)),
        (1 << 30, adapter, "E-MODEL-UNSUPPORTED", ("adapter_config.json",)),
        (10_000, adapter, "E-MODEL-UNSUPPORTED", ("adapter_config.json",)),
    ],
)
def test_two_sets_of_weights_are_both_named(
    tmp_path: Path, shard_bytes: int, change: Callable[[Path], object], code: str, named: tuple[str, ...]
) -> None:
    change(toys.saved(tmp_path, toys.causal(), shard_bytes=shard_bytes))
    with pytest.raises(UserError) as caught:
        inspect(tmp_path)
    assert caught.value.code == code
    assert all(name in caught.value.what for name in named)
    assert caught.value.hint


def pickles(folder: Path) -> object:
    return toys.write(folder, {"pytorch_model.bin": b"x", "pytorch_model.bin.index.json": b"{}"})


def old_shards(folder: Path) -> object:
    """Without their index nothing names them."""
    toys.saved(folder / "old", toys.causal(seed=2), shard_bytes=10_000)
    return [path.rename(folder / path.name) for path in (folder / "old").glob("*.safetensors")]


def index_of_one(folder: Path) -> object:
    names = dict(parameter_shapes(toys.causal().config))
    return toys.write(folder, {INDEX: json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}).encode()})


def adapter_weights_alone(folder: Path) -> object:
    """Without adapter_config.json nothing puts them onto the model."""
    return toys.write(folder, {"adapter_model.safetensors": b"x"})


@pytest.mark.parametrize("change", [pickles, old_shards, index_of_one, adapter_weights_alone])
def test_what_transformers_passes_over_is_passed_over(tmp_path: Path, change: Callable[[Path], object]) -> None:
    model = toys.causal(seed=1)
    change(toys.saved(tmp_path, model))
    assert [path.name for path in inspect(tmp_path).files] == ["model.safetensors"]
    assert torch.equal(read_causal(tmp_path).model.embed_tokens.weight, model.model.embed_tokens.weight)


# --- config.json against the tensors


def with_head(folder: Path, head: torch.Tensor, shard: str = "model.safetensors") -> Path:
    """A tied model's folder whose file, or one more shard, has a head too."""
    if shard == "model.safetensors":
        toys.write(folder, {shard: tensor_chunks({**read_tensors(folder / shard), "lm_head.weight": head})})
        return folder
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    return toys.write(folder, {shard: tensor_chunks({"lm_head.weight": head}), INDEX: json.dumps(index).encode()})


@pytest.mark.parametrize(("shard", "shard_bytes"), [("model.safetensors", 1 << 30), ("head.safetensors", 10_000)])
def test_a_head_that_is_tied_by_name_alone(tmp_path: Path, shard: str, shard_bytes: int) -> None:
    """The same numbers are passed over; others in one place, or of another type or shape, are refused."""
    model = toys.causal()
    folder, embedding = toys.saved(tmp_path, model, shard_bytes=shard_bytes), model.model.embed_tokens.weight.detach()
    assert inspect(with_head(folder, embedding.clone(), shard)).config.tied
    other = embedding.clone()
    other[-1, -1] += 1e-3
    for head in (other, embedding.bfloat16(), embedding[:-1].clone(), torch.zeros_like(embedding)):
        with pytest.raises(UserError, match=r"E-CKPT-KEYS.*lm_head\.weight differs from model\.embed_tokens\.weight"):
            inspect(with_head(folder, head, shard))
    assert inspect(folder, scalar=True)  # a reward model or critic has no such head: nothing is dropped


def test_a_head_of_its_own_is_read_and_needed(tmp_path: Path) -> None:
    model = toys.causal(tied=False)
    folder = toys.saved(tmp_path, model)
    assert torch.equal(read_causal(folder).lm_head.weight, model.lm_head.weight)
    tensors = read_tensors(folder / "model.safetensors")
    toys.write(folder, {"model.safetensors": tensor_chunks({**tensors, "lm_head.weight": torch.zeros(39, 32)})})
    with pytest.raises(UserError, match=r"E-CKPT-SHAPE.*lm_head\.weight"):
        inspect(folder)
    del tensors["lm_head.weight"]
    toys.write(folder, {"model.safetensors": tensor_chunks(tensors)})
    with pytest.raises(UserError, match=r"E-CKPT-KEYS.*lm_head\.weight"):
        inspect(folder)


@pytest.mark.parametrize("rows", [39, 48])  # padded to a multiple of 16
def test_a_vocabulary_of_other_rows_than_config_says(tmp_path: Path, rows: int) -> None:
    folder = toys.saved(tmp_path, toys.causal(vocab_size=rows))
    assert inspect(folder).config.vocab_size == rows
    config = json.loads((folder / "config.json").read_text())
    toys.write(folder, {"config.json": json.dumps(config | {"vocab_size": 40}).encode()})
    with pytest.raises(UserError, match=r"E-CKPT-SHAPE.*embed_tokens"):
        inspect(folder)
