"""The shape of a decoder, and its `config.json` as Hugging Face writes it. No torch.

One decoder with a few flags covers Qwen2/2.5, Qwen3, Llama 3 and Mistral. Whatever would change numbers in a way the
decoder doesn't implement (yarn, sliding windows, quantised weights, custom code in the folder) is refused, never
ignored; a sliding window that no text can outgrow changes nothing.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad import disk
from tetrad.errors import UserError
from tetrad.storage import json_of

_CLASS = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
_KINDS = ("CausalLM", "SequenceClassification")
ARCHITECTURES = {f"{name}For{kind}": family for family, name in _CLASS.items() for kind in _KINDS}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ff",
    "max_position_embeddings": "max_positions",
}
"""config.json's names and ours."""
_LEFT_OUT = {"qwen3": {"head_dim": 128}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096}}
"""What transformers takes for a key that isn't there, where it isn't the same in all families."""
GENERATION = "generation_config.json"
MAX_JSON_BYTES = 8 << 20
"""The limit for config.json, an index of shards and the like."""
_LARGEST = 2**31


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """family: qwen2 (bias on q, k, v), qwen3 (norm on q and k), llama or mistral (neither). Sizes are counts.

    eos_ids: all that end a text, those of generation_config.json too.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    init_std: float = 0.02
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    bos_id: int | None = None
    reward_bias: float = 0.0

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"


def read_config(folder: Path) -> DecoderConfig:
    """The config.json of a folder. Errors: E-MODEL-MISSING, E-MODEL-CODE, E-MODEL-UNSUPPORTED, E-MODEL-FORMAT."""
    return _parsed(folder)[0]


def is_reward(folder: Path) -> bool:
    """True for a reward model's folder, False for a language model's; from config.json alone. Errors: E-MODEL-*."""
    return _parsed(folder)[1].endswith("ForSequenceClassification")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError E-MODEL-FORMAT."""
    try:
        size, raw = disk.start_of(path, MAX_JSON_BYTES)
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        value = json_of(raw)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError, RecursionError) as error:
        hint = "copy the whole model folder again"
        raise UserError("E-MODEL-FORMAT", f"{path.name} can't be read: {error}", where=str(path), hint=hint) from error
    return value


