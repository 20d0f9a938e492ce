"""Trackers get every metric and sample, in their own offline files, and can do a run no harm."""

import importlib.util
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.pipeline import recipe, runner
from tetrad.storage import LineLog
from tetrad.tracking import trackers
from tetrad.tracking.trackers import Trackers
from tiny import Chain

Rows = dict[str, dict[int, float]]


def fed(name: str, folder: Path, steps: range, first: int = 0) -> tuple[Rows, list[str]]:
    """What a tracker was given, and what was said."""
    said: list[str] = []
    one = Trackers((name,), "project", folder, said.append)
    with one.following(folder / "sft", "key", {"lr": 1e-3}, first):
        log = LineLog(folder / "sft/metrics.jsonl")
        for step in steps:
            log.append({"step": step, "loss": 1 / (step + 1), "kl": 0.1 * step, "note": "no number"})
        samples = LineLog(folder / "sft/samples.jsonl")
        samples.append(*({"step": steps[-1], "text": text} for text in ("好 <b>bold</b>", "two")))
    end(one)
    return {"loss": {s: 1 / (s + 1) for s in steps}, "kl": {s: 0.1 * s for s in steps}}, said


def end(one: Trackers) -> None:
    one.__exit__(None)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of trackers are slow on a busy machine."""
    monkeypatch.setattr(trackers, "LEAST", 90.0)
    monkeypatch.setattr(trackers, "MOST", 90.0)
    for name in (
        "WANDB_MODE",
        "SWANLAB_MODE",
        "TRACKIO_SPACE_ID",
        "TRACKIO_SERVER_URL",
        "TRACKIO_DIR",
        "MLFLOW_TRACKING_URI",
    ):
        monkeypatch.delenv(name, raising=False)


def needs(name: str) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")


def same(found: Rows, given: Rows) -> None:
    assert found.keys() == given.keys()
    for name, numbers in given.items():
        assert found[name] == pytest.approx(numbers, rel=1e-6), name


def tensorboard_rows(folder: Path) -> tuple[Rows, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard/sft"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples")]
    return scalars, texts


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard(tmp_path: Path) -> None:
    """A second run that begins before the end of the first, as after a kill, leaves each step once."""
    needs("tensorboard")
    fed("tensorboard", tmp_path, range(6))
    given, said = fed("tensorboard", tmp_path, range(4, 8), first=4)
    scalars, texts = tensorboard_rows(tmp_path)
    assert scalars["loss"] == pytest.approx({s: 1 / (s + 1) for s in range(8)}, rel=1e-6) and not said
    assert {json.loads(text)["text"] for text in texts} == {"好 <b>bold</b>", "two"}
    assert scalars.keys() == given.keys()


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path: Path) -> None:
    needs("trackio")
    given, said = fed("trackio", tmp_path, range(5))
    rows: Rows = {}
    texts = []
    with sqlite3.connect(next(tmp_path.rglob("*.db"))) as base:
        for step, numbers in base.execute("SELECT step, metrics FROM metrics"):
            for name, number in json.loads(numbers).items():
                rows.setdefault(name, {})[step] = number
                texts += [json.loads(number)["text"]] if name == "samples" else []
    assert rows.pop("samples") and sorted(texts) == ["two", "好 <b>bold</b>"] and not said
    same(rows, given)


def level_records(raw: bytes, block: int = 32768) -> Iterator[bytes]:
    """Of LevelDB's log, which wandb writes behind 7 bytes of its own: checksum, length, type, data."""
    at, data = 7, b""
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        data += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def wandb_rows(folder: Path, names: set[str]) -> Rows:
    from wandb.proto import wandb_internal_pb2

    rows = Rows()
    for data in level_records(next(folder.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in items.keys() & names:
            rows.setdefault(name, {})[items["_step"]] = items[name]
    return rows


@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path: Path) -> None:
    needs("wandb")
    given, said = fed("wandb", tmp_path, range(5))
    (table,) = (json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json"))
    assert [json.loads(text)["text"] for (text,) in table["data"]] == ["好 <b>bold</b>", "two"] and not said
    for _ in range(100):  # its own process writes, on a busy machine after `finish` has returned
        if len(wandb_rows(tmp_path, set(given)).get("loss", ())) == 5:
            break
        time.sleep(0.1)
    same(wandb_rows(tmp_path, set(given)), given)


@pytest.mark.filterwarnings("ignore")
def test_swanlab(tmp_path: Path) -> None:
    """By the reader with which `swanlab sync` reads it."""
    needs("swanlab")
    given, said = fed("swanlab", tmp_path, range(5))
    from swanlab.proto.swanlab.record.v1 import record_pb2
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader, rows = DataStoreReader(), Rows()
    reader.open(next(tmp_path.rglob("*.swanlab")))
    for data in reader:
        record = record_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("scalar"):
            rows.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
    texts = {json.loads(path.read_text())["text"] for path in tmp_path.rglob("media/text/*.txt")}
    assert texts == {"好 <b>bold</b>", "two"} and not said
    same(rows, given)


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path) -> None:
    """By its own client; a stage that resumes has one run, in which a step that was repeated is last as it was last."""
    needs("mlflow")
    fed("mlflow", tmp_path, range(4))
    given, said = fed("mlflow", tmp_path, range(2, 6), first=2)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    rows = {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in given}
    assert not said and run.data.params == {"lr": "0.001"} and run.info.status == "FINISHED"
    assert rows["loss"] == pytest.approx({s: 1 / (s + 1) for s in range(6)})
    assert run.data.metrics.keys() == given.keys()
    texts = [path.read_text() for path in (tmp_path / "mlflow/files").rglob("samples/*.json")]
    found = sorted((sample["step"], sample["text"]) for sample in map(json.loads, texts))
    assert found == [(step, text) for step in (3, 5) for text in ("two", "好 <b>bold</b>")]


# --- what a tracker does to a run ---


def logged(folder: Path, *names: str, steps: int = 100) -> tuple[list[str], Trackers]:
    """These trackers of a stage that has ended; what they were heard to say."""
    said: list[str] = []
    several = Trackers(names, "project", folder / "trackers", said.append)
    with several.following(folder / "sft", "key", {}, 0):
        log = LineLog(folder / "sft/metrics.jsonl")
        for step in range(steps):
            log.append({"step": step, "loss": 1.0})
    return said, several


def waits_until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def seen(folder: Path, name: str) -> list[list[Any]]:
    path = folder / "trackers" / name / "seen"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "SINKS", "fake_sinks")
    monkeypatch.setattr(trackers, "LEAST", 1.0)
    monkeypatch.setattr(trackers, "POLL", 0.1)
    monkeypatch.setattr(trackers, "NICENESS", 0)  # else beside other tests it may get no processor


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("bad", ["broken", "hanging", "breaking"])
def test_a_bad_tracker_stops_and_slows_nothing(tmp_path: Path, bad: str) -> None:
    """Beside one that works; at the end one that hangs is waited for once, as long as it may be."""
    began = time.process_time()
    said, both = logged(tmp_path, bad, "good")
    assert time.process_time() - began < 0.5
    waits_until(lambda: len(seen(tmp_path, "good")) == 102)
    ended = time.monotonic()
    end(both)
    assert time.monotonic() - ended < 8
    opened, *lines, closed = seen(tmp_path, "good")
    assert opened[:3] == ["open", "sft", 0] and closed == ["close", "sft", True]
    assert lines == [["metrics", step, {"loss": 1.0}] for step in range(100)]
    (line,) = said
    assert f"tracker {bad}" in line and ("100 lines have not reached it" in line) == (bad == "hanging")


