import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faults.toy import EVERY, STEPS, Part, Stage, result
from tetrad import disk, storage
from tetrad.distributed import collectives
from tetrad.errors import Stopped, UserError
from tetrad.training import step
from tetrad.training.run_folder import StageRun
from tetrad.training.step import timed

NAN = float("nan")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("calm")
    Stage(folder / "stage").run()
    return result(folder / "stage")


def at(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    def each_step(now: int) -> None:
        if now == step:
            act()

    return each_step


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop(folder: Path, step: int) -> None:
    with pytest.raises(Stopped):
        Stage(folder, at(step, kill(signal.SIGTERM))).run()


def saved(folder: Path) -> list[int]:
    return list(storage.step_folders(folder / "checkpoints"))


def test_a_run_leaves_model_and_logs(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run()
    assert (stage.began, stage.notes) == (0, [])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["lock", "metrics.jsonl", "model", "samples.jsonl", "timing.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert list(lines[0]) == ["step", "loss", "beta"]
    assert storage.verify_folder(tmp_path / "model")["key"] == "k"


def test_saves_come_when_due_and_two_are_kept(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    Stage(tmp_path, lambda step: seen.append(saved(tmp_path))).run()
    assert seen == [[], [], [2], [2], [2, 4], [2, 4], [4, 6]]


@pytest.mark.parametrize("steps", [1, 10, 11, 250])
def test_zero_means_about_ten(steps: int, tmp_path: Path) -> None:
    part, saves = Part(0.0), set[int]()
    with StageRun(tmp_path, seed=0, total_steps=steps) as run:
        assert run.resume({"model": part}) is None
        for _ in run.steps():
            saves |= {run._saved_step}
        saves |= {run._saved_step}
    assert min(steps, 5) <= len(saves - {0}) <= 10


def test_a_checkpoint_holds_all_that_a_resume_needs(tmp_path: Path) -> None:
    stop(tmp_path, 3)
    checkpoint = tmp_path / "checkpoints/step-000004"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        *("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    ]
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["seed"], state["total_steps"]) == (4, 3, STEPS)
    assert state["values"] == {"beta": 0.2 * 1.1**4}
    assert state["environment"] == {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    assert state["logs"] == {n: (tmp_path / n).stat().st_size for n in ("metrics.jsonl", "samples.jsonl")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_stop_saves_the_step_and_loses_nothing(number: int, step: int, tmp_path: Path, calm: dict[str, str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"after {step + 1} of {STEPS} steps, all saved"):
        Stage(tmp_path, at(step, kill(number))).run()
    assert signal.getsignal(number) is before
    assert saved(tmp_path)[-1] == step + 1
    again = Stage(tmp_path)
    again.run()
    assert (again.began, again.notes) == (step + 1, [])
    assert result(tmp_path) == calm


class DiedError(Exception):
    pass


def die() -> None:
    raise DiedError


@pytest.mark.parametrize("step", range(STEPS))
def test_a_death_loses_the_steps_since_the_last_save(step: int, tmp_path: Path, calm: dict[str, str]) -> None:
    with pytest.raises(DiedError):
        Stage(tmp_path, at(step, die)).run()
    again = Stage(tmp_path)
    again.run()
    assert again.began == step // EVERY * EVERY
    assert result(tmp_path) == calm


def test_timing_only_grows(tmp_path: Path) -> None:
    with pytest.raises(DiedError):
        Stage(tmp_path, at(3, die)).run()
    Stage(tmp_path, lambda _: time.sleep(0.01)).run()
    lines = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 5, 6]
    for line in lines[3:]:
        assert list(line) == ["step", "seconds", "tokens_per_second", "peak_mib", "phases"]
        assert line["seconds"] == pytest.approx(sum(line["phases"].values()))
        assert line["phases"].keys() == ({"other", "save"} if line["step"] in (3, 5, 6) else {"other"})
        assert line["phases"]["other"] >= 0.01
        assert 10 / line["phases"]["other"] <= line["tokens_per_second"] <= 1000
        assert 10 < line["peak_mib"] < 100_000


def test_seconds_of_a_phase_within_another_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(step, "time", clock)

    @timed("eval")
    def evaluate() -> None:
        clock.now += 3
        with timed("update"):
            clock.now += 1

    with StageRun(tmp_path, seed=0, total_steps=1) as run:
        run.resume({"model": Part(0.0)})
        for _ in run.steps():
            with timed("update"):
                clock.now += 4
                evaluate()
                with pytest.raises(DiedError), timed("data"):
                    clock.now += 2
                    die()
            shown = run.timing(tokens=14)
            clock.now += 5
    line = json.loads((tmp_path / "timing.jsonl").read_text())
    assert line["phases"] == {"other": 5, "update": 5, "eval": 3, "data": 2, "save": 0}
    assert line["seconds"] == 15
    assert shown["tokens/s"] == line["tokens_per_second"] == 2  # evaluation and saving do not count
    assert shown["phases"] == "update 5 s, data 2 s"


def test_a_stage_without_samples_leaves_no_empty_log(tmp_path: Path) -> None:
    with StageRun(tmp_path, seed=0, total_steps=2, save_every=1) as run:
        run.resume({"model": Part(0.0)})
        for step in run.steps():
            run.log(step, loss=0.0)
        run.finish({"a": b"x"}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl", "model"]


def test_the_last_step_is_saved(tmp_path: Path) -> None:
    """What follows the steps may take long, and a stop there must not lose any of them."""
    with pytest.raises(Stopped, match=r"after 7 of 7 steps, in what follows them; the last checkpoint is of step 7"):
        stop_after_the_steps(tmp_path, steps=7)
    with StageRun(tmp_path, seed=0, total_steps=7, save_every=2) as run:
        run.resume({"model": Part(0.0)})
        assert (run.step, list(run.steps())) == (7, [])


def test_an_early_end_is_saved(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"after 5 of 7 steps, in what follows them; the last checkpoint is of step 5"):
        stop_after_the_steps(tmp_path, steps=5)


def stop_after_the_steps(folder: Path, steps: int) -> None:
    with StageRun(folder, seed=0, total_steps=7, save_every=2) as run:
        run.resume({"model": Part(0.0)})
        for step in run.steps():
            if step == steps - 1:
                run.end_early()
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo of the same key press
        time.sleep(0.35)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        Stage(tmp_path, at(3, twice)).run()
    assert saved(tmp_path) == [2]


def test_a_step_that_outlasts_its_grace_is_given_up(tmp_path: Path, calm: dict[str, str]) -> None:
    def long() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            time.sleep(0.01)

    start = time.perf_counter()
    with pytest.raises(Stopped, match=r"in step 3 of 7.* it and 1 finished steps since the last checkpoint are lost"):
        Stage(tmp_path, at(3, long)).run(grace=0.05)
    assert 0.05 <= time.perf_counter() - start < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    Stage(tmp_path).run()
    assert result(tmp_path) == calm


def test_a_step_within_its_grace_is_saved(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after 4 of 7 steps, all saved"):
        Stage(tmp_path, at(3, kill(signal.SIGTERM))).run(grace=30)
    assert saved(tmp_path) == [2, 4]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_grace_never_ends_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.3)
        real(descriptor)

    monkeypatch.setattr(disk.Calls, "fsync", staticmethod(slow))
    with pytest.raises(Stopped, match="after 1 of 7 steps, all saved"):
        Stage(tmp_path, at(0, kill(signal.SIGTERM))).run(grace=0.3)
    assert saved(tmp_path) == [1]


def test_a_stop_during_finish_comes_after_the_model(tmp_path: Path, calm: dict[str, str]) -> None:
    part = Part(0.0)

    def contents() -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield b"x"

    with pytest.raises(Stopped, match="end of the stage"), StageRun(tmp_path, seed=0, total_steps=1) as run:
        run.resume({"model": part})
        list(run.steps())
        run.finish({"a": contents()}, {})
    storage.verify_folder(tmp_path / "model")


def test_a_model_that_reads_back_otherwise_keeps_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(
        disk.Calls,
        "write",
        staticmethod(lambda descriptor, view: real(descriptor, bytes(view).replace(b"good", b"goof"))),
    )
    with (
        pytest.raises(UserError, match="E-CKPT-HASH"),
        StageRun(tmp_path, seed=0, total_steps=1, save_every=1) as run,
    ):
        run.resume({"model": Part(0.0)})
        list(run.steps())
        run.finish({"a": b"good"}, {})
    assert saved(tmp_path) == [1]


def test_one_rank_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "any_rank", lambda wanted: wanted or bool(saved(tmp_path)))
    with pytest.raises(Stopped):
        Stage(tmp_path).run()
    assert saved(tmp_path) == [2, 3]


def become_another_rank(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """chosen: the checkpoint that rank 0 resumes from."""
    monkeypatch.setattr(collectives, "is_main", lambda: False)
    monkeypatch.setattr(collectives, "from_main", lambda _: chosen)


def test_other_ranks_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path, 3)
    become_another_rank(monkeypatch, "step-000004")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with storage.RunLock(tmp_path / "lock"):
        stage = Stage(tmp_path)
        stage.run()
    assert stage.began == 4
    before.pop(tmp_path / "lock")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"} == before


def test_other_ranks_load_what_the_first_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what they would choose, and not from the start where it is not to be seen."""
    stop(tmp_path, 5)
    older, newest = saved(tmp_path)
    with monkeypatch.context() as patch:
        become_another_rank(patch, f"step-{older:06d}")
        other = Stage(tmp_path)
        other.run()
        assert other.began == older
        become_another_rank(patch, "step-000099")
        with pytest.raises(UserError, match="rank 0 goes on from step-000099, which is not here") as raised:
            Stage(tmp_path).run()
    assert (raised.value.code, raised.value.exit_code) == ("E-RANK-FOLDER", 8)
    chosen: list[str] = []
    monkeypatch.setattr(collectives, "from_main", lambda name: chosen.append(name) or name)
    Stage(tmp_path).run()
    assert chosen == [f"step-{newest:06d}"]


def test_a_thread_listens_to_nothing(tmp_path: Path, calm: dict[str, str]) -> None:
    thread = threading.Thread(target=Stage(tmp_path).run)
    thread.start()
    thread.join()
    assert result(tmp_path) == calm


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(UserError) as caught:
            Stage(tmp_path).run()
        refused.append(caught.value.code)

    Stage(tmp_path, at(2, second)).run()
    assert refused == ["E-RUN-LOCKED"]


def test_done_but_for_the_end(tmp_path: Path) -> None:
    """A checkpoint of the last step: nothing is left to do but to finish."""
    stop(tmp_path, STEPS - 1)
    done: list[int] = []
    Stage(tmp_path, done.append).run()
    assert done == []
    storage.verify_folder(tmp_path / "model")


def test_a_fresh_start_empties_old_logs(tmp_path: Path, calm: dict[str, str]) -> None:
    with pytest.raises(DiedError):
        Stage(tmp_path, at(1, die)).run()
    assert (tmp_path / "metrics.jsonl").stat().st_size > 0
    Stage(tmp_path).run()
    assert result(tmp_path) == calm


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    stop(tmp_path, 3)
    (tmp_path / "checkpoints/.tmp-step-000006-0a1b2c3d").mkdir()
    (tmp_path / ".tmp-model-0a1b2c3d").mkdir()
    (tmp_path / "checkpoints/step-000004").rename(tmp_path / "checkpoints/.old-step-000004-0a1b2c3d")
    stage = Stage(tmp_path, at(4, die))
    with pytest.raises(DiedError):
        stage.run()
    assert stage.began == 4
    assert saved(tmp_path) == [2, 4]
    assert not list(tmp_path.rglob(".*"))


def test_lost_log_lines_are_told(tmp_path: Path) -> None:
    stop(tmp_path, 3)
    (tmp_path / "metrics.jsonl").unlink()
    stage = Stage(tmp_path)
    stage.run()
    assert len(stage.notes) == 1
    assert "metrics.jsonl has lost lines: 0 bytes of" in stage.notes[0]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(b'{"step": 4')


def test_other_conditions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        Stage(tmp_path, at(3, kill(signal.SIGTERM))).run(environment={"device": "cuda", "ranks": (1, 2)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    stage = Stage(tmp_path)
    stage.run(environment={"device": "cpu", "ranks": (1, 2)})
    assert len(stage.notes) == 1
    assert "device was cuda, is cpu" in stage.notes[0]
    assert "threads was 1, is 64" in stage.notes[0]
    assert "ranks" not in stage.notes[0]


def test_a_checkpoint_that_others_may_change_is_told(tmp_path: Path) -> None:
    stop(tmp_path, 3)
    (tmp_path / "checkpoints/step-000004").chmod(0o777)
    stage = Stage(tmp_path)
    stage.run()
    assert len(stage.notes) == 1
    assert "another user" in stage.notes[0]


def test_save_every_beyond_the_end_is_told(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run(save_every=STEPS + 1)
    assert len(stage.notes) == 1
    assert "no checkpoint" in stage.notes[0]


def test_room_is_asked_for_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of 16 bytes, and three checkpoints at once: the two kept and the one being written."""
    begun: list[int] = []
    monkeypatch.setattr(disk.Calls, "free_bytes", staticmethod(lambda path: 3 * 32 - 1))
    with pytest.raises(UserError, match=r"E-IO-SPACE.*needs 0\.0 MB, has 0\.0 MB") as caught:
        Stage(tmp_path, begun.append).run()
    assert caught.value.exit_code == 6
    assert begun == []
    monkeypatch.setattr(disk.Calls, "free_bytes", staticmethod(lambda path: 3 * 32))
    Stage(tmp_path).run()


@pytest.mark.parametrize("wrong", [NAN, float("inf")])
def test_weights_that_are_no_numbers_are_never_saved(wrong: float, tmp_path: Path) -> None:
    part = Part(1.0)
    with (
        pytest.raises(UserError, match=r"E-NUM-NONFINITE.*critic: numbers: 1 of 4") as caught,
        StageRun(tmp_path, seed=0, total_steps=4, save_every=1) as run,
    ):
        run.resume({"actor": Part(1.0), "critic": part})
        for step in run.steps():
            part.numbers[step] = wrong if step == 2 else 0.0
    assert caught.value.exit_code == 5
    assert saved(tmp_path) == [1, 2]


def test_nor_do_they_become_the_model(tmp_path: Path) -> None:
    part = Part(1.0)
    with (
        pytest.raises(UserError, match=r"E-NUM-NONFINITE"),
        StageRun(tmp_path, seed=0, total_steps=4, save_every=3) as run,
    ):
        run.resume({"model": part})
        for step in run.steps():
            part.numbers[step] = NAN if step == 3 else 0.0
        run.finish({"a": b""}, {})
    assert not (tmp_path / "model").exists()
    assert saved(tmp_path) == [3]


def test_a_value_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"E-NUM-NONFINITE.*'beta': nan"),
        StageRun(tmp_path, seed=0, total_steps=4, save_every=1) as run,
    ):
        run.resume({"model": Part(0.0)}, lambda: {"beta": NAN})
        list(run.steps())
    assert saved(tmp_path) == []


def test_a_metric_that_is_no_number_ends_the_step(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"E-NUM-NONFINITE.*'step': 1"),
        StageRun(tmp_path, seed=0, total_steps=4, save_every=1) as run,
    ):
        run.resume({"model": Part(0.0)})
        for step in run.steps():
            run.log(step, loss=NAN if step == 1 else 0.0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 0, "loss": 0.0}\n'
