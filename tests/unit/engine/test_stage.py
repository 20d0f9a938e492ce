"""A model as a part of a checkpoint."""

import pytest
import torch

import toys
from tetrad.engine.stage import Weights
from tetrad.errors import UserError


def test_weights_come_back() -> None:
    one, other = toys.causal(seed=1), toys.causal(seed=2)
    Weights(other).load_tensors({name: t.clone() for name, t in Weights(one).tensors().items()})
    for name, tensor in Weights(one).tensors().items():
        assert torch.equal(tensor, Weights(other).tensors()[name])
    assert Weights(one).full_bytes() == sum(p.nbytes for p in one.parameters())


def test_foreign_weights_are_refused() -> None:
    weights = Weights(toys.causal(seed=1))
    tensors = dict(weights.tensors())
    name, tensor = tensors.popitem()
    with pytest.raises(UserError) as missing:
        weights.load_tensors(tensors)
    assert missing.value.code == "E-CKPT-KEYS" and name in missing.value.what
    with pytest.raises(UserError) as misshapen:
        weights.load_tensors({**tensors, name: tensor[:1] if tensor.dim() > 1 else tensor[:-1]})
    assert misshapen.value.code == "E-CKPT-SHAPE" and name in misshapen.value.what
