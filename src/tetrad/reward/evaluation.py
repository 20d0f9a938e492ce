"""How good a reward model is: its accuracy on pairs, calibration and rank correlation, overall and by slice.

Judged answers come in pairs: within each list, and among scored answers whose scores are far enough apart. Pairs of one
answer are not independent, so intervals come from resampling lists and scored answers, never single pairs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tetrad.objectives import calibration
from tetrad.reward.batches import Examples, judgements
from tetrad.types import Comparison, Score

MOST_SCORED = 4000  # scored answers that are paired: all pairs of more would exhaust the memory
RESAMPLES = 1000
MOST_VALUES = 20  # slices of one kind
LEAST = 30  # pairs that a slice needs
BETTER_IS_LONGER, BETTER_IS_SHORTER = "the better is longer", "the better is shorter"


@dataclass(frozen=True)
class Pairs:
    """Judged answers in pairs of a better and a worse one.

    better_P, worse_P: numbers of documents; the first `lists` pairs are within lists, and of_list_P are their lists.
    gaps_P: reward of the better minus that of the worse; apart_P: the human margin between them, NaN where unknown.
    scored_S: the documents with scores; rewards_S, scores_S: theirs.
    """

    better_P: Tensor
    worse_P: Tensor
    of_list_P: Tensor
    gaps_P: Tensor
    apart_P: Tensor
    scored_S: Tensor
    rewards_S: Tensor
    scores_S: Tensor

    @classmethod
    def of(cls, examples: Examples, rewards_D: Tensor, gap: float) -> "Pairs":
        """gap: scored answers closer than this form no pair."""
        targets = judgements(examples.records, 0.0, 1.0, torch.device("cpu"))
        rewards, scored = rewards_D.double(), targets.scored_S
        scores = torch.tensor([r.score for r in examples.records if isinstance(r, Score)], dtype=torch.float64)
        apart = scores[:MOST_SCORED, None] - scores[None, :MOST_SCORED]
        above, below = ((apart >= gap) & (apart > 0)).nonzero().unbind(1)
        better = torch.cat((targets.winners_P, scored[above]))
        worse = torch.cat((targets.losers_P, scored[below]))
        margins = torch.where(targets.margins_P > 0, targets.margins_P.double(), math.nan)
        apart_P = torch.cat((margins, apart[above, below]))
        gaps = rewards[better] - rewards[worse]
        return cls(better, worse, targets.lists_P, gaps, apart_P, scored, rewards[scored], scores)

    def __len__(self) -> int:
        return len(self.gaps_P)

    def temperature(self) -> float:
        """The T at which sigmoid(gap / T) is best calibrated on these pairs; 1 without pairs."""
        return calibration.fit_temperature(self.gaps_P, torch.ones_like(self.gaps_P)) if len(self) else 1.0

    def figures(self, temperature: float) -> dict[str, float]:
        """pair_accuracy with its 95 % interval; ece and brier at this temperature and (raw_) at 1; spearman with its
        interval and kendall of scored answers. Undefined metrics are absent."""
        metrics: dict[str, float] = {"pairs": float(len(self))}
        if len(self):
            correct = self.correct()
            low, high = self.interval(correct)
            metrics |= {"pair_accuracy": float(correct.mean()), "pair_accuracy_low": low, "pair_accuracy_high": high}
            for name, t in (("", temperature), ("raw_", 1.0)):
                confidence = self.confidence(t)
                metrics[f"{name}ece"] = float(calibration.ece(confidence, correct))
                metrics[f"{name}brier"] = float(calibration.brier(confidence, correct))
        return metrics | self.ranks()

    def correct(self) -> Tensor:
        """1 where the better answer has the higher reward, 0.5 where both have the same; [P]."""
        return (self.gaps_P.sign() + 1) / 2

    def confidence(self, temperature: float) -> Tensor:
        """The model's confidence in its own order of each pair; [P]."""
        return torch.sigmoid(self.gaps_P.abs() / temperature)

    def ranks(self) -> dict[str, float]:
        """Rank correlations of rewards and scores."""
        if len(self.scores_S) < 3 or not math.isfinite(rank := calibration.spearman(self.rewards_S, self.scores_S)):
            return {}
        both = torch.stack((self.rewards_S, self.scores_S), 1)
        low, high = calibration.bootstrap_interval(
            both, lambda drawn: calibration.spearman(drawn[:, 0], drawn[:, 1]), resamples=300
        )
        metrics = {"spearman": rank, "spearman_low": low, "spearman_high": high}
        few = slice(None, MOST_SCORED)
        return {n: v for n, v in metrics.items() if math.isfinite(v)} | {
            "kendall": calibration.kendall(self.rewards_S[few], self.scores_S[few])
        }

    def interval(self, values_P: Tensor) -> tuple[float, float]:
        """95 % bootstrap interval of the mean of a per-pair value: lists, and scored answers with their pairs."""
        generator = torch.Generator().manual_seed(0)
        lists = len(self.of_list_P)
        top = torch.zeros(RESAMPLES, dtype=torch.float64)
        bottom = torch.zeros(RESAMPLES, dtype=torch.float64)
        if lists:
            _, place = self.of_list_P.unique(return_inverse=True)
            sums = torch.zeros(int(place.max()) + 1, 2, dtype=torch.float64)
            sums.index_add_(0, place, torch.stack((values_P[:lists], torch.ones(lists, dtype=torch.float64)), 1))
            drawn = _counts(len(sums), generator).double() @ sums
            top, bottom = top + drawn[:, 0], bottom + drawn[:, 1]
        if len(self) > lists:
            documents, place = torch.cat((self.better_P[lists:], self.worse_P[lists:])).unique(return_inverse=True)
            better, worse = place.chunk(2)
            weights = _counts(len(documents), generator)
            for total, numbers in ((top, values_P[lists:]), (bottom, torch.ones(len(better)))):
                matrix = torch.zeros(len(documents), len(documents))
                matrix[better, worse] = numbers.float()
                total += ((weights @ matrix) * weights).sum(1).double()
        means = (top / bottom)[bottom > 0]
        return float(means.quantile(0.025)), float(means.quantile(0.975))

    def chosen(self, pairs_P: Tensor, scored_S: Tensor | None = None) -> "Pairs":
        """Only these pairs, and these scored answers (none by default)."""
        within = pairs_P[: len(self.of_list_P)]
        given = (self.better_P, self.worse_P, self.gaps_P, self.apart_P)
        better, worse, gaps, apart = (x[pairs_P] for x in given)
        keep = torch.zeros(len(self.scored_S), dtype=torch.bool) if scored_S is None else scored_S
        scored = tuple(x[keep] for x in (self.scored_S, self.rewards_S, self.scores_S))
        return Pairs(better, worse, self.of_list_P[within], gaps, apart, *scored)


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


