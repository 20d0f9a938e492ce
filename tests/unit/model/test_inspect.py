"""A folder told without torch: the table of parameters is the decoder's own. What is refused is in test_weights."""

from pathlib import Path

import pytest

import toys
from tetrad.errors import UserError
from tetrad.model.decoder import CausalLM, ScalarModel
from tetrad.model.inspect import inspect, parameters


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scalar", [True, False])
def test_the_table_is_the_decoders(family: str, tied: bool, scalar: bool) -> None:
    config = toys.config(family, tied=tied, head_dim=16, ff=20, layers=3)
    model = ScalarModel(config) if scalar else CausalLM(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(parameters(config, scalar=scalar)) == wanted


def test_facts(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path, toys.causal(), shard_bytes=10_000)
    facts = inspect(folder)
    assert facts.config == toys.causal().config
    assert not facts.reward
    assert [path.name for path in facts.files] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(facts.files) > 1
    assert facts.tensors.keys() == dict(parameters(facts.config)).keys()


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
    from tetrad.model.safetensors_io import read_tensors, tensor_chunks

    tensors = read_tensors(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = model.model.inv_freq
    toys.write(folder, {"model.safetensors": tensor_chunks(tensors)})
    assert inspect(folder).tensors.keys() == dict(parameters(model.config)).keys()
