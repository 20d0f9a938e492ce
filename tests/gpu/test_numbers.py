"""What a GPU computes is what a CPU does: to rounding in float32, within bfloat16's in bfloat16."""

from typing import Any

import pytest
import torch

import toys
from gpu.place import KIND, device, needs_gpu
from tetrad.data.pack import pack
from tetrad.inference.engine import generate
from tetrad.model.transformer import CausalLM, narrowed
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update

pytestmark = needs_gpu
SHAPES: list[dict[str, Any]] = [{}, {"family": "llama", "tied": False}, {"family": "qwen3"}, {"kv_heads": 4}]
SIZES = {"hidden_size": 64, "heads": 4, "head_dim": 16}
NEAR = {"float32": 1e-4, "bfloat16": 3e-2}  # on average, of log-probabilities; and of gradients' norms


def near(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    """A single number may be further off, by five times."""
    apart = (found.detach().cpu() - expected.detach().cpu()).abs()
    assert float(apart.mean()) <= NEAR[dtype]
    assert float(apart.max()) <= 5 * NEAR[dtype]


def models(make: Any, **changes: Any) -> tuple[Any, Any]:
    """The same one on the CPU and on the GPU."""
    return tuple(make(seed=1, **SIZES, **changes).to(place) for place in ("cpu", device().torch_device))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_log_probabilities(changes: dict[str, Any], dtype: str) -> None:
    ours, theirs = models(toys.causal, **changes)
    place, documents = device(dtype), toys.documents(9)
    expected = ours(toys.packed(documents), "logprobs")
    with place.compute():
        found = theirs(place.put(pack(documents)), "logprobs")
    for a, b in zip(found, expected, strict=True):
        near(a, b, dtype)


@pytest.mark.parametrize("dtype", NEAR)
def test_scalars(dtype: str) -> None:
    ours, theirs = models(toys.scalar)
    place, documents = device(dtype), toys.documents(9)
    with place.compute():
        found = theirs(place.put(pack(documents)), "both")
    assert found.dtype == torch.float32
    near(found, ours(toys.packed(documents), "both"), dtype)


@pytest.mark.parametrize("want", ["nll", "logprobs"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", NEAR)
def test_gradients(dtype: str, recompute: bool, want: str) -> None:
    """With dropout, whose masks are functions of keys on every device."""
    place, documents, found = device(dtype, recompute=recompute), toys.documents(9), []
    keys = torch.arange(sum(len(d.ids) for d in documents)) * 7919
    for model, where in zip(models(toys.causal), (toys.CPU, place), strict=True):
        model.train().model.dropout = 0.2
        packed = where.put(pack(documents))
        packed = type(packed)(**{**fields(packed), "keys_T": keys.to(where.torch_device)})
        with where.compute():
            out = model(packed, want)
        (out if want == "nll" else out[0].sum() + out[1].sum()).backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) <= NEAR[dtype]


def fields(packed: Any) -> dict[str, Any]:
    return {name: getattr(packed, name) for name in packed.__slots__}


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
@pytest.mark.parametrize("dtype", NEAR)
def test_losses_fall_alike(dtype: str, muon_lr: float) -> None:
    """Twenty steps of training; Muon orthogonalises in bfloat16 on a GPU."""
    losses = []
    for model, place in zip(models(toys.causal), (toys.CPU, device(dtype)), strict=True):
        optimizer = Optimizer(model, 3e-3, Optim(), muon_lr=muon_lr)
        micros = language_micros(toys.documents(9), 64, place)
        losses.append([update(model, optimizer, micros, language_terms, place).loss for _ in range(20)])
    expected, found = losses
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=3e-2 if dtype == "bfloat16" or muon_lr else 1e-4)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_greedy_replies(changes: dict[str, Any]) -> None:
    """In float32 the same ids; twice the same."""
    ours, theirs = models(toys.causal, **changes)
    requests = [toys.request(toys.ids(1 + i % 5, i), i, temperature=0.0, max_new_tokens=12) for i in range(9)]
    expected = generate(ours, requests, toys.CPU, 4)
    place = device("float32")
    first, second = (generate(theirs, requests, place, 4) for _ in range(2))
    assert [r.ids for r in first] == [r.ids for r in second] == [r.ids for r in expected]


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.7}, {"min_p": 0.1}], ids=str)
def test_sampled_log_probabilities_are_the_models(sampling: dict[str, float]) -> None:
    """The sampler's, from captured steps in bfloat16, beside the training forward's; and again with a kept engine."""
    _, model = models(toys.causal)
    place = device()
    requests = [toys.request(toys.ids(3 + i % 5, i), i, max_new_tokens=12, **sampling) for i in range(9)]
    fresh = generate(model, requests, place, 4)
    kept = [generate(model, requests, place, 4, keep=True) for _ in range(2)]
    assert kept[0] == kept[1]
    assert [r.ids for r in kept[0]] == [r.ids for r in fresh]
    documents = [toys.document([*q.ids, *r.ids], len(q.ids)) for q, r in zip(requests, fresh, strict=True)]
    with torch.no_grad(), place.compute():
        read, _ = model(place.put(pack(documents)), "logprobs", sampling.get("temperature", 1.0))
    said = torch.tensor([p for r in fresh for p in r.logprobs])
    near(said, read, "bfloat16")


def test_deterministic_top_p() -> None:
    _, model = models(toys.causal)
    requests = [toys.request(toys.ids(3, i), i, max_new_tokens=8, top_p=0.8) for i in range(5)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (generate(model, requests, device(), 4) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


def test_frozen_matrices_in_16_bit_are_the_same_numbers() -> None:
    place, found = device(), []
    for narrow in (False, True):
        model: CausalLM = models(toys.causal)[1].requires_grad_(False)
        if narrow:
            narrowed(model, torch.bfloat16)
        with place.compute():
            found.append(model(place.put(pack(toys.documents(9))), "logprobs")[0])
    assert torch.equal(*found)


@pytest.mark.skipif(KIND == "cpu", reason="a CPU is never waited for")
def test_an_update_waits_three_times() -> None:
    """For the losses, for the gradients' norm, and for the optimizer's nothing: torch reports each wait."""
    _, model = models(toys.causal)
    place, optimizer = device(), Optimizer(model, 1e-3, Optim())
    micros = language_micros(toys.documents(20), 64, place)
    update(model, optimizer, micros, language_terms, place)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            update(model, optimizer, micros, language_terms, place)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 3
