"""What a report is made of: sections of figures, tables, plots and findings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something to act on. error: training would stop; warning: it would learn something else than is meant."""

    level: str
    name: str
    text: str
    where: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(self.level)


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
        """Errors first, then warnings, then notes."""
        return sorted((f for s in self.sections for f in s.findings), key=lambda found: LEVELS.index(found.level))


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
