"""Trackers: where others look at a run. What metrics.jsonl and samples.jsonl get goes to each of `run.trackers` too.

Each tracker has a thread and a bounded queue, so that whatever it does, the run goes on. One that raises is off from
then on, with one warning; what one that hangs or is slow can't take is dropped, and counted in a warning at the end of
the stage, which waits for it for 5 seconds or a hundredth of the stage, whichever is more, and a few times that if it
is only slow. All write below runs/NAME/trackers, without a network, unless their own environment (WANDB_MODE,
SWANLAB_MODE, TRACKIO_SPACE_ID, MLFLOW_TRACKING_URI) asks for more; secrets are read from there alone. A stage that
resumes goes on with its run.
"""

import hashlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

from tetrad import storage
from tetrad.distributed import collectives
from tetrad.storage import Json
from tetrad.training.context import StageContext

WAITING = 2000  # lines that wait for a slow tracker
LEAST_PATIENCE, PATIENCE = 5.0, 0.01  # for a tracker without progress at the end of a stage: seconds, share of it
MLFLOW_LINES, MLFLOW_MS = 500, 5000  # it gets metrics so many at once, or so often: a transaction costs milliseconds
LONGEST = 6  # times as long for one that is slow but moves


@dataclass(frozen=True)
class Place:
    """A run of a tracker. folder: for its files; identity: the same for a stage that resumes; step: the first that is
    not there yet."""

    folder: Path
    project: str
    stage: str
    identity: str
    settings: Mapping[str, Json]
    step: int = 0


class Sink(NamedTuple):
    """What an open run of a tracker can do."""

    metrics: Callable[[int, dict[str, float]], object]
    sample: Callable[[int, str], object]
    close: Callable[[], object]


class Trackers:
    """Those of a stage. warn: prints a line, from any thread."""

    def __init__(self, names: tuple[str, ...], place: Place, warn: Callable[[str], None]) -> None:
        self._feeds = [_Feed(name, replace(place, folder=place.folder / name), warn) for name in names]
        self._began = time.monotonic()

    @classmethod
    def of(cls, ctx: StageContext, step: int) -> "Trackers":
        """The recipe's, on the first process; step: where the stage begins or resumes."""
        names = ctx.recipe.run.trackers if collectives.is_main() else ()
        identity = hashlib.sha256(f"{ctx.folder.resolve()} {ctx.key}".encode()).hexdigest()[:16]
        own = asdict(getattr(ctx.recipe, ctx.folder.name))
        place = Place(ctx.folder.parent / "trackers", ctx.recipe.name, ctx.folder.name, identity, own, step)
        return cls(names, place, ctx.console.warn)

    def metrics(self, step: int, numbers: Mapping[str, Json]) -> None:
        """A line of metrics.jsonl."""
        plain = {name: float(n) for name, n in numbers.items() if isinstance(n, int | float)}
        for feed in self._feeds:
            feed.put(lambda sink: sink.metrics(step, plain))

    def sample(self, record: Mapping[str, Json]) -> None:
        """A line of samples.jsonl."""
        step, text = int(str(record.get("step", 0))), storage.json_bytes(dict(record)).decode(errors="replace")
        for feed in self._feeds:
            feed.put(lambda sink: sink.sample(step, text))

    def close(self) -> None:
        """Lets the trackers end that still move."""
        patience = max(LEAST_PATIENCE, PATIENCE * (time.monotonic() - self._began))
        for feed in self._feeds:
            feed.put(lambda sink: sink.close(), last=True)
        for feed in self._feeds:
            feed.end(patience)


