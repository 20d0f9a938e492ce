"""Small random models and documents for the tests that need one; nothing here is trained."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tetrad.data.pack import pack
from tetrad.distributed.device import Device
from tetrad.inference.engine import Request
from tetrad.model.config import DecoderConfig
from tetrad.model.huggingface import members_content, model_files
from tetrad.model.transformer import CausalLM, ScalarModel
from tetrad.settings.common import Sampling
from tetrad.storage import Content
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Packed, Tokens

CPU = Device(torch.device("cpu"), torch.float32)
EOS, PAD = 1, 2
SEEDS = range(int(os.environ.get("TETRAD_SEEDS", "3")))  # of tests that train


def config(family: str = "qwen2", **changes: Any) -> DecoderConfig:
    """Two layers, four query heads, two key and value heads, 40 tokens of which 1 ends and 2 pads."""
    given: dict[str, Any] = {
        "family": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ff": 48,
        "max_positions": 128,
        "eos_ids": (EOS,),
        "pad_id": PAD,
    }
    return DecoderConfig(**{**given, **changes})


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Every parameter random, biases and norms too: a zero bias would hide that it isn't read."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else std * noise)


def causal(seed: int = 0, std: float = 0.15, **changes: Any) -> CausalLM:
    model = CausalLM(config(**changes))
    randomise(model, seed, std)
    return model


def scalar(seed: int = 0, bias: float = 0.0, **changes: Any) -> ScalarModel:
    model = ScalarModel(config(reward_bias=bias, **changes))
    randomise(model, seed)
    return model


def ids(length: int, seed: int = 0, low: int = 3, high: int = 40) -> list[int]:
    """Random tokens, none of which ends or pads."""
    return torch.randint(low, high, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def document(tokens: Sequence[int], prompt: int = 1, where: str = "") -> Tokens:
    """All tokens after the first `prompt` are labels."""
    return Tokens(np.asarray(tokens, np.int32), np.arange(len(tokens)) >= prompt, where)


def documents(count: int, seed: int = 0) -> list[Tokens]:
    """Of 4 to 17 tokens, the last an end token; labels from the second or third on."""
    return [document([*ids(3 + (7 * i + seed) % 14, seed * 1000 + i), EOS], 1 + i % 2, f"{i}") for i in range(count)]


def request(
    prompt: Sequence[int], number: int = 0, copies: int = 1, ends: Sequence[int] = (EOS,), **how: Any
) -> Request:
    """A prompt for the engine. how: settings of Sampling, and stop, bias, top."""
    rest = {name: how.pop(name) for name in ("stop", "bias", "top") if name in how}
    keys = tuple((0, "test", copy, number) for copy in range(copies))
    return Request(tuple(prompt), Sampling(**how), keys, tuple(ends), **rest)


def packed(found: Sequence[Tokens]) -> Packed:
    return CPU.put(pack(found))


def write(folder: Path, files: Mapping[str, Content]) -> Path:
    """The files of a model in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else b"".join(bytes(c) for c in content))
    return folder


def saved(folder: Path, model: CausalLM | ScalarModel, **how: Any) -> Path:
    return write(folder, model_files(model, **how))


def tokenizer(size: int = 40) -> Tokenizer:
    """Words w0, w1 ...; id 1 is <|endoftext|>, id 2 <|pad|>, id 0 <|sep|>."""
    controls = {"<|sep|>": 0, "<|endoftext|>": EOS, "<|pad|>": PAD}
    vocab = controls | {f"w{i}": i for i in range(3, size)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True, **flags} for name, i in controls.items()]
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w3"}
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    return Tokenizer(json.dumps(spec))


def members(models: Sequence[ScalarModel]) -> dict[str, Content]:
    """The files of an ensemble beyond its first member."""
    return members_content(models)
