"""The trackers, and how a run of each is opened: imported when it is, in the process of the trackers.

All write below runs/NAME/trackers, without a network, unless their own environment (WANDB_MODE, SWANLAB_MODE,
TRACKIO_SPACE_ID, TRACKIO_SERVER_URL, MLFLOW_TRACKING_URI) asks for more; secrets are read from there alone. A stage
that resumes goes on with its run.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tetrad.storage import Json

MLFLOW_LINES = 500  # it gets metrics so many at once: a transaction costs milliseconds


class Place(NamedTuple):
    """A run of a tracker. folder: for its files; identity: the same for a stage that resumes; step: the first that is
    not there yet."""

    folder: Path
    project: str
    stage: str
    identity: str
    settings: Mapping[str, Json]
    step: int = 0


class Sink(NamedTuple):
    """What an open run of a tracker can do. Steps come in ascending order. close: takes whether the stage has finished;
    flush: returns when what has come is written, as far as the tracker can do that."""

    metrics: Callable[[int, dict[str, float]], object]
    samples: Callable[[int, list[str]], object]
    close: Callable[[bool], object]
    flush: Callable[[], object] = lambda: None


def _tensorboard(place: Place) -> Sink:
    """What a killed run wrote beyond its last checkpoint is left out by whoever reads it. torch's writer would do the
    same, and import torch."""
    event, summary = (import_module(f"tensorboard.compat.proto.{name}_pb2") for name in ("event", "summary"))
    text = import_module("tensorboard.plugins.text.summary_v2").text_pb
    writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
    run = writer(str(place.folder / place.stage))

    def add(step: int, **content: object) -> None:
        run.add_event(event.Event(wall_time=time.time(), step=step, **content))

    def metrics(step: int, numbers: dict[str, float]) -> None:
        values = [summary.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        add(step, summary=summary.Summary(value=values))

    def samples(step: int, texts: list[str]) -> None:
        for one in texts:
            add(step, summary=text("samples", one))

    add(place.step, session_log=event.SessionLog(status=event.SessionLog.START))
    return Sink(metrics, samples, lambda finished: run.close(), run.flush)


def _wandb(place: Place) -> Sink:
    wandb = import_module("wandb")
    own = {"project": place.project, "name": place.stage, "id": place.identity, "config": dict(place.settings)}
    quiet = wandb.Settings(console="off", silent=True)
    mode, again = os.environ.get("WANDB_MODE", "offline"), {"resume": "allow", "reinit": "create_new"}
    run = wandb.init(dir=str(place.folder), mode=mode, settings=quiet, **own, **again)

    def samples(step: int, texts: list[str]) -> None:
        run.log({"samples": wandb.Table(["sample"], [[text] for text in texts])}, step=step)

    return Sink(lambda step, numbers: run.log(numbers, step=step), samples, lambda finished: run.finish(not finished))


def _swanlab(place: Place) -> Sink:
    swanlab = import_module("swanlab")
    own = {"project": place.project, "name": place.stage, "id": place.identity, "config": dict(place.settings)}
    swanlab.init(log_dir=str(place.folder), mode=os.environ.get("SWANLAB_MODE", "offline"), resume="allow", **own)

    def samples(step: int, texts: list[str]) -> None:
        swanlab.log({"samples": [swanlab.Text(text) for text in texts]}, step=step)

    def close(finished: bool) -> None:
        swanlab.finish("success" if finished else "aborted")

    return Sink(lambda step, numbers: swanlab.log(numbers, step=step), samples, close)


def _trackio(place: Place) -> Sink:
    """It would ask Hugging Face who is logged in."""
    os.environ.setdefault("TRACKIO_DIR", str(place.folder))  # it is read when trackio is imported
    if not os.environ.keys() & {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"}:
        os.environ["HF_HUB_OFFLINE"] = "1"
    name, config = f"{place.stage}-{place.identity}", dict(place.settings)
    run = import_module("trackio").init(place.project, name=name, config=config, resume="allow", embed=False)

    def samples(step: int, texts: list[str]) -> None:
        for text in texts:
            run.log({"samples": text}, step=step)

    return Sink(lambda step, numbers: run.log(numbers, step=step), samples, lambda finished: run.finish())


def _mlflow(place: Place) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read when mlflow is imported
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place.folder.resolve()}/mlflow.db")
    mlflow = import_module("mlflow")
    for name in ("alembic", "mlflow.store.db.utils"):  # they tell each table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    client = mlflow.MlflowClient(uri)
    there = client.get_experiment_by_name(place.project)
    files = {} if "MLFLOW_TRACKING_URI" in os.environ else {"artifact_location": str(place.folder.resolve() / "files")}
    experiment = there.experiment_id if there else client.create_experiment(place.project, **files)
    old = client.search_runs([experiment], f"tags.tetrad = '{place.identity}'", max_results=1)
    run = (old[0] if old else client.create_run(experiment, None, {"tetrad": place.identity}, place.stage)).info.run_id
    entity = import_module("mlflow.entities")
    new = place.settings.keys() - (old[0].data.params if old else {})  # one that has changed is refused
    client.log_batch(run, params=[entity.Param(name, str(place.settings[name])) for name in sorted(new)])
    client.update_run(run, "RUNNING")

    waiting: list[Any] = []

    def flush() -> None:
        client.log_batch(run, waiting)
        waiting.clear()

    def metrics(step: int, numbers: dict[str, float]) -> None:
        now = round(1000 * time.time())
        if len(waiting) + len(numbers) > MLFLOW_LINES:
            flush()
        waiting.extend(entity.Metric(name, number, now, step) for name, number in numbers.items())

    def samples(step: int, texts: list[str]) -> None:
        for text in texts:
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            client.log_text(run, text, f"samples/{step:06}-{digest}.json")

    def close(finished: bool) -> None:
        client.set_terminated(run, "FINISHED" if finished else "FAILED")

    return Sink(metrics, samples, close, flush)


SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab, "trackio": _trackio, "mlflow": _mlflow}
