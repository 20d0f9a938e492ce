"""On one process every collective is an identity (two processes: tests/dist)."""

import torch
from torch import nn

import toys
from tetrad.engine import mesh


def test_one_process():
    mesh.start("cpu")  # nothing to join
    assert (mesh.rank(), mesh.size(), mesh.is_main()) == (0, 1, True)
    assert list(mesh.share([5, 6, 7])) == [5, 6, 7]
    assert mesh.gather((5, 6, 7)) == [5, 6, 7]
    assert mesh.sum_counts({"a": 2.0}) == {"a": 2.0}
    assert mesh.on_any(True)
    assert not mesh.on_any(False)
    tensor = torch.tensor([1.0, 2.0])
    assert torch.equal(mesh.sum_tensor(tensor), torch.tensor([1.0, 2.0]))
    mesh.wait()
    mesh.stop()


def test_weights_and_gradients_stay():
    model = toys.causal(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mesh.same_weights(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    mesh.sum_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))
