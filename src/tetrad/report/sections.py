"""The parts of a report: sections with metrics, tables, plots and findings."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVELS = ("error", "warning", "note")
FIRST = 5  # findings that a report opens with
FIXES = {
    "refused": "correct these rows, or move them out of the file (--quarantine FILE writes them there)",
    "length": "shorten or split these records",
    "memory": "take a smaller model, or lower run.micro_batch_tokens",
    "leakage": "remove them from the training data, or split the records anew by a hash of their prompt",
    "contradicting scores": 'keep one score a text, or name who gave it in "annotator"',
    "contradictions": 'keep one judgement a pair, or name who judged in "annotator"',
    "agreement": "have them judged again with clearer instructions, or collect more judgements of each",
    "annotator": "look at this annotator's records: if the scale was read the wrong way swap them, else remove them",
    "length bias": "add records in which length and quality differ, or remove some of those in which they agree",
    "coverage": "add comparisons or scores for such prompts to reward.data, or remove them from ppo.prompts",
    "judge": 'add [evaluate] with prompts = ["FILE"] and judges = ["FILE.py:FUNCTION"]',
    "validation": "set a tenth of the records apart and name their file in validation",
    "answer length": "raise max_new_tokens, or learn from shorter answers",
    "few records": "add records: results on so few are chance",
    "score scale": "declare the range that is used in reward.score_scale",
    "duplicates": "keep one of each, unless the repetition is meant",
    "long tokens": "remove repeated text from tokenizer.text (see Duplicates), or raise tokenizer.min_frequency",
    "circles": "judge these prompts again, or remove them",
    "epochs": "add text, or lower pretrain.tokens",
    "encoding": "export them again from their source, as UTF-8",
    "learned share": "shorten the prompts, or count on more sft.epochs",
    "diversity": "add prompts of other kinds",
    "vocabulary": "add text, or lower tokenizer.vocab_size",
    "flips": "",
    "control strings": "",
    "tokenizer": "",
}
"""The fix for a finding of each name, unless it has its own. What harms a result more comes first."""


@dataclass(frozen=True)
class Finding:
    """Something to act on. error: training would stop; warning: it would learn something else than intended.

    name: one of FIXES. fix: the setting, the command or the change of the data that resolves it.
    """

    level: str
    name: str
    text: str
    where: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(self.level)
        object.__setattr__(self, "fix", self.fix or FIXES[self.name])


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names. brief: how many of them to show on a terminal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    brief: int = 20


@dataclass(frozen=True)
class Plot:
    """A histogram: counts between edges, one more edge than counts."""

    title: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass
class Section:
    """One part of a report, filled step by step. metrics: by name, for programs; tables and plots: for people."""

    name: str
    title: str
    metrics: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, name: str, text: str, where: str = "", fix: str = "") -> None:
        """Adds a finding."""
        self.findings.append(Finding(level, name, text, where, fix))


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered sample: what the loss reads is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RenderedSample:
    """A record as the model sees it."""

    where: str
    runs: tuple[Span, ...]

    def beginning(self, limit: int) -> Iterator[Span]:
        """Its first `limit` characters."""
        for run in self.runs:
            yield Span(run.text[:limit], run.trained)
            limit = max(0, limit - len(run.text))


@dataclass(frozen=True)
class Report:
    """The whole report. target: what was checked."""

    target: str
    sections: tuple[Section, ...]
    samples: tuple[RenderedSample, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        """Errors, warnings, notes; within each level first one of every name, in the order of FIXES, then the rest."""
        order, before = list(FIXES), Counter[tuple[str, str]]()
        ranked: list[tuple[int, int, int, Finding]] = []
        for finding in (finding for section in self.sections for finding in section.findings):
            seen = before[finding.level, finding.name]
            ranked.append((LEVELS.index(finding.level), seen, order.index(finding.name), finding))
            before[finding.level, finding.name] += 1
        return [finding for *_, finding in sorted(ranked, key=lambda row: row[:3])]

    @property
    def first(self) -> list[Finding]:
        """The few that matter most; none if there are only notes."""
        return [finding for finding in self.findings if finding.level != "note"][:FIRST]


def histogram(title: str, unit: str, values: Sequence[float] | np.ndarray[Any, Any], bins: int = 30) -> Plot:
    """Equal bins over the values, with the top hundredth in the last."""
    given = np.asarray(values, np.float64)
    low, top = float(given.min()), float(np.quantile(given, 0.99))
    top = top if top > low else low + max(1.0, abs(low) / 100)
    counts, edges = np.histogram(np.minimum(given, top), bins=bins, range=(low, top))
    return Plot(title, unit, tuple(edges.tolist()), tuple(counts.tolist()))


def share(part: float, whole: float) -> str:
    """`12.5 %`, or `-` if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
