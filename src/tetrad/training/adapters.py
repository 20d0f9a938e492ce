"""Adapters in stages: added to a model before it trains, saved next to the result, and loaded onto the same base.

A reward model's adapter belongs to the weights that it was trained on: their sha256 is saved with it and compared.
"""

from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.distributed import collectives
from tetrad.errors import UserError
from tetrad.model.config import read_config, read_json
from tetrad.model.inspect import weights_digest
from tetrad.model.lora import (
    ALL,
    ATTENTION,
    CONFIG,
    WEIGHTS,
    adapter_files,
    adapter_notes,
    add_adapters,
    has_adapters,
    load_adapters,
    share_weights,
)
from tetrad.model.safetensors_io import read_tensors
from tetrad.model.transformer import CausalLM, ScalarModel, give_head
from tetrad.seeds import seed_for
from tetrad.stages import POLICY
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


def save_adapter(ctx: StageContext, model: CausalLM | ScalarModel, base: Path) -> None:
    """Writes <stage>/adapter in PEFT's format, before the merged model ends the stage; nothing without adapters."""
    if not has_adapters(model) or not collectives.is_main():
        return
    noted: dict[str, Any] = {"base_sha256": weights_digest(base)}
    if isinstance(model, ScalarModel):
        noted["reward_bias"] = float(model.bias)
    storage.write_folder(ctx.folder / "adapter", adapter_files(model, base, noted), {"key": ctx.key})


def load_reward_adapter(ctx: StageContext, base: CausalLM) -> ScalarModel:
    """The recipe's reward model as an adapter with a head on `base`, the SFT model.

    Errors: E-CONF-CONFLICT where it was trained in full or has another base; E-CKPT-*.
    """
    folder, base_folder = ctx.parents["reward"], first_parent(ctx, *POLICY)
    adapter = folder.parent / "adapter"
    hint = "train it with [reward] adapters = true on this SFT model, or set ppo.adapters = false"
    if not (adapter / CONFIG).is_file():
        what = "ppo.adapters = true needs a reward model that is an adapter; this one was trained in full"
        raise UserError("E-CONF-CONFLICT", what, where=str(folder), hint=hint)
    storage.verify_folder(adapter)
    config, notes = read_json(adapter / CONFIG), adapter_notes(adapter)
    if notes["base_sha256"] != weights_digest(base_folder):
        what = "the reward model's adapter was trained on other weights than the SFT model's"
        raise UserError("E-CONF-CONFLICT", what, where=str(adapter), hint=hint)
    model = share_weights(ScalarModel, base, read_config(folder))
    load_adapters(model, read_tensors(adapter / WEIGHTS), config["lora_alpha"] / config["r"], str(adapter))
    model.bias = base.model.norm.weight.new_tensor(notes["reward_bias"])
    return model
