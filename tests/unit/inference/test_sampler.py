"""One uniform number to one token: the right shares, the right log-probabilities, nothing that was filtered."""

import numpy as np
import pytest
import torch

from fake_cuda import CUDA, fake_cuda
from tetrad.inference import sampler as module
from tetrad.inference.sampler import Sampled, SamplingBatch, pick
from tetrad.inference.sampler import sample as sample_by
from tetrad.settings.common import Sampling

LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0])


def draw(logits, uniforms, *rows: Sampling, biases=None, **rest) -> Sampled:
    """One rule for all rows, or one each."""
    rows = rows * len(logits) if len(rows) == 1 else rows
    batch = SamplingBatch.of(rows, biases or [{}] * len(rows), logits.shape[-1], torch.device("cpu"))
    return sample_by(logits, uniforms, batch, **rest)


def shares(sampling, logits=LOGITS, n=20_000):
    """How often each token comes for evenly spread numbers; and the log-probabilities said."""
    uniforms = (torch.arange(n) + 0.5) / n
    drawn = draw(logits.expand(n, -1), uniforms, sampling)
    ids, logprobs = drawn.ids, drawn.logprobs
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
    drawn = draw(logits, torch.tensor([0.9, 0.9]), Sampling(temperature=0.0))
    assert drawn.ids.tolist() == [1, 0]  # the first of equals
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_extreme_numbers_never_draw_what_cannot_be():
    """0 and the largest float32 below 1, where tokens of no chance lie first and last."""
    edge = [0.0, float(np.float32(1) - np.float32(2**-24))]
    for seed in range(200):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
        logits[[0, 49]] = -torch.inf
        for how in (Sampling(), Sampling(top_p=0.9), Sampling(min_p=0.01), Sampling(top_k=40)):
            drawn = draw(logits.expand(2, -1), torch.tensor(edge), how)
            assert 0 < int(drawn.ids.min()) <= int(drawn.ids.max()) < 49
            assert torch.isfinite(drawn.logprobs).all()
        ids = draw(logits.expand(2, -1), torch.tensor(edge), Sampling(top_k=1)).ids
        assert ids.tolist() == [int(logits.argmax())] * 2


def test_half_precision_logits_are_taken_in_float32():
    logits = LOGITS.expand(100, -1)
    uniforms = torch.arange(100) / 100
    found = draw(logits.bfloat16(), uniforms, Sampling(temperature=0.7))
    expected = draw(logits.bfloat16().float(), uniforms, Sampling(temperature=0.7))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logprobs, expected.logprobs)


MANY = (
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(top_k=3),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(temperature=1.7, top_k=5, top_p=0.8, min_p=0.05),
    Sampling(temperature=0.3),
)


@pytest.mark.parametrize("rows", [(how,) for how in MANY] + [MANY], ids=str)
def test_rows_are_on_their_own(rows):
    """Alone and together, and whatever the others ask for."""
    logits = torch.randn(7 * 40, 99, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(7 * 40, generator=torch.Generator().manual_seed(1))
    every = [rows[i % len(rows)] for i in range(len(logits))]
    together = draw(logits, uniforms, *every)
    for i, how in enumerate(every):
        alone = draw(logits[i : i + 1], uniforms[i : i + 1], how)
        assert int(alone.ids) == int(together.ids[i])
        assert float(alone.logprobs) == pytest.approx(float(together.logprobs[i]), abs=1e-6)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 4096, 8192, 8193, 50_000])
def test_pick_finds_every_place(size):
    """The middle of each token's share leads to that token, and tokens without a weight have no share."""
    weights = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.5
    weights[::3] = 0 if size > 1 else 1
    ends = weights.cumsum(0)
    chosen = weights.nonzero()[:, 0][:: max(1, size // 200)]
    middles = (ends[chosen] - weights[chosen] / 2) / ends[-1]
    found = pick(weights.float().expand(len(chosen), -1), middles.float())
    assert torch.equal(found, chosen)


def test_pick_takes_any_total():
    weights = torch.tensor([[0.0, 3.0, 1.0]])
    for scale in (1e-30, 1.0, 1e30):
        assert [int(pick(weights * scale, torch.tensor([u]))) for u in (0.0, 0.74, 0.76)] == [1, 1, 2]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999, 0.9999])
def test_top_p_looks_at_few_tokens_first(share, monkeypatch):
    """What it keeps does not depend on how many that are."""
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(20, generator=torch.Generator().manual_seed(1))
    rows = [Sampling(top_p=share, top_k=(0, 7)[i % 2]) for i in range(20)]
    whole = draw(logits, uniforms, *rows).ids
    for first in (1, 8, 299):
        monkeypatch.setattr(module._least, "__defaults__", (first,))
        assert torch.equal(draw(logits, uniforms, *rows).ids, whole)


