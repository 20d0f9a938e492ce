"""Adapters: nothing at the start, the base's own tensors beneath, what is merged and what is read back."""

import json

import pytest
import torch

import toys
from tetrad.errors import UserError
from tetrad.inference.engine import generate
from tetrad.inference.fused_model import Fused
from tetrad.model.bases import CONFIG
from tetrad.model.lora import (
    ALL,
    ATTENTION,
    adapter_files,
    adapter_tensors,
    add_adapters,
    has_adapters,
    load_adapters,
    merged,
    share_weights,
)
from tetrad.model.transformer import CausalLM, ScalarModel, initial_head

FAMILIES = ["qwen2", "qwen3", "llama"]


def filled(model: torch.nn.Module, seed: int = 0) -> None:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.1, generator=generator)


def on(base: CausalLM, targets: tuple[str, ...] = ALL, rank: int = 3) -> CausalLM:
    model = share_weights(CausalLM, base)
    add_adapters(model, rank, 6.0, targets, seed=1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_begins_as_the_base_exactly_and_owns_nothing_of_it(family):
    base = toys.causal(seed=1, family=family).requires_grad_(False)
    model, packed = on(base), toys.packed(toys.documents(5))
    assert torch.equal(model(packed, "logits"), base(packed, "logits"))
    own = dict(model.named_parameters())
    for name, tensor in base.named_parameters():
        assert own[name] is tensor
    learned = [name for name, p in own.items() if p.requires_grad]
    assert len(learned) == 2 * 7 * base.config.layers
    assert all("adapter" in name for name in learned)


def test_targets():
    model = on(toys.causal(seed=1), ATTENTION)
    names = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(ATTENTION)


@pytest.mark.parametrize(("model", "heads"), [(toys.causal(1, tied=False), set()), (toys.scalar(1), {"score.weight"})])
def test_of_a_model_that_learned_all_before_only_adapters_and_a_scalar_head_learn(model, heads):
    add_adapters(model, 3, 6.0, ALL, seed=1)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learned if "adapter" not in name} == heads  # an untied lm_head is in no adapter's file


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_same_function_and_leaves_the_base_alone(family):
    base = toys.causal(seed=1, family=family).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model, packed = on(base), toys.packed(toys.documents(5))
    filled(model)
    plain = merged(model)
    assert not has_adapters(plain)
    assert merged(plain) is plain
    expected = model(packed, "logits")
    assert (expected - base(packed, "logits")).abs().max() > 0.05
    torch.testing.assert_close(plain(packed, "logits"), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.named_parameters())


def test_gradients_reach_the_adapters_alone():
    base = toys.causal(seed=1).requires_grad_(False)
    model = on(base)
    filled(model)
    model(toys.packed(toys.documents(5)), "nll").backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("adapter" in name), name


def test_sampling_reads_the_adapters():
    base = toys.causal(seed=1).requires_grad_(False)
    model = on(base)
    filled(model)
    requests = [toys.request([3, 4, 5 + i], number=i, max_new_tokens=12) for i in range(4)]
    ours, plain = (generate(m, requests, toys.CPU, 4) for m in (model, merged(model)))
    assert [reply.ids for reply in ours] == [reply.ids for reply in plain]
    assert [reply.ids for reply in generate(Fused(base, torch.float32), requests, toys.CPU, 4)] != [r.ids for r in ours]


def test_read_back_onto_the_same_base():
    base = toys.causal(seed=1).requires_grad_(False)
    model = share_weights(ScalarModel, base)
    model.score.weight = torch.nn.Parameter(initial_head(32, 3))
    model.bias = torch.tensor(0.25)
    add_adapters(model, 3, 6.0, ALL, seed=1)
    filled(model)
    told = json.loads(b"".join([adapter_files(model, ("base", None), {"reward_bias": 0.25}, {})[CONFIG]]))
    assert (told["r"], told["lora_alpha"], told["task_type"]) == (3, 6.0, "SEQ_CLS")
    again = share_weights(ScalarModel, base)
    load_adapters(again, adapter_tensors(model), told["lora_alpha"] / told["r"], "x")
    again.bias = torch.tensor(0.25)
    packed = toys.packed(toys.documents(5))
    assert torch.equal(again(packed, "scores"), model(packed, "scores"))
    torch.testing.assert_close(merged(model)(packed, "scores"), model(packed, "scores"), rtol=1e-4, atol=1e-4)


def test_what_does_not_belong_is_refused():
    base = toys.causal(seed=1).requires_grad_(False)
    model = on(base)
    tensors = adapter_tensors(model)
    name = next(iter(tensors))
    other = toys.causal(seed=1, hidden_size=64, head_dim=16).requires_grad_(False)
    faults = (
        ({n: t for n, t in tensors.items() if n != name.replace("lora_A", "lora_B")}, base, CausalLM, "E-CKPT-KEYS"),
        ({**tensors, "base_model.model.x.lora_A.weight": tensors[name]}, base, CausalLM, "E-CKPT-KEYS"),
        ({**tensors, "base_model.model.x.bias": tensors[name]}, base, CausalLM, "E-CKPT-KEYS"),
        (tensors, other, CausalLM, "E-CKPT-SHAPE"),
        (tensors, base, ScalarModel, "E-CKPT-KEYS"),
    )
    for given, beneath, kind, code in faults:
        with pytest.raises(UserError) as caught:
            load_adapters(share_weights(kind, beneath), given, 2.0, "adapter")
        assert caught.value.code == code
