"""Model folders: what is refused, with its code, and what comes back as it was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import toys
from tetrad.errors import UserError
from tetrad.model.huggingface import model_files, read_causal, read_scalar
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.storage import write_folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    change(tensors)
    toys.write(folder, {"model.safetensors": tensor_chunks(tensors)})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, read: Callable[[Path], object] = read_causal) -> UserError:
    with pytest.raises(UserError) as raised:
        read(folder)
    assert raised.value.exit_code == 4
    assert str(folder) in raised.value.where
    assert raised.value.hint
    return raised.value


def equal(a: CausalLM | ScalarModel, b: CausalLM | ScalarModel) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000, 1])
def test_round_trip(tmp_path, family, tied, shard_bytes):
    model = toys.causal(family=family, tied=tied)
    files = model_files(model, shard_bytes)
    again = read_causal(toys.write(tmp_path, files))
    assert equal(model, again)
    assert again.config == model.config
    assert torch.equal(model(toys.packed(toys.documents(3)), "nll"), again(toys.packed(toys.documents(3)), "nll"))
    names = [name for name in files if name.endswith(".safetensors")]
    if shard_bytes == 1:
        assert len(names) == len(dict(model.named_parameters()))
    index = json.loads(files["model.safetensors.index.json"]) if len(names) > 1 else None
    assert (index is None) == (shard_bytes == 1 << 30)
    if index:
        assert set(index["weight_map"].values()) == set(names)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


def test_scalar_round_trip(tmp_path):
    model = toys.scalar(bias=0.75)
    with torch.no_grad():
        model.bias.add_(0.5)
    again = read_scalar(toys.saved(tmp_path, model))
    assert equal(model, again)
    assert float(again.bias) == 1.25
    packed = toys.packed(toys.documents(3))
    assert torch.equal(model(packed), again(packed))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_from_a_language_model(tmp_path, tied):
    body = toys.causal(tied=tied)
    model = read_scalar(toys.saved(tmp_path, body), seed=7)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, body.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(model.score.weight, read_scalar(tmp_path, seed=7).score.weight)
    assert not torch.equal(model.score.weight, read_scalar(tmp_path, seed=8).score.weight)
    assert float(model.bias) == 0


def test_buffers_are_real_and_weights_learn(tmp_path):
    """The model is built on the meta device: nothing of it may stay there."""
    for model in (read_causal(toys.saved(tmp_path / "a", toys.causal())), read_scalar(tmp_path / "a")):
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_tied_head_in_the_file_is_not_read(tmp_path):
    model = toys.causal()
    toys.saved(tmp_path, model)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert equal(read_causal(tmp_path), model)


def test_old_rotary_buffers_are_passed_over(tmp_path):
    toys.saved(tmp_path, toys.causal())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda t: t.update({name: torch.ones(4)}))
    read_causal(tmp_path)


def test_missing_tensor(tmp_path):
    toys.saved(tmp_path, toys.causal())
    change_tensors(tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    error = refused(tmp_path)
    assert error.code == "E-CKPT-KEYS"
    assert "model.layers.1.mlp.up_proj.weight" in error.what


def test_untied_head_missing(tmp_path):
    toys.saved(tmp_path, toys.causal())
    change_config(tmp_path, tie_word_embeddings=False)
    error = refused(tmp_path)
    assert error.code == "E-CKPT-KEYS"
    assert "lm_head.weight" in error.what


def test_extra_tensor(tmp_path):
    toys.saved(tmp_path, toys.causal())
    change_tensors(tmp_path, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}))
    error = refused(tmp_path)
    assert error.code == "E-CKPT-KEYS"
    assert "model.layers.2.mlp.up_proj.weight" in error.what


def test_a_reward_model_is_no_language_model(tmp_path):
    toys.saved(tmp_path, toys.scalar())
    assert refused(tmp_path).code == "E-CKPT-ROLE"


def test_wrong_shape(tmp_path):
    toys.saved(tmp_path, toys.causal())
    change_config(tmp_path, intermediate_size=64)
    error = refused(tmp_path)
    assert error.code == "E-CKPT-SHAPE"
    assert "[48, 32]" in error.what
    assert "[64, 32]" in error.what


def test_two_labels(tmp_path):
    toys.saved(tmp_path, toys.scalar())
    change_tensors(tmp_path, lambda t: t.update({"score.weight": torch.ones(2, 32)}))
    assert refused(tmp_path, read_scalar).code == "E-CKPT-SHAPE"


def test_bin_only(tmp_path):
    toys.saved(tmp_path, toys.causal())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    error = refused(tmp_path)
    assert error.code == "E-MODEL-MISSING"
    assert ".bin" in error.hint


def test_no_weights_and_no_folder(tmp_path):
    toys.saved(tmp_path, toys.causal())
    (tmp_path / "model.safetensors").unlink()
    assert refused(tmp_path).code == "E-MODEL-MISSING"
    assert refused(tmp_path / "none").code == "E-MODEL-MISSING"


def test_a_shard_is_missing(tmp_path):
    toys.saved(tmp_path, toys.causal(), shard_bytes=10_000)
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    error = refused(tmp_path)
    assert error.code == "E-MODEL-MISSING"
    assert "model-00002" in error.what


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}'])
def test_the_index_of_shards_is_damaged(tmp_path, index):
    toys.saved(tmp_path, toys.causal(), shard_bytes=10_000)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="E-MODEL-FORMAT"):
        read_causal(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_the_index_of_shards_leaves_the_folder(tmp_path, name):
    folder = toys.saved(tmp_path / "in", toys.causal())
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert refused(folder).code == "E-MODEL-MISSING"


def test_a_damaged_folder_of_ours_is_refused(tmp_path):
    """A folder with a manifest is verified before a number of it is used."""
    folder = tmp_path / "model"
    write_folder(folder, model_files(toys.causal()), {})
    read_causal(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="E-CKPT-HASH"):
        read_causal(folder)
