"""A model folder from its small files and headers, without torch: is this a model that can be loaded here?

Everything that loading would refuse is refused here in milliseconds, before a weight is read: missing files,
custom code, other architectures, wrong headers, tensors that config.json doesn't imply. `huggingface` loads what was
inspected. Damage in the weights themselves shows only in a manifest's sha256 or in the numbers.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tetrad.errors import UserError
from tetrad.model.bases import CONFIG, INDEX, LOST, NOTES, WEIGHTS, WHOLE, is_stack, stack_of
from tetrad.model.config import DecoderConfig, is_reward, read_config, read_json, shortened
from tetrad.model.headers import Entry, read_header, same_numbers
from tetrad.storage import MANIFEST, digest_of, verify_folder

_WEIGHTS = ("F32", "F16", "BF16", "F64")
_NOT_OURS = "rotary_emb.inv_freq"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HINT = "check config.json against the weights"


@dataclass(frozen=True)
class Facts:
    """What a folder holds. reward: a reward model, else a language model. files: its weights. tensors: all of them,
    or those of the base beneath adapters, whose file comes last."""

    config: DecoderConfig
    reward: bool
    files: tuple[Path, ...]
    tensors: Mapping[str, Entry]


def inspect(folder: Path, *, scalar: bool = False) -> Facts:
    """The folder's facts, for loading it as a language model or, with `scalar`, as a reward model or critic.

    Raises UserError E-MODEL-{MISSING,CODE,UNSUPPORTED,FORMAT}, E-CKPT-{FORMAT,KEYS,SHAPE,ROLE}. Its manifest, if
    there is one, is not checked.
    """
    if not folder.is_dir():
        raise UserError("E-MODEL-MISSING", "there is no such folder", where=str(folder), hint="name a model folder")
    refuse_incomplete([path.name for path in folder.iterdir()], str(folder))
    config, reward = read_config(folder), is_reward(folder)
    if reward and not scalar:
        hint = "name a language model; `tetrad score` uses reward models"
        raise UserError("E-CKPT-ROLE", "this is a reward model: it writes no text", where=str(folder), hint=hint)
    if stack := stack_of(folder):
        below = inspect(stack.base)
        own = replace(config, vocab_size=below.config.vocab_size, tied=below.config.tied)
        if config.vocab_size < below.config.vocab_size or {*parameter_shapes(own)} != {*parameter_shapes(below.config)}:
            what = f"config.json does not describe the base of these adapters, {stack.base}"
            raise UserError("E-CKPT-SHAPE", what, where=str(folder), hint=_HINT)
        return replace(below, config=config, reward=reward, files=(*below.files, *_files(folder)))
    files = tuple(_files(folder))
    tensors: dict[str, Entry] = {}
    owners: dict[str, Path] = {}
    for path in files:
        header = read_header(path)
        if both := sorted(tensors.keys() & header.keys()):
            what = f"{shortened(both[0])} stands in two of the folder's files"
            raise UserError("E-CKPT-KEYS", what, where=str(path), hint=_HINT)
        tensors |= header
        owners |= dict.fromkeys(header, path)
    tensors = {name: entry for name, entry in tensors.items() if not name.endswith(_NOT_OURS)}
    _refuse_others(folder, config, tensors, scalar, reward)
    if config.tied and not scalar and _HEAD in tensors:
        head, embedding = ((owners[name], tensors[name]) for name in (_HEAD, _EMBEDDING))
        if not same_numbers(head, embedding):
            what = f"config.json says tie_word_embeddings = true, but {_HEAD} differs from {_EMBEDDING}"
            hint = (
                'a head that was trained apart needs "tie_word_embeddings": false there; else take it out of the file'
            )
            raise UserError("E-CKPT-KEYS", what, where=str(folder / "config.json"), hint=hint)
    return Facts(config, reward, files, tensors)


def parameter_shapes(config: DecoderConfig, *, scalar: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every parameter of a language model or, with `scalar`, a reward model or critic."""
    c, wide, narrow = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield _EMBEDDING, (c.vocab_size, c.hidden_size)
    yield "model.norm.weight", (c.hidden_size,)
    if scalar:
        yield "score.weight", (1, c.hidden_size)
    elif not c.tied:
        yield _HEAD, (c.vocab_size, c.hidden_size)
    block = {f"self_attn.{x}_proj.weight": (n, c.hidden_size) for x, n in (("q", wide), ("k", narrow), ("v", narrow))}
    shapes: dict[str, tuple[int, ...]] = {**block, "self_attn.o_proj.weight": (c.hidden_size, wide)}
    if c.qkv_bias:
        shapes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", wide), ("k", narrow), ("v", narrow))}
    if c.qk_norm:
        shapes |= {f"self_attn.{x}_norm.weight": (c.head_dim,) for x in "qk"}
    shapes |= {"mlp.gate_proj.weight": (c.ff, c.hidden_size), "mlp.up_proj.weight": (c.ff, c.hidden_size)}
    shapes |= {"mlp.down_proj.weight": (c.hidden_size, c.ff)}
    shapes |= {f"{name}.weight": (c.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}
    for layer in range(c.layers):
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in shapes.items())


