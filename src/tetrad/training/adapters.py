"""Adapters in stages: added to a model before it trains, saved as the result, and loaded onto the same base.

A reward model's adapter belongs to the weights that it was trained on: their sha256 is saved with it and compared.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tetrad import storage
from tetrad.errors import UserError
from tetrad.model.bases import CONFIG, WEIGHTS, Stack, is_stack, stack_of
from tetrad.model.config import read_config, read_json
from tetrad.model.inspect import weights_digest
from tetrad.model.lora import (
    ALL,
    ATTENTION,
    adapter_files,
    adapter_notes,
    adapter_shape,
    add_adapters,
    has_adapters,
    load_adapters,
    share_weights,
    split_ranks,
)
from tetrad.model.safetensors_io import read_tensors
from tetrad.model.transformer import CausalLM, ScalarModel, give_head
from tetrad.seeds import seed_for
from tetrad.stages import POLICY
from tetrad.storage import Content
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent


def adapt(ctx: StageContext, model: CausalLM | ScalarModel, seed: int) -> None:
    """Freezes the model except for fresh adapters and, where it has one, its scalar head."""
    lora = ctx.recipe.lora
    targets = ALL if lora.targets == "all" else ATTENTION
    add_adapters(model, lora.rank, lora.alpha, targets, seed_for(seed, "adapter"))


def adapted_scalar_model(ctx: StageContext, base: CausalLM, seed: int) -> ScalarModel:
    """A scalar model of fresh adapters and a fresh head on `base`."""
    model = share_weights(ScalarModel, base)
    give_head(model, seed)
    adapt(ctx, model, seed)
    return model


def keeps(ctx: StageContext, model: nn.Module, parent: Path) -> bool:
    """Whether the result is adapters, not whole weights. parent: the folder of the model that they were trained on."""
    return has_adapters(model) and not ctx.recipe.lora.merge and (not is_stack(parent) or bool(_before(model, parent)))


def _before(model: nn.Module, parent: Path) -> Stack | None:
    """The parent's own adapters, if it has some of the same matrices and scale, beside which the model's may lie."""
    stack, (_, *ours) = stack_of(parent), adapter_shape(model)
    return stack if stack and [stack.scale, stack.config["target_modules"]] == ours else None


def earlier(model: nn.Module, parent: Path) -> dict[str, Tensor]:
    """The tensors of the parent's adapters beside which the model's lie; none without any."""
    return read_tensors(parent / WEIGHTS) if _before(model, parent) else {}


def result_files(ctx: StageContext, model: CausalLM | ScalarModel, parent: Path) -> dict[str, Content]:
    """The model's adapters in PEFT's format, beside the parent's on the base of these, if that may be."""
    before = _before(model, parent)
    base, lineage = before.base if before else parent, cast(Mapping[str, Any], ctx.lineage)
    named = {p["folder"]: (p["repository"], p["commit"]) for p in lineage["parents"].values() if "commit" in p}
    name, commit = named.get(str(parent), (str(base.resolve()), None))
    if before and before.config.get("revision"):
        name, commit = before.config["base_model_name_or_path"], before.config["revision"]
    notes: dict[str, Any] = {
        "base": os.path.relpath(base.resolve(), (ctx.folder / "model").resolve()),
        "base_sha256": weights_digest(base),
        "ranks": [*(before.ranks if before else ()), adapter_shape(model)[0]],
        "trained_on_sha256": weights_digest(parent),
    }
    notes |= {"reward_bias": float(model.bias)} if isinstance(model, ScalarModel) else {}
    return adapter_files(model, (name, commit), notes, earlier(model, parent))


def load_reward_adapter(ctx: StageContext, base: CausalLM) -> ScalarModel:
    """The recipe's reward model as an adapter with a head on `base`, the SFT model.

    Errors: E-CONF-CONFLICT where it was trained in full or has another base; E-CKPT-*.
    """
    folder, base_folder = ctx.parents["reward"], first_parent(ctx, *POLICY)
    adapter = folder if is_stack(folder) else folder.parent / "adapter"
    setting = f"{ctx.folder.name}.adapters"
    hint = f"train it with [reward] adapters = true on this SFT model, or set {setting} = false"
    if not (adapter / CONFIG).is_file():
        what = f"{setting} = true needs a reward model that is an adapter; this one was trained in full"
        raise UserError("E-CONF-CONFLICT", what, where=str(folder), hint=hint)
    storage.verify_folder(adapter)
    config, notes = read_json(adapter / CONFIG), adapter_notes(adapter)
    if notes.get("trained_on_sha256", notes["base_sha256"]) != weights_digest(base_folder):
        what = "the reward model's adapter was trained on other weights than the SFT model's"
        raise UserError("E-CONF-CONFLICT", what, where=str(adapter), hint=hint)
    model = share_weights(ScalarModel, base, read_config(folder))
    own = split_ranks(read_tensors(adapter / WEIGHTS), notes.get("ranks", [config["r"]]))[-1]
    load_adapters(model, own, config["lora_alpha"] / config["r"], str(adapter))
    model.bias = base.model.norm.weight.new_tensor(notes["reward_bias"])
    return model
