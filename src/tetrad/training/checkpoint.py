"""Checkpoints: how one is written, loaded and checked, and which is the newest that a stage can resume from. No torch.

A checkpoint is checkpoints/step-000400/{<part>.safetensors, state.json, manifest.json}. It is valid if its
manifest confirms each file, every part that the stage keeps is there and is that part, and state.json has the stage's
own values. The pipeline checks before anything runs, to report damage at once. Tensors are read and written by
the caller.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tetrad import storage
from tetrad.errors import UserError
from tetrad.model.headers import read_header
from tetrad.storage import Content, Json

T = TypeVar("T")

_STATE = ("step", "seed", "total_steps", "logs", "values", "environment")
_HEADS = {"critic": True, "actor": False}  # whether a part has a scalar head
_HINT = "put back a copy of it, or remove the folder and run the stage again"

Failures = list[tuple[Path, UserError]]


def save(checkpoints: Path, parts: Mapping[str, Content], state: Mapping[str, Json], keep: int) -> None:
    """Writes a checkpoint and removes the oldest beyond `keep`. parts: by file name; state: all that _STATE names.

    Raises UserError E-NUM-NONFINITE for a number of the state that is not finite, E-IO-*.
    """
    try:
        raw = json.dumps(state, indent=1, allow_nan=False).encode()
    except ValueError as error:
        what = f"a number of the stage's state is not finite: {state['values']!s:.200}"
        raise UserError("E-NUM-NONFINITE", what, where="state.json") from error
    step = state["step"]
    storage.write_folder(checkpoints / f"step-{step:06d}", {**parts, "state.json": raw}, {"step": step})
    storage.prune(checkpoints, keep)


def load(
    path: Path,
    loaders: Mapping[str, Callable[[T], None]],
    read_tensors: Callable[[Path], T],
    values: Collection[str],
    ours: Mapping[str, Any],
) -> dict[str, Any]:
    """Loads each part of a checkpoint by its loader and returns its state. values, ours: see `read_state`.

    Raises UserError E-CKPT-*.
    """
    state = read_state(path, loaders, values, ours)
    for name, load_tensors in loaders.items():
        file = path / file_of(name)
        try:
            load_tensors(read_tensors(file))
        except UserError as error:
            raise UserError(error.code, error.what, where=error.where or str(file), hint=error.hint) from error
    return state


def newest(checkpoints: Path, read: Callable[[Path], Any]) -> tuple[Path | None, Any, Failures]:
    """The newest checkpoint that `read` accepts, what it returned, and the newer ones with their errors.

    Newest means the highest step; the clock plays no part. None where there is no checkpoint at all. Raises the newest
    one's UserError, naming all, if there are checkpoints but none is intact: a stage never silently starts over.
    """
    failures: Failures = []
    for path in reversed(storage.step_folders(checkpoints).values()):
        try:
            return path, read(path), failures
        except UserError as error:
            failures.append((path, error))
    if failures:
        errors = "; ".join(f"{path.name}: {error.where}: {error.what}" for path, error in failures)
        hint = f"put back a whole checkpoint, or remove {checkpoints} to begin this stage again"
        what = f"no checkpoint is whole: {errors}"
        raise UserError(failures[0][1].code, what, where=str(checkpoints.parent), hint=hint)
    return None, None, failures


def read_state(path: Path, parts: Collection[str], values: Collection[str], ours: Mapping[str, Any]) -> dict[str, Any]:
    """state.json of a checkpoint that is intact, has these parts and values, and belongs to this run.

    ours: what state.json must say, besides the step of the folder's name. Raises UserError E-CKPT-*.
    """
    files = storage.verify_folder(path)["files"]
    for name in ("state.json", *map(file_of, parts)):
        if name not in files:
            raise UserError("E-CKPT-MISSING", f"holds no {name}", where=str(path), hint=_HINT)
    state = _state(path / "state.json")
    if missing := set(values) - set(state["values"]):
        what = f"lacks {', '.join(sorted(missing))}"
        raise UserError("E-CKPT-MISSING", what, where=str(path / "state.json"), hint=_HINT)
    if changed := differences(state, {**ours, "step": int(path.name.removeprefix("step-"))}):
        raise UserError("E-CKPT-SETTINGS", f"is of another run: {changed}", where=str(path), hint=_HINT)
    for part in parts:
        _refuse_other_part(part, path / file_of(part))
    return state


def file_of(part: str) -> str:
    """The name of a part's file."""
    return f"{part}.safetensors"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs from `now`, in words."""
    pairs = [(key, before.get(key), now[key]) for key in sorted(now)]
    return ", ".join(f"{key} was {old}, is {new}" for key, old, new in pairs if old != new)


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
        lacks = [name for name in _STATE if name not in state]
        if lacks or not isinstance(state["values"], dict):
            raise ValueError(f"it lacks {', '.join(lacks) or 'values'}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError("E-CKPT-FORMAT", f"is no state of a stage: {error}", where=str(path), hint=_HINT) from error
    return dict(state)


def _refuse_other_part(part: str, path: Path) -> None:
    """A critic has a scalar head, an actor none; invalid headers are refused for every part."""
    names = read_header(path)
    scalar = any(name == "score.weight" for name in names)
    if part in _HEADS and scalar != _HEADS[part]:
        what = f"holds a model {'with' if scalar else 'without'} a scalar head, which is no {part}"
        raise UserError("E-CKPT-ROLE", what, where=str(path), hint=_HINT)
