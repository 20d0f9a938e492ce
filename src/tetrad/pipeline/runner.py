"""The stages of a recipe in order: what each is made from, which are done, which to rerun, and where old results go.

A stage's key is a sha256 over the settings that change its numbers, the contents of its files, its parents' keys and
the version of its arithmetic. A stage whose result has its key is skipped; one that was stopped continues; one whose
key changed is moved to old/ and rebuilt. Keys follow from the recipe alone, so all of them are known before the first
stage runs. No torch: a stage's module is imported when it runs.
"""

import errno
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tetrad import storage
from tetrad.console import Console, phase
from tetrad.errors import UserError
from tetrad.pipeline.hashes import Hashes
from tetrad.pipeline.plan import hashes_of, home, plan
from tetrad.pipeline.preflight import preflight
from tetrad.pipeline.recipe import write
from tetrad.pipeline.status import Step, differences, lineage, show, state, verdict_of, verify
from tetrad.report import charts, outcome
from tetrad.report.run_page import NAME, write_page
from tetrad.report.verdict import UNTRUSTED, Verdict
from tetrad.signals import Stop
from tetrad.stages import STAGES, Recipe
from tetrad.tracking.trackers import Trackers
from tetrad.training.context import StageContext

StageFunction = Callable[[StageContext], None]
_LOWER = "run.micro_batch_tokens, then the longest text (max_tokens, max_new_tokens), then the model"


@dataclass(frozen=True)
class RunResult:
    """What `run` leaves. folder: runs/NAME. stages: the folder of each stage by its name, as "ppo"; `tetrad.load` and
    `tetrad.load_reward` take it. trained: the names of those that were not skipped. verdict: None without PPO."""

    folder: Path
    stages: Mapping[str, Path]
    trained: tuple[str, ...]
    verdict: Verdict | None


def run(recipe: Recipe, console: Console, *, only: str = "") -> RunResult:
    """Runs the stages that are not done, in order; `only` runs that one and needs its parents done.

    Under torchrun every process runs this, and only the first one writes.
    Raises UserError, E-NUM-VERDICT after the last stage; Stopped when a stop was requested.
    """
    hashes = hashes_of(recipe)
    steps = plan(recipe, hashes, upto=only)
    if only:
        _refuse_missing_parents(steps, hashes)
    wanted, trained = steps[-1:] if only else steps, list[str]()
    if is_first():
        unfinished = [(step, current) for step in wanted if (current := state(step, hashes)) != "done"]
        memory = home(recipe) / ".cache" / "preflight.json"
        for note in preflight(recipe, unfinished, lambda folder: verify(folder, hashes), memory):
            console.say(f"note: {note}")
    names = recipe.run.trackers if is_first() else ()
    with Trackers(names, recipe.name, home(recipe) / "trackers", console.warn) as trackers:
        for step in wanted:
            current = state(step, hashes)
            if current == "done":
                if is_first():
                    storage.remove_folder(step.folder / "checkpoints")  # left if a kill came before this
                console.say(f"{step.stage:<10} unchanged, skipped")
                continue
            trained.append(step.stage)
            context = StageContext(recipe, step.folder, step.key, step.parents, step.lineage, console, trackers)
            began = time.monotonic()
            _run_stage(step, current, context)
            if state(step, hashes) != "done":
                raise RuntimeError(f"the stage {step.stage} ended without a result that has its key")
            console.say(f"{step.stage:<10} done in {time.monotonic() - began:.1f} s: {step.result}")
            _show_page(recipe, console, going_on=step is not wanted[-1])
        if is_first():
            hashes.save()
        if not trained:
            console.say("nothing to do")
        if steps[-1].stage == "evaluate" or not recipe.evaluate.prompts:  # `tetrad ppo` reports no evaluation
            _conclude(recipe, steps, hashes, console)
    verdict = verdict_of(recipe, steps, hashes)
    return RunResult(home(recipe), {step.stage: step.folder for step in steps}, tuple(trained), verdict)


