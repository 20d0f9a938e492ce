"""Low-rank adapters (Hu et al. 2021) on a base whose weights several models share.

A model on a base is a decoder whose parameters are the base's own tensors, frozen, with a pair of small matrices beside
each large one: W x + alpha / rank * B A x. With B = 0, the initial value, that is the base exactly. On disk adapters
have PEFT's names and adapter_config.json; what PEFT does not know lies
beside them in tetrad.json; `merged` adds them to the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetrad.errors import UserError
from tetrad.model.bases import CONFIG, NOTES, WEIGHTS
from tetrad.model.config import DecoderConfig, read_json
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import Adapter, CausalLM, Linear, M, ScalarModel, on_meta
from tetrad.storage import Content, json_bytes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PEFT = "base_model.model."
"""Before the names of tensors in its files."""
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapted(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The matrices of a model that may have an adapter, by name."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Linear))


def share_weights(kind: type[M], base: CausalLM, config: DecoderConfig | None = None) -> M:
    """A model whose decoder's parameters are those of `base`, not copies; its own head, if any, is left empty."""
    model = on_meta(kind, config or base.config)
    given = dict(base.named_parameters())
    for name in dict(model.named_parameters()):
        if name in given:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, given[name])
    model.model.inv_freq = base.model.inv_freq
    return model


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
    """Freezes all but a scalar head, and gives the decoder's matrices fresh adapters: A uniform like a Linear's weight,
    B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("score."):  # a head of its own, where it isn't tied, is no part of an adapter's files
            parameter.requires_grad_(False)
    for name, linear in adapted(model):
        if name.rpartition(".")[2] in targets:
            bound = 1 / sqrt(linear.in_features)
            a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            device = linear.weight.device
            linear.adapter = Adapter(a.to(device), torch.zeros(linear.out_features, rank, device=device), alpha / rank)


@torch.no_grad()
def merged(model: M) -> M:
    """The same function in separate plain weights; a model without adapters is returned unchanged."""
    if not has_adapters(model):
        return model
    plain = on_meta(type(model), model.config)
    linears = {f"{name}.weight": linear for name, linear in adapted(model)}
    own = {name: p for name, p in model.named_parameters() if ".adapter." not in name}
    weights = {name: (linears[name].whole() if name in linears else p.detach()).clone() for name, p in own.items()}
    plain.load_state_dict(weights, assign=True)
    plain.model.inv_freq = model.model.inv_freq
    if isinstance(model, ScalarModel) and isinstance(plain, ScalarModel):
        plain.bias = copy(model.bias)
    return plain


def absorb(model: nn.Module) -> None:
    """Adds the adapters to the model's weights, in tensors of its own: what others share with it stays."""
    for _, linear in adapted(model):
        linear.weight, linear.adapter = nn.Parameter(linear.whole()), None


def has_adapters(model: nn.Module) -> bool:
    return any(linear.adapter is not None for _, linear in adapted(model))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, and a scalar model's head, by PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, linear in adapted(model):
        if linear.adapter is not None:
            tensors[f"{PEFT}{name}.lora_A.weight"] = linear.adapter.a
            tensors[f"{PEFT}{name}.lora_B.weight"] = linear.adapter.b
    if isinstance(model, ScalarModel):
        tensors[f"{PEFT}score.weight"] = model.score.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def stacked(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's adapters, and its head, beside earlier ones of the same matrices and scale that it was trained on."""
    tensors = adapter_tensors(model)
    for name, tensor in before.items():
        tensors[name] = torch.cat((tensor.to(tensors[name].device), tensors[name]), int("lora_B" in name))
    return tensors


def adapter_files(
    model: nn.Module, base: tuple[str, str | None], notes: Mapping[str, Any], before: Mapping[str, Tensor]
) -> dict[str, Content]:
    """The files of an adapter folder. base: the weights beneath, a folder or a name with its commit; notes: what PEFT
    has no key for; before: as `stacked` takes them."""
    (rank, scale, targets), scalar = adapter_shape(model), isinstance(model, ScalarModel)
    rank = sum(notes.get("ranks", [rank]))
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "r": rank,
        "lora_alpha": scale * rank,
        "inference_mode": True,
        "target_modules": targets,
        "modules_to_save": ["score"] if scalar else None,
    }
    weights = tensor_chunks(stacked(model, before))
    return {CONFIG: json_bytes(config), NOTES: json_bytes(notes), WEIGHTS: weights}


def adapter_shape(model: nn.Module) -> tuple[int, float, list[str]]:
    """Rank, scale and matrices of a model's adapters."""
    linears = {name.rpartition(".")[2]: linear for name, linear in adapted(model) if linear.adapter is not None}
    first = next(iter(linears.values())).adapter
    assert first is not None
    return len(first.a), first.scale, sorted(linears)


def split_ranks(tensors: Mapping[str, Tensor], ranks: Sequence[int]) -> list[dict[str, Tensor]]:
    """The adapters of each stage, by PEFT's names, from those that lie side by side; a head goes with each."""
    parts, start = list[dict[str, Tensor]](), 0
    for rank in ranks:
        rows = slice(start, start := start + rank)
        cuts = {"lora_A": (rows,), "lora_B": (slice(None), rows)}
        split = {name: tensor[cuts.get(name.split(".")[-2], ())] for name, tensor in tensors.items()}
        parts.append({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in split.items()})
    return parts


def adapter_notes(folder: Path) -> dict[str, Any]:
    """base_sha256 and, of a reward model, reward_bias of an adapter folder. Errors: E-MODEL-FORMAT."""
    older = not (folder / NOTES).is_file()
    return dict(read_json(folder / CONFIG)["tetrad"]) if older else read_json(folder / NOTES)


@torch.no_grad()
def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor], scale: float, where: str) -> None:
    """Gives a model on its base these adapters and, to a scalar model, this head. Errors: E-CKPT-{KEYS,SHAPE}."""
    linears = dict(adapted(model))
    left = dict(tensors)
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        matrix = name.removesuffix(".lora_A.weight")
        a, b = left.pop(name), left.pop(f"{matrix}.lora_B.weight", None)
        linear = linears.get(matrix.removeprefix(PEFT))
        if b is None or linear is None:
            raise UserError("E-CKPT-KEYS", f"{name} belongs to no matrix of this model", where=where)
        if (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features) or len(a) != b.shape[1]:
            raise UserError("E-CKPT-SHAPE", f"{name} and its B don't fit the base's matrix", where=where)
        device = linear.weight.device
        linear.adapter = Adapter(a.float().to(device), b.float().to(device), scale)
    head = left.pop(f"{PEFT}score.weight", None)
    if isinstance(model, ScalarModel):
        if head is None or head.shape != model.score.weight.shape:
            raise UserError("E-CKPT-KEYS", "the adapter has no scalar head of this width", where=where)
        model.score.weight = nn.Parameter(head.float().to(model.model.norm.weight.device))
    if left:
        raise UserError("E-CKPT-KEYS", f"tensors belong to no part of the model: {sorted(left)[:3]}", where=where)
