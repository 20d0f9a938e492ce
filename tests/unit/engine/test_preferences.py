"""Comparisons and scores on their way to the reward model, and the pairs it is judged on."""

import math

import numpy as np
import pytest
import torch

import toys
from tetrad.data.source import Counts
from tetrad.engine.preferences import Examples, Pairs, judgements, preference_micros
from tetrad.errors import UserError
from tetrad.types import IGNORE, Comparison, Prompt, Score, Turn

PROMPT = Prompt((Turn("instruction", "say"),))
CPU = torch.device("cpu")


def listed(*ranks, margin=0.0, where=""):
    return Comparison(PROMPT, tuple(f"a{i}" for i in range(len(ranks))), ranks, margin=margin, where=where)


RECORDS = (listed(2, 1, 2), Score(PROMPT, "s", 5.0), listed(1, 1), listed(7, 3, margin=0.5), Score(PROMPT, "t", 2.0))
TOKENS = tuple(toys.document(toys.ids(3 + i, i)) for i in range(9))
EXAMPLES = Examples.of(RECORDS, TOKENS)


def test_documents_of_a_record():
    assert EXAMPLES.first == (0, 3, 4, 6, 8, 9)
    assert EXAMPLES.documents(0) == TOKENS[:3]
    assert EXAMPLES.documents(4) == TOKENS[8:]
    assert [sample.text for sample in EXAMPLES.samples()] == ["a0", "a1", "a2", "s", "a0", "a1", "a0", "a1", "t"]
    assert EXAMPLES.samples()[0].prompt == "say"


def test_judgements():
    found = judgements(RECORDS, 3.0, 2.0, CPU)
    pairs = list(zip(found.winners_P.tolist(), found.losers_P.tolist(), strict=True))
    assert pairs == [(1, 0), (1, 2), (7, 6)]
    assert found.weights_P.tolist() == [0.5, 0.5, 1.0]
    assert found.margins_P.tolist() == [0.0, 0.0, 0.5]
    assert found.ranked_N.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert found.ranks_N.tolist() == [2, 1, 2, 1, 1, 7, 3]
    assert found.bounds == (0, 3, 5, 7)
    assert found.scored_S.tolist() == [3, 8]
    assert found.targets_S.tolist() == [1.0, -0.5]


@pytest.mark.parametrize("records", [RECORDS[1:2], RECORDS[2:3], RECORDS[:1]])
def test_judgements_of_one_kind(records):
    found = judgements(records, 0.0, 1.0, CPU)
    assert len(found.winners_P) == len(found.losers_P) == len(found.weights_P) == len(found.margins_P)
    assert len(found.scored_S) == (1 if isinstance(records[0], Score) else 0)


@pytest.mark.parametrize("micro_tokens", [1, 20, 4096])
def test_micro_batches_hold_whole_records(micro_tokens):
    documents = [EXAMPLES.documents(i) for i in range(5)]
    micros = preference_micros(RECORDS, documents, micro_tokens, 3.0, 2.0, toys.CPU)
    assert len(micros) == {1: 5, 20: 4, 4096: 1}[micro_tokens]
    assert sum(micro.counts["comparisons"] for micro in micros) == 2  # a list of equals doesn't count
    assert sum(micro.counts["scores"] for micro in micros) == 2
    ids = torch.cat([micro.packed.ids_T for micro in micros])
    assert ids.tolist() == np.concatenate([t.ids for t in TOKENS]).tolist()
    assert sum(len(micro.data.winners_P) for micro in micros) == 3
    assert all((micro.packed.targets_T != IGNORE).any() for micro in micros)


def test_long_records():
    counts = Counts()
    records = (listed(1, 2, where="x:1"), Score(PROMPT, "s", 1.0, where="x:2"), listed(2, 1, where="x:3"))
    tokens = tuple(toys.document(toys.ids(n, n)) for n in (5, 9, 4, 5, 8))
    examples = Examples.of(records, tokens)
    assert examples.fitted(9, "refuse", counts).tokens[1].ids.tolist() == tokens[1].ids.tolist()
    with pytest.raises(UserError) as raised:
        examples.fitted(6, "refuse", counts)
    assert raised.value.code == "E-DATA-LONG"
    assert raised.value.where == "x:1"
    assert "2 of 3" in raised.value.what
    dropped = examples.fitted(6, "drop", counts)
    assert dropped.records == records[1:2]
    assert dropped.tokens == tokens[2:3]
    assert dropped.first == (0, 1)
    assert counts.dropped == 2
    cut = examples.fitted(6, "cut", counts)
    assert cut.records == records
    assert [len(t.ids) for t in cut.tokens] == [5, 6, 4, 5, 6]
    assert cut.tokens[1].ids.tolist() == tokens[1].ids[-6:].tolist()  # the answer's end is what the head reads
    assert counts.cut == 2
    with pytest.raises(UserError, match="E-DATA-EMPTY"):
        examples.fitted(3, "drop", counts)


def test_pairs_of_lists_and_scores():
    rewards = torch.tensor([0.1, 0.5, 0.9, 2.0, 7.0, 8.0, 1.0, 4.0, 1.5])
    pairs = Pairs.of(EXAMPLES, rewards, 1.0)
    assert pairs.gaps_P.tolist() == pytest.approx([0.4, -0.4, 3.0, 0.5])
    assert len(pairs.groups_P.unique()) == 3  # two lists and a pair of scores
    figures = pairs.figures(1.0)
    assert figures["pairs"] == 4
    assert figures["pair_accuracy"] == 0.75
    assert figures["pair_accuracy_low"] <= 0.75 <= figures["pair_accuracy_high"]
    assert "spearman" not in figures  # of two scores it says nothing
    assert len(Pairs.of(EXAMPLES, rewards, 4.0).gaps_P) == 3  # the scores are 3 apart


def test_figures_of_scores():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    examples = Examples.of([Score(PROMPT, "", v) for v in values], TOKENS[:5])
    good, bad, blind = (
        Pairs.of(examples, torch.tensor(r), 0.0).figures(1.0)
        for r in ([0.1, 0.2, 0.3, 0.4, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0], [1.0] * 5)
    )
    assert (good["spearman"], good["pair_accuracy"], good["pairs"]) == (pytest.approx(1), 1.0, 10.0)
    assert (bad["spearman"], bad["pair_accuracy"]) == (pytest.approx(-1), 0.0)
    assert "spearman" not in blind  # undefined, and not a number
    assert blind["pair_accuracy"] == 0.5
    assert all(math.isfinite(value) for found in (good, bad, blind) for value in found.values())


def test_temperature_makes_confidence_honest():
    """Gaps ten times too large: the fitted temperature is about ten, and the calibration error falls."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(2000, generator=generator, dtype=torch.float64) * 1.5
    right = torch.rand(2000, generator=generator) < torch.sigmoid(gaps.abs())
    shown = torch.where(right, gaps.abs(), -gaps.abs()) * 10
    pairs = Pairs(shown, torch.arange(2000), torch.empty(0), torch.empty(0))
    temperature = pairs.temperature()
    assert 8 < temperature < 12.5
    assert pairs.figures(temperature)["ece"] < 0.03 < pairs.figures(1.0)["ece"]


def test_no_pairs():
    pairs = Pairs.of(Examples.of([Score(PROMPT, "", 1.0)], TOKENS[:1]), torch.tensor([0.3]), 0.0)
    assert pairs.temperature() == 1
    assert pairs.figures(1.0) == {"pairs": 0.0}