@contextmanager
def stoppable(console: Console, error: Callable[[str], BaseException]) -> Iterator[None]:
    """Shows the progress of phases; a signal that no stage handles raises this error. error: from what was running."""
    stop = Stop(console.warn, lambda: console.doing, lambda: error(console.doing or "the plan"))
    with console.in_use(), stop.listening():
        yield


def function_of(name: str) -> StageFunction:
    """MODULE:FUNCTION, imported when it is needed: training modules import torch."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _run_stage(step: Step, current: str, context: StageContext) -> None:
    with explained(step.stage), phase(step.stage):
        if is_first():
            _prepare(step, current, context.recipe, context.console)
        row = STAGES[step.stage]
        if is_first() and row.prepare:
            function_of(row.prepare)(context)
        function_of(f"{row.module}:run")(context)


def _show_page(recipe: Recipe, console: Console, *, going_on: bool) -> None:
    """Writes the page of what there is so far, and says where at the end. Nothing that fails here ends a run."""
    if not (recipe.run.report and is_first()):
        return
    try:
        with phase("writing the page"):
            path = write_page([str(home(recipe))], home(recipe) / NAME, going_on=going_on)
    except Exception as error:
        console.warn(f"note: {NAME} could not be written: {error}")
        return
    if not going_on:
        without = "" if charts.available() else '; for its charts: pip install -c constraints.txt -e ".[report]"'
        console.say(f"report     {path}{without}")


def _conclude(recipe: Recipe, steps: list[Step], hashes: Hashes, console: Console) -> None:
    """Reports the verdict, and writes it into the card of PPO's model where a kill or an older evaluation left another.

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
    hashes = hashes_of(recipe)
    steps = plan(recipe, hashes)
    show(f"{recipe.name} in {home(recipe)}", steps, hashes, console)
    if verdict := verdict_of(recipe, steps, hashes):
        console.say("\n".join(verdict.lines()))
    if home(recipe).is_dir():
        hashes.save()


def is_first() -> bool:
    """False in all processes of torchrun but the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def explained(phase: str, lower: str = _LOWER) -> Iterator[None]:
    """Turns an out-of-memory or disk-full error into a UserError that names the phase, and what to lower."""
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


# Existing results


def _refuse_missing_parents(steps: list[Step], hashes: Hashes) -> None:
    wanted = steps[-1]
    for step in steps[:-1]:
        if step.stage in wanted.parents and state(step, hashes) != "done":
            what = f"{wanted.stage} is made from {step.stage}, which is not done"
            hint = f"run `tetrad run RECIPE`, or `tetrad {step.stage} RECIPE` first"
            raise UserError("E-CONF-MISSING", what, where=str(step.folder), hint=hint)


def _prepare(step: Step, current: str, recipe: Recipe, console: Console) -> None:
    """Moves an old result aside and records what this one is made from, before any training."""
    word = {"stopped": "goes on where it stopped", "new": "starts", "stale": "starts anew", "running": ""}[current]
    if current != "new":
        with storage.RunLock(step.folder / "lock") as lock:  # refuses a folder that another process is using
            if lock.note:
                console.say(f"{step.stage:<10} {lock.note}")
            if current == "stale":
                before = lineage(step.folder)
                to = step.folder.parent / "old" / f"{step.stage}-{before.get('key', 'unknown')[:8]}"
                moved = storage.move_aside(step.folder, to)
                why = "; ".join(differences(before, step.lineage)) if before else "its lineage is unknown"
                console.say(f"{step.stage:<10} {why}; the old one is now {moved}")
    if current != "stopped":
        storage.write_file(step.folder / "lineage.json", json.dumps(step.lineage, indent=1).encode())
    storage.write_file(step.folder / "recipe.toml", write(recipe).encode())
    console.say(f"{step.stage:<10} {word}")
