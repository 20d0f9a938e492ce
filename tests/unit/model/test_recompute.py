"""Activation checkpointing: the same numbers from less memory."""

import dataclasses

import pytest
import torch

from tetrad.data.pack import pack
from tetrad.distributed.device import Device, choose
from tetrad.settings.common import Run
from toys import CPU, causal, documents, scalar


def gradients(model, packed, want):
    out = model(packed, want)
    sum(x.square().sum() for x in out).backward() if isinstance(out, tuple) else out.sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "want"), [(causal, "nll"), (causal, "logprobs"), (scalar, "both")])
def test_digits_are_equal(make, want, dtype):
    """With dropout of both kinds: masks are functions of the tokens' keys, so that they come out again."""
    keys = torch.arange(30, dtype=torch.int64) * 7919
    found = []
    for recompute in (False, True):
        device, model = Device(torch.device("cpu"), dtype, recompute), make(seed=2)
        model.model.dropout, model.model.token_dropout = 0.3, 0.1
        packed = dataclasses.replace(device.put(pack(documents(4))), keys_T=keys)
        with device.compute():
            found.append(gradients(model.train(), packed, want))
    plain, again = found
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_computed_twice(recompute):
    """Once more in the backward, and only where there is one."""
    model, times = causal(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: times.append(1))
    packed = dataclasses.replace(CPU, recompute=recompute).put(pack(documents(4)))
    with torch.no_grad():
        model(packed)
    assert len(times) == 2
    model(packed).backward()
    assert len(times) == 4 + 2 * recompute


def test_less_is_kept():
    """Of what is saved for the backward only what enters the blocks is left, and the head's."""
    sizes = []
    for recompute in (False, True):
        packed = dataclasses.replace(CPU, recompute=recompute).put(pack(documents(40)))
        model, kept = causal(layers=6), {}

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.nbytes
            return x

        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(packed)
        sizes.append(sum(size for place, size in kept.items() if place not in weights))
        loss.backward()
    assert sizes[1] < 0.2 * sizes[0]


def test_the_recipe_decides():
    assert choose(Run(device="cpu", activation_checkpointing=True)).recompute
    assert not choose(Run(device="cpu")).recompute
