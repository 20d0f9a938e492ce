"""How good a reward model is: pairs, figures, slices, intervals."""

import math

import pytest
import torch

import toys
from tetrad.reward import evaluation
from tetrad.reward.batches import Examples
from tetrad.reward.evaluation import Pairs, slices
from tetrad.reward.metrics import PairMetrics
from tetrad.types import Comparison, Prompt, Score, Turn

PROMPT = Prompt((Turn("instruction", "say"),))


def listed(*ranks, margin=0.0, where="", annotator=""):
    texts = tuple(f"a{i}" for i in range(len(ranks)))
    return Comparison(PROMPT, texts, ranks, annotator, margin, where)


RECORDS = (listed(2, 1, 2), Score(PROMPT, "s", 5.0), listed(1, 1), listed(7, 3, margin=0.5), Score(PROMPT, "t", 2.0))
TOKENS = tuple(toys.document(toys.ids(3 + i, i)) for i in range(9))
EXAMPLES = Examples.of(RECORDS, TOKENS)


def test_pairs_of_lists_and_scores():
    rewards = torch.tensor([0.1, 0.5, 0.9, 2.0, 7.0, 8.0, 1.0, 4.0, 1.5])
    pairs = Pairs.of(EXAMPLES, rewards, 1.0)
    assert pairs.gaps_P.tolist() == pytest.approx([0.4, -0.4, 3.0, 0.5])
    assert pairs.lists_P.tolist() == [0, 0, 2]  # and a pair of scores
    metrics = pairs.metrics(1.0)
    assert metrics.pairs == 4
    assert metrics.pair_accuracy == 0.75
    assert metrics.pair_accuracy_low <= 0.75 <= metrics.pair_accuracy_high
    assert metrics.spearman is None  # of two scores it says nothing
    assert len(Pairs.of(EXAMPLES, rewards, 4.0).gaps_P) == 3  # the scores are 3 apart


def test_more_scores_than_one_block_form_the_same_pairs():
    scores = [float(i * 37 % 101) for i in range(evaluation.BLOCK + 40)]
    examples = Examples.of([Score(PROMPT, "", x) for x in scores], [TOKENS[0]] * len(scores))
    pairs = Pairs.of(examples, torch.arange(len(scores)), 90.0)
    numbers = range(len(scores))
    expected = [(i, j) for i in numbers for j in numbers if scores[i] - scores[j] >= 90]
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == expected
    assert pairs.gaps_P.tolist() == [i - j for i, j in expected]


def test_figures_of_scores():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    examples = Examples.of([Score(PROMPT, "", v) for v in values], TOKENS[:5])
    good, bad, blind = (
        Pairs.of(examples, torch.tensor(r), 0.0).metrics(1.0)
        for r in ([0.1, 0.2, 0.3, 0.4, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0], [1.0] * 5)
    )
    assert (good.spearman, good.pair_accuracy, good.pairs) == (pytest.approx(1), 1.0, 10.0)
    assert (bad.spearman, bad.pair_accuracy) == (pytest.approx(-1), 0.0)
    assert blind.spearman is None  # undefined, and not a number
    assert blind.pair_accuracy == 0.5
    values = [value for found in (good, bad, blind) for value in vars(found).values() if value is not None]
    assert all(map(math.isfinite, values))


def of_gaps(gaps):
    """Pairs of lists of two."""
    n, none = torch.arange(len(gaps)), torch.empty(0)
    return Pairs(2 * n, 2 * n + 1, n, gaps, torch.full_like(gaps, math.nan), none.long(), none, none)


