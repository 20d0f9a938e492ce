import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from tetrad.objectives import calibration


def test_ece_is_the_weighted_gap_of_bins():
    confidence, correct = torch.tensor([0.95, 0.85, 0.55, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    # bin 9: two right, 1.95 said; bin 8: none right, 0.85 said; bin 5: one right, 0.55 said
    assert float(calibration.ece(confidence, correct, 10)) == pytest.approx((0.05 + 0.85 + 0.45) / 4)
    assert float(calibration.ece(torch.full((4,), 0.75), torch.tensor([1, 1, 1, 0]))) == pytest.approx(0, abs=1e-7)
    for bad in (torch.tensor([]), torch.tensor([1.2]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="confidences"):
            calibration.ece(bad, torch.zeros(len(bad)))


def test_brier():
    assert float(calibration.brier(torch.tensor([1.0, 0.5]), torch.tensor([1, 0]))) == 0.125
    with pytest.raises(ValueError, match="no values"):
        calibration.brier(torch.tensor([]), torch.tensor([]))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature):
    logits = torch.linspace(-3, 3, 41, dtype=torch.float64)
    found = calibration.fit_temperature(logits, torch.sigmoid(logits / temperature))
    assert found == pytest.approx(temperature, rel=1e-9)


def test_the_fitted_temperature_is_the_best():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, generator=generator)
    labels = (torch.rand(200, generator=generator) < torch.sigmoid(logits / 3)).float()
    best = calibration.fit_temperature(logits, labels)

    def loss(t: float) -> float:
        return float(binary_cross_entropy_with_logits(logits.double() / t, labels.double()))

    assert 2 < best < 5
    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01), loss(1.0))


def test_without_a_minimum_an_end_of_the_range_is_given():
    ones = torch.ones(5)
    assert calibration.fit_temperature(ones, ones) == pytest.approx(0.01, rel=1e-6)
    assert calibration.fit_temperature(ones, 0 * ones) == pytest.approx(100, rel=1e-6)
    assert calibration.fit_temperature(0 * ones, ones) == pytest.approx(100, rel=1e-6)
    for bad in (ones[:0], ones * float("nan")):
        with pytest.raises(ValueError, match="finite"):
            calibration.fit_temperature(bad, bad)


def test_spearman():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert calibration.spearman(x, x.exp()) == pytest.approx(1)
    assert calibration.spearman(x, -x) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert calibration.spearman(torch.tensor([1.0, 5.0, 5.0, 9.0]), x) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(calibration.spearman(x, torch.ones(4)))


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for seed in range(40):
        low, high = calibration.bootstrap_interval(torch.randn(60, generator=generator), resamples=200, seed=seed)
        hits += low < 0 < high
    assert 33 <= hits <= 40


def test_the_interval_repeats_by_seed_and_takes_any_statistic():
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))

    def correlation(rows: torch.Tensor) -> float:
        return calibration.spearman(rows[:, 0], rows[:, 1])

    first, again, other = (
        calibration.bootstrap_interval(values, correlation, resamples=50, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] < correlation(values) < first[1]
    with pytest.raises(ValueError, match="no values"):
        calibration.bootstrap_interval(values[:0])


def test_the_interval_of_the_mean_is_that_of_means_taken_one_by_one(monkeypatch):
    values = torch.randn(70, generator=torch.Generator().manual_seed(0))
    expected = calibration.bootstrap_interval(values, lambda rows: rows.mean())
    assert calibration.bootstrap_interval(values) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(calibration, "MOST_DRAWN", 200)  # draws do not depend on how many are made at a time
    assert calibration.bootstrap_interval(values) == pytest.approx(expected, abs=1e-12)


def test_kendall_counts_pairs():
    x = torch.tensor([1.0, 2, 3, 4])
    assert calibration.kendall(x, torch.tensor([1.0, 3, 2, 4])) == pytest.approx(4 / 6)
    assert calibration.kendall(x, -x) == pytest.approx(-1)
    # By hand: 3 pairs in one order, 1 in the other; 5 and 5 of 6 untied.
    tied_x, tied_y = torch.tensor([1.0, 1, 2, 3]), torch.tensor([1.0, 2, 2, 0])
    untied = [(i, j) for i in range(4) for j in range(i)]
    signs = [float(torch.sign(tied_x[i] - tied_x[j]) * torch.sign(tied_y[i] - tied_y[j])) for i, j in untied]
    assert calibration.kendall(tied_x, tied_y) == pytest.approx(sum(signs) / 5)
    assert math.isnan(calibration.kendall(x, torch.ones(4)))