def _parsed(folder: Path) -> tuple[DecoderConfig, str]:
    """The configuration, and the name of the architecture."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise UserError("E-MODEL-MISSING", "there is no config.json", where=str(folder), hint="name a model folder")
    raw = read_json(path)
    try:
        _refuse(raw, path)
        return _checked(_parse(raw, folder)), raw["architectures"][0]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"config.json lacks or misstates {error}"
        raise UserError("E-MODEL-FORMAT", what, where=str(path), hint="copy the whole model folder again") from error


def _refuse(raw: dict[str, Any], path: Path) -> None:
    def refuse(what: str, hint: str, code: str = "E-MODEL-UNSUPPORTED") -> None:
        raise UserError(code, what, where=str(path), hint=hint)

    if "auto_map" in raw:
        refuse("the folder wants to run code of its own (auto_map)", "use a folder without it", "E-MODEL-CODE")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not names or str(names[0]) not in ARCHITECTURES:
        named = shortened(names) if names else "unnamed"
        refuse(f"architecture {named} isn't one of Tetrad's", f"choose from {', '.join(ARCHITECTURES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse(f"rotary scaling {shortened(kind)} isn't supported", "use a checkpoint without it")
    family = ARCHITECTURES[names[0]]
    if _slides(raw, family):
        window = shortened(_default(raw, "sliding_window", family))
        hint = "lower max_position_embeddings to the window: up to that length the model is the same"
        refuse(f"sliding windows aren't supported (sliding_window = {window})", hint)
    if raw.get("quantization_config"):
        refuse("the weights are quantised", "use the float checkpoint")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("hidden_act, mlp_bias or partial_rotary_factor differ from the decoder's", "use another checkpoint")
    if family != "qwen2" and raw.get("attention_bias"):
        refuse("attention_bias = true isn't supported here", "use another checkpoint")


def _slides(raw: dict[str, Any], family: str) -> bool:
    """Whether some layer may see less than all positions: a window that holds them all is none."""
    window = _default(raw, "sliding_window", family)
    windowed = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or [])
    if not windowed and (family != "mistral" or window is None):
        return False
    return type(window) is not int or window < _count(raw, "max_position_embeddings")


def _default(raw: dict[str, Any], name: str, family: str, default: Any = None) -> Any:
    """A value of config.json; the family's own where the key isn't there."""
    return raw.get(name, _LEFT_OUT.get(family, {}).get(name, default))


def shortened(value: Any) -> str:
    """Foreign text, shortened to one line."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _end_ids(raw: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """Those of both files: of some models only generation_config.json names the end of a turn."""
    path = folder / GENERATION
    stated = read_json(path) if os.path.isfile(path) else {}
    named = (raw.get("eos_token_id"), ""), (stated.get("eos_token_id"), f" in {GENERATION}")
    return tuple(dict.fromkeys(i for value, where in named for i in _ids(value, where)))


def _ids(value: Any, where: str) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id{where}: {shortened(value)}")
    return ids


def _count(raw: dict[str, Any], name: str, default: Any = None) -> int:
    value = raw.get(name) or default if default else raw[name]
    if type(value) is not int or not 0 < value < _LARGEST:
        raise ValueError(f"{name}: {shortened(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: {shortened(value)}")
    return float(value)


def _maybe_id(raw: dict[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is not None and type(value) is not int:
        raise ValueError(f"{name}: {shortened(value)}")
    return value


def _parse(raw: dict[str, Any], folder: Path) -> DecoderConfig:
    family = ARCHITECTURES[raw["architectures"][0]]
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        factor, low, high = (_number(n, rope[n]) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        scaling = RopeScaling(factor, low, high, _count(rope, "original_max_position_embeddings"))
    heads = _count(raw, "num_attention_heads")
    defaults = {"num_key_value_heads": heads, "head_dim": _count(raw, "hidden_size") // heads}
    defaults = {name: _default(raw, name, family, value) or value for name, value in defaults.items()}
    return DecoderConfig(
        family=family,
        **{ours: _count(raw, name, defaults.get(name)) for name, ours in _SIZES.items()},
        rope_theta=_number("rope_theta", rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=scaling,
        norm_eps=_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        init_std=_number("initializer_range", raw.get("initializer_range", 0.02)),
        eos_ids=_end_ids(raw, folder),
        pad_id=_maybe_id(raw, "pad_token_id"),
        bos_id=_maybe_id(raw, "bos_token_id"),
        reward_bias=_number("tetrad.reward_bias", (raw.get("tetrad") or {}).get("reward_bias", 0.0)),
    )


def _checked(config: DecoderConfig) -> DecoderConfig:
    """Raises ValueError for numbers that are each legal but don't form a decoder."""
    if config.heads % config.kv_heads:
        raise ValueError(f"num_key_value_heads: {config.heads} heads can't be divided by {config.kv_heads}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim: {config.head_dim} is odd")
    if config.rope_theta <= 0 or config.norm_eps <= 0:
        raise ValueError("rope_theta or rms_norm_eps: not above 0")
    return config


def eos_json(config: DecoderConfig) -> int | list[int] | None:
    """The end tokens as Hugging Face's files have them: one, a list, or none."""
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None


def config_json(config: DecoderConfig, kind: str, dtype: str = "float32") -> dict[str, Any]:
    """What transformers reads. kind: "CausalLM" or "SequenceClassification" (one label). dtype: of the weights.

    `rope_theta` is for transformers 4, `rope_parameters` for 5; both hold the same.
    """
    scaling = config.rope_scaling
    rope = {"rope_type": "llama3" if scaling else "default", "rope_theta": config.rope_theta}
    rope |= vars(scaling) if scaling else {}
    raw: dict[str, Any] = {
        "architectures": [f"{_CLASS[config.family]}For{kind}"],
        "model_type": config.family,
        **{name: getattr(config, ours) for name, ours in _SIZES.items()},
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if scaling else None,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_json(config),
        "pad_token_id": config.pad_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if config.family in ("qwen3", "llama"):
        raw["attention_bias"] = False
    if config.family == "mistral":
        raw["sliding_window"] = None  # else transformers assumes one
    if kind == "SequenceClassification":
        raw |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        raw["tetrad"] = {"reward_bias": config.reward_bias}
    return raw