class _Feed(threading.Thread):
    """The queue of one tracker and what empties it."""

    def __init__(self, name: str, place: Place, warn: Callable[[str], None]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self._open, self._place, self._warn = SINKS[name], place, warn
        self._queue = Queue[tuple[Callable[[Sink], object], bool]](WAITING)
        self._dropped, self._moved = 0, time.monotonic()
        self.start()

    def put(self, act: Callable[[Sink], object], *, last: bool = False) -> None:
        if last and self._queue.full():  # the end must not be what is dropped
            self._queue.get_nowait()
            self._dropped += 1
        try:
            self._queue.put_nowait((act, last))
        except Full:
            self._dropped += 1

    def run(self) -> None:
        try:
            storage.make_folder(self._place.folder)
            sink, last = self._open(self._place), False
            while not last:
                self._moved = time.monotonic()
                act, last = self._queue.get()
                act(sink)
        except BaseException as error:  # also SystemExit: it is the tracker's own end, not the run's
            self._warn(f"{self.name} fails and is off, the run goes on: {type(error).__name__}: {error}")

    def end(self, patience: float) -> None:
        began = time.monotonic()
        latest = began + LONGEST * patience
        while self.is_alive() and time.monotonic() < min(max(began, self._moved), latest) + patience:
            self.join(0.05)
        left = self._dropped + (self._queue.qsize() if self.is_alive() else 0)
        if left or self.is_alive():
            self._warn(f"{self.name} does not answer or is too slow: {left} lines did not reach it")


def _tensorboard(place: Place) -> Sink:
    """What a killed run wrote beyond its last checkpoint is left out by whoever reads it."""
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    run = writer(str(place.folder / place.stage), purge_step=place.step)

    def metrics(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            run.add_scalar(name, number, step)

    return Sink(metrics, lambda step, text: run.add_text("samples", text, step), run.close)


def _wandb(place: Place) -> Sink:
    wandb = importlib.import_module("wandb")
    own = {"project": place.project, "name": place.stage, "id": place.identity, "config": dict(place.settings)}
    quiet = wandb.Settings(console="off", silent=True)
    mode, again = os.environ.get("WANDB_MODE", "offline"), {"resume": "allow", "reinit": "create_new"}
    run = wandb.init(dir=str(place.folder), mode=mode, settings=quiet, **own, **again)

    def sample(step: int, text: str) -> None:
        run.log({"samples": wandb.Table(["sample"], [[text]])}, step=step)

    return Sink(lambda step, numbers: run.log(numbers, step=step), sample, run.finish)


def _swanlab(place: Place) -> Sink:
    swanlab = importlib.import_module("swanlab")
    own = {"project": place.project, "name": place.stage, "id": place.identity, "config": dict(place.settings)}
    swanlab.init(log_dir=str(place.folder), mode=os.environ.get("SWANLAB_MODE", "offline"), resume="allow", **own)

    def sample(step: int, text: str) -> None:
        swanlab.log({"samples": swanlab.Text(text)}, step=step)

    return Sink(lambda step, numbers: swanlab.log(numbers, step=step), sample, swanlab.finish)


def _trackio(place: Place) -> Sink:
    os.environ.setdefault("TRACKIO_DIR", str(place.folder))  # it is read when trackio is imported
    name, config = f"{place.stage}-{place.identity}", dict(place.settings)
    run = importlib.import_module("trackio").init(place.project, name=name, config=config, resume="allow", embed=False)
    log = run.log
    return Sink(lambda step, n: log(n, step=step), lambda step, text: log({"samples": text}, step=step), run.finish)


def _mlflow(place: Place) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read when mlflow is imported
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place.folder.resolve()}/mlflow.db")
    mlflow = importlib.import_module("mlflow")
    for name in ("alembic", "mlflow.store.db.utils"):  # they tell each table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    client = mlflow.MlflowClient(uri)
    there = client.get_experiment_by_name(place.project)
    files = {} if "MLFLOW_TRACKING_URI" in os.environ else {"artifact_location": str(place.folder.resolve() / "files")}
    experiment = there.experiment_id if there else client.create_experiment(place.project, **files)
    old = client.search_runs([experiment], f"tags.tetrad = '{place.identity}'", max_results=1)
    run = (old[0] if old else client.create_run(experiment, None, {"tetrad": place.identity}, place.stage)).info.run_id
    entity = importlib.import_module("mlflow.entities")
    client.log_batch(run, params=[entity.Param(name, str(value)) for name, value in place.settings.items()])
    client.update_run(run, "RUNNING")

    waiting: list[Any] = []

    def flush() -> None:
        client.log_batch(run, waiting)
        waiting.clear()

    def metrics(step: int, numbers: dict[str, float]) -> None:
        now = round(1000 * time.time())
        if waiting and (now - waiting[0].timestamp > MLFLOW_MS or len(waiting) + len(numbers) > MLFLOW_LINES):
            flush()
        waiting.extend(entity.Metric(name, number, now, step) for name, number in numbers.items())

    def sample(step: int, text: str) -> None:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        client.log_text(run, text, f"samples/{step:06}-{digest}.json")

    def close() -> None:
        flush()
        client.set_terminated(run)

    return Sink(metrics, sample, close)


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab, "trackio": _trackio, "mlflow": _mlflow}
