"""Loss and logits of padded batches: each row as if it were alone, whatever the side of the padding."""

import pytest
import torch
import torch.nn.functional as F

import toys
from tetrad.model.padded import forward
from tetrad.types import IGNORE

ROWS = [toys.ids(length, length) for length in (9, 1, 14, 4)]
LABELS = [[token if place % 3 != 1 else IGNORE for place, token in enumerate(row)] for row in ROWS]


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, labels; padding holds tokens and labels that no number may read."""
    longest = max(map(len, ROWS))

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        made = [(row, [fill] * (longest - len(row))) for row in rows]
        return torch.tensor([fill + row if side == "left" else row + fill for row, fill in made])

    return padded(ROWS, 5), padded([[1] * len(row) for row in ROWS], 0), padded(LABELS, 6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_each_row_as_if_alone(side: str, kind: torch.dtype) -> None:
    model = toys.causal().eval()
    ids, mask, labels = batch(side)
    loss, logits = forward(model, ids, mask.to(kind), labels)
    total, count = torch.zeros(()), 0
    for row, wanted, found, kept in zip(ROWS, LABELS, logits, mask.bool(), strict=True):
        _, alone = forward(model, torch.tensor([row]))
        torch.testing.assert_close(found[kept], alone[0], atol=1e-5, rtol=1e-5)
        assert not found[~kept].any()
        total += F.cross_entropy(alone[0][:-1], torch.tensor(wanted[1:], dtype=torch.int64), reduction="sum")
        count += sum(label != IGNORE for label in wanted[1:])
    assert loss is not None
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_without_labels_or_mask() -> None:
    model = toys.causal()
    ids = torch.tensor([ROWS[0], ROWS[2][:9]])
    loss, logits = forward(model, ids)
    assert loss is None
    assert logits.shape == (2, 9, 40) and logits.dtype == torch.float32
    _, again = forward(model, ids, torch.ones_like(ids))
    assert torch.equal(logits, again)
    assert not torch.equal(logits[0], logits[1])


def test_a_position_sees_what_stands_before_it() -> None:
    model = toys.causal().eval()
    ids = torch.tensor([ROWS[2]])
    changed = ids.clone()
    changed[0, 8] = 3 + (ids[0, 8] - 2) % 37
    _, before = forward(model, ids)
    _, after = forward(model, changed)
    torch.testing.assert_close(before[0, :8], after[0, :8])
    assert (before[0, 8:] - after[0, 8:]).abs().max() > 1e-3


def test_a_hole_is_stepped_over() -> None:
    model = toys.causal().eval()
    ids, mask = torch.tensor([ROWS[2]]), torch.ones(1, 14)
    mask[0, 5:8] = 0
    loss, logits = forward(model, ids, mask, ids)
    short = torch.tensor([ROWS[2][:5] + ROWS[2][8:]])
    expected_loss, expected = forward(model, short, None, short)
    assert loss is not None and expected_loss is not None
    torch.testing.assert_close(logits[mask.bool()], expected[0])
    torch.testing.assert_close(loss, expected_loss)


def test_gradients_reach_every_parameter() -> None:
    model = toys.causal(tied=False)
    ids, mask, labels = batch("left")
    loss, logits = forward(model, ids, mask, labels)
    assert loss is not None
    (loss + logits.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_no_label_no_loss() -> None:
    ids = torch.tensor([ROWS[0]])
    loss, _ = forward(toys.causal(), ids, None, torch.full_like(ids, IGNORE))
    assert loss is not None and loss.isnan()


def test_shapes_are_checked() -> None:
    model, ids = toys.causal(), torch.tensor([ROWS[0]])
    with pytest.raises(ValueError, match="attention_mask"):
        forward(model, ids, torch.ones(1, 8))
    with pytest.raises(ValueError, match="labels"):
        forward(model, ids, None, ids[:, 1:])
    for wrong, mask in ((ids[0], None), (ids, torch.zeros(1, 9)), (ids[:0], None)):
        with pytest.raises(ValueError, match="input_ids"):
            forward(model, wrong, mask)
