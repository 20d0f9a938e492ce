"""Damage to checkpoints that were once whole: every flipped bit, cut, deletion and stranger is found, and told."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.toy import STEPS, Stage, result
from tetrad import storage
from tetrad.errors import Stopped, UserError

pytestmark = pytest.mark.faults


class HaltError(Exception):
    pass


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("calm")
    Stage(folder / "stage").run()
    return result(folder / "stage")


@pytest.fixture
def halted(tmp_path: Path) -> Path:
    """A stage that died in its last step, with whole checkpoints of steps 4 and 6."""
    with pytest.raises(HaltError):
        Stage(tmp_path / "stage", halt_at(STEPS - 1)).run()
    assert list(storage.step_folders(tmp_path / "stage/checkpoints")) == [4, 6]
    return tmp_path / "stage"


def halt_at(last: int) -> Callable[[int], None]:
    def each_step(step: int) -> None:
        if step == last:
            raise HaltError

    return each_step


def test_every_flipped_bit_is_found(halted: Path) -> None:
    checkpoint = halted / "checkpoints/step-000006"
    missed, flips = [], 0
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole) * 8):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            flips += 1
            try:
                storage.verify_folder(checkpoint)
                missed.append((path.name, place))
            except UserError as error:
                assert error.code.startswith("E-CKPT-")
        path.write_bytes(whole)
    assert flips > 7_000
    assert not missed
    storage.verify_folder(checkpoint)


def test_every_cut_and_addition_is_found(halted: Path) -> None:
    checkpoint = halted / "checkpoints/step-000006"
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        codes = {"E-CKPT-MANIFEST", "E-CKPT-VERSION"} if path.name == "manifest.json" else {"E-CKPT-SIZE"}
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert refusal(checkpoint).code in codes
        path.write_bytes(whole + b"\0")
        assert refusal(checkpoint).code in codes
        path.write_bytes(whole)


def refusal(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        storage.verify_folder(folder)
    return caught.value


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = random.Random(0).randrange(len(raw))
    raw[place] ^= 4
    path.write_bytes(raw)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def link(path: Path) -> None:
    away = path.parent.parent / "elsewhere"
    shutil.move(path, away)
    path.symlink_to(away)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, zeros, link, Path.unlink], ids=["flip", "zeros", "link", "unlink"])
def test_the_checkpoint_before_is_taken_and_named(
    name: str, damage: Callable[[Path], None], halted: Path, calm: dict[str, str]
) -> None:
    damage(halted / "checkpoints/step-000006" / name)
    stage = Stage(halted)
    stage.run()
    assert stage.began == 4
    assert len(stage.notes) == 1
    assert "step-000006 was passed over" in stage.notes[0]
    assert name in stage.notes[0]
    assert result(halted) == calm


def test_damaged_ones_do_not_count_as_kept(halted: Path) -> None:
    flip(halted / "checkpoints/step-000006/model.safetensors")
    with pytest.raises(HaltError):
        Stage(halted, halt_at(6)).run()
    assert sorted(path.name for path in (halted / "checkpoints").iterdir()) == [
        *("damaged-step-000006", "step-000004", "step-000006")
    ]
    storage.verify_folder(halted / "checkpoints/step-000006")


def test_no_whole_checkpoint_is_an_error_and_never_a_fresh_start(halted: Path) -> None:
    (halted / "checkpoints/step-000006/optimizer.safetensors").unlink()
    flip(halted / "checkpoints/step-000004/model.safetensors")
    before = sorted(halted.rglob("*"))
    logged = (halted / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        Stage(halted).run()
    assert caught.value.code == "E-CKPT-MISSING"
    assert caught.value.exit_code == 4
    for part in ("step-000006", "optimizer.safetensors", "step-000004", "sha256", "checkpoints"):
        assert part in str(caught.value)
    assert sorted(halted.rglob("*")) == before
    assert (halted / "metrics.jsonl").read_bytes() == logged


def test_a_renamed_or_foreign_checkpoint_is_refused(halted: Path) -> None:
    shutil.rmtree(halted / "checkpoints/step-000004")
    (halted / "checkpoints/step-000006").rename(halted / "checkpoints/step-000002")
    with pytest.raises(UserError, match=r"E-CKPT-SETTINGS.*step was 6, is 2"):
        Stage(halted).run()
    (halted / "checkpoints/step-000002").rename(halted / "checkpoints/step-000006")
    with pytest.raises(UserError, match=r"E-CKPT-SETTINGS.*seed was 3, is 4"):
        Stage(halted).run(seed=4)


def test_a_missing_part_or_value_is_refused(halted: Path) -> None:
    shutil.rmtree(halted / "checkpoints/step-000004")
    checkpoint = halted / "checkpoints/step-000006"
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}
    state = json.loads(files["state.json"])
    for name, changed in {
        "optimizer.safetensors": {key: value for key, value in files.items() if key != "optimizer.safetensors"},
        "beta": {**files, "state.json": json.dumps({**state, "values": {}}).encode()},
    }.items():
        storage.write_folder(checkpoint, changed, {"step": 6})  # whole, but not all that the stage needs
        with pytest.raises(UserError, match=rf"E-CKPT-MISSING.*{name}"):
            Stage(halted).run()


def test_the_clock_plays_no_part(halted: Path) -> None:
    """Newest is the highest step, whatever the files' times say (the clock was set back an hour after step 4)."""
    os.utime(halted / "checkpoints/step-000004", (4e9, 4e9))
    os.utime(halted / "checkpoints/step-000006", (1e9, 1e9))
    stage = Stage(halted, halt_at(STEPS - 1))
    with pytest.raises(HaltError):
        stage.run()
    assert stage.began == 6
    storage.write_folder(halted / "checkpoints/step-000007", {}, {})
    storage.prune(halted / "checkpoints", 2)
    assert list(storage.step_folders(halted / "checkpoints")) == [6, 7]


def test_a_stop_between_two_resumes_changes_nothing(tmp_path: Path, calm: dict[str, str]) -> None:
    for step in (1, 3, 4):
        with pytest.raises(HaltError):
            Stage(tmp_path / "stage", halt_at(step)).run()
    with pytest.raises(Stopped):
        Stage(tmp_path / "stage", lambda step: os.kill(os.getpid(), 15) if step == 4 else None).run()
    assert list(storage.step_folders(tmp_path / "stage/checkpoints"))[-1] == 5
    Stage(tmp_path / "stage").run()
    assert result(tmp_path / "stage") == calm
