"""A model as a folder of transformers, or its adapters as one of PEFT, without paths of the machine that trained it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.errors import UserError
from tetrad.inference.model_folder import Checked
from tetrad.model.bases import CONFIG, NOTES, WEIGHTS, stack_of
from tetrad.model.config import GENERATION, read_json
from tetrad.model.huggingface import SHARD_BYTES, in_dtype, members_content, model_files, read_causal, read_members
from tetrad.model.inspect import weights_digest
from tetrad.model.lora import adapter_notes
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.report.outcome import CARD
from tetrad.storage import MANIFEST, Content, Json, json_bytes, read_manifest

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)


def free_target(path: Path, model: Path) -> None:
    """Refuses a place that something has already, or that lies in the model's own folder. Errors: E-CONF-CONFLICT."""
    inside = model.resolve() in (path.resolve(), *path.resolve().parents)
    if inside or path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "this is in the model's own folder" if inside else "something is there already"
        raise UserError("E-CONF-CONFLICT", what, where=str(path), hint="name a new folder or file")


def export_folder(folder: Path, checked: Checked, to: Path, dtype: str) -> None:
    """Writes config.json, weights, tokenizer, chat template and card to a new folder. Errors: E-CKPT-*, E-IO-*,
    E-NUM-NONFINITE."""
    if checked.facts.reward:
        members = read_members(folder)
        files = {**model_files(members[0], SHARD_BYTES, dtype), **members_content(members, dtype)}
    else:
        files = model_files(read_causal(folder), SHARD_BYTES, dtype)
    _write(to, folder, files, f"Weights in {dtype}.", {"dtype": dtype})


def export_adapter(folder: Path, to: Path, dtype: str, base: str) -> str:
    """Writes the adapters of the stage whose model is in `folder` to a new folder; returns what they belong to.

    base: what others load beneath them; a folder is named in full. Where it is empty, a model of the hub is named, if
    they were trained on one. Errors: E-MODEL-MISSING, E-CKPT-*, E-IO-*.
    """
    source = folder if stack_of(folder) else folder.parent / "adapter"
    if not (source / CONFIG).is_file():
        hint = "train it with adapters = true, or write the whole model without --adapter-only"
        raise UserError("E-MODEL-MISSING", "this model has no adapters", where=str(folder), hint=hint)
    storage.verify_folder(source)
    notes, config = adapter_notes(source), read_json(source / CONFIG)
    hub = config["base_model_name_or_path"] if config.get("revision") else ""
    notes.pop("base", None)  # a path of this machine
    named = str(Path(base).resolve()) if base and Path(base).is_dir() else base or hub
    config |= {"base_model_name_or_path": named or None, "revision": None if base else config.get("revision")}
    config.pop("tetrad", None)  # older ones have it, and PEFT warns of it
    tensors = {name: in_dtype(name, tensor, dtype) for name, tensor in read_tensors(source / WEIGHTS).items()}
    files: dict[str, Content] = {CONFIG: json_bytes(config), NOTES: json_bytes(notes), WEIGHTS: tensor_chunks(tensors)}
    about = f"adapters in {dtype}; the weights beneath, {named or 'unnamed'}, have sha256 {notes['base_sha256']}"
    _write(to, folder, files, f"Only the {about}.", {"dtype": dtype, "adapter_only": True})
    return f"{about}\n"


def _write(to: Path, folder: Path, files: Mapping[str, Content], note: str, meta: Mapping[str, Json]) -> None:
    """The new folder, with the model's tokenizer, card and metrics, and the key of its source. meta: what it is."""
    own: Mapping[str, Any] = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    key = hashlib.sha256(f"{own.get('key')} {weights_digest(folder)} {sorted(meta.items())}".encode()).hexdigest()
    source: dict[str, Json] = {"key": own.get("key"), **meta}
    about: dict[str, Json] = {"key": key, "metrics": storage.metrics_of(own), "exported": source}
    words = {name: (folder / name).read_bytes() for name in _COPIED if (folder / name).is_file()}
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    card = re.sub(r"Loads in PEFT with `AutoPeft(\w+).*", r"Loads in transformers with `Auto\1`.", card)
    card = f"{card.rstrip() or '# ' + to.name}\n\n{note} Written by `tetrad export`.\n"
    storage.write_folder(to, {**files, **words}, about, {CARD: card.encode(errors="backslashreplace")})
