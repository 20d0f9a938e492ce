"""Padded tokens behind a pack, where oneDNN trains: zeros to the end, and nothing that is read or learned knows of
them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import toys
from tetrad.data.pack import common_prefix, pack_groups
from tetrad.inference.engine import Engine
from tetrad.inference.fused_model import Fused
from tetrad.kernels import onednn
from tetrad.kernels.onednn import padded
from tetrad.model import transformer
from tetrad.model.attention import packed_attention, plan_for
from tetrad.types import Packed

CPU = torch.device("cpu")
FAMILIES = {
    "biased": {"family": "qwen2"},
    "plain": {"family": "llama"},
    "normed heads": {"family": "qwen3", "head_dim": 6},
}


@pytest.fixture(autouse=True)
def trains_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AVX-512."""
    monkeypatch.setattr(onednn, "_IN_TRAINING", True)


def plain() -> Packed:
    return toys.packed(toys.documents(10))


def shared() -> Packed:
    groups = [[toys.document([*toys.ids(21, n), *toys.ids(3 + i, 10 * n + i)], 21) for i in range(3)] for n in range(3)]
    return toys.CPU.put(pack_groups(groups, [common_prefix(group) for group in groups]))


@contextmanager
def unpadded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "padded_training", lambda rows, place: rows)
        yield


def learned(model: nn.Module, packed: Packed, want: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What is read, and the gradients of its weighed sum."""
    model.zero_grad()
    out = model(packed, want)
    numbers = torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])
    (numbers * torch.linspace(-1, 2, len(numbers), dtype=numbers.dtype)).sum().backward()
    return numbers.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [plain(), shared()], ids=["plain", "shared"])
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_numbers_and_gradients_are_those_without_padding(
    changes: dict[str, object], packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert padded(len(packed.ids_T), CPU) > len(packed.ids_T)
    for model, wants in ((toys.causal(**changes), ("nll", "logprobs", "logits")), (toys.scalar(**changes), ("both",))):
        for want in wants:
            numbers, gradients = learned(model.double(), packed, want)
            with unpadded(monkeypatch):
                expected, expected_gradients = learned(model, packed, want)
            torch.testing.assert_close(numbers, expected, rtol=1e-6, atol=1e-6)
            assert gradients.keys() == expected_gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("packed", [plain(), shared()], ids=["plain", "shared"])
def test_padding_is_zero_in_both_directions_and_poison_stays_in_it(packed: Packed) -> None:
    """Hidden states of padding are zeros, and so are the gradients that reach them; whatever stands there instead
    changes no number and no gradient."""
    tokens, model = len(packed.ids_T), toys.causal()
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.extend((given[0], out))
        out.register_hook(lambda grad: seen.append(grad))

    handles = [layer.register_forward_hook(look) for layer in model.model.layers]
    numbers, gradients = learned(model, packed, "nll")
    assert len(seen) == 6
    for x in seen:
        assert len(x) == padded(tokens, CPU)
        assert not x[tokens:].any()
        assert x[:tokens].any(1).all() or x.grad_fn is None
    for handle in handles:
        handle.remove()
    poison = torch.zeros(padded(tokens, CPU), 1)
    poison[tokens:] = 1000.0
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, given, out: out + poison)
    poisoned, gradients_poisoned = learned(model, packed, "nll")
    assert torch.equal(poisoned, numbers)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_poisoned[name]), name
    poison[tokens:] = torch.nan
    assert torch.equal(model(packed, "nll").detach(), numbers.squeeze())


def test_attention_reads_no_padding_and_gives_zeros_there() -> None:
    bounds = (0, 5, 6, 14)
    plan, given = plan_for(bounds, CPU), [torch.randn(20, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    for x in given:
        x[14:] = torch.nan
    real = [x[:14].clone().requires_grad_() for x in given]
    whole = [x.requires_grad_() for x in given]
    slope = torch.randn(20, 4, 4, dtype=torch.float64)
    ours, expected = packed_attention(*whole, plan), packed_attention(*real, plan)
    assert torch.equal(ours[:14], expected) and not ours[14:].any()
    slope[14:] = torch.nan
    for a, b in zip(
        torch.autograd.grad(ours, whole, slope), torch.autograd.grad(expected, real, slope[:14]), strict=True
    ):
        assert torch.equal(a[:14], b) and not a[14:].any()


def test_prompts_leave_nothing_in_the_cache_beyond_their_own() -> None:
    model = toys.causal()
    engine = Engine(Fused(model, torch.float32), toys.CPU, 3, 32)
    for number, length in enumerate((5, 9, 3)):
        engine.add(toys.request(toys.ids(length, number), number, max_new_tokens=4))
    engine.advance()
    assert engine.prefilled == 17
    filled = engine.cache.kv.any(-1).any(3).all(0).all(0)  # [slots, positions]
    assert filled.sum(1).tolist() == [5, 9, 3, 0]
