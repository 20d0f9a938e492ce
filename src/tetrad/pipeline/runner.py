"""The stages of a recipe in order: what each is made from, which are done, which to do again, and where the old go.

A stage's key is a sha256 over the settings that change its numbers, the contents of its files, its parents' keys and
the version of its arithmetic. A stage whose result has its key is skipped; one that was stopped goes on; one whose key
changed is moved to old/ and made anew. Keys follow from the recipe alone, so all of them are known before the first
stage runs. No torch: a stage's module is imported when it runs.
"""

import errno
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.console import Console, phase
from tetrad.data import source
from tetrad.errors import UserError
from tetrad.inference import model_folder
from tetrad.pipeline.ahead import read_ahead
from tetrad.pipeline.hashes import Hashes
from tetrad.pipeline.preflight import Preflight
from tetrad.pipeline.recipe import write
from tetrad.pipeline.status import Step, differences, lineage, show, state, verdict_of, verify
from tetrad.report import outcome
from tetrad.report.verdict import UNTRUSTED
from tetrad.settings.base import FILES, FUNCTIONS, REWARDS, is_function, knobs, model_pays
from tetrad.settings.recipe import Recipe
from tetrad.storage import Json
from tetrad.training import checkpoint, prepare
from tetrad.training.context import StageContext

Stage = Callable[[StageContext], None]
STAGES = {
    "tokenizer": "text",
    "pretrain": "text",
    "sft": "data",
    "reward": "data",
    "ppo": "prompts",
    "evaluate": "prompts",
}
"""Each stage with the setting that turns it on."""
MODULES = {stage: f"tetrad.train.{stage}" for stage in STAGES} | {"evaluate": "tetrad.eval.compare"}
"""What runs each."""
VERSIONS = {"tokenizer": 1, "pretrain": 2, "sft": 2, "reward": 4, "ppo": 3, "evaluate": 2}
"""Raised when a stage's arithmetic changes, so that its results are made anew."""
_SHARED = {"pretrain": "optim", "sft": "optim", "reward": "optim", "ppo": "optim", "evaluate": "sampling"}
_TEMPLATE = ("sft.template", "sft.separator", "sft.add_separator")
_FOLDERS = {"base": "model.from", "from": "reward.from", "reward": "reward.from", "referee": "evaluate.referee"}
_LOWER = "run.micro_tokens, then the longest text (max_tokens, max_new), then the model"
_KNOBS = cache(knobs)


def run(recipe: Recipe, console: Console, *, only: str = "", stages: Mapping[str, Stage] | None = None) -> None:
    """Runs the stages that are not done, in order; `only` runs that one and needs its parents done.

    stages: what runs instead of the modules tetrad.train.<stage>, for tests. Under torchrun every process walks this
    way, and the first one alone writes.
    Raises UserError, E-NUM-VERDICT after the last stage; Stopped when a stage was asked to stop.
    """
    hashes = _hashes(recipe)
    steps = plan(recipe, hashes, upto=only)
    if only:
        _refuse_missing_parents(steps, hashes)
    wanted, todo = steps[-1:] if only else steps, 0
    if not stages and is_first():
        _look_ahead(wanted, recipe, hashes, console)
    for step in wanted:
        found = state(step, hashes)
        if found == "done":
            if is_first():
                storage.remove_folder(step.folder / "checkpoints")  # left where a kill came between the result and this
            console.say(f"{step.stage:<10} unchanged, skipped")
            continue
        todo += 1
        context = StageContext(recipe, step.folder, step.key, step.parents, step.lineage, console)
        began = time.monotonic()
        with explained(step.stage), phase(step.stage):
            if is_first():
                _prepare(step, found, recipe, console)
            if is_first() and step.stage in prepare.STAGES and not stages:
                prepare.STAGES[step.stage](context)
            (stages[step.stage] if stages else importlib.import_module(MODULES[step.stage]).run)(context)
        if state(step, hashes) != "done":
            raise RuntimeError(f"the stage {step.stage} ended without a result that has its key")
        console.say(f"{step.stage:<10} done in {time.monotonic() - began:.1f} s: {step.result}")
    if is_first():
        hashes.save()
    if not todo:
        console.say("nothing to do")
    if steps[-1].stage == "evaluate" or not recipe.evaluate.prompts:  # `tetrad ppo` says nothing of an evaluation
        _conclude(recipe, steps, hashes, console)