def test_the_process_comes_last_and_holds_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "SINKS", "fake_sinks")
    said, one = logged(tmp_path, "good")
    end(one)
    (_, _, _, process, torch, nice), *_ = seen(tmp_path, "good")
    assert (torch, nice, said) == (False, 19, []) and process != os.getpid()


@pytest.mark.usefixtures("impatient")
def test_a_process_that_dies_is_told_at_once(tmp_path: Path) -> None:
    said, one = logged(tmp_path, "dying")
    waits_until(lambda: bool(said))
    (line,) = said
    assert "ended with 3" in line and (tmp_path / "trackers/output.txt").read_text() == "Aaargh\n"
    with one.following(tmp_path / "ppo", "key", {}, 0):  # the next stage
        pass
    end(one)
    assert said == [line]


@pytest.mark.usefixtures("impatient")
def test_a_process_that_computes_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "LEAST", 0.1)
    monkeypatch.setattr(trackers, "SLACK", 1.0)
    said, one = logged(tmp_path, "frozen")
    waits_until(lambda: bool(seen(tmp_path, "frozen")))
    began = time.monotonic()
    end(one)
    assert 1.7 <= time.monotonic() - began < 6
    (line,) = said
    assert "ended with -9" in line


@pytest.mark.usefixtures("impatient")
def test_a_slow_tracker_is_waited_for_while_it_moves_but_not_to_its_end(tmp_path: Path) -> None:
    said, one = logged(tmp_path, "slow", steps=1000)
    waits_until(lambda: bool(seen(tmp_path, "slow")))
    began = time.monotonic()
    end(one)
    assert 7.0 < time.monotonic() - began < 14.0
    taken = len(seen(tmp_path, "slow"))
    (line,) = said
    left = int(line.rpartition(": ")[2].split()[0])
    assert 20 < taken < 100 and left in (1000 - taken, 1000 - taken + 1)  # one may be on its way


