"""Annotators: their numbers, what they change in a loss, what their priors add up to, and what is told of them."""

import math
from dataclasses import asdict

import pytest
import torch

import toys
from tetrad.reward.annotators import START, Annotators, annotator_report, ids_of_annotators
from tetrad.reward.batches import judgements, preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.settings.reward import Reward
from tetrad.train.reward import preference_terms
from tetrad.types import Comparison, Prompt, Score, Turn

PROMPT = Prompt((Turn("user", "w5"),))


def pair(name: str, best: int = 0, margin: float = 0.0, where: str = "") -> Comparison:
    return Comparison(PROMPT, ("x", "y"), (1.0 + best, 2.0 - best), name, margin, where)


def score(name: str, value: float) -> Score:
    return Score(PROMPT, "x", value, name)


RECORDS = [pair("b"), pair("a", 1), pair(""), score("a", 2.0), score("c", 1.0), pair("b", 1), pair("b", margin=0.5)]
NUMBERS = {"a": 1, "b": 2, "c": 3}
DOCUMENTS = [
    tuple(toys.document(toys.ids(4 + j, 10 * i + j)) for j in range(1 if isinstance(r, Score) else 2))
    for i, r in enumerate(RECORDS)
]


def planted() -> Annotators:
    found = Annotators(RECORDS, NUMBERS)
    with torch.no_grad():
        found.common.fill_(-0.2)
        found.own.copy_(torch.tensor([9.0, 0.5, -1.0, 2.0]))
        found.offset.copy_(torch.tensor([9.0, 0.3, 0.0, -0.4]))
        found.log_gain.copy_(torch.tensor([9.0, 0.2, 0.0, -0.1]))
    return found


def terms_of(s: Reward, annotators: Annotators | None, numbers=NUMBERS) -> dict[str, float]:
    latent = Latent(toys.scalar(seed=1), False, annotators)
    (micro,) = preference_micros(RECORDS, DOCUMENTS, 4096, 1.5, 0.5, toys.CPU, numbers)
    return {term.name: float(term.sum.detach()) for term in preference_terms(s)(latent, micro)}


def test_numbers():
    assert ids_of_annotators(RECORDS) == NUMBERS
    assert ids_of_annotators([pair(""), score("", 1.0)]) == {}
    found = judgements(RECORDS, annotator_ids=NUMBERS)
    assert found.annotators_L.tolist() == [2, 1, 0, 2, 2] == found.annotators_L[found.lists_P].tolist()
    assert found.annotators_S.tolist() == [1, 3]
    assert judgements(RECORDS).annotators_L.tolist() == [0] * 5


def test_only_what_records_need_is_learned():
    needs = {name: p.requires_grad for name, p in Annotators([pair("a")], {"a": 1}).named_parameters()}
    assert needs == {"common": True, "own": True, "offset": False, "log_gain": False}
    needs = {name: p.requires_grad for name, p in Annotators([score("a", 1.0), pair("")], {"a": 1}).named_parameters()}
    assert needs == {"common": False, "own": False, "offset": True, "log_gain": True}


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
def test_losses_are_the_formula(loss):
    """c sigmoid(d) + (1 - c) sigmoid(-d) with each one's c; a score against b + k r; a nameless record has the common c
    and the plain scale."""
    found = terms_of(Reward(comparison_loss=loss), planted())
    latent = Latent(toys.scalar(seed=1), False)
    (micro,) = preference_micros(RECORDS, DOCUMENTS, 4096, 1.5, 0.5, toys.CPU)
    r = latent.reward(micro.packed, "scores").detach().double().tolist()
    logits = {"": START - 0.2, "a": START + 0.3, "b": START - 1.2}
    expected, place, errors = 0.0, 0, 0.0
    for record in RECORDS:
        if isinstance(record, Score):
            b, k = {"a": (0.3, math.exp(0.2)), "c": (-0.4, math.exp(-0.1))}[record.annotator]
            errors += (b + k * r[place] - (record.score - 1.5) / 0.5) ** 2
            place += 1
            continue
        first = record.ranks[0] < record.ranks[1]
        d = (r[place] - r[place + 1]) * (1 if first else -1) - (record.margin if loss == "pairs" else 0.0)
        c = 1 / (1 + math.exp(-logits[record.annotator]))
        expected -= math.log(c / (1 + math.exp(-d)) + (1 - c) / (1 + math.exp(d)))
        place += 2
    assert found["comparison_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["score_loss"] == pytest.approx(errors, rel=1e-5)


def test_without_annotators_nothing_changes():
    plain = terms_of(Reward(), None)
    assert set(plain) == {"comparison_loss", "score_loss", "center_loss"}
    sure = Annotators(RECORDS, NUMBERS)
    with torch.no_grad():
        sure.common.fill_(40.0)
    for name, value in terms_of(Reward(), sure).items():
        assert value == pytest.approx(plain.get(name, 0.0), rel=1e-5)


def test_priors_add_up_to_one_an_annotator():
    found = terms_of(Reward(), planted())
    assert found["annotator_prior"] == pytest.approx((0.5**2 + 1.0**2) / (2 * 1.5**2), rel=1e-5)
    offsets, gains = (0.3**2 + 0.4**2) / (2 * 0.5**2), (0.2**2 + 0.1**2) / (2 * 0.3**2)
    assert found["scale_prior"] == pytest.approx(offsets + gains, rel=1e-5)


def test_what_is_told():
    """One who is right as often as the rewards say, one who is always wrong, one who said too little to know."""
    records = [pair("good", where="f:1")] * 40 + [pair("bad", 1, where="f:2")] * 40 + [pair("new", 1, where="f:3")]
    rewards = torch.tensor([3.0, -3.0]).repeat(81)
    report = annotator_report(records, rewards, ids_of_annotators(records))
    reliabilities, suspects = report.annotators, report.suspects
    names = [r.annotator for r in reliabilities]
    assert names[0] == "bad" and names[-1] == "good" and reliabilities[0].right < 0.1 < 0.9 < reliabilities[-1].right
    new = reliabilities[1]
    assert new.comparisons == 1 and new.high - new.low > 0.5 and all(r.low <= r.right <= r.high for r in reliabilities)
    assert {s.annotator for s in suspects} >= {"bad"} and all(s.annotator != "good" for s in suspects)
    assert suspects[0].chance > 0.99 and suspects[0].where in ("f:2", "f:3")
    told = asdict(report)
    assert told["annotators"][0]["annotator"] == "bad" and told["suspects"][0]["chance"] == suspects[0].chance
    assert asdict(annotator_report(records, rewards, {})) == {"annotators": (), "suspects": ()}
