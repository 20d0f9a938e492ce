"""Order is a pure function: each epoch reads each record once, and any step can be asked for on its own."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad.data.loader import Rows, batch_indices, epoch_size, micro_batches, mixed, order, steps_for, whole
from tetrad.data.source import Counts
from tetrad.data.store import TokenStore, write_part
from tetrad.errors import UserError
from tetrad.types import Tokens

SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.integers(1, 40), st.integers(1, 60), st.integers(1, 30))
def test_each_epoch_reads_each_record_once(seed, n, batch, steps):
    stream = np.concatenate([batch_indices(seed, whole(n), batch, step) for step in range(steps)])
    assert len(stream) == steps * batch
    for epoch in range(len(stream) // n):
        part = stream[epoch * n : (epoch + 1) * n]
        assert sorted(part) == list(range(n))
        assert part.tolist() == order(seed, epoch, n).tolist()
    rest = stream[len(stream) // n * n :]
    assert len(set(rest.tolist())) == len(rest)


@given(SEEDS, st.integers(1, 40), st.integers(1, 20), st.integers(0, 50))
def test_a_step_needs_no_other_step(seed, n, batch, step):
    straight = [batch_indices(seed, whole(n), batch, s).tolist() for s in range(step + 1)][-1]
    order.cache_clear()
    assert batch_indices(seed, whole(n), batch, step).tolist() == straight


def test_order_depends_on_seed_and_epoch_and_stays_as_it_is():
    assert order(0, 0, 10).tolist() == order(0, 0, 10).tolist()
    assert len({tuple(order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0, 10).dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        order(0, 0, 10)[0] = 1


def test_order_is_that_of_every_release():
    """Changing this changes every run that is resumed."""
    assert order(0, 0, 10).tolist() == [3, 1, 8, 4, 5, 2, 7, 0, 6, 9]
    assert batch_indices(7, whole(5), 3, 1).tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "steps"), [(10, 5, 1, 2), (10, 4, 1, 3), (10, 4, 0.5, 2), (3, 8, 0.1, 1), (10, 1, 0.3, 3)]
)
def test_steps_for(n, batch, epochs, steps):
    assert steps_for(n, batch, epochs) == steps


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of 1 to 12 tokens; token = 100 * document + place."""
    lengths = [(5 * i) % 12 + 1 for i in range(30)]
    documents = [
        Tokens(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) % 2 == 0, f"f:{i + 1}")
        for i, n in enumerate(lengths)
    ]
    folder = tmp_path_factory.mktemp("rows") / "t"
    write_part(folder, documents, Counts())
    return TokenStore([folder])


@pytest.mark.parametrize("sequence_length", [1, 4, 7, 32, 189])
def test_rows_are_the_permuted_documents_end_to_end(store, sequence_length):
    rows = Rows(store, sequence_length, seed=3)
    assert rows.per_epoch == store.total // sequence_length
    for epoch in range(3):
        stream = np.concatenate([store[int(i)].ids for i in order(3, epoch, len(store))])
        found = [rows.row(epoch * rows.per_epoch + k) for k in range(rows.per_epoch)]
        ids = np.concatenate([piece.ids for row in found for piece in row])
        assert ids.tolist() == stream[: rows.per_epoch * sequence_length].tolist()
        assert all(sum(len(p.ids) for p in row) == sequence_length for row in found)


def test_a_piece_is_of_one_document_and_all_trained(store):
    rows = Rows(store, 7, seed=0)
    for k in range(rows.per_epoch):
        for piece in rows.row(k):
            document = piece.ids[0] // 100
            assert (piece.ids // 100 == document).all() and (np.diff(piece.ids) == 1).all()
            assert piece.where == f"f:{document + 1}" and piece.train.all() and piece.train.dtype == np.bool_


@given(st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_any_row_on_its_own(store, wanted):
    straight, jumping = Rows(store, 5, seed=1), Rows(store, 5, seed=1)
    expected = {k: straight.row(k) for k in sorted(wanted)}
    for k in wanted:
        assert [p.ids.tolist() for p in jumping.row(k)] == [p.ids.tolist() for p in expected[k]]


def test_too_little_text_for_a_row(store):
    with pytest.raises(UserError, match=rf"E-DATA-EMPTY.*{store.total} tokens, less than one row of 10000"):
        Rows(store, 10_000, seed=0)


MIXTURES = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 2.5])), min_size=1, max_size=4
)


