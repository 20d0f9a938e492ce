"""How good a reward model is: its accuracy on pairs, calibration and rank correlation, overall and by slice.

Judged answers come in pairs: within each list, and among scored answers whose scores are far enough apart. Pairs of one
answer are not independent, so intervals come from resampling lists and scored answers, never single pairs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrad.objectives import calibration
from tetrad.reward.batches import Examples, Record, judgements, texts
from tetrad.reward.metrics import PairMetrics
from tetrad.types import MOST_SCORED, Score

BLOCK = 256
RESAMPLES = 1000
MOST_VALUES = 20  # slices of one kind
LEAST = 30  # pairs that a slice needs
BETTER_IS_LONGER, BETTER_IS_SHORTER = "the better is longer", "the better is shorter"


@dataclass(frozen=True)
class Pairs:
    """Judged answers in pairs of a better and a worse one.

    better_P, worse_P: numbers of documents; the first pairs are within lists, and lists_P are the lists of those.
    gaps_P: reward of the better minus that of the worse; margins_P: the human margin between them, NaN where unknown.
    scored_S: the documents with scores; rewards_S, scores_S: theirs.
    """

    better_P: Tensor
    worse_P: Tensor
    lists_P: Tensor
    gaps_P: Tensor
    margins_P: Tensor
    scored_S: Tensor
    rewards_S: Tensor
    scores_S: Tensor

    @classmethod
    def of(cls, examples: Examples, rewards_D: Sequence[float] | np.ndarray[Any, Any] | Tensor, gap: float) -> "Pairs":
        """gap: scored answers closer than this form no pair."""
        targets = judgements(examples.records)
        rewards, scored = torch.as_tensor(rewards_D).double(), targets.scored_S
        scores = torch.tensor([r.score for r in examples.records if isinstance(r, Score)], dtype=torch.float64)
        above, below = _apart(scores[:MOST_SCORED], gap)
        documents = scored.int()
        better = torch.cat((targets.winners_P.int(), documents[above]))
        worse = torch.cat((targets.losers_P.int(), documents[below]))
        margins = torch.where(targets.margins_P > 0, targets.margins_P.double(), math.nan)
        gaps, margins = rewards[better] - rewards[worse], torch.cat((margins, scores[above] - scores[below]))
        return cls(better, worse, targets.lists_P, gaps, margins, scored, rewards[scored], scores)

    def __len__(self) -> int:
        return len(self.gaps_P)

    def temperature(self) -> float:
        """The T at which sigmoid(gap / T) is best calibrated on these pairs; 1 without pairs."""
        return calibration.fit_temperature(self.gaps_P, torch.ones_like(self.gaps_P)) if len(self) else 1.0

    def metrics(self, temperature: float) -> PairMetrics:
        """Accuracy and calibration, and the rank correlations of scored answers."""
        metrics = replace(self.rank_metrics(), temperature=temperature, pairs=float(len(self)))
        if not len(self):
            return metrics
        correct, confidence, raw = self.correct(), self.confidence(temperature), self.confidence(1.0)
        low, high = self.interval(correct)
        return replace(
            metrics,
            pair_accuracy=float(correct.mean()),
            pair_accuracy_low=low,
            pair_accuracy_high=high,
            ece=float(calibration.ece(confidence, correct)),
            brier=float(calibration.brier(confidence, correct)),
            raw_ece=float(calibration.ece(raw, correct)),
            raw_brier=float(calibration.brier(raw, correct)),
        )

    def accuracy(self) -> float | None:
        """The share of pairs in the right order; None without pairs."""
        return float(self.correct().mean()) if len(self) else None

    def correct(self) -> Tensor:
        """1 where the better answer has the higher reward, 0.5 where both have the same; [P]."""
        return (self.gaps_P.sign() + 1) / 2

    def confidence(self, temperature: float) -> Tensor:
        """The model's confidence in its own order of each pair; [P]."""
        return torch.sigmoid(self.gaps_P.abs() / temperature)

    def reliability(self, temperature: float, bins: int = 10) -> list[dict[str, float]]:
        """The reliability diagram: of each bin of confidence from 0.5 to 1 that has LEAST pairs its mean confidence,
        the share in order with its 95 % interval, and the pairs."""
        confidence, correct = self.confidence(temperature), self.correct()
        bin_P = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
        rows = []
        for number in range(bins):
            if int((chosen := bin_P == number).sum()) < LEAST:
                continue
            part = self.chosen(chosen)
            low, high = part.interval(part.correct())
            row = {"confidence": float(confidence[chosen].mean()), "accuracy": float(correct[chosen].mean())}
            rows.append({**row, "low": low, "high": high, "pairs": float(len(part))})
        return rows

    def extremes(self, count: int = 3) -> list[int]:
        """Of pairs: the numbers of those furthest the wrong way round, then of those furthest the right way."""
        order = self.gaps_P.argsort().tolist()
        return list(dict.fromkeys([*order[:count], *order[::-1][:count]]))

    def rank_metrics(self) -> PairMetrics:
        """Rank correlations of rewards and scores alone."""
        if len(self.scores_S) < 3 or not math.isfinite(rank := calibration.spearman(self.rewards_S, self.scores_S)):
            return PairMetrics()
        both = torch.stack((self.rewards_S, self.scores_S), 1)
        ends = calibration.bootstrap_interval(both, lambda x: calibration.spearman(x[:, 0], x[:, 1]), resamples=300)
        kendall = calibration.kendall(self.rewards_S[:MOST_SCORED], self.scores_S[:MOST_SCORED])
        low, high = (end if math.isfinite(end) else None for end in ends)
        return PairMetrics(spearman=rank, spearman_low=low, spearman_high=high, kendall=kendall)

    def interval(self, values_P: Tensor) -> tuple[float, float]:
        """95 % bootstrap interval of the mean of a per-pair value: lists, and scored answers with their pairs."""
        generator = torch.Generator().manual_seed(0)
        n = len(self.lists_P)
        totals, counts = torch.zeros(2, RESAMPLES, dtype=torch.float64)
        if n:
            _, list_P = self.lists_P.unique(return_inverse=True)
            sums = torch.zeros(int(list_P.max()) + 1, 2, dtype=torch.float64)
            sums.index_add_(0, list_P, torch.stack((values_P[:n], torch.ones(n, dtype=torch.float64)), 1))
            drawn = _counts(len(sums), generator).double() @ sums
            totals, counts = totals + drawn[:, 0], counts + drawn[:, 1]
        if len(self) > n:
            better, worse, documents = _renumbered(self.better_P[n:], self.worse_P[n:])
            weights = _counts(documents, generator)
            for total, values in ((totals, values_P[n:]), (counts, torch.ones(len(better)))):
                matrix = torch.zeros(documents, documents)
                matrix[better, worse] = values.float()
                total += ((weights @ matrix) * weights).sum(1).double()
        means = (totals / counts)[counts > 0]
        return float(means.quantile(0.025)), float(means.quantile(0.975))

    def chosen(self, pairs_P: Tensor, scored_S: Tensor | None = None) -> "Pairs":
        """Only these pairs, and these scored answers (none by default)."""
        arrays = (self.better_P, self.worse_P, self.gaps_P, self.margins_P)
        better, worse, gaps, margins = (x[pairs_P] for x in arrays)
        keep = torch.zeros(len(self.scored_S), dtype=torch.bool) if scored_S is None else scored_S
        scored = tuple(x[keep] for x in (self.scored_S, self.rewards_S, self.scores_S))
        return Pairs(better, worse, self.lists_P[pairs_P[: len(self.lists_P)]], gaps, margins, *scored)


