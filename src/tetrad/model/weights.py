"""Model folders in and out: ordinary Hugging Face folders with safetensors, in one file or shards.

Nothing is guessed: a missing or unexpected tensor, a wrong shape, a pickle-only folder is an error. Folders that Tetrad
wrote carry a manifest and are verified before they are read.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig, config_json, read_config
from tetrad.model.decoder import CausalLM, ScalarModel, initial_head, rope_frequencies
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.storage import Content, verify_folder

SHARD_BYTES = 5 * 2**30


def read_causal(folder: Path) -> CausalLM:
    """A language model in float32. Errors: E-MODEL-*, E-CKPT-*."""
    config = _checked(folder)
    with torch.device("meta"):
        model = CausalLM(config)
    _fill(model, _tensors(folder), folder)
    return model


def read_scalar(folder: Path, seed: int = 0) -> ScalarModel:
    """A reward model or critic in float32; from a language model's folder, its body and a fresh head."""
    config = _checked(folder)
    tensors = _tensors(folder)
    with torch.device("meta"):
        model = ScalarModel(config)
    if "score.weight" not in tensors:
        tensors["score.weight"] = initial_head(config.hidden_size, seed)
    _fill(model, tensors, folder)
    return model


def _checked(folder: Path) -> DecoderConfig:
    if not folder.is_dir():
        raise UserError("E-MODEL-MISSING", "there is no such folder", where=str(folder), hint="name a model folder")
    if (folder / "manifest.json").is_file():
        verify_folder(folder)
    return read_config(folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "E-MODEL-FORMAT", f"the index of shards can't be read: {error}", where=str(index)
            ) from error
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / str(name)
        if path.parent != folder or not path.is_file():
            pickled = any(folder.glob("*.bin"))
            hint = "convert the .bin files to safetensors first" if pickled else "copy the whole model folder"
            raise UserError("E-MODEL-MISSING", f"{name} is missing", where=str(folder), hint=hint)
        tensors |= read_tensors(path)
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _fill(model: CausalLM | ScalarModel, tensors: dict[str, Tensor], folder: Path) -> None:
    config = model.config
    wanted = dict(model.named_parameters())
    if config.tied or isinstance(model, ScalarModel):
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        what = f"{len(missing)} tensors are missing {missing[:3]} and {len(extra)} unexpected {extra[:3]}"
        raise UserError("E-CKPT-KEYS", what, where=str(folder), hint="check config.json against the weights")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            what = f"{name} is {list(tensors[name].shape)}, config.json says {list(parameter.shape)}"
            raise UserError("E-CKPT-SHAPE", what, where=str(folder), hint="check config.json against the weights")
    for name, tensor in tensors.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor.float()))
    # Buffers were made on the meta device as well; their values follow from the configuration.
    model.model.inv_freq = rope_frequencies(config)
    if isinstance(model, ScalarModel):
        model.bias = torch.tensor(config.reward_bias)


def model_files(model: CausalLM | ScalarModel, shard_bytes: int = SHARD_BYTES) -> dict[str, Content]:
    """config.json, weights in one file or shards, generation_config.json: what transformers loads."""
    scalar = isinstance(model, ScalarModel)
    config = model.config
    if isinstance(model, ScalarModel):
        config = dataclasses.replace(config, reward_bias=float(model.bias))
    files: dict[str, Content] = {
        "config.json": _json(config_json(config, "SequenceClassification" if scalar else "CausalLM"))
    }
    if not scalar:
        eos = list(config.eos_ids)
        files["generation_config.json"] = _json(
            {"eos_token_id": eos[0] if len(eos) == 1 else eos or None, "pad_token_id": config.pad_id}
        )
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return files | {"model.safetensors": tensor_chunks(tensors)}
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(t.nbytes for t in tensors.values())
    files["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": where})
    return files | {name: tensor_chunks(shard) for name, shard in zip(names, shards, strict=True)}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
