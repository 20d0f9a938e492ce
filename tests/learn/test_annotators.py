"""Planted annotators: three of ten give 30 to 50 % of their comparisons the wrong way round. The reward model loses at
most a third of what plain Bradley-Terry loses, names the three, and finds what they flipped."""

import numpy as np
import pytest
import torch

import toys
from tetrad.reward.annotators import LR, AnnotatorReport, Annotators, annotator_report, ids_of_annotators
from tetrad.reward.batches import preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.reward.model import score_sequences
from tetrad.settings.common import Optim
from tetrad.settings.reward import Reward
from tetrad.train.reward import preference_terms
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import update
from tetrad.types import Comparison, Prompt, Score, Tokens, Turn

pytestmark = pytest.mark.learn

NAMES = [f"a{i}" for i in range(10)]
FLIPS = {"a2": 0.3, "a5": 0.4, "a8": 0.5}
COUNT, BATCH = 8000, 40
PROMPT = Prompt((Turn("user", "w5"),))


class Planted:
    """Pairs of random answers; the truth prefers the one with more of the tokens 10 to 19. clean: as it should be said;
    said: with the flips; flipped: which."""

    def __init__(self, seed: int = 0, count: int = COUNT) -> None:
        draw = np.random.default_rng(seed)
        self.documents: list[tuple[Tokens, Tokens]] = []
        self.clean: list[Comparison] = []
        self.said: list[Comparison] = []
        self.flipped: list[bool] = []
        while len(self.clean) < count:
            answers = draw.integers(3, 40, (2, 12))
            good = ((answers >= 10) & (answers < 20)).sum(1)
            if good[0] == good[1]:
                continue
            name, number = str(draw.choice(NAMES)), len(self.clean)
            best = int(good.argmax())
            flip = bool(draw.random() < FLIPS.get(name, 0.0))
            self.documents.append((toys.document(answers[0].tolist()), toys.document(answers[1].tolist())))
            self.clean.append(comparison(best, name, number))
            self.said.append(comparison(best ^ flip, name, number))
            self.flipped.append(flip)


def comparison(best: int, name: str, number: int) -> Comparison:
    return Comparison(PROMPT, ("x", "y"), (1.0 + best, 2.0 - best), name, where=f"f:{number}")


def trained(records: list[Comparison], planted: Planted, annotators: bool) -> Latent:
    """One epoch from one start."""
    numbers = ids_of_annotators(records) if annotators else {}
    latent = Latent(toys.scalar(seed=1), False, Annotators(records, numbers) if annotators else None)
    optimizer = Optimizer(latent, 3e-3, Optim(), lr_overrides={"annotators.": LR})
    terms = preference_terms(Reward())
    steps = len(records) // BATCH
    for step in range(steps):
        rows = range(step * BATCH, (step + 1) * BATCH)
        chosen = [records[i] for i in rows], [planted.documents[i] for i in rows]
        micros = preference_micros(*chosen, 4096, 0.0, 1.0, toys.CPU, numbers)
        update(latent, optimizer, micros, terms, toys.CPU, factor=1 - step / steps, max_norm=1.0)
    return latent


def rewards(latent: Latent, planted: Planted) -> torch.Tensor:
    return torch.tensor(
        score_sequences(latent.reward, [t for pair in planted.documents for t in pair], toys.CPU, 10_000)
    )


def accuracy(latent: Latent) -> float:
    """On pairs that nobody trained on, against the truth."""
    test = Planted(seed=9, count=2000)
    r = rewards(latent, test).view(-1, 2)
    best = torch.tensor([record.ranks[1] == 1.0 for record in test.clean])
    return float(((r[:, 1] > r[:, 0]) == best).double().mean())


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def modelled(planted: Planted) -> Latent:
    return trained(planted.said, planted, annotators=True)


@pytest.fixture(scope="module")
def report(planted: Planted, modelled: Latent) -> AnnotatorReport:
    return annotator_report(planted.said, rewards(modelled, planted), ids_of_annotators(planted.said))


def test_it_loses_a_third_of_what_plain_bradley_terry_loses(planted: Planted, modelled: Latent) -> None:
    """Over two draws of the data; with few records even those of the seven alone lose more than that."""
    lost = []
    for data, ours in ((planted, modelled), (Planted(seed=1), None)):
        clean, plain = (accuracy(trained(records, data, annotators=False)) for records in (data.clean, data.said))
        lost.append((clean - plain, clean - accuracy(ours or trained(data.said, data, annotators=True))))
    plain_loses, ours_loses = (sum(part) / 2 for part in zip(*lost, strict=True))
    print(f"plain loses {plain_loses:.4f}, modelled {ours_loses:.4f}")
    assert plain_loses > 0.01
    assert ours_loses <= plain_loses / 3


def test_the_three_are_named_and_reliability_is_right(report: AnnotatorReport) -> None:
    reliabilities = report.annotators
    print([(r.annotator, round(r.right, 3), round(r.low, 3), round(r.high, 3)) for r in reliabilities])
    assert {r.annotator for r in reliabilities[:3]} == set(FLIPS)
    for r in reliabilities:
        assert r.right == pytest.approx(1 - FLIPS.get(r.annotator, 0.0), abs=0.1)
        assert r.low <= r.right <= r.high and r.comparisons > 200


def test_what_they_flipped_is_found(planted: Planted, report: AnnotatorReport) -> None:
    suspects = {int(s.where.removeprefix("f:")) for s in report.suspects}
    flipped = {number for number, flip in enumerate(planted.flipped) if flip}
    precision, recall = len(suspects & flipped) / len(suspects), len(suspects & flipped) / len(flipped)
    print(f"precision {precision:.3f} recall {recall:.3f} of {len(flipped)}")
    assert precision >= 0.7 and recall >= 0.6


def test_each_ones_scale_of_scores_is_learned() -> None:
    """One scores a point higher than the others, one uses half the scale."""
    draw, names = np.random.default_rng(3), ["high", "low", "plain", "flat"]
    offsets, gains = {"high": 0.8, "low": -0.8}, {"flat": 0.5}
    documents, records = [], []
    for number in range(3000):
        answer = draw.integers(3, 40, 12)
        good = float(((answer >= 10) & (answer < 20)).sum()) / 1.6 - 2.0
        name = names[number % 4]
        value = offsets.get(name, 0.0) + gains.get(name, 1.0) * good + 0.2 * float(draw.normal())
        documents.append((toys.document(answer.tolist()),))
        records.append(Score(PROMPT, "x", value, name))
    numbers = ids_of_annotators(records)
    latent = Latent(toys.scalar(seed=1), False, Annotators(records, numbers))
    optimizer = Optimizer(latent, 3e-3, Optim(), lr_overrides={"annotators.": LR})
    for step in range(75):
        rows = slice(step * 40, step * 40 + 40)
        micros = preference_micros(records[rows], documents[rows], 4096, 0.0, 1.0, toys.CPU, numbers)
        update(latent, optimizer, micros, preference_terms(Reward()), toys.CPU, factor=1 - step / 75, max_norm=1.0)
    assert latent.annotators is not None
    offset = {name: float(latent.annotators.offset[i].detach()) for name, i in numbers.items()}
    gain = {name: float(latent.annotators.log_gain[i].detach().exp()) for name, i in numbers.items()}
    assert offset["high"] - offset["plain"] == pytest.approx(0.8, abs=0.2)
    assert offset["plain"] - offset["low"] == pytest.approx(0.8, abs=0.2)
    assert gain["flat"] / gain["plain"] == pytest.approx(0.5, abs=0.15)
