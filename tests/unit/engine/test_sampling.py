"""One uniform number to one token: the right shares, the right log-probabilities, nothing that was filtered."""

import numpy as np
import pytest
import torch

from tetrad.engine.sampling import draw
from tetrad.settings.common import Sampling

LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0])


def shares(sampling, logits=LOGITS, n=20_000):
    """How often each token comes for evenly spread numbers; and the log-probabilities said."""
    uniforms = (torch.arange(n) + 0.5) / n
    ids, logprobs = draw(logits.expand(n, -1), uniforms, sampling)
    said = {int(i): float(p) for i, p in zip(ids, logprobs, strict=True)}
    return torch.bincount(ids, minlength=len(logits)).double() / n, said


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_the_softmax(temperature):
    found, said = shares(Sampling(temperature=temperature))
    expected = (LOGITS.double() / temperature).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    for token, logprob in said.items():
        assert logprob == pytest.approx(float(expected[token].log()), abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.0}, [1]),
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),
    ],
    ids=str,
)
def test_filters(sampling, kept):
    """Shares among what is kept; log-probabilities are those before the filter."""
    found, said = shares(Sampling(**sampling))
    chances = LOGITS.double().softmax(-1)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = chances[kept] / chances[kept].sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    for token, logprob in said.items():
        assert logprob == pytest.approx(float(chances[token].log()), abs=1e-5)


def test_greedy():
    logits = torch.tensor([[1.0, 5.0, 5.0], [9.0, 0.0, 1.0]])
    ids, logprobs = draw(logits, torch.tensor([0.9, 0.9]), Sampling(temperature=0.0))
    assert ids.tolist() == [1, 0]  # the first of equals
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_extreme_numbers_never_draw_what_cannot_be():
    """0 and the largest float32 below 1, where tokens of no chance lie first and last."""
    edge = [0.0, float(np.float32(1) - np.float32(2**-24))]
    for seed in range(200):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
        logits[[0, 49]] = -torch.inf
        ids, logprobs = draw(logits.expand(2, -1), torch.tensor(edge), Sampling())
        assert 0 < int(ids.min()) <= int(ids.max()) < 49
        assert torch.isfinite(logprobs).all()
        top = logits.argmax()
        ids, _ = draw(logits.expand(2, -1), torch.tensor(edge), Sampling(top_k=1))
        assert ids.tolist() == [int(top)] * 2


def test_half_precision_logits_are_taken_in_float32():
    logits = LOGITS.expand(100, -1)
    uniforms = torch.arange(100) / 100
    ids, logprobs = draw(logits.bfloat16(), uniforms, Sampling(temperature=0.7))
    expected = draw(logits.bfloat16().float(), uniforms, Sampling(temperature=0.7))
    assert torch.equal(ids, expected[0])
    assert torch.equal(logprobs, expected[1])


def test_rows_are_on_their_own():
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.6)):
        together = draw(logits, uniforms, sampling)[0]
        alone = torch.cat([draw(logits[i : i + 1], uniforms[i : i + 1], sampling)[0] for i in range(40)])
        assert torch.equal(together, alone)