@dataclass(frozen=True)
class Slice:
    """The model on a part of the test data. confidence: its mean, at the temperature; None where undefined."""

    by: str
    value: str
    pairs: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    confidence: float | None
    scored: int
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None

    @classmethod
    def of(cls, by: str, value: str, pairs: Pairs, temperature: float) -> "Slice":
        """Without the metrics for which it is too small."""
        m = pairs.metrics(temperature) if len(pairs) >= LEAST else PairMetrics()
        ranks = pairs.rank_metrics() if len(pairs.scores_S) >= LEAST else PairMetrics()
        confidence = float(pairs.confidence(temperature).mean()) if len(pairs) >= LEAST else None
        accuracy = (m.pair_accuracy, m.pair_accuracy_low, m.pair_accuracy_high)
        spearman = (ranks.spearman, ranks.spearman_low, ranks.spearman_high)
        return cls(by, value, len(pairs), *accuracy, confidence, len(pairs.scores_S), *spearman)


def _source(record: Record) -> str:
    return record.where.rpartition(":")[0].rpartition("/")[2]


GROUPS: Mapping[str, Callable[[Record], str]] = {
    "source": _source,
    "annotator": lambda record: record.annotator,
    "asked": lambda record: record.prompt.turns[0].text,  # the Instruction or first turn
}


