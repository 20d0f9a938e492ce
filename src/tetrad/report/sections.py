"""What a report is made of: sections of figures, tables, plots and findings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVELS = ("error", "warning", "note")
FIRST = 5  # findings that a report opens with
ORDER = (
    "refused", "length", "memory", "leakage", "contradicting scores", "contradictions", "agreement", "annotator",
    "length bias", "coverage", "judge", "validation", "answer length", "few records", "score scale", "duplicates",
    "long tokens", "circles", "vocabulary", "epochs", "encoding", "learned share", "diversity", "flips",
    "control strings", "tokenizer",
)  # fmt: skip
"""The names of findings: of one level, what spoils a result more stands before what spoils it less."""


@dataclass(frozen=True)
class Finding:
    """Something to act on. error: training would stop; warning: it would learn something else than is meant.

    name: one of ORDER. fix: the setting, the command or the change of the data that ends it; a note may have none.
    """

    level: str
    name: str
    text: str
    where: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS or self.name not in ORDER:
            raise ValueError(f"{self.level} {self.name}")


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names. brief: so many of them on a terminal."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    brief: int = 20


@dataclass(frozen=True)
class Plot:
    """A histogram: counts between edges, one more edge than counts."""

    title: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """One part of a report. figures: by name, for programs; tables and plots: for people."""

    name: str
    title: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Run:
    """A stretch of a rendered sample: what the loss reads is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """A record as the model sees it."""

    where: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Report:
    """All of it. target: what was checked."""

    target: str
    sections: tuple[Section, ...]
    samples: tuple[Sample, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        """Errors first, then warnings, then notes; each in the order of ORDER, what has a name for the first time before
        what repeats it."""
        ranked, before = [], Counter[tuple[str, str]]()
        for finding in (finding for section in self.sections for finding in section.findings):
            kind = finding.level, finding.name
            ranked.append((LEVELS.index(finding.level), before[kind], ORDER.index(finding.name), finding))
            before[kind] += 1
        return [finding for *_, finding in sorted(ranked, key=lambda row: row[:3])]

    @property
    def first(self) -> list[Finding]:
        """The few that matter most; none where there are only notes."""
        return [finding for finding in self.findings if finding.level != "note"][:FIRST]


def histogram(title: str, unit: str, values: Sequence[float] | np.ndarray[Any, Any], bins: int = 30) -> Plot:
    """Equal bins over the values, the top hundredth in the last."""
    given = np.asarray(values, np.float64)
    low, top = float(given.min()), float(np.quantile(given, 0.99))
    top = top if top > low else low + max(1.0, abs(low) / 100)
    counts, edges = np.histogram(np.minimum(given, top), bins=bins, range=(low, top))
    return Plot(title, unit, tuple(edges.tolist()), tuple(counts.tolist()))


def share(part: float, whole: float) -> str:
    """`12.5 %`, or nothing of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
