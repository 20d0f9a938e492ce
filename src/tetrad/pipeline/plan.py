"""Which stages of a recipe run, from what, and the key of each.

A key is a sha256 over the settings that change a stage's numbers, the contents of its files, its parents' keys and the
version of its arithmetic. Keys follow from the recipe alone, so all of them are known before the first stage runs.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tetrad import hub, storage
from tetrad.data import source
from tetrad.errors import UserError
from tetrad.inference import model_folder
from tetrad.pipeline.hashes import Hashes
from tetrad.pipeline.status import Step
from tetrad.settings.base import FILES, FUNCTIONS, REWARDS, is_function, options
from tetrad.stages import FOLDERS, STAGES, Recipe
from tetrad.storage import Json

_TEMPLATE = ("sft.template", "sft.system", "sft.separator", "sft.add_separator")
_OPTIONS = cache(options)
Origin = tuple[Path, str, Mapping[str, Json]]
"""What a stage is made from: the folder and its key; of a model of the hub also which one, for the lineage."""


def plan(recipe: Recipe, hashes: Hashes, upto: str = "") -> list[Step]:
    """The recipe's stages with their keys, in order; up to one of them where it is named.

    Raises UserError E-CONF-MISSING where a stage lacks a parent, E-DATA-PATH, E-MODEL-MISSING.
    """
    on = [name for name, row in STAGES.items() if getattr(getattr(recipe, name), row.switch)]
    if not on or (upto and upto not in on):
        stage = upto or "sft"
        what = f"the stage {stage} has no files to work on" if upto else "no stage of the recipe has files to work on"
        hint = f'add {STAGES[stage].switch} = ["FILE"] to [{stage}]'
        raise UserError("E-CONF-MISSING", what, where=f"[{stage}]", hint=hint)
    steps: dict[str, Step] = {}
    for stage in on[: on.index(upto) + 1] if upto else on:
        parents = {role: _parent(recipe, role, steps, hashes) for role in _roles(recipe, stage, on)}
        steps[stage] = _step(recipe, stage, "sft" in on, parents, hashes)
    return list(steps.values())


def _roles(recipe: Recipe, stage: str, on: list[str]) -> list[str]:
    """The parents of a stage: stages of this recipe, and models from elsewhere."""
    there = [*on, *(role for role, setting in FOLDERS.items() if recipe.value(setting))]
    roles: list[str] = []
    for parent in STAGES[stage].parents:
        if not parent.when(recipe):
            continue
        chosen = next((role for role in parent.roles if role in there), "")
        if parent.noun and not chosen:
            what = f"{stage} needs {parent.noun}, and the recipe has none"
            raise UserError("E-CONF-MISSING", what, where=stage, hint=f"add {parent.add}")
        roles += [chosen] if chosen and chosen not in roles else []
    return [*roles, *STAGES[stage].folders(recipe)]


def _parent(recipe: Recipe, role: str, steps: Mapping[str, Step], hashes: Hashes) -> Origin:
    """The folder and the key of a stage's parent."""
    if role in steps:
        return steps[role].result, steps[role].key, {}
    setting = FOLDERS.get(role, "evaluate.others")
    name = recipe.value(setting) if role in FOLDERS else STAGES["evaluate"].folders(recipe)[role]
    if hub.is_model(name):
        repository, folder = hub.model(name), model_folder.snapshot(name)
        sums = model_folder.hub_sha256(name, folder, hashes.of)
        about = {**repository.about(folder), "sha256": sums}
        return folder, _digest([list(item) for item in sums.items()]), about
    folder = Path(name)
    for step in steps.values():  # a stage of this very run
        if folder.resolve() in (step.folder.resolve(), step.result.resolve()):
            return step.result, step.key, {}
    for place in (folder / "model", folder):
        if (place / storage.MANIFEST).is_file():
            return place, str(storage.read_manifest(place).get("key", "")), {}
    files = model_folder.foreign_files(folder, setting)
    return folder, _digest([[path.name, hashes.of(path)] for path in files]), {}


def _step(recipe: Recipe, stage: str, has_sft: bool, parents: Mapping[str, Origin], hashes: Hashes) -> Step:
    row = STAGES[stage]
    tables = row.keyed(recipe)
    names = [name for name in _OPTIONS(Recipe) if name.partition(".")[0] in tables]
    names += ["data.rename", *(["seed", "run.dtype"] if row.seeded else [])]
    names += _TEMPLATE if row.template and not has_sft else ()
    settings: dict[str, Json] = {}
    data: dict[str, list[dict[str, str]]] = {}
    for name in names:
        option, value = _OPTIONS(Recipe)[name], recipe.value(name)
        if option.kind == "str" and value is None:
            continue  # so that the keys from before the setting existed are still the same
        if option.mark == FILES:
            data[name] = [{"path": str(path), "sha256": hashes.of(path)} for path in source.files(value)]
        elif option.mark in (FUNCTIONS, REWARDS):
            data[name] = [_function(text, hashes) for text in value]
        elif option.keyed and name not in FOLDERS.values():
            settings[name] = float(value) if option.kind == "float" else value
    contents = {name: [[item["sha256"], item.get("function", "")] for item in items] for name, items in data.items()}
    keys = {role: key for role, (_, key, _) in parents.items()}
    key = _digest([stage, row.version, settings, contents, keys])
    lineage: dict[str, Any] = {"stage": stage, "key": key, "version": row.version, "settings": settings, "data": data}
    lineage["parents"] = {
        role: {"folder": str(at), "key": keys[role], **about} for role, (at, _, about) in parents.items()
    }
    return Step(stage, home(recipe) / stage, key, {role: at for role, (at, *_) in parents.items()}, lineage)


def _function(text: str, hashes: Hashes) -> dict[str, str]:
    if not is_function(text):
        return {"path": text, "sha256": "", "function": text}
    file, _, function = text.rpartition(":")
    if not Path(file).is_file():
        raise UserError("E-CONF-MISSING", "there is no such Python file", where=file, hint="write FILE.py:FUNCTION")
    return {"path": file, "sha256": hashes.of(Path(file)), "function": function}


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def home(recipe: Recipe) -> Path:
    return Path(recipe.run.out) / recipe.name


def hashes_of(recipe: Recipe) -> Hashes:
    return Hashes(home(recipe) / ".cache" / "hashes.json")