@pytest.mark.usefixtures("impatient")
def test_nothing_is_dropped_for_a_slow_tracker_while_the_run_goes_on(tmp_path: Path) -> None:
    said, one = logged(tmp_path, "slow", steps=30)
    time.sleep(2)
    end(one)
    assert [row[1] for row in seen(tmp_path, "slow")] == [*range(30), "sft"] and not said


@pytest.mark.usefixtures("impatient")
def test_one_that_computes_moves(tmp_path: Path) -> None:
    """For longer than one that hangs is waited for."""
    said, one = logged(tmp_path, "importing", steps=3)
    end(one)
    assert len(seen(tmp_path, "importing")) == 5 and not said


@pytest.mark.usefixtures("impatient")
def test_stages_follow_each_other_in_one_process(tmp_path: Path) -> None:
    """Samples come after the metrics of their step, a line when it is whole."""
    said: list[str] = []
    one = Trackers(("good",), "project", tmp_path / "trackers", said.append)
    for stage in ("sft", "ppo"):
        with one.following(tmp_path / stage, "key", {}, 1):
            samples = LineLog(tmp_path / stage / "samples.jsonl")
            samples.append({"step": 1, "text": "\u2028"}, {"step": 2, "text": "b"}, {"step": 2, "text": "c"})
            with (tmp_path / stage / "metrics.jsonl").open("a") as file:
                for text in (
                    '{"step": 1, "lo',
                    'ss": 1, "whole": true}\n',
                    '{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 3',
                ):
                    file.write(text)
                    file.flush()
                    time.sleep(0.4)
    end(one)
    rows = seen(tmp_path, "good")
    assert not said and rows[0][3] == rows[6][3]
    expected = [
        ["metrics", 1, {"loss": 1.0, "whole": 1.0}],
        ["samples", 1, [{"step": 1, "text": "\u2028"}]],
        ["metrics", 2, {"loss": 2.5}],
        ["samples", 2, [{"step": 2, "text": "b"}, {"step": 2, "text": "c"}]],
    ]
    for stage, part in (("sft", rows[:6]), ("ppo", rows[6:])):
        assert part[0][:3] == ["open", stage, 1] and part[1:] == [*expected, ["close", stage, True]]


@pytest.mark.usefixtures("impatient")
def test_a_stage_that_resumes_goes_on_where_each_tracker_is(tmp_path: Path) -> None:
    """A log that was cut, with other lines behind; one that is new gets all; another key, or stage, begins anew."""
    said, one = logged(tmp_path, "good", steps=6)
    end(one)
    log = LineLog(tmp_path / "sft/metrics.jsonl")
    log.truncate(3 * len(b'{"step": 0, "loss": 1.0}\n'))
    two = Trackers(("good", "other"), "project", tmp_path / "trackers", said.append)
    with two.following(tmp_path / "sft", "key", {}, 3):
        log.append({"step": 3, "loss": 4.0})
    with two.following(tmp_path / "sft", "other", {}, 0):
        pass
    end(two)
    steps = {name: [row[1] for row in seen(tmp_path, name) if row[0] == "metrics"] for name in ("good", "other")}
    assert not said and steps == {"good": [0, 1, 2, 3, 4, 5, 3, 0, 1, 2, 3], "other": [0, 1, 2, 3, 0, 1, 2, 3]}


