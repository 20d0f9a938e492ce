"""What the folders of a run record, as its page and `tetrad explain` read them. No torch; nothing is computed anew."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.errors import UserError
from tetrad.stages import STAGES, names_of


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; none of one that is not there, and without a last line that is still being written."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if line.endswith(b"\n"):
            yield json.loads(line)


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; empty where there is none."""
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


@dataclass(frozen=True)
class StageRecords:
    """One stage's folder. A stage without a manifest is not done."""

    name: str
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / ("report" if self.name == "evaluate" else "model")

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        return read_json(self.result / storage.MANIFEST)

    @property
    def recorded(self) -> dict[str, Any]:
        """The metrics in its manifest."""
        return storage.metrics_of(self.manifest) if self.manifest else {}

    @cached_property
    def lineage(self) -> Mapping[str, Any]:
        return read_json(self.folder / "lineage.json")

    @cached_property
    def metrics(self) -> Sequence[Mapping[str, Any]]:
        return list(lines_of(self.folder / "metrics.jsonl"))

    @cached_property
    def timing(self) -> Sequence[Mapping[str, Any]]:
        """A line a step: a step that a stop repeated is there once, as it was last."""
        return list({line["step"]: line for line in lines_of(self.folder / "timing.jsonl")}.values())

    @cached_property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        return list(lines_of(self.folder / "samples.jsonl"))


@dataclass(frozen=True)
class RunRecords:
    """A run's folder. name: as the page calls it. stages: those that have a folder, in the order they run."""

    name: str
    folder: Path
    stages: Mapping[str, StageRecords]

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """report.json; of an evaluation from before costs were kept, with what the stages' own logs say."""
        return read_json(self.folder / "evaluate" / "report" / "report.json")

    @cached_property
    def replies(self) -> Sequence[Mapping[str, Any]]:
        """Every response of the evaluation, by prompt; of an older evaluation the few that it showed."""
        path = self.folder / "evaluate" / "report" / "replies.jsonl.gz"
        if path.is_file():
            return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        rows = [dict(row) for row in self.report.get("samples", ())]
        return [{"prompt": row.pop("prompt"), "replies": {name: {"text": row[name]} for name in row}} for row in rows]

    @cached_property
    def assessment(self) -> Mapping[str, Any]:
        """The reward model on test records: evaluation.json."""
        return read_json(self.folder / "reward" / "model" / "evaluation.json")

    @cached_property
    def annotators(self) -> Sequence[Mapping[str, Any]]:
        return list(read_json(self.folder / "reward" / "model" / "annotators.json").get("annotators", ()))

    @cached_property
    def findings(self) -> Sequence[Mapping[str, Any]] | None:
        """What the last `tetrad check` of the recipe left; None without one."""
        return read_json(self.folder / "check.json").get("findings")


def read_runs(folders: Sequence[str]) -> list[RunRecords]:
    """The runs of these folders, by name, or by the end of their path where two have the same.

    Errors: E-CKPT-MISSING where no stage has a folder.
    """
    runs = []
    plain = {Path(folder).resolve().name: folder for folder in folders}
    named = plain if len(plain) == len(folders) else names_of(folders)
    for name, folder in named.items():
        stages = {stage: StageRecords(stage, Path(folder) / stage) for stage in STAGES}
        there = {stage: one for stage, one in stages.items() if one.lineage}
        if not there:
            hint = 'name the folder of a run ("runs/NAME")'
            raise UserError("E-CKPT-MISSING", "no stage was run here", where=folder, hint=hint)
        runs.append(RunRecords(name, Path(folder), there))
    return runs