def _look_ahead(steps: list[Step], recipe: Recipe, hashes: Hashes, console: Console) -> None:
    """Refuses what a stage can't start from and records that can't be read, before the first one runs."""
    todo = [(step, found) for step in steps if (found := state(step, hashes)) != "done"]
    look = Preflight(recipe, [step.result for step, _ in todo], lambda folder: verify(folder, hashes))
    for step, found in todo:
        look.refuse(step.stage, step.parents)
        if found == "stopped":
            checkpoint.check(step.folder, step.stage, recipe)
    for note in look.notes:
        console.say(f"note: {note}")
    if todo:
        names, keys = zip(*((step.stage, step.key) for step, _ in todo), strict=True)
        read_ahead(recipe, names, keys, _home(recipe) / ".cache" / "read.json")


def _conclude(recipe: Recipe, steps: list[Step], hashes: Hashes, console: Console) -> None:
    """Says the verdict, and writes it into the card of PPO's model where a kill or an older evaluation left another.

    Raises UserError E-NUM-VERDICT where the result is not to be trusted, under `evaluate.strict`.
    """
    if not (verdict := verdict_of(recipe, steps, hashes)):
        return
    ppo = [step.result for step in steps if step.stage == "ppo"]
    if ppo and is_first():
        outcome.write_card(ppo[0], verdict)
    console.say("\n".join(verdict.lines()))
    if recipe.evaluate.strict and verdict.outcome == UNTRUSTED:
        where, hint = str(steps[-1].result), "mend what it names, or set evaluate.strict = false; the report is kept"
        raise UserError("E-NUM-VERDICT", "; ".join([str(verdict), *verdict.reasons]), where=where, hint=hint)


def status(recipe: Recipe, console: Console) -> None:
    """Shows what is done, stale, stopped or running, which data and parents made each model, and the verdict."""
    hashes = _hashes(recipe)
    steps = plan(recipe, hashes)
    show(f"{recipe.name} in {_home(recipe)}", steps, hashes, console)
    if verdict := verdict_of(recipe, steps, hashes):
        console.say("\n".join(verdict.lines()))
    if _home(recipe).is_dir():
        hashes.save()


