"""Which method was worth it: each trained policy against SFT and best-of-N, and the cheapest that holds the gain. No
torch.

Costs are read from what the stages recorded (timing.jsonl), never from a clock of this process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrad import storage
from tetrad.report.records import StageRecords
from tetrad.report.verdict import FEWEST_PROMPTS, SFT, Differences, cost_of_answer, is_better, name_of


@dataclass(frozen=True)
class Cost:
    """What a system took. minutes: of its stage's training; reward_minutes: of the reward model that it needs, 0 where
    it needs none; peak_mib: of its stage. None where it is not recorded."""

    minutes: float | None = None
    reward_minutes: float | None = 0.0
    peak_mib: float | None = None

    @property
    def total(self) -> float | None:
        """Minutes of training after SFT."""
        return None if self.minutes is None or self.reward_minutes is None else self.minutes + self.reward_minutes

    @classmethod
    def of(cls, model: Path) -> "Cost":
        """Of the stage whose model folder this is, and of the reward model that its manifest names."""
        minutes, peak = recorded(model.parent)
        manifest = storage.read_manifest(model) if (model / storage.MANIFEST).is_file() else {}
        lineage: Any = manifest.get("lineage", {})
        reward = lineage.get("parents", {}).get("reward")
        return cls(minutes, recorded(Path(reward["folder"]).parent)[0] if reward else 0.0, peak)


def recorded(stage: Path) -> tuple[float | None, float | None]:
    """Minutes of a stage's steps, each counted once however often a stop repeated it, and the peak of memory in MiB."""
    steps = StageRecords(stage.name, stage).timing
    if not steps:
        return None, None
    return sum(line["seconds"] for line in steps) / 60, max(line["peak_mib"] for line in steps)


Gains = Mapping[tuple[str, str], Differences]
"""Of each system over every other, by judge."""


def compared(guards: Mapping[str, Sequence[str]], gains: Gains, costs: Mapping[str, Cost]) -> tuple[str, ...]:
    """A sentence for each trained policy, and the cheapest; none where a single system stands beside SFT.

    guards: those that each system failed; SFT's first. costs: of each system.
    """
    systems = [name for name in guards if name != SFT]
    if len(systems) < 2:
        return ()
    best = [name for name in systems if cost_of_answer(name)]
    sentences = []
    for name in (name for name in systems if name not in best):
        words = ", ".join(_against(gains, name, other) for other in (SFT, *best))
        faults = "".join(f"; not to be trusted: {guard}" for guard in guards[name][:1])
        sentences.append(f"{name_of(name)}: {words}{faults}")
    return (*sentences, *_cheapest(guards, gains, costs))


def _against(gains: Gains, name: str, other: str) -> str:
    gain = gains[name, other]
    few = any(difference.count < FEWEST_PROMPTS for difference in gain.values())
    word = "worse than" if is_better(gains[other, name]) else "no difference shown to"
    word = "better than" if is_better(gain) else word
    rows = [(judge, difference.mean, *difference.interval(len(gain))) for judge, difference in gain.items()]
    details = "; ".join(f"{judge} {mean:+.2f} [{low:+.2f}, {high:+.2f}]" for judge, mean, low, high in rows)
    return f"{word} {name_of(other)}" + (f" ({details})" if details and not few else "")


def _cheapest(guards: Mapping[str, Sequence[str]], gains: Gains, costs: Mapping[str, Cost]) -> list[str]:
    """Of the systems above SFT that no other is above: the one with the least training, and the least of those whose
    answers take one response each."""
    sound = [name for name in guards if name != SFT and not guards[name] and is_better(gains[name, SFT])]
    if not sound:
        return ["no method is shown to be better than SFT"]
    top = [name for name in sound if not any(is_better(gains[other, name]) for other in sound if other != name)]
    known = {name: total for name in top if (total := costs[name].total) is not None}
    if not known:
        return []
    first = min(known, key=known.__getitem__)
    text = f"cheapest that is not shown to be worse than another: {_priced(first, known)}"
    single = [name for name in known if not cost_of_answer(name)]
    if single and first not in single:
        text += f"; of those with one response an answer: {_priced(min(single, key=known.__getitem__), known)}"
    return [text]


def _priced(name: str, minutes: Mapping[str, float]) -> str:
    return f"{name_of(name)}{cost_of_answer(name)}, {minutes[name]:.1f} minutes of training after SFT"
