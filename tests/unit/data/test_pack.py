import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad.data.pack import pack
from tetrad.types import IGNORE, Tokens

DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=6
)


def tokens(pairs: list[tuple[int, bool]], where: str = "") -> Tokens:
    ids, train = zip(*pairs, strict=True)
    return Tokens(np.array(ids, dtype=np.int32), np.array(train), where)


def test_a_label_is_the_next_token_of_the_same_document():
    first = tokens([(5, False), (6, True), (7, True)], "a.jsonl:1")
    second = tokens([(8, True), (9, False)], "a.jsonl:2")
    packed = pack([first, second])
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert packed.bounds == (0, 3, 5)
    assert packed.targets_T.tolist() == [6, 7, IGNORE, IGNORE, IGNORE]
    assert packed.where == ("a.jsonl:1", "a.jsonl:2")
    assert packed.ids_T.dtype == packed.targets_T.dtype == packed.positions_T.dtype == np.int64


@given(DOCUMENTS)
def test_packing_is_each_document_in_turn(documents):
    packed = pack([tokens(pairs) for pairs in documents])
    ids, positions, targets, bounds = [], [], [], [0]
    for pairs in documents:
        for n, (token, _) in enumerate(pairs):
            following = pairs[n + 1] if n + 1 < len(pairs) else (0, False)
            ids.append(token)
            positions.append(n)
            targets.append(following[0] if following[1] else IGNORE)
        bounds.append(len(ids))
    assert packed.ids_T.tolist() == ids and packed.positions_T.tolist() == positions
    assert packed.targets_T.tolist() == targets and packed.bounds == tuple(bounds)


def test_what_cannot_be_packed_is_refused():
    empty = Tokens(np.array([], dtype=np.int32), np.array([], dtype=bool))
    for documents in ([], [tokens([(1, True)]), empty]):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack(documents)
    with pytest.raises(ValueError, match="length"):
        pack([Tokens(np.array([1, 2]), np.array([True]))])
