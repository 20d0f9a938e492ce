"""A folder told without torch: the table of parameters is the decoder's own. What is refused is in test_weights."""

import json
from pathlib import Path

import pytest

import toys
from tetrad.errors import UserError
from tetrad.model.decoder import CausalLM, ScalarModel
from tetrad.model.inspect import inspect, parameters
from tetrad.model.safetensors_io import read_tensors, tensor_chunks


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
    tensors = read_tensors(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = model.model.inv_freq
    toys.write(folder, {"model.safetensors": tensor_chunks(tensors)})
    assert inspect(folder).tensors.keys() == dict(parameters(model.config)).keys()


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path / "old", toys.causal(), shard_bytes=10_000)
    newer = toys.saved(tmp_path / "new", toys.causal())
    whole = folder / "model.safetensors"
    whole.write_bytes((newer / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"E-MODEL-FORMAT.*model\.safetensors, and the shards"):
        inspect(folder)
    index = folder / "model.safetensors.index.json"
    index.unlink()  # the shards that are left are nobody's
    assert inspect(folder).files == (whole,)
    names = {"weight_map": dict.fromkeys(inspect(folder).tensors, whole.name)}
    index.write_text(json.dumps(names))  # an index of that one file
    assert inspect(folder).files == (whole,)


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path, toys.causal())
    (folder / "pytorch_model.bin").write_bytes(b"\x80")  # transformers reads safetensors first, too
    assert [path.name for path in inspect(folder).files] == ["model.safetensors"]
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"E-MODEL-UNSUPPORTED.*adapter_config\.json lies beside the model"):
        inspect(folder)


@pytest.mark.parametrize("shard_bytes", [10_000, 2**30])
def test_a_head_that_is_not_the_embedding_it_is_said_to_be(tmp_path: Path, shard_bytes: int) -> None:
    model = toys.causal(tied=False)
    folder = toys.saved(tmp_path, model, shard_bytes=shard_bytes)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"E-CKPT-KEYS.*lm_head\.weight differs from model\.embed_tokens\.weight"):
        inspect(folder)
    if shard_bytes == 2**30:  # a reward model may start from it: it has no such head
        assert inspect(folder, scalar=True).config.tied


def test_a_head_that_stands_there_twice(tmp_path: Path) -> None:
    model = toys.causal(tied=True)
    folder = toys.saved(tmp_path, model)
    embedding = model.model.embed_tokens.weight.detach()
    for head, same in ((embedding.clone(), True), (embedding.bfloat16(), False), (embedding[:, :-1].clone(), False)):
        tensors = dict(model.named_parameters()) | {"lm_head.weight": head}
        toys.write(folder, {"model.safetensors": tensor_chunks({k: v.detach() for k, v in tensors.items()})})
        if same:
            assert inspect(folder).config.tied
        else:
            with pytest.raises(UserError, match=r"E-CKPT-KEYS.*tie_word_embeddings"):
                inspect(folder)


def test_a_head_of_its_own_that_is_missing(tmp_path: Path) -> None:
    folder = toys.saved(tmp_path, toys.causal(tied=True))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"E-CKPT-KEYS.*lm_head\.weight"):
        inspect(folder)
