"""Trackers get every metric and sample, in their own offline files, and can do a run no harm."""

import importlib.util
import io
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.pipeline import recipe, runner
from tetrad.training import trackers
from tetrad.training.trackers import Place, Sink, Trackers
from tiny import Chain

Rows = dict[str, dict[int, float]]


def place(folder: Path, step: int = 0) -> Place:
    return Place(folder, "project", "sft", "abcdef0123456789", {"lr": 1e-3}, step)


def fed(name: str, folder: Path, steps: range, first: int = 0) -> tuple[Rows, list[str]]:
    """What a tracker was given, and what was said."""
    said: list[str] = []
    open_trackers = Trackers((name,), place(folder, first), said.append)
    for step in steps:
        open_trackers.metrics(step, {"loss": 1 / (step + 1), "kl": 0.1 * step, "note": "no number"})
    open_trackers.sample({"step": steps[-1], "text": "好 <b>bold</b>"})
    open_trackers.close()
    return {"loss": {s: 1 / (s + 1) for s in steps}, "kl": {s: 0.1 * s for s in steps}}, said


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of trackers are slow on a busy machine."""
    monkeypatch.setattr(trackers, "LEAST_PATIENCE", 90.0)
    for name in ("WANDB_MODE", "SWANLAB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
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
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    return scalars, texts


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard(tmp_path: Path) -> None:
    """A second run that begins before the end of the first, as after a kill, leaves each step once."""
    needs("tensorboard")
    fed("tensorboard", tmp_path, range(6))
    given, said = fed("tensorboard", tmp_path, range(4, 8), first=4)
    scalars, texts = tensorboard_rows(tmp_path)
    assert scalars["loss"] == pytest.approx({s: 1 / (s + 1) for s in range(8)}, rel=1e-6) and not said
    assert {json.loads(text)["text"] for text in texts} == {"好 <b>bold</b>"}
    assert scalars.keys() == given.keys()


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path: Path) -> None:
    needs("trackio")
    given, said = fed("trackio", tmp_path, range(5))
    rows: Rows = {}
    with sqlite3.connect(next(tmp_path.rglob("*.db"))) as base:
        for step, numbers in base.execute("SELECT step, metrics FROM metrics"):
            for name, number in json.loads(numbers).items():
                rows.setdefault(name, {})[step] = number
    assert rows.pop("samples") and not said
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
    assert not said and next(tmp_path.rglob("*.table.json"))
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
    assert not said and "好" in next(tmp_path.rglob("media/text/*.txt")).read_text()
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
    assert {json.loads(text)["step"] for text in texts} == {3, 5} and "好 <b>bold</b>" in texts[0]


# --- a bad one ---


def raises(_: Place) -> Sink:
    raise SystemExit("no network")


def hangs(_: Place) -> Sink:
    time.sleep(60)
    raise AssertionError


def breaks(_: Place) -> Sink:
    return Sink(lambda step, numbers: 1 / (step - 1), lambda *_: None, lambda: None)


@pytest.mark.parametrize("bad", [raises, hangs, breaks])
def test_a_bad_tracker_stops_and_slows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Callable[[Place], Sink]
) -> None:
    """Beside one that works; at the end one that hangs is waited for once, as long as it may be."""
    seen: list[int] = []
    good = Sink(lambda step, numbers: seen.append(step), lambda *_: None, lambda: seen.append(-1))
    monkeypatch.setattr(trackers, "SINKS", {"bad": bad, "good": lambda _: good})
    monkeypatch.setattr(trackers, "LEAST_PATIENCE", 1.0)
    monkeypatch.setattr(trackers, "WAITING", 200)
    said: list[str] = []
    both, began = Trackers(("bad", "good"), place(tmp_path), said.append), time.process_time()
    for step in range(100):
        both.metrics(step, {"loss": 1.0})
        time.sleep(0.001)
    assert time.process_time() - began < 0.5
    ended = time.monotonic()
    both.close()
    assert time.monotonic() - ended < 8
    assert seen == [*range(100), -1]
    (line,) = said if bad is hangs else said[:1]
    assert "tracker bad" in line and ("101 lines did not reach it" in line) == (bad is hangs)


def test_what_a_slow_tracker_cannot_take_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest lines wait no longer than there is room; the end is told all the same."""
    seen: list[int] = []
    slow = Sink(lambda step, numbers: (time.sleep(0.2), seen.append(step)), lambda *_: None, lambda: seen.append(-1))
    monkeypatch.setattr(trackers, "SINKS", {"slow": lambda _: slow})
    monkeypatch.setattr(trackers, "WAITING", 3)
    said: list[str] = []
    one = Trackers(("slow",), place(tmp_path), said.append)
    for step in range(50):
        one.metrics(step, {"loss": 1.0})
    one.close()
    assert seen[-1] == -1 and len(seen) < 10 and f"{50 - len(seen) + 1} lines did not reach it" in said[0]


def test_a_slow_tracker_is_not_waited_for_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Sink(lambda step, numbers: time.sleep(0.1), lambda *_: None, lambda: None)
    monkeypatch.setattr(trackers, "SINKS", {"slow": lambda _: slow})
    monkeypatch.setattr(trackers, "LEAST_PATIENCE", 0.2)
    said: list[str] = []
    one = Trackers(("slow",), place(tmp_path), said.append)
    for step in range(200):
        one.metrics(step, {"loss": 1.0})
    began = time.monotonic()
    one.close()
    assert 1.0 < time.monotonic() - began < 4.0 and "lines did not reach it" in said[0]


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
