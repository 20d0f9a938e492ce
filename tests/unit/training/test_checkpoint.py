"""Which checkpoint a stopped stage goes on from, told without torch. Damage is in tests/faults."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tetrad import storage
from tetrad.errors import UserError
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.pipeline import preflight
from tetrad.pipeline.preflight import refuse_checkpoints
from tetrad.pipeline.status import Step
from tetrad.settings.ppo import Ppo
from tetrad.stages import STAGES as REGISTRY
from tetrad.stages import Recipe
from tetrad.training import checkpoint
from tetrad.training.stage import _refuse_unlisted

STAGES = ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")
BODY = {"model.norm.weight": torch.ones(2)}
HEAD = {**BODY, "score.weight": torch.ones(1, 2)}


def write(folder: Path, number: int, drop: str = "", **changes: Any) -> Path:
    """A checkpoint of PPO."""
    state = {
        "step": number,
        "seed": 3,
        "total_steps": 9,
        "logs": {},
        "values": {"beta": 0.1, "alarms": {}, "scores": []},
        "environment": {},
    }
    parts = {"actor": BODY, "actor_optimizer": BODY, "critic": HEAD, "critic_optimizer": HEAD}
    files: dict[str, Any] = {checkpoint.file_of(name): tensor_chunks(parts[name]) for name in parts}
    files["state.json"] = json.dumps({**state, **changes}).encode()
    path = folder / "checkpoints" / f"step-{number:06d}"
    storage.write_folder(path, {name: content for name, content in files.items() if name != drop}, {"step": number})
    return path


def check(folder: Path) -> None:
    refuse_checkpoints(folder, "ppo", Recipe(name="x", seed=3))


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    check(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    check(tmp_path)


def test_the_newest_that_is_whole_is_enough(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (write(tmp_path, 4) / "critic.safetensors").unlink()
    check(tmp_path)
    path, state, failures = checkpoint.newest(
        tmp_path / "checkpoints", lambda path: storage.verify_folder(path)["step"]
    )
    assert (path, state) == (tmp_path / "checkpoints/step-000002", 2)
    assert [(path.name, error.code) for path, error in failures] == [("step-000004", "E-CKPT-MISSING")]


def test_none_is_whole(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "state.json").unlink()
    write(tmp_path, 4, drop="critic_optimizer.safetensors")
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    assert caught.value.code == "E-CKPT-MISSING"
    for part in ("step-000004", "holds no critic_optimizer.safetensors", "step-000002", "state.json"):
        assert part in caught.value.what
    assert caught.value.where == str(tmp_path)


def test_a_killed_writers_folder_is_not_judged(tmp_path: Path) -> None:
    (write(tmp_path, 4) / "state.json").unlink()
    (tmp_path / "checkpoints/.old-step-000004-0a1b2c3d").mkdir()
    check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"values": {}}, "E-CKPT-MISSING"),
        ({"values": []}, "E-CKPT-FORMAT"),
        ({"seed": 4}, "E-CKPT-SETTINGS"),
        ({"step": 3}, "E-CKPT-SETTINGS"),
    ],
)
def test_another_state(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    write(tmp_path, 4, **changes)
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    assert caught.value.code == code


def test_the_table_is_held_against_what_a_stage_keeps() -> None:
    for stage in STAGES:
        ctx = SimpleNamespace(folder=Path(stage), recipe=Recipe())
        parts, values = REGISTRY[stage].parts(Recipe()), REGISTRY[stage].values
        _refuse_unlisted(ctx, dict.fromkeys(parts), dict.fromkeys(values, 0.0))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"stages\.py lists"):
            _refuse_unlisted(ctx, dict.fromkeys(parts[1:]), dict.fromkeys(values, 0.0))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"stages\.py lists"):
            _refuse_unlisted(ctx, dict.fromkeys(parts), {**dict.fromkeys(values, 0.0), "more": 1.0})  # type: ignore[arg-type]


def test_every_stage_that_trains_is_listed() -> None:
    assert [name for name, row in REGISTRY.items() if row.parts(Recipe())] == list(STAGES)


def test_parts_of_ppo_follow_the_recipe() -> None:
    shared = replace(Recipe(), ppo=Ppo(critic="shared", ema_decay=0.9))
    assert REGISTRY["ppo"].parts(shared) == ("actor", "actor_optimizer", "critic", "average")
    assert "critic_optimizer" in REGISTRY["ppo"].parts(Recipe())


def test_preflight_asks_for_the_checkpoints_of_stopped_stages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "read_records", lambda *args: None)
    step = Step("ppo", tmp_path, "key", {}, {})
    (write(tmp_path, 4) / "critic.safetensors").unlink()
    preflight.preflight(Recipe(name="x", seed=3), [(step, "new")], lambda folder: None, tmp_path / "memory")
    with pytest.raises(UserError, match="no checkpoint is whole") as error:
        preflight.preflight(Recipe(name="x", seed=3), [(step, "stopped")], lambda folder: None, tmp_path / "memory")
    assert error.value.code.startswith("E-CKPT-")


def test_a_part_that_is_not_its_own_is_named_by_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, 4)

    def refuse(tensors: Any) -> None:
        raise UserError("E-CKPT-KEYS", "lacks a tensor")

    with pytest.raises(UserError, match="lacks a tensor") as error:
        checkpoint.load(path, {"actor": refuse}, lambda file: file, (), {"seed": 3})
    assert error.value.where == str(path / "actor.safetensors")