def slices(examples: Examples, pairs: Pairs, temperature: float) -> list[Slice]:
    """By source, annotator and prompt of the records (pairs of equal value); by the human margin between two answers,
    the model's confidence, and the difference in length."""
    parts = []
    for by, names in (("source", _sources(examples)), ("annotator", _people(examples)), ("asked", _asked(examples))):
        values = sorted(set(names) - {""})
        if not 1 < len(values) <= MOST_VALUES:
            continue
        number = {name: i for i, name in enumerate(values)}
        of_D = torch.tensor([number.get(name, -1) for name in names])
        same = of_D[pairs.better_P] == of_D[pairs.worse_P]
        for name, i in number.items():
            part = pairs.chosen(same & (of_D[pairs.better_P] == i), of_D[pairs.scored_S] == i)
            parts.append(_slice(by, name, part, temperature))
    lengths_D = torch.tensor([float(len(sample.text)) for sample in examples.samples()])
    for by, value, chosen in _of_pairs(pairs, lengths_D):
        if int(chosen.sum()) >= LEAST:
            parts.append(_slice(by, value, pairs.chosen(chosen), temperature))
    return parts


def _slice(by: str, value: str, part: Pairs, temperature: float) -> Slice:
    metrics = part.figures(temperature) if len(part) >= LEAST else {}
    ranks = part.ranks() if len(part.scores_S) >= LEAST else {}
    return Slice(
        by,
        value,
        len(part),
        metrics.get("pair_accuracy"),
        metrics.get("pair_accuracy_low"),
        metrics.get("pair_accuracy_high"),
        float(part.confidence(temperature).mean()) if metrics else None,
        len(part.scores_S),
        ranks.get("spearman"),
        ranks.get("spearman_low"),
        ranks.get("spearman_high"),
    )


def _of_pairs(pairs: Pairs, lengths_D: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Slices by the relation of two answers: kind, value, which pairs."""
    for by, amount in (("apart", pairs.apart_P), ("sure", pairs.gaps_P.abs())):
        known = amount[~amount.isnan()]
        if len(known) and known.min() < known.max():
            few = known[:: max(1, len(known) // 100_000)]
            low, high = (float(few.quantile(share)) for share in (1 / 3, 2 / 3))
            yield by, f"below {low:.2f}", amount < low
            yield by, f"{low:.2f} to {high:.2f}", (amount >= low) & (amount < high)
            yield by, f"{high:.2f} and more", amount >= high
    better, worse = lengths_D[pairs.better_P], lengths_D[pairs.worse_P]
    like = (better - worse).abs() <= 0.1 * torch.maximum(better, worse)
    yield "length", BETTER_IS_LONGER, ~like & (better > worse)
    yield "length", "about equal", like
    yield "length", BETTER_IS_SHORTER, ~like & (better < worse)


def _sources(examples: Examples) -> list[str]:
    return [name for r, n in _sized(examples) for name in [r.where.rpartition(":")[0].rpartition("/")[2]] * n]


def _people(examples: Examples) -> list[str]:
    return [name for r, n in _sized(examples) for name in [r.annotator] * n]


def _asked(examples: Examples) -> list[str]:
    """The Instruction or first turn."""
    return [name for r, n in _sized(examples) for name in [r.prompt.turns[0].text] * n]


def _sized(examples: Examples) -> Iterator[tuple[Comparison | Score, int]]:
    """Each record with the number of its answers."""
    for i, record in enumerate(examples.records):
        yield record, examples.first[i + 1] - examples.first[i]


def _counts(size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` items is drawn, [resamples, size]."""
    drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
    return torch.zeros(RESAMPLES, size).scatter_add_(1, drawn, torch.ones(RESAMPLES, size))
