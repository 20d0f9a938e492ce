"""Where the verdict of a run is kept: PPO's notes in its manifest, report.json, the PPO model's card. No torch.

The card (README.md) is for people: no manifest vouches for it, so that an evaluation can write the verdict into the
finished folder with one rename.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.report.verdict import AlarmSpan, Verdict, unevaluated
from tetrad.stages import Recipe
from tetrad.storage import Json

CARD = "README.md"
_HEADING = "\n## Verdict\n\n"


@dataclass(frozen=True)
class Notes:
    """PPO's notes in its manifest. gate: why the reward model failed; alarms: when each was raised."""

    gate: Sequence[str] = ()
    alarms: Sequence[AlarmSpan] = ()

    def record(self) -> dict[str, Json]:
        """As the manifest has them."""
        return {"gate": list(self.gate), "alarms": [asdict(span) for span in self.alarms]}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Notes":
        """From a manifest's metrics."""
        return cls(record.get("gate", ()), [AlarmSpan(**span) for span in record.get("alarms", ())])

    def faults(self) -> list[str]:
        """What counts against the result: a gate that failed, alarms at their second limit."""
        alarms = [
            f"alarm {span.figure}: at its second limit, first at step {span.first}, last at step {span.last}"
            for span in self.alarms
            if span.level == 2
        ]
        return [*(f"gate: {reason}" for reason in self.gate), *alarms]


def before_evaluation(recipe: Recipe, notes: Notes) -> Verdict:
    """PPO's verdict from its own notes."""
    return unevaluated(notes.faults(), "run on to evaluate it" if recipe.evaluate.prompts else "add [evaluate]")


def of_run(recipe: Recipe, ppo: Path | None, report: Path | None) -> Verdict | None:
    """ppo, report: the folders of finished stages. None if there is no PPO, and nothing was compared."""
    if report:
        saved = json.loads((report / "report.json").read_bytes())["verdict"]
        return Verdict.read(saved) if saved else None
    return before_evaluation(recipe, Notes.read(storage.metrics_of(storage.read_manifest(ppo)))) if ppo else None


def with_verdict(card: str, verdict: Verdict) -> str:
    """The card with this verdict as its last section."""
    lines = [f"**{verdict}**", "", *(f"- {reason}" for reason in (*verdict.reasons, *verdict.methods))]
    return card.partition(_HEADING)[0] + _HEADING + "\n".join(lines) + "\n"


def write_card(folder: Path, verdict: Verdict) -> None:
    """Writes the verdict into the card of a finished model, if it has another."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else f"# {folder.parent.name}\n"
    if (now := with_verdict(card, verdict)) != card:
        with storage.RunLock(folder.parent / "lock"):
            storage.remove_leftovers(folder)
            storage.write_file(path, now.encode())
