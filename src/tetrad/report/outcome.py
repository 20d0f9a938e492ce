"""Where the verdict of a run is kept: PPO's notes in its manifest, report.json, the PPO model's card. No torch.

The card (README.md) is for people: no manifest vouches for it, so that an evaluation can write the verdict into the
finished folder with one rename.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.registry import Recipe
from tetrad.report.verdict import AlarmSpan, Verdict, alarm_faults, unevaluated
from tetrad.storage import Json

CARD = "README.md"
_HEADING = "\n## Verdict\n\n"


def notes(gate: Sequence[str], alarms: Sequence[AlarmSpan]) -> dict[str, Json]:
    """PPO's notes in its manifest. gate: why the reward model failed."""
    return {"gate": list(gate), "alarms": [asdict(span) for span in alarms]}


def faults(metrics: Mapping[str, Any]) -> list[str]:
    """The faults of the result in PPO's notes."""
    spans = [AlarmSpan(**span) for span in metrics["alarms"]]
    return [*(f"gate: {reason}" for reason in metrics["gate"]), *alarm_faults(spans)]


def before_evaluation(recipe: Recipe, metrics: Mapping[str, Any]) -> Verdict:
    """PPO's verdict from its own notes."""
    return unevaluated(faults(metrics), "run on to evaluate it" if recipe.evaluate.prompts else "add [evaluate]")


def of_run(recipe: Recipe, ppo: Path | None, report: Path | None) -> Verdict | None:
    """ppo, report: the folders of finished stages. None if there is no PPO, and nothing was compared."""
    if report:
        saved = json.loads((report / "report.json").read_bytes())["verdict"]
        return Verdict(**{**saved, "reasons": tuple(saved["reasons"])}) if saved else None
    return before_evaluation(recipe, storage.read_manifest(ppo)["figures"]) if ppo else None


def with_verdict(card: str, verdict: Verdict) -> str:
    """The card with this verdict as its last section."""
    lines = [f"**{verdict}**", "", *(f"- {reason}" for reason in verdict.reasons)]
    return card.partition(_HEADING)[0] + _HEADING + "\n".join(lines) + "\n"


def write_card(folder: Path, verdict: Verdict) -> None:
    """Writes the verdict into the card of a finished model, if it has another."""
    place = folder / CARD
    card = place.read_text(encoding="utf-8", errors="replace") if place.is_file() else f"# {folder.parent.name}\n"
    if (now := with_verdict(card, verdict)) != card:
        with storage.RunLock(folder.parent / "lock"):
            storage.remove_leftovers(folder)
            storage.write_file(place, now.encode())
