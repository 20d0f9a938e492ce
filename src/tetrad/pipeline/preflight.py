"""Can this run start? Asked once, here, before the first stage and without torch.

Folders that stages start from, their own checkpoints, and every record that they will read: an error that was there
from the start does not follow hours of training. Settings that don't go together are `pipeline.validation`'s.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tetrad import storage
from tetrad.console import counted
from tetrad.data.records import Record, reader, refuse_overlap, refuse_unusable
from tetrad.data.source import Counts, DataFiles
from tetrad.datacheck.reading import HELD_OUT, SETTINGS, settings_of, stage_of
from tetrad.errors import UserError
from tetrad.inference import model_folder
from tetrad.pipeline import validation
from tetrad.pipeline.status import Step
from tetrad.settings.common import TRACKERS
from tetrad.settings.names import shown
from tetrad.stages import ON_POLICY, POLICY, STAGES, Recipe
from tetrad.text.chat_template import choose
from tetrad.text.tokenizer import SEPARATOR, Tokenizer
from tetrad.training import checkpoint
from tetrad.types import Turn

MOST_BYTES = 64 << 20
"""Of documents; more are left to their own stage, which begins with them."""
_ROLES = {"reward": "reward", "from": "any"}


def preflight(
    recipe: Recipe, todo: Sequence[tuple[Step, str]], verify: Callable[[Path], None], memory: Path
) -> list[str]:
    """Refuses what these stages can't start from, resume from or read; what the user should know.

    todo: stages with their states. verify: compares a folder with its manifest. memory: a file with the keys whose
    records were read before. Raises UserError E-MODEL-*, E-CKPT-*, E-CONF-*, E-DATA-*.
    """
    refuse_missing_trackers(recipe.run.trackers)
    validation.check(recipe)  # again: a model of the hub may not have been here when the recipe was read
    folders = Folders(recipe, [step.result for step, _ in todo], verify)
    for step, state in todo:
        folders.refuse(step.stage, step.parents)
        if state == "stopped":
            refuse_checkpoints(step.folder, step.stage, recipe)
    if todo:
        read_records(recipe, [step.stage for step, _ in todo], [step.key for step, _ in todo], memory)
    return list(folders.notes)


def refuse_missing_trackers(names: Collection[str]) -> None:
    """Raises UserError E-CONF-UNKNOWN for a tracker that is none, E-CONF-MISSING for one that is not installed."""
    for name in names:
        code, what, hint = "E-CONF-MISSING", f"the package {name} is not installed", f'pip install "tetrad[{name}]"'
        if name not in TRACKERS:
            code, what, hint = "E-CONF-UNKNOWN", f"{shown(name)} is no tracker", f"write some of {', '.join(TRACKERS)}"
        if name not in TRACKERS or not find_spec(name):
            raise UserError(code, what, where="run.trackers", hint=hint)


# --- folders ---


class Folders:
    """Checks each folder once. ahead: folders that stages of this run will create. notes: in order, each once."""

    def __init__(self, recipe: Recipe, ahead: Collection[Path], verify: Callable[[Path], None]) -> None:
        self.recipe, self.ahead = recipe, ahead
        self.notes: dict[str, None] = {}
        self._verify, self._look = cache(verify), cache(self._checked)

    def refuse(self, stage: str, parents: Mapping[str, Path]) -> None:
        """Raises UserError E-MODEL-*, E-CKPT-*, E-CONF-MISSING for what the stage can't start from."""
        there = {role: folder for role, folder in parents.items() if folder not in self.ahead}
        if "tokenizer" in there:
            self._verify(there.pop("tokenizer"))
            Tokenizer.load(parents["tokenizer"])
        models = {role: self._look(folder, _ROLES.get(role, "language")) for role, folder in there.items()}
        policy = next((models.get(role) for role in POLICY if role in parents), None)
        role = {"ppo": "reward", "reward": "from"}.get(stage, "")
        if role in models and policy and self.recipe.ppo.prompts and self.recipe.ppo.critic == "reward":
            model_folder.refuse_other_tokenizer(there[role], models[role].tokenizer, policy.tokenizer)
        for name in STAGES[stage].folders(self.recipe):
            if policy and (own := models.get(name)):
                model_folder.refuse_other_run(there[name], own.tokenizer, policy.tokenizer)
        for spec in self.recipe.alarms.judges if stage in ON_POLICY else ():
            if not (file := Path(spec.rpartition(":")[0])).is_file():
                hint = "write FILE.py:FUNCTION in alarms.judges"
                raise UserError("E-CONF-MISSING", "there is no such Python file", where=str(file), hint=hint)
        if stage == "sft" and policy:
            self._refuse_template(next(there[role] for role in POLICY if role in there), policy.tokenizer)

    def _checked(self, folder: Path, role: str) -> model_folder.Checked:
        self._verify(folder)
        checked = model_folder.check(folder, role=role, verify=False)
        if checked.note:
            self.notes[checked.note] = None
        return checked

    def _refuse_template(self, folder: Path, tokenizer: Tokenizer) -> None:
        """A foreign tokenizer must have the template's control tokens."""
        s = self.recipe.sft
        if s.add_separator:
            tokenizer = tokenizer.with_control(SEPARATOR)
        try:
            choose(folder, s.template, s.separator, s.system, own=False).prompt(tokenizer, (Turn("user", "a"),), "")
        except UserError as error:
            raise UserError(error.code, error.what, where=error.where or "sft.template", hint=error.hint) from None


def refuse_checkpoints(folder: Path, stage: str, recipe: Recipe) -> None:
    """Raises UserError E-CKPT-* if a stopped stage has checkpoints and can resume from none."""
    row, checkpoints = STAGES[stage], folder / "checkpoints"
    parts, values, ours = row.parts(recipe), row.values, {"seed": recipe.seed}
    if not any(checkpoints.glob(".old-*")):  # left by a killed writer; the stage restores it first
        checkpoint.newest(checkpoints, lambda path: checkpoint.read_state(path, parts, values, ours))


# --- records ---


def read_records(recipe: Recipe, stages: Collection[str], keys: Collection[str], memory: Path) -> None:
    """Reads every record of these stages once; the first bad one ends the run, and no text is kept.

    keys: of the stages. memory: a file with the keys that passed before. Errors: E-DATA-*.
    """
    passed = _remembered(memory)
    if passed >= set(keys):
        return
    held: dict[str, DataFiles] = {}
    for setting, what, given in settings_of(recipe):
        if stage_of(setting) not in stages:
            continue
        held[setting] = given
        if what == "documents" and sum(path.stat().st_size for path in given.paths) > MOST_BYTES:
            continue
        refuse_unusable(setting, _records(what, given, recipe), recipe.reward.score_scale, recipe.dpo.score_gap)
    for setting, tests in HELD_OUT.items():
        if setting in held:
            what = SETTINGS[setting]
            apart = (record for name in tests if name in held for record in _records(what, held[name], recipe))
            refuse_overlap(_records(what, held[setting], recipe), apart)
    storage.write_file(memory, json.dumps(sorted(passed | set(keys))[-200:]).encode())


def _records(what: str, given: DataFiles, recipe: Recipe) -> Iterator[Record]:
    read = reader(what, recipe.reward.score_scale)
    for path in given.paths:
        yield from counted(f"reading {path.name}", read(path, given, Counts(), None), 0)


def _remembered(memory: Path) -> set[str]:
    try:
        return {str(key) for key in json.loads(memory.read_bytes())}
    except (OSError, ValueError, TypeError):
        return set()
