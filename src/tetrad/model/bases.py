"""Adapters without whole weights: which folders are that, and where the base beneath them lies. No torch.

Such a folder has the files of a model, but PEFT's adapter_config.json and adapter_model.safetensors in place of
weights. Adapters that were trained on adapters lie side by side with those in one file, so that every folder stands on
a base of whole weights and PEFT loads it; `ranks` tells them apart, to be added one after the other as they were made.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad import hub
from tetrad.errors import UserError
from tetrad.model.config import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTES = "tetrad.json"
"""Beside them: what PEFT has no key for. Its adapter_config.json warns of a key that it does not know."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LOST = "put it back, or a link to it; only whole weights, as `tetrad export` writes them, need no base"


@dataclass(frozen=True)
class Stack:
    """What a folder's adapters are. base: the folder of whole weights beneath, whose weights have this sha256. ranks:
    of those of each stage, the first on the base. config: PEFT's."""

    base: Path
    sha256: str
    ranks: tuple[int, ...]
    scale: float
    config: dict[str, Any]


def is_stack(folder: Path) -> bool:
    """Whether the model of a folder is adapters on a base elsewhere."""
    there = {name for name in ("config.json", CONFIG, NOTES, WHOLE, INDEX) if (folder / name).is_file()}
    return there == {"config.json", CONFIG, NOTES}


def stack_of(folder: Path) -> Stack | None:
    """The adapters of a folder; None for one of whole weights. Errors: E-MODEL-FORMAT; E-CKPT-MISSING for a base that
    is gone."""
    if not is_stack(folder):
        return None
    config, notes = read_json(folder / CONFIG), read_json(folder / NOTES)
    try:
        name, ranks, scale = config["base_model_name_or_path"], notes["ranks"], config["lora_alpha"] / config["r"]
        if sum(ranks) != config["r"] or min(ranks) < 1:
            raise ValueError(f"ranks: {ranks}")
        places, commit = [folder.resolve() / notes["base"], Path(name)], config.get("revision")
        places += [hub.Repository("model", name, commit, name).cached((), ()) or folder] if commit else []
        base = next((place for place in places if (place / "config.json").is_file() and not is_stack(place)), None)
        if base:
            return Stack(Path(os.path.normpath(base)), notes["base_sha256"], tuple(ranks), scale, config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{NOTES} or {CONFIG} lacks or misstates {error}"
        raise UserError("E-MODEL-FORMAT", what, where=str(folder), hint="copy the whole model folder again") from error
    hint = f"hf download {name} --revision {commit}" if commit else LOST
    raise UserError("E-CKPT-MISSING", f"the base of the adapters in {folder} is gone", where=name, hint=hint)
