"""On one process every collective is an identity (two processes: tests/dist)."""

import torch
from torch import nn

import toys
from tetrad.distributed import collectives


def test_one_process():
    collectives.start("cpu")  # nothing to join
    assert (collectives.rank(), collectives.size(), collectives.is_main()) == (0, 1, True)
    assert list(collectives.shard([5, 6, 7])) == [5, 6, 7]
    assert collectives.gather((5, 6, 7)) == [5, 6, 7]
    assert collectives.sum_counts({"a": 2.0}) == {"a": 2.0}
    assert collectives.any_rank(True)
    assert not collectives.any_rank(False)
    tensor = torch.tensor([1.0, 2.0])
    assert torch.equal(collectives.sum_tensor(tensor), torch.tensor([1.0, 2.0]))
    collectives.barrier()
    collectives.stop()


def test_weights_and_gradients_stay():
    model = toys.causal(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    collectives.same_weights(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    collectives.GradientSum(layer.parameters()).finish()
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))