def test_temperature_makes_confidence_honest():
    """Gaps ten times too large: the fitted temperature is about ten, and the calibration error falls."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(2000, generator=generator, dtype=torch.float64) * 1.5
    right = torch.rand(2000, generator=generator) < torch.sigmoid(gaps.abs())
    shown = torch.where(right, gaps.abs(), -gaps.abs()) * 10
    pairs = of_gaps(shown)
    temperature = pairs.temperature()
    assert 8 < temperature < 12.5
    metrics = pairs.metrics(temperature)
    assert metrics.ece < 0.03 < metrics.raw_ece
    assert metrics.brier < metrics.raw_brier


def test_no_pairs():
    pairs = Pairs.of(Examples.of([Score(PROMPT, "", 1.0)], TOKENS[:1]), torch.tensor([0.3]), 0.0)
    assert pairs.temperature() == 1
    assert pairs.metrics(1.0) == PairMetrics(temperature=1.0, pairs=0.0)


def test_intervals_draw_answers_not_pairs():
    """300 scored answers make 44,850 pairs, and the interval is that of 300 things: as wide as over fresh draws."""

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(300, generator=generator, dtype=torch.float64)
        rewards = truth + 1.5 * torch.randn(300, generator=generator, dtype=torch.float64)
        examples = Examples.of([Score(PROMPT, "", float(v)) for v in truth], [TOKENS[0]] * 300)
        return Pairs.of(examples, rewards, 0.0)

    metrics = drawn(0).metrics(1.0)
    width = metrics.pair_accuracy_high - metrics.pair_accuracy_low
    spread = torch.stack([drawn(seed).correct().mean() for seed in range(200)]).std()
    assert width == pytest.approx(2 * 1.96 * float(spread), rel=0.25)


def test_intervals_of_lists_draw_lists():
    """Ten lists whose pairs are all right or all wrong: as uncertain as ten coins."""
    gaps = torch.ones(60, dtype=torch.float64)
    gaps[:30] = -1.0
    lists = torch.arange(60) // 6
    pairs = of_gaps(gaps)
    pairs = Pairs(pairs.better_P, pairs.worse_P, lists, gaps, pairs.margins_P, *[torch.empty(0)] * 3)
    low, high = pairs.interval(pairs.correct())
    assert low == pytest.approx(0.2, abs=0.1) and high == pytest.approx(0.8, abs=0.1)


def test_slices():
    generator = torch.Generator().manual_seed(1)
    records, rewards = [], []
    for i in range(200):
        kind, person, score = ("film", "book")[i % 2], ("ann", "bob")[i // 2 % 2], float(i % 7)
        prompt = Prompt((Turn("instruction", kind),))
        records.append(Score(prompt, "x" * (1 + i % 50), score, person, f"d/{kind}s.jsonl:{i}"))
        noise = 0.1 if kind == "film" else 5.0
        rewards.append(score + noise * float(torch.randn((), generator=generator)))
    examples = Examples.of(records, [TOKENS[0]] * 200)
    pairs = Pairs.of(examples, torch.tensor(rewards), 1.0)
    found = {(part.by, part.value): part for part in slices(examples, pairs, 1.0)}
    film, book = found["source", "films.jsonl"], found["source", "books.jsonl"]
    assert film.scored == book.scored == 100
    assert film.accuracy is not None and book.accuracy is not None and film.accuracy > 0.99 > 0.8 > book.accuracy
    assert film.spearman is not None and film.spearman > 0.95
    assert book.spearman_low < book.spearman < book.spearman_high
    assert found["asked", "film"].pairs == film.pairs < len(pairs) / 2
    assert {value for by, value in found if by == "annotator"} == {"ann", "bob"}
    apart = [part for (by, _), part in found.items() if by == "apart"]
    assert sum(part.pairs for part in apart) == len(pairs)
    assert apart[0].accuracy < apart[-1].accuracy  # people far apart are easier to follow
    sure = [part for (by, _), part in found.items() if by == "sure"]
    assert sure[0].confidence < sure[-1].confidence and sure[0].accuracy < sure[-1].accuracy
    lengths = [part for (by, _), part in found.items() if by == "length"]
    assert sum(part.pairs for part in lengths) == len(pairs)


def test_one_source_is_no_slice():
    examples = Examples.of([Score(PROMPT, "x", float(i), where=f"a:{i}") for i in range(40)], [TOKENS[0]] * 40)
    pairs = Pairs.of(examples, torch.arange(40.0), 0.0)
    assert {part.by for part in slices(examples, pairs, 1.0)} == {"apart", "sure", "length"}


def test_the_worse_answers_are_drawn_too():
    """A hundred good answers against two bad ones, right about one and wrong about the other: hardly known at all."""
    records = [*(Score(PROMPT, "", 10.0) for _ in range(100)), Score(PROMPT, "", 0.0), Score(PROMPT, "", 0.0)]
    rewards = torch.tensor([*[0.0] * 100, -1.0, 1.0])
    metrics = Pairs.of(Examples.of(records, [TOKENS[0]] * 102), rewards, 1.0).metrics(1.0)
    assert metrics.pair_accuracy == 0.5
    assert metrics.pair_accuracy_low < 0.2 and metrics.pair_accuracy_high > 0.8


def test_the_reliability_diagram():
    """A bin holds pairs of like confidence, each at its mean, with the share in order; small bins are left out."""
    near, far = math.log(0.62 / 0.38), math.log(0.93 / 0.07)  # how sure: 0.62 and 0.93
    gaps = torch.tensor([near] * 60 + [-near] * 40 + [far] * 90 + [-far] * 10 + [9.0] * 5, dtype=torch.float64)
    low, high = of_gaps(gaps).reliability(1.0)
    assert (low["confidence"], low["accuracy"], low["pairs"]) == (pytest.approx(0.62), pytest.approx(0.6), 100.0)
    assert (high["confidence"], high["accuracy"], high["pairs"]) == (pytest.approx(0.93), pytest.approx(0.9), 100.0)
    assert low["low"] < 0.6 < low["high"] < high["low"] < 0.9 < high["high"]
    honest = of_gaps(gaps).reliability(2.0)
    assert honest[-1]["confidence"] < 0.93  # at another temperature


def test_the_most_wrong_and_the_most_right_pairs():
    pairs = of_gaps(torch.tensor([0.5, -2.0, 3.0, -0.1, 1.0]))
    assert pairs.extremes(2) == [1, 3, 2, 4]
    assert of_gaps(torch.tensor([1.0])).extremes() == [0]
