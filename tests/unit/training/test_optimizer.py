"""AdamW, Muon, schedules, and state that a checkpoint can hold."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import toys
from tetrad.errors import UserError
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer, lr_factor, orthogonalised
from tetrad.training.step import language_terms, update

MICROS = language_micros(toys.documents(6), 99, toys.CPU)


def train(model, optimizer, steps):
    for _ in range(steps):
        update(model, optimizer, MICROS, language_terms, toys.CPU)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_adamw_by_the_formula():
    """Loshchilov and Hutter 2019, algorithm 2; decay on matrices alone."""
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model, 0.1, Optim(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.2))
    w, b = (p.detach().clone() for p in (model.weight, model.bias))
    state = [torch.zeros_like(x) for x in (w, w, b, b)]
    for t in range(1, 4):
        model.weight.grad, model.bias.grad = torch.full_like(w, 0.3 * t), torch.full_like(b, -0.5)
        for x, m, v, gradient, decay in ((w, *state[:2], model.weight.grad, 0.2), (b, *state[2:], model.bias.grad, 0)):
            m.mul_(0.8).add_(0.2 * gradient)
            v.mul_(0.9).add_(0.1 * gradient**2)
            x.mul_(1 - 0.05 * decay)
            x.sub_(0.05 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3))
        optimizer.step(0.5)
    torch.testing.assert_close(model.weight.detach(), w)
    torch.testing.assert_close(model.bias.detach(), b)


@pytest.mark.parametrize("shape", [(20, 20), (10, 30), (30, 10)])
def test_orthogonalised(shape):
    """Singular values come near 1, singular vectors stay."""
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalised(matrix)
    values = torch.linalg.svdvals(out[0])
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    inside = u.T @ out[0] @ v.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-3
    assert float(torch.linalg.svdvals(orthogonalised(matrix * 1000)[0]).max()) == pytest.approx(float(values.max()))


def test_muon_steps_by_its_learning_rate():
    """Nesterov momentum, orthogonalised, scaled by the root of rows / columns where taller."""
    model = toys.causal(seed=1)
    optimizer = Optimizer(model, 1e-3, Optim(muon_momentum=0.9, weight_decay=0.1), muon_lr=0.02)
    up, down = model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.down_proj.weight
    before = [p.detach().clone() for p in (up, down)]
    update(model, optimizer, MICROS, language_terms, toys.CPU)
    for p, old, scale in ((up, before[0], (48 / 32) ** 0.5), (down, before[1], 1.0)):
        ahead = p.grad.lerp(0.1 * p.grad, 0.9)
        expected = old * (1 - 0.02 * 0.1) - 0.02 * scale * orthogonalised(ahead[None])[0]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_muon_takes_the_matrices_of_the_blocks():
    model = toys.causal(seed=1, tied=False)
    optimizer = Optimizer(model, 1e-3, Optim(), muon_lr=0.02)
    train(model, optimizer, 1)
    muon = {key.rpartition("/")[0] for key in optimizer.tensors() if key.endswith("/momentum")}
    assert muon == {n for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}
    adam = {key.rpartition("/")[0] for key in optimizer.tensors() if key.endswith("/exp_avg")}
    assert adam == set(dict(model.named_parameters())) - muon


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_state_goes_on_exactly(muon_lr):
    """Three steps, a checkpoint, three more: bit for bit the same as six."""
    whole, part, taken_up = (toys.causal(seed=1) for _ in range(3))
    how = {"settings": Optim(weight_decay=0.1), "muon_lr": muon_lr}
    train(whole, Optimizer(whole, 1e-3, **how), 6)
    first = Optimizer(part, 1e-3, **how)
    train(part, first, 3)
    taken_up.load_state_dict(part.state_dict())
    second = Optimizer(taken_up, 1e-3, **how)
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    train(taken_up, second, 3)
    assert torch.equal(weights(taken_up), weights(whole))
    fresh = toys.causal(seed=1)
    fresh.load_state_dict(part.state_dict())
    train(fresh, Optimizer(fresh, 1e-3, **how), 3)
    assert not torch.equal(weights(fresh), weights(whole))


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_size_of_the_state(muon_lr):
    model = toys.causal(seed=1)
    optimizer = Optimizer(model, 1e-3, Optim(), muon_lr=muon_lr)
    expected = optimizer.full_bytes()
    train(model, optimizer, 1)
    held = sum(t.nbytes for name, t in optimizer.tensors().items() if not name.endswith("/step"))
    assert held == expected


def test_state_of_another_model():
    optimizer = Optimizer(toys.causal(), 1e-3, Optim())
    with pytest.raises(UserError, match="E-CKPT-KEYS"):
        optimizer.load_tensors({"model.layers.9.mlp.up_proj.weight/exp_avg": torch.zeros(48, 32)})


def test_schedules():
    for name in ("linear", "cosine", "constant"):
        factors = [lr_factor(step, 100, 0.1, name) for step in range(100)]
        assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert factors[10] == 1
        assert all(a >= b for a, b in pairwise(factors[9:]))
        assert all(factor > 0 for factor in factors)
    assert lr_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert lr_factor(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert lr_factor(99, 100, 0.1, "constant") == 1
    assert [lr_factor(step, 4, 0.0, "linear") for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert lr_factor(0, 1, 0.05, "linear") == 1
    assert lr_factor(0, 1, 1.0, "linear") == 1


def test_release_leaves_nothing_of_a_weight_but_the_weight():
    model = toys.causal()
    optimizer = Optimizer(model, 1e-2, Optim(), muon_lr=1e-2)
    train(model, optimizer, 1)
    before = weights(model)
    assert optimizer.tensors() and any(p.grad is not None for p in model.parameters())
    optimizer.release()
    assert not optimizer.tensors() and all(p.grad is None for p in model.parameters())
    assert torch.equal(weights(model), before)