@pytest.mark.usefixtures("impatient")
def test_what_a_slow_tracker_has_is_not_sent_again(tmp_path: Path) -> None:
    """After a cut but for what it got in the last two looks, a line each."""
    said, one = logged(tmp_path, "slow", steps=40)
    waits_until(lambda: len(seen(tmp_path, "slow")) >= 10)
    one.__exit__(KeyboardInterrupt)
    first = [row[1] for row in seen(tmp_path, "slow")]
    two = Trackers(("slow",), "project", tmp_path / "trackers", said.append)
    with two.following(tmp_path / "sft", "key", {}, 40):
        pass
    waits_until(lambda: seen(tmp_path, "slow")[-1][0] == "close")
    end(two)
    second = [row[1] for row in seen(tmp_path, "slow")[len(first) : -1]]
    assert second == [*range(second[0], 40)] and len(first) - 4 <= second[0] <= len(first)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_an_error_does_not_wait_for_a_slow_tracker(tmp_path: Path, error: type[BaseException]) -> None:
    _, one = logged(tmp_path, "slow", steps=1000)
    waits_until(lambda: bool(seen(tmp_path, "slow")))
    began = time.monotonic()
    one.__exit__(error)
    assert time.monotonic() - began < (3 if error is UserError else 1)


@pytest.mark.usefixtures("impatient")
def test_a_signal_ends_the_wait_and_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "LEAST", 60.0)
    _, both = logged(tmp_path, "good", "hanging")
    waits_until(lambda: len(seen(tmp_path, "good")) == 102)
    process = seen(tmp_path, "good")[0][3]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # beside other tests it is ignored
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            end(both)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5 and not lives(process)


def lives(process: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:2]
    except FileNotFoundError:
        return False


ALONE = """
import sys, time
from pathlib import Path
from tetrad.storage import LineLog
from tetrad.tracking import trackers
trackers.SINKS = "fake_sinks"
folder = Path(sys.argv[1])
one = trackers.Trackers(("good",), "project", folder / "trackers", print)
with one.following(folder / "sft", "key", {}, 0):
    LineLog(folder / "sft/metrics.jsonl").append({"step": 0, "loss": 1.0})
    time.sleep(60)
"""


def test_the_process_ignores_signals_and_ends_with_the_run(tmp_path: Path) -> None:
    """Even one that is killed."""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", ALONE, str(tmp_path)], env=path) as run:
        waits_until(lambda: len(seen(tmp_path, "good")) == 2)
        process = seen(tmp_path, "good")[0][3]
        assert os.getpgid(process) != os.getpgid(run.pid)  # Ctrl-C of a terminal
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process, number)
        time.sleep(0.5)
        os.kill(process, 0)
        run.kill()
    waits_until(lambda: not lives(process))


def run(chain: Chain, *words: str) -> str:
    said = io.StringIO()
    given: Any = recipe.read(chain.path, ["--run.out", str(chain.runs), *words])
    runner.run(given, Console(out=said, err=said), only="tokenizer")
    runner.run(given, Console(out=said, err=said), only="pretrain")
    return said.getvalue()


def test_a_tracker_that_is_missing_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    for name, code in (("tensorbord", "E-CONF-UNKNOWN"), ("trackio", "E-CONF-MISSING")):
        if code == "E-CONF-MISSING" and importlib.util.find_spec(name):
            continue
        with pytest.raises(UserError) as error:
            run(chain, "--run.trackers", name)
        assert error.value.code == code and not (chain.home / "tokenizer/model").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_stage_is_tracked(tmp_path: Path) -> None:
    """Every number of metrics.jsonl, and no number differs for it."""
    needs("tensorboard")
    chain = Chain(tmp_path)
    run(chain, "--run.trackers", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(chain.home / "trackers/tensorboard/pretrain"), size_guidance={"scalars": 0})
    events.Reload()
    for row in chain.lines("pretrain"):
        for name in row.keys() - {"step"}:
            assert events.Scalars(name)[row["step"]].value == pytest.approx(row[name], rel=1e-6)
    assert "skipped" in run(chain)