@given(SEEDS, MIXTURES.filter(epoch_size), st.integers(0, 5))
def test_a_mixture_reads_each_run_as_often_as_its_weight_says(seed, runs, epoch):
    mixture = tuple(runs)
    found = mixed(seed, epoch, mixture)
    assert abs(len(found) - epoch_size(mixture)) < len(mixture)
    first = 0
    for n, weight in mixture:
        times = np.bincount(found[(found >= first) & (found < first + n)] - first, minlength=n)
        assert times.sum() == int((epoch + 1) * n * weight + 0.5) - int(epoch * n * weight + 0.5)
        assert times.max() - times.min() <= 2  # one more where a share ends one permutation and begins the next
        first += n
    steps = [batch_indices(seed, mixture, 3, step) for step in range(5)]
    laid = np.concatenate([mixed(seed, e, mixture) for e in range(64)])
    assert np.concatenate(steps).tolist() == laid[:15].tolist()


def test_a_share_changes_from_epoch_to_epoch_until_all_were_read():
    mixture = ((8, 0.25), (3, 1.0))
    epochs = [set(mixed(0, epoch, mixture).tolist()) - {8, 9, 10} for epoch in range(4)]
    assert all(len(epoch) == 2 for epoch in epochs) and set().union(*epochs) == set(range(8))
    assert mixed(5, 2, ((4, 1.0), (6, 1.0))).tolist() == order(5, 2, 10).tolist()


SMALL = [((32, 0.01),), ((32, 0.01), (40, 0.01)), ((32, 0.01), (40, 1.0)), ((8, 0.05),), ((3, 1e-5), (5, 0.3))]


@pytest.mark.parametrize("mixture", SMALL)
def test_a_weight_that_rounds_to_nothing_is_carried_over(mixture):
    """After so many epochs as make every share whole, each record was read exactly as often as its weight says."""
    epochs = 100 if all(weight > 1e-3 for _, weight in mixture) else 100_000
    wanted = [n * weight for n, weight in mixture]
    read = batch_indices(3, mixture, round(sum(wanted) * epochs), 0)
    first = 0
    for n, weight in mixture:
        times = np.bincount(read[(read >= first) & (read < first + n)] - first, minlength=n)
        assert times.sum() == round(n * weight * epochs) and times.max() - times.min() <= 1
        first += n
    assert steps_for(epoch_size(mixture), 4, 1) >= 1


def test_mixtures_of_whole_shares_are_those_of_every_release():
    """Changing this changes every run that is resumed."""
    assert mixed(7, 3, ((8, 0.25), (3, 2.0))).tolist() == [10, 8, 10, 5, 9, 8, 9, 6]
    assert batch_indices(7, ((8, 0.25), (3, 2.0)), 5, 2).tolist() == [9, 10, 9, 7, 3]


def test_a_text_of_a_tiny_weight_is_told(store):
    with pytest.raises(UserError, match=r"E-DATA-EMPTY.*first epoch has 0 tokens.*raise the weights"):
        Rows(store, 4, seed=0, mixture=((len(store), 0.001),))


def test_rows_of_a_mixture(store):
    half = (len(store) // 2, 0.5), (len(store) - len(store) // 2, 2.0)
    rows = Rows(store, 7, seed=1, mixture=half)
    lengths = [int(store.lengths[mixed(1, epoch, half)].sum()) // 7 for epoch in range(3)]
    assert rows.per_epoch == lengths[0]
    for epoch in range(3):
        stream = np.concatenate([store[int(i)].ids for i in mixed(1, epoch, half)])
        found = [rows.row(sum(lengths[:epoch]) + k) for k in range(lengths[epoch])]
        assert np.concatenate([p.ids for row in found for p in row]).tolist() == stream[: lengths[epoch] * 7].tolist()


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 15))
def test_micro_batches(lengths, micro_batch_tokens):
    documents = [Tokens(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in lengths]
    groups = micro_batches(documents, micro_batch_tokens)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    sizes = [[lengths[i] for i in group] for group in groups]
    assert all(sum(size) <= micro_batch_tokens or len(size) == 1 for size in sizes)
    assert all(sum(a) + b[0] > micro_batch_tokens for a, b in pairwise(sizes))  # no group is cut early