def parameter_count(config: DecoderConfig) -> int:
    """The parameters of a language model."""
    return sum(math.prod(shape) for _, shape in parameter_shapes(config))


def refuse_incomplete(names: Iterable[str], where: str, hint: str = "copy the whole model folder") -> None:
    """Lists all that a folder with files of these names lacks, and what it has instead. Errors: E-MODEL-*."""
    names = sorted(names)
    if {WEIGHTS, NOTES, CONFIG, "config.json"} <= {*names} and not {WHOLE, INDEX} & {*names}:
        return
    if CONFIG in names and "config.json" in names:
        what = f"{CONFIG} lies beside the model: transformers would put that adapter onto its weights"
        merge = "merge it with PEFT (merge_and_unload) and save that, or take the adapter's files away"
        raise UserError("E-MODEL-UNSUPPORTED", what, where=where, hint=merge)
    missing = ["config.json"] if "config.json" not in names else []
    missing += [WHOLE] if not any(name in names for name in (WHOLE, INDEX)) else []
    if not missing:
        return
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        hint = "convert the .bin files to safetensors first: pickles are never read"
    there = ", ".join(shortened(name)[1:-1] for name in names[:8]) or "none"
    what = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing; files there: {there}"
    raise UserError("E-MODEL-MISSING", what, where=where, hint=hint)


def weight_names(folder: Path) -> list[str]:
    """The files that hold the weights of a folder, whether they are there or not. Errors: E-MODEL-FORMAT."""
    if is_stack(folder):
        return [WEIGHTS]
    if not os.path.isfile(folder / INDEX):
        return [WHOLE]
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        what = "the index of shards can't be read: it has no weight_map"
        raise UserError("E-MODEL-FORMAT", what, where=str(folder / INDEX), hint="copy the whole model folder again")
    if os.path.isfile(folder / WHOLE) and WHOLE not in shards.values():
        what = f"two sets of weights lie here: {WHOLE}, and the shards that {INDEX} names"
        hint = f"take the older set away (with shards, {INDEX} too); transformers reads {WHOLE}"
        raise UserError("E-MODEL-FORMAT", what, where=str(folder), hint=hint)
    return sorted(set(shards.values()))


def _files(folder: Path) -> Iterator[Path]:
    for name in weight_names(folder):
        path = folder / name
        if path.parent != folder or not os.path.lexists(path):
            hint = "copy the whole model folder"
            raise UserError("E-MODEL-MISSING", f"{shortened(name)} is missing", where=str(folder), hint=hint)
        yield path


def _refuse_others(
    folder: Path, config: DecoderConfig, tensors: Mapping[str, Entry], scalar: bool, reward: bool
) -> None:
    """Compares names, shapes and types with what config.json implies."""
    where = str(folder)
    if config.layers > len(tensors):  # a config may claim any number
        what = f"config.json says {config.layers} layers, the weights are {len(tensors)} tensors"
        raise UserError("E-CKPT-KEYS", what, where=where, hint=_HINT)
    wanted = dict(parameter_shapes(config, scalar=scalar))
    spare = {_HEAD} if config.tied or scalar else set[str]()
    fresh = {"score.weight"} if scalar and not reward else set[str]()  # a critic's head may be new
    missing = sorted(wanted.keys() - tensors.keys() - fresh)
    extra = sorted(tensors.keys() - wanted.keys() - spare)
    if missing or extra:
        named = f"{shortened(missing[:3])} and {len(extra)} unexpected {shortened(extra[:3])}"
        what = f"{len(missing)} tensors are missing {named}"
        raise UserError("E-CKPT-KEYS", what, where=where, hint=_HINT)
    for name, shape in wanted.items():
        entry = tensors.get(name, Entry("F32", shape))
        if entry.shape != shape:
            what = f"{name} is {list(entry.shape)}, config.json says {list(shape)}"
            raise UserError("E-CKPT-SHAPE", what, where=where, hint=_HINT)
        if entry.dtype not in _WEIGHTS:
            what = f"{name} is {entry.dtype}, weights are one of {', '.join(_WEIGHTS)}"
            raise UserError("E-CKPT-SHAPE", what, where=where, hint="use the float checkpoint")


def verify_own(folder: Path) -> None:
    """Compares the files of a folder that Tetrad wrote with its manifest, and the base of adapters with the sha256 that
    they name. Errors: E-CKPT-*."""
    if os.path.isfile(folder / MANIFEST):
        verify_folder(folder)
    verify_base(folder)


def verify_base(folder: Path, digest: Callable[[Path], str] = digest_of) -> None:
    """Compares the weights beneath adapters with the sha256 that they name. digest: of a file. Errors: E-CKPT-*."""
    if (stack := stack_of(folder)) and weights_digest(stack.base, digest) != stack.sha256:
        what = f"its weights have changed: the adapters in {folder} were trained on others"
        raise UserError("E-CKPT-HASH", what, where=str(stack.base), hint=f"as they were, {LOST}")


def weights_digest(folder: Path, digest: Callable[[Path], str] = digest_of) -> str:
    """sha256 over a model folder's weight files, of adapters over their base's too. digest: of a file."""
    digests = [digest(path.resolve()) for path in inspect(folder, scalar=True).files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
