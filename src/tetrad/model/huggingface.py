"""Reading and writing model folders: ordinary Hugging Face folders with safetensors, in one file or shards.

Nothing is guessed: a missing or unexpected tensor, a wrong shape, a pickle-only folder is an error. Folders that Tetrad
wrote have a manifest and are verified before they are read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from tetrad.errors import UserError
from tetrad.model.bases import is_stack, stack_of
from tetrad.model.config import DecoderConfig, config_json, eos_json, read_config
from tetrad.model.inspect import inspect, verify_own
from tetrad.model.lora import PEFT, absorb, load_adapters, split_ranks
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.model.transformer import CausalLM, M, ScalarModel, grow_vocabulary, initial_head, on_meta
from tetrad.storage import Content, json_bytes

SHARD_BYTES = 5 * 2**30


def read_causal(folder: Path) -> CausalLM:
    """A language model in float32, with its adapters merged. Errors: E-MODEL-*, E-CKPT-*."""
    config, tensors = _read(folder)
    return _filled(CausalLM, config, tensors)


def read_scalar(folder: Path, seed: int = 0) -> ScalarModel:
    """A reward model or critic in float32; from a language model's folder, its decoder and a fresh head."""
    config, tensors = _read(folder, scalar=True)
    if "score.weight" not in tensors:
        tensors["score.weight"] = initial_head(config.hidden_size, seed)
    return _filled(ScalarModel, config, tensors)


def read_members(folder: Path) -> tuple[ScalarModel, ...]:
    """A reward model and the further members of its ensemble, if it has any. Errors: E-MODEL-*, E-CKPT-*."""
    members = [read_scalar(folder)]
    for path in sorted(folder.glob("member-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2])):
        tensors = _merged(folder, read_tensors(path))
        shapes = {**{name: p.shape for name, p in members[0].named_parameters()}, "bias": torch.Size()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            code = "E-CKPT-KEYS" if tensors.keys() != shapes.keys() else "E-CKPT-SHAPE"
            raise UserError(code, "its tensors are not those of the model beside it", where=str(path))
        model = _filled(ScalarModel, members[0].config, tensors)
        model.bias = tensors["bias"].float()
        members.append(model)
    return tuple(members)


def _merged(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder's model; of adapters, the weights beneath with these added, and what lies beside them."""
    if not (stack := stack_of(folder)):
        return tensors
    model, left = _filled(CausalLM, *_read(stack.base, verified=True)), dict(tensors)
    lora = {name: left.pop(name) for name in tensors if ".lora_" in name}
    for adapters in split_ranks(lora, stack.ranks):
        load_adapters(model, adapters, stack.scale, str(folder))
        absorb(model)
    grow_vocabulary(model, read_config(folder).vocab_size)
    whole = {name: p.detach() for name, p in model.named_parameters() if not left or name != "lm_head.weight"}
    return whole | {name.removeprefix(PEFT): tensor for name, tensor in left.items()}


def members_content(members: Sequence[ScalarModel], dtype: str = "float32") -> dict[str, Content]:
    """The files of all but the first member, which is the folder's own model."""
    return {
        f"member-{number}.safetensors": tensor_chunks({**_trained(member, dtype), "bias": member.bias})
        for number, member in enumerate(members[1:], start=2)
    }


def _trained(model: nn.Module, dtype: str = "float32") -> dict[str, Tensor]:
    return {name: in_dtype(name, p.detach(), dtype) for name, p in model.named_parameters()}


def in_dtype(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """float32, bfloat16 or float16. Raises E-NUM-NONFINITE for a number that float16 cannot hold."""
    cast: Tensor = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not bool(cast.isfinite().all()):
        raise UserError("E-NUM-NONFINITE", "a weight is too large for float16", where=name, hint="write bfloat16")
    return cast


def _read(folder: Path, *, scalar: bool = False, verified: bool = False) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The configuration and all tensors of a folder that was verified and inspected."""
    if not verified:
        verify_own(folder)
    facts, tensors = inspect(folder, scalar=scalar), dict[str, Tensor]()
    for path in facts.files[-1:] if is_stack(folder) else facts.files:
        tensors |= read_tensors(path)
    return facts.config, _merged(folder, tensors)


def _filled(kind: type[M], config: DecoderConfig, tensors: Mapping[str, Tensor]) -> M:
    """A model with these tensors, whose names and shapes `inspect` has compared; others are left out."""
    model = on_meta(kind, config)
    model.load_state_dict({name: tensors[name].float() for name in dict(model.named_parameters())}, assign=True)
    if isinstance(model, ScalarModel):
        model.bias = torch.tensor(config.reward_bias)
    return model


def config_files(model: CausalLM | ScalarModel, dtype: str = "float32") -> dict[str, Content]:
    """config.json, and of a language model generation_config.json."""
    config = model.config
    if isinstance(model, ScalarModel):
        config = dataclasses.replace(config, reward_bias=float(model.bias))
        return {"config.json": json_bytes(config_json(config, "SequenceClassification", dtype))}
    generation = json_bytes({"eos_token_id": eos_json(config), "pad_token_id": config.pad_id})
    return {"config.json": json_bytes(config_json(config, "CausalLM", dtype)), "generation_config.json": generation}


def model_files(
    model: CausalLM | ScalarModel, shard_bytes: int = SHARD_BYTES, dtype: str = "float32"
) -> dict[str, Content]:
    """config.json, weights in one file or shards, generation_config.json: what transformers loads. Errors:
    E-NUM-NONFINITE."""
    files, tensors = config_files(model, dtype), _trained(model, dtype)
    split = split_state_dict_into_shards_factory(  # the one for torch loads all of torch.compile: two seconds
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files["model.safetensors.index.json"] = json_bytes(index)
    shards = split.filename_to_tensors.items()
    return files | {file: tensor_chunks({name: tensors[name] for name in names}) for file, names in shards}
