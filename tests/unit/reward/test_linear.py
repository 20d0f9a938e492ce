"""The linear baseline is ridge regression: the weights are those of its normal equations."""

import pytest
import torch

from tetrad.reward import linear
from tetrad.reward.batches import Examples
from tetrad.types import Comparison, Prompt, Score, Turn

PROMPT = Prompt((Turn("instruction", "Say."), Turn("input", "the film")))


def test_the_weights_solve_the_normal_equations() -> None:
    """Of two scores, in their standard deviations, and of a list of three, whose three pairs weigh as one score."""
    records = [
        Score(PROMPT, "warm and kind", 2.0),
        Comparison(PROMPT, ("dull", "warm, warm", "好看"), (3.0, 1.0, 2.0)),
        Score(PROMPT, "slow", -1.0),
    ]
    fitted = linear.fit(records)
    samples = Examples.of(records, ()).samples()
    x = linear._tfidf(map(linear._counts, samples), fitted.terms, fitted.idf).to_dense()
    assert torch.linalg.vector_norm(x, dim=1) == pytest.approx([1.0] * 5)
    rows = torch.stack((x[0], x[4], x[2] - x[1], x[2] - x[3], x[3] - x[1]))
    targets, weights = torch.tensor([1.0, -1, 1, 1, 1]).double(), torch.tensor([1.0, 1, 1 / 3, 1 / 3, 1 / 3]).double()
    normal = rows.T @ (weights[:, None] * rows) + linear.PENALTY * torch.eye(len(fitted.terms), dtype=torch.float64)
    expected = torch.linalg.solve(normal, rows.T @ (weights * targets))
    torch.testing.assert_close(fitted.weights, expected, rtol=1e-4, atol=1e-4)
    assert fitted(samples) == pytest.approx((x @ expected).tolist(), abs=1e-3)
    assert {"好", "看", "好 看", "warm warm"} <= set(fitted.terms)