def is_first() -> bool:
    """False in all processes of torchrun but the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def explained(phase: str, lower: str = _LOWER) -> Iterator[None]:
    """Turns a full memory or disk into a UserError that says in which phase, and what to lower."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("E-IO-SPACE", "the disk is full", where=phase, hint="free some space, then go on") from error
    except (MemoryError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not full and "allocate memory" not in first and "out of memory" not in first:
            raise
        what = f"the memory is full: {first or 'MemoryError'}"
        raise UserError("E-MEM-FULL", what, where=phase, hint=f"lower {lower}") from error


# Which stages, from what


def plan(recipe: Recipe, hashes: Hashes, upto: str = "") -> list[Step]:
    """The recipe's stages with their keys, in order; up to one of them where it is named.

    Raises UserError E-CONF-MISSING where a stage lacks what it is made from, E-DATA-PATH, E-MODEL-MISSING.
    """
    on = [stage for stage, starter in STAGES.items() if getattr(getattr(recipe, stage), starter)]
    if not on or (upto and upto not in on):
        stage = upto or "sft"
        what = f"the stage {stage} has no files to work on" if upto else "no stage of the recipe has files to work on"
        hint = f'add {STAGES[stage]} = ["FILE"] to [{stage}]'
        raise UserError("E-CONF-MISSING", what, where=f"[{stage}]", hint=hint)
    steps: dict[str, Step] = {}
    for stage in on[: on.index(upto) + 1] if upto else on:
        parents = {role: _parent(recipe, role, steps, hashes) for role in _roles(recipe, stage, on)}
        steps[stage] = _step(recipe, stage, "sft" in on, parents, hashes)
    return list(steps.values())


def _roles(recipe: Recipe, stage: str, on: list[str]) -> list[str]:
    """What a stage is made from: stages of this recipe, `base` (model.from), `from` (reward.from), `referee`."""
    base = ["base"] if recipe.model.from_ else []
    policy = [s for s in reversed(on) if s in ("pretrain", "sft")][:1] or base
    reward = ["reward"] if "reward" in on or recipe.reward.from_ else []
    match stage:
        case "tokenizer":
            return []
        case "pretrain":
            add = '[tokenizer] text = ["FILE"], or [model] from = "FOLDER"'
            return _needed(stage, "a tokenizer", base or [s for s in on if s == "tokenizer"], add)
        case "sft":
            add = '[pretrain] text = ["FILE"], or [model] from = "FOLDER"'
            return _needed(stage, "a model to start from", [s for s in on if s == "pretrain"] or base, add)
    start = ["from"] if stage == "reward" and recipe.reward.from_ else []
    add = '[sft] data = ["FILE"], or [model] from = "FOLDER"'
    roles = start + policy if start else _needed(stage, "a model to start from", policy, add)
    if stage == "evaluate":
        referee = ["referee"] if recipe.evaluate.referee else []
        told = [role for role in ("pretrain", "ppo") if role in on and role not in roles]
        return roles + reward + told + referee
    if stage == "ppo" and model_pays(recipe.ppo.rewards):
        roles = roles + _needed(
            stage, "a reward", reward, '[reward] data = ["FILE"], or [ppo] rewards = ["FILE.py:NAME"]'
        )
    elif stage == "ppo" and recipe.ppo.critic == "reward":
        add = '[ppo] critic = "actor", or [reward] data = ["FILE"]'
        roles = roles + _needed(stage, "a reward model for its critic", reward, add)
    return roles


def _needed(stage: str, noun: str, roles: list[str], add: str) -> list[str]:
    if not roles:
        raise UserError(
            "E-CONF-MISSING", f"{stage} needs {noun}, and the recipe has none", where=stage, hint=f"add {add}"
        )
    return roles


def _parent(recipe: Recipe, role: str, steps: Mapping[str, Step], hashes: Hashes) -> tuple[Path, str]:
    """The folder and the key of what a stage is made from."""
    if role in steps:
        return steps[role].result, steps[role].key
    setting = _FOLDERS[role]
    folder = Path(_get(recipe, setting))
    for step in steps.values():  # a stage of this very run
        if folder.resolve() in (step.folder.resolve(), step.result.resolve()):
            return step.result, step.key
    for place in (folder / "model", folder):
        if (place / storage.MANIFEST).is_file():
            return place, str(storage.read_manifest(place).get("key", ""))
    files = model_folder.foreign_files(folder, setting)
    return folder, _digest([[path.name, hashes.of(path)] for path in files])


def _step(recipe: Recipe, stage: str, has_sft: bool, parents: Mapping[str, tuple[Path, str]], hashes: Hashes) -> Step:
    prefixes = [stage, *filter(None, [_SHARED.get(stage)])]
    prefixes += ["model"] if stage == "pretrain" and "base" not in parents else []
    names = [name for name in _KNOBS(Recipe) if name.partition(".")[0] in prefixes]
    names += ["data.rename", *(["seed", "run.dtype"] if stage != "tokenizer" else [])]
    names += _TEMPLATE if stage in ("reward", "ppo", "evaluate") and not has_sft else ()
    names += [n for n in _KNOBS(Recipe) for table in _beside(recipe, stage) if n.startswith(table)]
    settings: dict[str, Json] = {}
    data: dict[str, list[dict[str, str]]] = {}
    for name in names:
        knob, value = _KNOBS(Recipe)[name], _get(recipe, name)
        if knob.mark == FILES:
            data[name] = [{"path": str(path), "sha256": hashes.of(path)} for path in source.files(value)]
        elif knob.mark in (FUNCTIONS, REWARDS):
            data[name] = [_function(text, hashes) for text in value]
        elif knob.keyed and name not in _FOLDERS.values():
            settings[name] = float(value) if knob.kind == "number" else value
    contents = {name: [[item["sha256"], item.get("function", "")] for item in items] for name, items in data.items()}
    keys = {role: key for role, (_, key) in parents.items()}
    key = _digest([stage, VERSIONS[stage], settings, contents, keys])
    made: dict[str, Any] = {"stage": stage, "key": key, "version": VERSIONS[stage], "settings": settings, "data": data}
    made["parents"] = {role: {"folder": str(folder), "key": parent} for role, (folder, parent) in parents.items()}
    return Step(stage, _home(recipe) / stage, key, {role: folder for role, (folder, _) in parents.items()}, made)


def _beside(recipe: Recipe, stage: str) -> list[str]:
    """Further tables that a stage reads: adapters' where it has any, PPO's text where there is some."""
    lora = ["lora."] if getattr(getattr(recipe, stage), "adapters", False) else []
    return lora + (["ptx."] if stage == "ppo" and recipe.ptx.text else [])


def _function(text: str, hashes: Hashes) -> dict[str, str]:
    if not is_function(text):
        return {"path": text, "sha256": "", "function": text}
    file, _, function = text.rpartition(":")
    if not Path(file).is_file():
        raise UserError("E-CONF-MISSING", "there is no such Python file", where=file, hint="write FILE.py:FUNCTION")
    return {"path": file, "sha256": hashes.of(Path(file)), "function": function}


def _get(recipe: Recipe, name: str) -> Any:
    table, _, key = name.rpartition(".")
    return getattr(getattr(recipe, table) if table else recipe, "from_" if key == "from" else key)


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _home(recipe: Recipe) -> Path:
    return Path(recipe.run.out) / recipe.name


def _hashes(recipe: Recipe) -> Hashes:
    return Hashes(_home(recipe) / ".cache" / "hashes.json")


# What there is already


def _refuse_missing_parents(steps: list[Step], hashes: Hashes) -> None:
    wanted = steps[-1]
    for step in steps[:-1]:
        if step.stage in wanted.parents and state(step, hashes) != "done":
            what = f"{wanted.stage} is made from {step.stage}, which is not done"
            hint = f"run `tetrad run RECIPE`, or `tetrad {step.stage} RECIPE` first"
            raise UserError("E-CONF-MISSING", what, where=str(step.folder), hint=hint)


def _prepare(step: Step, found: str, recipe: Recipe, console: Console) -> None:
    """Moves an old result aside and writes down what this one is made from, before anything is trained."""
    word = {"stopped": "goes on where it stopped", "new": "starts", "stale": "starts anew", "running": ""}[found]
    if found != "new":
        with storage.RunLock(step.folder / "lock") as lock:  # refuses a folder that another process is using
            if lock.note:
                console.say(f"{step.stage:<10} {lock.note}")
            if found == "stale":
                made = lineage(step.folder)
                to = step.folder.parent / "old" / f"{step.stage}-{made.get('key', 'unknown')[:8]}"
                moved = storage.move_aside(step.folder, to)
                why = "; ".join(differences(made, step.lineage)) if made else "its lineage is unknown"
                console.say(f"{step.stage:<10} {why}; the old one is now {moved}")
    if found != "stopped":
        storage.write_file(step.folder / "lineage.json", json.dumps(step.lineage, indent=1).encode())
    storage.write_file(step.folder / "recipe.toml", write(recipe).encode())
    console.say(f"{step.stage:<10} {word}")