def slices(examples: Examples, pairs: Pairs, temperature: float) -> list[Slice]:
    """By source, annotator and prompt of the records (pairs of equal value); by the human margin between two answers,
    the model's confidence, and the difference in length."""
    result = list[Slice]()
    for by, value_of in GROUPS.items():
        values_D = [value_of(record) for record in examples.records for _ in texts(record)]
        values = sorted(set(values_D) - {""})
        if not 1 < len(values) <= MOST_VALUES:
            continue
        result += [Slice.of(by, value, group, temperature) for value, group in by_value(pairs, values_D)]
    lengths_D = torch.tensor([float(len(sample.text)) for sample in examples.samples()])
    for by, value, chosen in _of_pairs(pairs, lengths_D):
        if int(chosen.sum()) >= LEAST:
            result.append(Slice.of(by, value, pairs.chosen(chosen), temperature))
    return result


def by_value(pairs: Pairs, values_D: Sequence[str]) -> Iterator[tuple[str, Pairs]]:
    """Each value of the documents, sorted, and the pairs of which both have it; documents without a value are left
    out."""
    values = sorted(set(values_D) - {""})
    of_D = torch.tensor([values.index(value) if value else -1 for value in values_D])
    same = of_D[pairs.better_P] == of_D[pairs.worse_P]
    for i, value in enumerate(values):
        yield value, pairs.chosen(same & (of_D[pairs.better_P] == i), of_D[pairs.scored_S] == i)


def _of_pairs(pairs: Pairs, lengths_D: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Slices by the relation of two answers: kind, value, which pairs."""
    for by, values in (("apart", pairs.margins_P), ("sure", pairs.gaps_P.abs())):
        known = values[~values.isnan()]
        if len(known) and known.min() < known.max():
            few = known[:: max(1, len(known) // 100_000)]
            low, high = (float(few.quantile(share)) for share in (1 / 3, 2 / 3))
            yield by, f"below {low:.2f}", values < low
            yield by, f"{low:.2f} to {high:.2f}", (values >= low) & (values < high)
            yield by, f"{high:.2f} and more", values >= high
    better, worse = lengths_D[pairs.better_P], lengths_D[pairs.worse_P]
    like = (better - worse).abs() <= 0.1 * torch.maximum(better, worse)
    yield "length", BETTER_IS_LONGER, ~like & (better > worse)
    yield "length", "about equal", like
    yield "length", BETTER_IS_SHORTER, ~like & (better < worse)


def _apart(scores_S: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """The numbers of a higher and a lower score, at least `gap` apart: int32, by blocks of rows, for pairs are many."""
    above, below = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int32)]
    for start in range(0, len(scores_S), BLOCK):
        apart = scores_S[start : start + BLOCK, None] - scores_S
        rows, columns = ((apart >= gap) & (apart > 0)).nonzero().int().unbind(1)
        above.append(rows + start)
        below.append(columns.clone())
    return torch.cat(above), torch.cat(below)


def _renumbered(*pairs_P: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both sides of pairs with their documents numbered from 0 in the same order, and how many these are."""
    there = torch.zeros(1 + max(int(side.max()) for side in pairs_P), dtype=torch.bool)
    for side in pairs_P:
        there[side] = True
    number = there.cumsum(0, dtype=torch.int32) - 1
    better, worse = (number[side] for side in pairs_P)
    return better, worse, int(there.sum())


def _counts(size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` items is drawn, [resamples, size]."""
    drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
    return torch.zeros(RESAMPLES, size).scatter_add_(1, drawn, torch.ones(RESAMPLES, size))
