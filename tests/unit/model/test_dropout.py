"""Masks by keys: their rates, their independence, and what they do not depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import toys
from tetrad.data.pack import common_prefix, pack_groups
from tetrad.model.dropout import dropped, kept_tokens
from tetrad.seeds import seed_for

T, H, RATE = 2000, 64, 0.1


def masks(step=0, layer=0, branch=0, rate=RATE):
    """[T, H] of 0 and 1, of one long document."""
    document = toys.document([3] * T)
    packed = toys.CPU.put(pack_groups([[document]], [0], [seed_for(0, "dropout", step)]))
    return (dropped(torch.ones(T, H), packed.keys_T, rate, layer, branch) != 0).double()


def correlation(a, b):
    """Of two masks, in standard errors."""
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())) * a.numel() ** 0.5


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(rate):
    """In all, of each channel and of each token: within five standard errors, and spread as chance spreads them."""
    kept = masks(rate=rate)
    for count, means in ((T * H, kept.mean()[None]), (T, kept.mean(0)), (H, kept.mean(1))):
        off = (means - (1 - rate)) / (rate * (1 - rate) / count) ** 0.5
        assert off.abs().max() < 5
        assert len(off) == 1 or 0.6 < float(off.square().mean()) < 1.5
    document = toys.CPU.put(pack_groups([[toys.document([3] * 20_000)]], [0], [7]))
    assert float(kept_tokens(document.keys_T, rate).float().mean()) == pytest.approx(1 - rate, abs=0.02)


def test_masks_know_nothing_of_each_other():
    first = masks()
    others = {"step": masks(step=1), "layer": masks(layer=1), "branch": masks(branch=1)}
    for shift in (1, 2, 3, 64):
        others |= {
            f"token + {shift}": first.roll(shift, 0),
            f"channel + {shift % H or 5}": first.roll(shift % H or 5, 1),
        }
    others |= {"next token, next layer": others["layer"].roll(1, 0), "next token, branch": others["branch"].roll(1, 0)}
    assert {name: far for name, b in others.items() if abs(far := correlation(first, b)) > 4.5} == {}
    pairs = (first - first.mean()).reshape(-1, 2, 32, 2).prod(3).prod(1)  # four neighbours
    assert abs(float(pairs.mean())) < 5 * float(pairs.std()) / pairs.numel() ** 0.5


def test_what_is_kept_is_enlarged():
    packed = toys.CPU.put(pack_groups([toys.documents(3)], [0], [1]))
    x = torch.randn(packed.bounds[-1], H, requires_grad=True)
    out = dropped(x, packed.keys_T, 0.2, 0, 0)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.8)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.8)


def group(number):
    """Answers to one prompt."""
    prompt = toys.ids(12, number)
    return [toys.document([*prompt, *toys.ids(4 + i, 10 * number + i + 1)]) for i in range(3)]


def scores(groups, keys, prefixes, pad=0):
    model = toys.scalar(seed=1).train()
    model.model.dropout, model.model.token_dropout = 0.3, 0.2
    packed = toys.CPU.put(pack_groups(groups, prefixes, keys))
    if pad:  # as a document of its own, which no key knows
        longer = {
            f"{name}_T": F.pad(getattr(packed, f"{name}_T"), (0, pad)) for name in ("ids", "positions", "targets")
        }
        packed = replace(packed, bounds=(*packed.bounds, packed.bounds[-1] + pad), **longer)
    return model(packed)[: sum(map(len, groups))]


def test_neighbours_order_padding_and_shared_prefixes_change_no_mask():
    groups, keys = [group(n) for n in range(4)], [seed_for(0, "dropout", 5, n) for n in range(4)]
    every = scores(groups, keys, [0] * 4)
    alone = torch.cat([scores([one], [key], [0]) for one, key in zip(groups, keys, strict=True)])
    turned = scores(groups[::-1], keys[::-1], [0] * 4).reshape(4, 3).flip(0).flatten()
    shared = scores(groups, keys, [common_prefix(one) for one in groups])
    for other in (alone, turned, shared, scores(groups, keys, [0] * 4, pad=9)):
        torch.testing.assert_close(other, every, rtol=1e-4, atol=1e-5)
    assert (scores(groups, keys[::-1], [0] * 4) - every).abs().min() > 1e-4


def test_answers_have_masks_of_their_own_after_what_they_share():
    alike = toys.document(toys.ids(9, 1))
    one = pack_groups([[toys.document([*alike.ids, 5, 6]), toys.document([*alike.ids, 7, 6])]], [0], [3]).keys_T
    first, second = np.split(one, 2)
    assert (first == second).tolist() == [True] * 9 + [False] * 2


def test_a_pack_without_keys_is_refused_in_training():
    model = toys.causal(seed=1).train()
    model.model.dropout = 0.1
    with pytest.raises(ValueError, match="keys"):
        model(toys.packed(toys.documents(2)))
