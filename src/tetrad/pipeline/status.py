"""The state of a run's stages: new, stopped, stale, running or done, and what each was made from; the verdict.

Reads only, and without torch.
"""

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.console import Console
from tetrad.model.inspect import verify_base
from tetrad.pipeline.hashes import Hashes
from tetrad.report import outcome
from tetrad.report.verdict import Verdict
from tetrad.settings.names import shown
from tetrad.stages import Recipe


@dataclass(frozen=True)
class Step:
    """One stage of a recipe. parents: model folders by role. lineage: what it is made from, key included."""

    stage: str
    folder: Path
    key: str
    parents: Mapping[str, Path]
    lineage: Mapping[str, Any]

    @property
    def result(self) -> Path:
        """The folder whose manifest says that the stage is done."""
        return self.folder / ("report" if self.stage == "evaluate" else "model")


def state(step: Step, hashes: Hashes) -> str:
    """done | new | stopped | stale | running. Raises UserError E-CKPT-* for a result that is damaged."""
    if not step.folder.is_dir():
        return "new"
    if (step.result / storage.MANIFEST).is_file():
        manifest = storage.read_manifest(step.result)
        if manifest.get("key") == step.key:
            verify(step.result, hashes)
            return "done"
    if _is_locked(step.folder / "lock"):
        return "running"
    return "stopped" if lineage(step.folder).get("key") == step.key else "stale"


def verify(folder: Path, hashes: Hashes) -> None:
    """Verifies the files of a folder that has a manifest, and the base of adapters; files whose hash is cached are not
    read."""
    if (folder / storage.MANIFEST).is_file():
        files = storage.read_manifest(folder)["files"]
        paths = {folder / name: entry["sha256"] for name, entry in files.items()}
        if not all(path.is_file() and hashes.of(path) == sha256 for path, sha256 in paths.items()):
            storage.verify_folder(folder)
    verify_base(folder, hashes.of)


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lineage(folder: Path) -> dict[str, Any]:
    """What a folder records that it was made from; empty where that can't be read."""
    try:
        recorded = json.loads((folder / "lineage.json").read_bytes())
        differences(recorded, recorded)
        names = [item["path"] + item["sha256"] for items in recorded["data"].values() for item in items]
        "".join([*names, recorded["key"], *(parent["key"] for parent in recorded["parents"].values())])
        return dict(recorded)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a stage has to be rebuilt, in words."""
    old, new = before["settings"], json.loads(json.dumps(now["settings"]))
    names = [name for name in new if name not in old or old[name] != new[name]]
    changes = [
        f"{name} was {shown(old[name])}, is {shown(new[name])}" if name in old else f"{name} is new"
        for name in names[:3]
    ]
    changes += [f"{len(names) - 3} more settings"] if len(names) > 3 else []
    old, new = _made_from(before), _made_from(now)
    changes += [f"{name} changed" for name in {**old, **new} if old.get(name) != new.get(name)]
    return changes or (["the arithmetic changed"] if before["key"] != now["key"] else [])


def _made_from(recorded: Mapping[str, Any]) -> dict[str, Any]:
    hashes = {name: [item["sha256"] for item in items] for name, items in recorded["data"].items()}
    return {**hashes, **{role: parent["key"] for role, parent in recorded["parents"].items()}}


def verdict_of(recipe: Recipe, steps: Sequence[Step], hashes: Hashes) -> Verdict | None:
    """The verdict on the last stages that are done; None where nothing was compared and there is no PPO."""
    last = (step for step in steps if step.stage in ("ppo", "evaluate"))
    done = {step.stage: step.result for step in last if state(step, hashes) == "done"}
    return outcome.of_run(recipe, done.get("ppo"), done.get("evaluate"))


def show(title: str, steps: Sequence[Step], hashes: Hashes, console: Console) -> None:
    """A table with one line per stage; for a stale one why, for an unfinished one how far it has come."""
    rows = []
    for step in steps:
        now, before = state(step, hashes), lineage(step.folder)
        recorded = before or step.lineage
        parents = ", ".join(f"{role} {parent['key'][:8]}" for role, parent in recorded["parents"].items())
        files = [item for items in recorded["data"].values() for item in items]
        data = ", ".join(f"{Path(item['path']).name} {item['sha256'][:8]}" for item in files)
        notes = differences(before, step.lineage) if before else ["its lineage is unknown"] if now == "stale" else []
        if saved := storage.step_folders(step.folder / "checkpoints"):
            notes.append(f"at step {max(saved)}")
        rows.append((step.stage, now, str(recorded["key"])[:8], parents, data, "; ".join(notes)))
    console.table(title, ("stage", "state", "key", "parents", "data", ""), rows)
