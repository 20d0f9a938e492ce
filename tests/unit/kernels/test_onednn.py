"""Products with a weight, by whichever kernel: torch's own numbers and gradients, up to rounding."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tetrad.kernels import onednn
from tetrad.kernels.onednn import Product, linear, padded, padded_training, pieces


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def in_training(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN, as on a processor with AVX-512, or torch's own."""
    monkeypatch.setattr(onednn, "_IN_TRAINING", onednn._HAS_ONEDNN and request.param)


def made(tokens: int, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32):
    """x, weight and perhaps bias, as leaves."""
    torch.manual_seed(tokens + inputs)
    shapes = [(tokens, inputs), (outputs, inputs), *([(outputs,)] if bias else [])]
    return [(torch.randn(shape, dtype=dtype) / 4).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 63, 64, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (256, 320), (300, 256)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(
    in_training: None, tokens: int, inputs: int, outputs: int, bias: bool
) -> None:
    leaves = made(tokens, inputs, outputs, bias)
    ours, expected = linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(*leaves), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not onednn._HAS_ONEDNN, reason="of oneDNN")
def test_it_trains_by_the_kernel_that_is_chosen(in_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ours = [], onednn._linear
    monkeypatch.setattr(onednn, "_linear", lambda *given: seen.append(1) or ours(*given))
    linear(*made(300, 256, 320)).sum().backward()
    assert bool(seen) == onednn._IN_TRAINING


def test_only_what_needs_a_gradient_gets_one(in_training: None) -> None:
    x, weight, bias = made(100, 24, 40)
    frozen = weight.detach()
    (to_x,) = torch.autograd.grad(linear(x, frozen, bias).sum(), [x])
    torch.testing.assert_close(to_x, frozen.sum(0).expand(100, -1), rtol=1e-4, atol=1e-4)
    assert not linear(x.detach(), frozen).requires_grad


def test_views_are_read_as_they_lie(in_training: None) -> None:
    """A slice of wider rows, and gradients that are transposed or spread."""
    wide, weight, _ = made(200, 64, 40)
    x = wide[:, 8:32]
    weight = weight[:, :24].detach().requires_grad_()
    for reduce in (lambda y: y.t().contiguous().sum(), lambda y: y.sum(), lambda y: (y.t() * 2)[::2].sum()):
        ours = torch.autograd.grad(reduce(linear(x, weight)), [wide, weight])
        expected = torch.autograd.grad(reduce(F.linear(x, weight)), [wide, weight])
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_other_types_are_torchs_own(in_training: None) -> None:
    leaves = made(100, 24, 40, dtype=torch.float64)
    assert torch.equal(linear(*leaves), F.linear(*leaves))
    assert torch.autograd.gradcheck(linear, made(70, 3, 4, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*made(100, 24, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("packs", [True, False])
def test_without_the_operators_it_is_the_same(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr(onednn, "_HAS_ONEDNN", False)
        monkeypatch.setattr(onednn, "_IN_TRAINING", False)
    for rows in (1, 2, 9, 100):
        for outputs in (40, 4096):
            x, weight, bias = (leaf.detach() for leaf in made(rows, 128, outputs))
            expected = F.linear(x, weight, bias)
            torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(Product(weight, bias)(x), expected, rtol=1e-5, atol=1e-5)
            added = Product(weight).added(x, expected)
            torch.testing.assert_close(added, 2 * expected - bias, rtol=1e-5, atol=1e-5)


def test_few_sizes_and_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, sizes = torch.device("cpu"), [padded(rows, torch.device("cpu")) for rows in range(1, 4097)]
    assert len(set(sizes)) < 50
    assert all(0 <= size - rows < max(16, size / 8) for rows, size in enumerate(sizes, 1))
    assert all(padded(size, cpu) == size for size in sizes)
    assert padded(1001, torch.device("cuda")) == 1001
    for by_onednn, rows in ((True, 1024), (False, 1001)):
        monkeypatch.setattr(onednn, "_IN_TRAINING", by_onednn)
        assert padded_training(1001, cpu) == rows


@pytest.mark.parametrize("most", [256, 1000, 4096])
def test_pieces_are_all_rows_in_few_sizes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_IN_TRAINING", True)
    seen: set[int] = set()
    for rows in range(3000):
        found = pieces(rows, most, torch.device("cpu"))
        assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(rows))
        sizes = [piece.stop - piece.start for piece in found]
        assert all(size <= most for size in sizes) and sum(size < 64 for size in sizes) <= 1
        seen |= {size for size in sizes if size >= 64}
    assert len(seen) <= 40  # eight in each doubling, four from 64 to 128
    assert pieces(3000, 4096, torch.device("cuda")) == [slice(0, 3000)]
    monkeypatch.setattr(onednn, "_IN_TRAINING", False)
    assert pieces(1001, 1000, torch.device("cpu")) == [slice(0, 1000), slice(1000, 1001)]


SIZES = """\
import ctypes, torch
from tetrad.kernels import onednn

onednn._IN_TRAINING = True

def held():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

weight, rows, seen = torch.randn(64, 32), torch.randn(8192, 32), []
with torch.no_grad():
    for size in range(64, 8192, 16):
        onednn.linear(rows[:size], weight)
        seen.append(held())
print(seen[200], seen[-1])
"""


@pytest.mark.skipif(sys.platform != "linux" or not onednn._HAS_ONEDNN, reason="of oneDNN, seen by Linux")
def test_products_of_ever_new_sizes_stay_within_a_bound() -> None:
    """300 sizes more than are kept. At 1,024 one cache grows by 86 MiB here, both by 178."""
    done = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before <= 15


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_product_in_bfloat16(units: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In oneDNN's layout where the processor has units for it: torch's own numbers, up to the last bits of 16."""
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: units)
    x, weight, bias = (leaf.detach().bfloat16() for leaf in made(rows, 512, 640))
    product = Product(weight, bias)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias), rtol=0.02, atol=0.05)
    to = torch.randn(rows, 640).bfloat16()
    torch.testing.assert_close(Product(weight).added(x, to), F.linear(x, weight) + to, rtol=0.02, atol=0.05)
    assert (product._weight.numel() == 0) == (units and onednn._HAS_ONEDNN)
