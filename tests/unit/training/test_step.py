"""The step: sums over micro-batches, clipped, refused where a number isn't finite."""

import math

import pytest
import torch
from torch import nn

import toys
from tetrad.errors import UserError
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import Loss, Metric, Microbatch, language_terms, update

PACKED = toys.packed(toys.documents(2))


class Two(nn.Module):
    """a and b, whose losses are a * data and b * data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))


def terms(model, micro):
    return [
        Loss("a", model.a * micro.data, "rows"),
        Loss("b", model.b * micro.data, "tokens", 0.5),
        Metric("shown", model.a * 100, "rows"),
    ]


def micro(data, rows, tokens):
    return Microbatch(PACKED, {"rows": rows, "tokens": tokens}, torch.tensor(data))


def step(model, micros, lr=0.0, **how):
    optimizer = Optimizer(model, lr, Optim())
    return update(model, optimizer, micros, terms, toys.CPU, **how), optimizer


def test_sums_over_the_whole_batch():
    """Each term: coefficient * sum of all parts / the count of all parts; what has coefficient 0 is only shown."""
    model = Two()
    stats, _ = step(model, [micro(3.0, 2, 10), micro(5.0, 6, 30)])
    assert stats.terms == pytest.approx({"a": 8 / 8, "b": 16 / 40, "shown": 200 / 8})
    assert stats.loss == pytest.approx(8 / 8 + 0.5 * 16 / 40)
    assert float(model.a.grad) == pytest.approx(8 / 8)
    assert float(model.b.grad) == pytest.approx(0.5 * 8 / 40)
    assert stats.grad_norm == pytest.approx(math.hypot(1, 0.1))


def test_gradients_do_not_pile_up():
    model = Two()
    for _ in range(2):
        stats, _ = step(model, [micro(3.0, 1, 1)])
        assert float(model.a.grad) == pytest.approx(3)
    assert stats.lr == 0


def test_a_term_that_nothing_counts_is_left_out():
    model = Two()
    step(model, [micro(3.0, 0, 4)], lr=0.1)
    assert model.a.grad is None
    assert float(model.a.detach()) == 1
    assert float(model.b.detach()) < 2


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping(max_norm):
    model = Two()
    stats, _ = step(model, [micro(3.0, 1, 1)], max_norm=max_norm)
    assert stats.grad_norm == pytest.approx(math.hypot(3, 1.5))  # that before clipping
    norm = math.hypot(float(model.a.grad), float(model.b.grad))
    assert norm == pytest.approx(0.5 if max_norm == 0.5 else math.hypot(3, 1.5), rel=1e-4)


def test_factor_is_a_share_of_the_learning_rate():
    moved = []
    for factor in (1.0, 0.25):
        model = Two()
        stats, _ = step(model, [micro(3.0, 1, 1)], lr=0.1, factor=factor)
        assert stats.lr == pytest.approx(0.1 * factor)
        moved.append(1 - float(model.a.detach()))
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad):
    """Nothing changes, neither weights nor optimizer, and the error names the batch's records."""
    model = Two()
    optimizer = Optimizer(model, 0.1, Optim())
    before = [p.detach().clone() for p in model.parameters()]
    named = toys.packed([toys.document([5, 6], where="sft.jsonl:3"), toys.document([5], where="sft.jsonl:9")])
    micros = [micro(1.0, 1, 1), Microbatch(named, {"rows": 1, "tokens": 1}, torch.tensor(bad))]
    with pytest.raises(UserError) as raised:
        update(model, optimizer, micros, terms, toys.CPU)
    assert raised.value.code == "E-NUM-NONFINITE"
    assert raised.value.exit_code == 5
    assert raised.value.what.endswith("The records: sft.jsonl:3, sft.jsonl:9")  # not those of the other micro-batch
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not optimizer.tensors()


def test_a_gradient_that_is_not_finite():
    """A finite loss may have one: sqrt at 0."""
    model = Two()
    optimizer = Optimizer(model, 0.1, Optim())

    def root(model, micro):
        return [Loss("root", (model.a - 1).sqrt(), "rows")]

    with pytest.raises(UserError, match="E-NUM-NONFINITE"):
        update(model, optimizer, [micro(1.0, 1, 1)], root, toys.CPU)
    assert float(model.a.detach()) == 1


def test_language_loss_is_the_mean_over_labels():
    model = toys.causal(seed=1)
    documents = toys.documents(6)
    micros = language_micros(documents, 40, toys.CPU)
    with torch.no_grad():
        nll = float(model(toys.packed(documents), "nll"))
    stats = update(model, Optimizer(model, 1e-3, Optim()), micros, language_terms, toys.CPU)
    assert stats.loss == pytest.approx(nll / sum(int(d.train.sum()) for d in documents), rel=1e-6)


def test_frozen_parameters_are_left_alone():
    model = toys.causal(seed=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    optimizer = Optimizer(model, 1e-2, Optim(weight_decay=0.1))
    update(model, optimizer, language_micros(toys.documents(3), 99, toys.CPU), language_terms, toys.CPU, max_norm=1.0)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not any("embed" in name for name in optimizer.tensors())
