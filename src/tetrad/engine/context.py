"""What the pipeline hands to a stage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tetrad.data import source
from tetrad.engine.console import Console
from tetrad.settings.recipe import Recipe
from tetrad.storage import Json


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

    def files(self, patterns: Iterable[str]) -> list[Path]:
        """The files that a setting names, globs expanded. Raises UserError E-DATA-PATH."""
        return source.files(patterns)

    def cache(self, name: str) -> Path:
        """A folder for what can be made again; its maker checks that it is still right."""
        return self.folder.parent / ".cache" / name
