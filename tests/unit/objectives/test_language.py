import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tetrad.objectives import language


def head(rows: int = 7, width: int = 3, vocabulary: int = 11, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    return [
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(vocabulary, (rows,), generator=generator),
    ]


class Made(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made, and counts matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return result


def test_temperature_divides_logits():
    hidden, weight, targets = head()
    colder = language.token_logprobs(hidden, weight, targets, 0.5)[0]
    assert torch.allclose(colder, language.token_logprobs(hidden * 2, weight, targets)[0])
    assert not torch.allclose(colder, language.token_logprobs(hidden, weight, targets)[0])


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
def test_nll_sum_is_cross_entropy_and_so_is_its_gradient(chunk):
    hidden, weight, targets = head()
    wanted = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    found = language.nll_sum(hidden, weight, targets, chunk)
    assert torch.allclose(found, wanted, rtol=1e-13)
    ours, theirs = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (found, wanted))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_by_finite_differences(temperature):
    hidden, weight, targets = head()
    assert torch.autograd.gradcheck(lambda h, w: language.nll_sum(h, w, targets, 3), (hidden, weight))
    for take in (slice(0, 1), slice(1, 2), slice(0, 2)):

        def outputs(h, w, take=take):
            return [-2 * x for x in language.token_logprobs(h, w, targets, temperature, 3)[take]]

        assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_the_needed_gradients_are_made(needed):
    hidden, weight, targets = head()
    both = torch.autograd.grad(language.nll_sum(hidden, weight, targets), (hidden, weight))
    inputs = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needed, strict=True)]
    for loss in (language.nll_sum(*inputs, targets), -language.token_logprobs(*inputs, targets)[0].sum()):
        assert loss.requires_grad == any(needed)
        if any(needed):
            with Made() as watch:
                language.nll_sum(*inputs, targets)
            assert watch.products == 2
            place = needed.index(True)
            assert torch.allclose(torch.autograd.grad(loss, inputs[place])[0], both[place])


def test_without_gradients_the_values_are_the_same():
    hidden, weight, targets = head()
    with torch.no_grad(), Made() as watch:
        quiet = language.nll_sum(hidden, weight, targets, 3)
        logprobs, _ = language.token_logprobs(hidden, weight, targets)
    assert watch.products == 3 + 1  # one for each chunk
    with Made() as watch:
        loud = language.nll_sum(hidden, weight, targets, 3)
    assert watch.products == 3 * 3
    assert not quiet.requires_grad
    assert torch.equal(quiet, loud)
    assert torch.allclose(-logprobs.sum(), quiet)


def test_entropy_is_skipped_on_request_and_then_undefined():
    hidden, weight, targets = head()
    logprobs, entropies = language.token_logprobs(hidden, weight, targets, entropy=False)
    assert entropies.isnan().all() and not entropies.requires_grad
    full, wanted = language.token_logprobs(hidden, weight, targets)
    assert torch.equal(logprobs, full)
    assert torch.allclose(wanted, Categorical(logits=hidden @ weight.T).entropy())


def test_the_whole_matrix_of_logits_never_exists():
    hidden, weight, targets = head(rows=64, width=4, vocabulary=50, dtype=torch.float32)
    for function in (
        language.nll_sum,
        lambda h, w, t, chunk: sum(x.sum() for x in language.token_logprobs(h, w, t, 0.9, chunk)),
    ):
        with Made() as watch:
            function(hidden, weight, targets, chunk=8).backward()
        assert 8 * 50 <= watch.largest < 2 * 8 * 50


def test_default_chunks_bound_the_memory():
    hidden, weight, targets = head(rows=3, vocabulary=150_000, dtype=torch.float32)
    assert language._chunks(hidden[:0], weight, targets[:0], 0) == []
    sizes = language._chunks(torch.empty(1000, 3), weight, torch.empty(1000), 0)
    assert sizes[0].stop == language.CHUNK_ROWS and sizes[-1].stop == 1000


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([2, 2])
    loss = language.nll_sum(hidden, weight, targets)
    logprobs, entropies = language.token_logprobs(hidden, weight, targets)
    assert loss.item() == pytest.approx(2e4) and logprobs.tolist() == pytest.approx([-2e4, 0])
    assert entropies.abs().max() < 1e-6
    for total in (loss, (logprobs + entropies).sum()):
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, (hidden, weight)))


def test_sixteen_bit_states_keep_a_float32_loss_and_weight_gradient():
    hidden, weight, targets = head(rows=512, width=16, dtype=torch.float32)
    exact = torch.autograd.grad(language.nll_sum(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = language.nll_sum(hidden, weight, targets, 1)
        logprobs, _ = language.token_logprobs(hidden, weight, targets, chunk=1)
    for total in (loss, -logprobs.sum()):
        assert total.dtype == torch.float32
        rough = torch.autograd.grad(total, (hidden, weight))
        assert [g.dtype for g in rough] == [torch.float32, torch.float32]
        assert all((a - b).norm() < 0.006 * b.norm() for a, b in zip(rough, exact, strict=True))
        assert all((a - b).norm() > 1e-4 * b.norm() for a, b in zip(rough, exact, strict=True))  # it was in 16 bits


def test_no_targets_sum_to_zero_and_wrong_shapes_are_refused():
    hidden, weight, targets = head()
    assert language.nll_sum(hidden[:0], weight, targets[:0]).item() == 0
    with pytest.raises(ValueError, match="shapes"):
        language.nll_sum(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="shapes"):
        language.token_logprobs(hidden, weight.T, targets)