def test_tokens_of_one_chance_stay_or_go_together():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    for how in (Sampling(top_k=2), Sampling(top_p=0.6), Sampling(top_k=4)):
        found, _ = shares(how, logits)
        assert found[1] == pytest.approx(float(found[2]), abs=1e-3) and found[2] > 0 and found[4] == 0


def test_likeliest_tokens_are_told():
    uniforms = torch.tensor([0.1, 0.9])
    ids, logprobs = draw(LOGITS.expand(2, -1), uniforms, Sampling(temperature=2.0, top_k=1), top=3).top
    assert ids.tolist() == [[1, 3, 0]] * 2
    torch.testing.assert_close(logprobs[0], (LOGITS / 2).log_softmax(-1)[[1, 3, 0]])
    assert draw(LOGITS.expand(2, -1), uniforms, Sampling(), top=99).top[0].shape == (2, 5)
    assert draw(LOGITS.expand(2, -1), uniforms, Sampling()).top is None


def test_penalties_and_biases():
    """By hand: repetition first, then presence once and frequency each time, then the bias."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 1.0]] * 3)
    how = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.1)
    rows = [how, Sampling(temperature=0.5, top_k=3, top_p=0.1, min_p=0.2), Sampling(frequency_penalty=-1.0)]
    said = [(how, [0, 1], [3, 3, 1]), (rows[1], [0], [1]), (rows[2], [0], [2, 2])]
    batch = SamplingBatch.of(rows, [{4: -7.0, 3: 1.0}, {}, {}], 5, torch.device("cpu"))
    assert batch.penalised == (0, 2)
    found = module._adjusted(logits, batch, said)
    expected = [2.0 / 2, -1.0 * 2 - 0.25 - 0.1, 0.5, 3.0 / 2 + 1.0 - 0.25 - 0.2, 1.0 - 7.0]
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert torch.equal(found[1], logits[1])
    torch.testing.assert_close(found[2], torch.tensor([2.0, -1.0, 2.5, 3.0, 1.0]))
    assert logits[0, 0] == 2.0  # its own are left alone
    assert module._adjusted(logits, SamplingBatch.of(rows[1:2] * 3, [{}] * 3, 5, torch.device("cpu")), said) is None


def test_a_penalised_row_takes_another_token():
    said = [(Sampling(temperature=0.0, presence_penalty=2.5), [0], [1])]
    found = draw(LOGITS[None], torch.tensor([0.5]), said[0][0], histories=said)
    assert found.ids.tolist() == [3]
    torch.testing.assert_close(found.logprobs, LOGITS.log_softmax(-1)[[3]])


def test_a_bias_chooses_and_the_models_own_chance_is_told():
    """A bias that forces a token of no chance: it is drawn, and its log-probability is finite and the model's."""
    logits = torch.tensor([[0.0, 200.0, 1.0]])
    for how in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=1)):
        drawn = draw(logits, torch.tensor([0.5]), how, biases=[{0: 400.0}])
        assert drawn.ids.tolist() == [0]
        assert float(drawn.logprobs) == pytest.approx(-200.0, rel=1e-5)
    hot = draw(logits, torch.tensor([0.5]), Sampling(temperature=2.0), biases=[{0: 400.0}])
    assert float(hot.logprobs) == pytest.approx(-100.0, rel=1e-5)


def test_deterministic_sums_on_a_gpu_are_of_whole_numbers(monkeypatch):
    """CUDA has no deterministic running sum of floats: with top-p the step would end with an error."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    settings = Sampling(top_p=0.9, temperature=0.7, top_k=7)
    with fake_cuda() as calls:
        column = torch.empty(3, 1, device=CUDA)
        batch = SamplingBatch(None, column, column.long(), column, None, False, settings.top_k, None, ())
        drawn = sample_by(torch.empty(3, 500, device=CUDA), torch.empty(3, device=CUDA), batch)
    assert drawn.ids.is_cuda
    summed = [given[0].dtype for given, _ in calls.named("cumsum")]
    assert len(summed) == 2 and set(summed) == {torch.int64}


def test_exact_sums_are_the_sums():
    """To 2^-40 of the total; what is 0 adds nothing, not even by rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 3000, generator=generator).pow(9) * torch.rand(50, 1, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.5] = 0
    sums = module._exact(weights.double())
    expected = weights.cumsum(-1, dtype=torch.float64)
    assert ((sums - expected).abs() <= 2**-40 * expected[:, -1:]).all()
    steps = sums.diff(dim=-1)
    assert (steps >= 0).all() and (steps[weights[:, 1:] == 0] == 0).all()
    assert (steps[weights[:, 1:] > 1e-9] > 0).all()
