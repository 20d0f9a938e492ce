"""What the pipeline passes to a stage."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tetrad.console import Console
from tetrad.data import source
from tetrad.stages import Recipe
from tetrad.storage import Json
from tetrad.tracking.trackers import Trackers


def renamed(pairs: Iterable[str]) -> dict[str, str]:
    """Aliases of fields by lower-case name: "question=Instruction" as {"question": "instruction"}."""
    split = (pair.partition("=") for pair in pairs)
    return {other.strip().lower(): name.strip().lower() for other, _, name in split}


@dataclass(frozen=True)
class StageContext:
    """All that a stage module's `run(context)` needs.

    folder: the stage's run folder; the result goes to its `model` (evaluate: `report`), whose manifest must have `key`.
    parents: model folders by role: tokenizer, pretrain, sft, reward, ppo; `base` is what `model.from` names, and `from`
    what `reward.from` names. lineage: what lineage.json says, for the result's manifest.
    """

    recipe: Recipe
    folder: Path
    key: str
    parents: Mapping[str, Path]
    lineage: Mapping[str, Json]
    console: Console
    trackers: Trackers

    def files(self, patterns: Iterable[str], weights: Sequence[float] = ()) -> source.DataFiles:
        """The files that a setting names, globs expanded. Raises UserError E-DATA-PATH."""
        return source.sources(patterns, weights, renamed(self.recipe.data.rename))

    def digests(self, name: str) -> list[str]:
        """The sha256 of each file of a setting, as its stage's key has them."""
        data = cast(Mapping[str, list[Mapping[str, str]]], self.lineage["data"])
        return [item["sha256"] for item in data[name]]

    @property
    def workers(self) -> int:
        """Processes that may tokenise."""
        return self.recipe.run.workers or len(os.sched_getaffinity(0))

    def cache(self, name: str) -> Path:
        """A folder for what can be rebuilt; its user checks that it is still valid."""
        return self.folder.parent / ".cache" / name
