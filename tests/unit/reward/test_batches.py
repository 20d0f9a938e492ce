"""Comparisons and scores on their way to the reward model."""

import numpy as np
import pytest
import torch

import toys
from tetrad.data.pack import LEAST_SAVED, LEAST_SHARE, prefix_pays
from tetrad.data.source import Counts
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.reward.batches import Examples, judgements, preference_micros
from tetrad.types import IGNORE, Comparison, Prefix, Prompt, Score, Turn

PROMPT = Prompt((Turn("instruction", "say"),))


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
    found = judgements(RECORDS, 3.0, 2.0)
    pairs = list(zip(found.winners_P.tolist(), found.losers_P.tolist(), strict=True))
    assert pairs == [(1, 0), (1, 2), (7, 6)]
    assert found.weights_P.tolist() == [0.5, 0.5, 1.0]
    assert found.margins_P.tolist() == [0.0, 0.0, 0.5]
    assert found.ranked_N.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert found.ranks_N.tolist() == [2, 1, 2, 1, 1, 7, 3]
    assert found.bounds == (0, 3, 5, 7)
    assert found.scored_S.tolist() == [3, 8]
    assert found.targets_S.tolist() == [1.0, -0.5]


def test_votes_are_soft_labels_and_spread_lowers_weight():
    voted = Comparison(PROMPT, ("a", "b", "c"), (1.0, 2.0, 2.0), votes=(6.0, 2.0, 2.0))
    records = (voted, listed(1, 2), Score(PROMPT, "s", 5.0, spread=2.0), Score(PROMPT, "t", 1.0))
    found = judgements(records, 3.0, 2.0)
    assert found.labels_P.tolist() == [0.75, 0.75, 1.0]
    assert found.weights_S.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("records", [RECORDS[1:2], RECORDS[2:3], RECORDS[:1]])
def test_judgements_of_one_kind(records):
    found = judgements(records)
    assert len(found.winners_P) == len(found.losers_P) == len(found.weights_P) == len(found.margins_P)
    assert len(found.scored_S) == (1 if isinstance(records[0], Score) else 0)


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 4096])
def test_micro_batches_hold_whole_records(micro_batch_tokens):
    documents = [EXAMPLES.documents(i) for i in range(5)]
    micros = preference_micros(RECORDS, documents, micro_batch_tokens, 3.0, 2.0, toys.CPU)
    assert len(micros) == {1: 5, 20: 4, 4096: 1}[micro_batch_tokens]
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
    cut = examples.fitted(6, "truncate", counts)
    assert cut.records == records
    assert [len(t.ids) for t in cut.tokens] == [5, 6, 4, 5, 6]
    assert cut.tokens[1].ids.tolist() == tokens[1].ids[-6:].tolist()  # the answer's end is what the head reads
    assert counts.cut == 2
    with pytest.raises(UserError, match="E-DATA-EMPTY"):
        examples.fitted(3, "drop", counts)


PROMPTS = [toys.ids(n, n) for n in (12, 30, 2, 5, 9)]  # of each record
ANSWERED = [
    [toys.document([*prompt, *toys.ids(3 + j, 50 * i + j)], len(prompt)) for j in range(n)]
    for i, (prompt, n) in enumerate(zip(PROMPTS, (3, 1, 2, 2, 1), strict=True))
]


def shared(setting, micro_batch_tokens=4096, device=toys.CPU):
    return preference_micros(RECORDS, ANSWERED, micro_batch_tokens, 3.0, 2.0, device, shared_prefix=setting)


def test_a_prompt_is_shared_where_that_pays():
    """24 tokens of the first record are saved; the pairs would save 2 and 5."""
    (never,), (auto,), (always,) = shared("never"), shared("auto"), shared("always")
    assert never.packed.prefixes == ()
    assert auto.packed.prefixes == (Prefix(0, 12, 2),)
    assert always.packed.prefixes == (Prefix(0, 12, 2), Prefix(4, 2, 5), Prefix(6, 5, 7))
    assert [len(never.packed.ids_T) - len(micro.packed.ids_T) for micro in (auto, always)] == [24, 31]
    model = toys.scalar(seed=1)
    for micro in (auto, always):
        torch.testing.assert_close(model(micro.packed), model(never.packed))
        assert micro.counts == never.counts
        assert torch.equal(micro.data.winners_P, never.data.winners_P)


def test_what_is_shared_counts_once_in_a_micro_batch():
    """The first record has 48 tokens, or 24; with the second, of 33, it fits into 57."""
    assert [len(micro.packed.bounds) - 1 for micro in shared("never", 57)] == [3, 3, 3]
    assert [len(micro.packed.bounds) - 1 for micro in shared("auto", 57)] == [4, 5]


def test_nothing_is_shared_on_a_gpu():
    elsewhere = Device(torch.device("meta"), torch.float32)
    assert all(not micro.packed.prefixes for micro in shared("always", device=elsewhere))


def test_the_rule_counts_what_is_saved():
    """Some tokens, and a share of all, however they are spread."""
    assert [prefix_pays(prefix, [20, 30]) for prefix in (0, LEAST_SAVED - 1, LEAST_SAVED)] == [False, False, True]
    assert prefix_pays(LEAST_SAVED // 4, [LEAST_SAVED] * 5)
    limit = int(LEAST_SHARE * 600)
    assert [prefix_pays(prefix, [500, 100]) for prefix in (limit - 1, limit)] == [False, True]
    assert not prefix_pays(1000, [2000])
