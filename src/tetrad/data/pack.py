"""Documents packed into one flat row without padding; `bounds` separates them.

A position's target is the next token of its own document where that token is a label; the last position of a document
has none. Numpy only: the batch is converted to tensors where it reaches the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tetrad.seeds import STRIDE, seed_for
from tetrad.types import IGNORE, Packed, Prefix, Tokens

LEAST_SAVED, LEAST_SHARE = 16, 1 / 8  # of a group's tokens, for a prefix to be shared


def pack(documents: Sequence[Tokens]) -> Packed:
    """T is the sum of the documents' lengths; ids, positions and targets are int64.

    Raises ValueError without documents, for an empty one, and where ids and train differ in length.
    """
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
    if not lengths.size or not lengths.all():
        raise ValueError("nothing to pack: every document needs a token")
    ids = np.concatenate([document.ids for document in documents]).astype(np.int64)
    train = np.concatenate([document.train for document in documents]).astype(bool)
    if train.shape != ids.shape:
        raise ValueError("ids and train differ in length")
    ends = np.cumsum(lengths)
    targets = np.full(len(ids), IGNORE, dtype=np.int64)
    targets[:-1] = np.where(train[1:], ids[1:], IGNORE)
    targets[ends - 1] = IGNORE
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    bounds = (0, *ends.tolist())
    return Packed(ids, positions, bounds, targets, tuple(document.where for document in documents))


def common_prefix(documents: Sequence[Tokens]) -> int:
    """The number of leading tokens that all of them share, such that each but the first has at least one more."""
    first, *others = documents
    if not others:
        return 0
    most = min(len(first.ids), *(len(other.ids) - 1 for other in others))
    same = np.all([other.ids[:most] == first.ids[:most] for other in others], axis=0)
    return most if same.all() else int(same.argmin())


def pack_groups(groups: Sequence[Sequence[Tokens]], prefixes: Sequence[int], keys: Sequence[int] = ()) -> Packed:
    """Documents in groups, of which the first `prefixes[i]` tokens of group i are stored once, in its first document.

    The label of the first token after a prefix is lost except in the first document: for scores, not for language.
    keys: of each group's dropout, the same for all of its documents in their common prefix, shared or not.
    Raises ValueError as `pack` does, and where a document has nothing but the prefix.
    """
    cuts = [prefix * (n > 0) for group, prefix in zip(groups, prefixes, strict=True) for n in range(len(group))]
    documents = [document for group in groups for document in group]
    rest = [Tokens(d.ids[cut:], d.train[cut:], d.where) for d, cut in zip(documents, cuts, strict=True)]
    packed = pack(rest)
    positions = packed.positions_T + np.repeat(cuts, np.diff(packed.bounds))
    ends = np.cumsum([len(group) for group in groups]).tolist()
    shared = tuple(
        Prefix(end - len(group), prefix, end - 1)
        for group, prefix, end in zip(groups, prefixes, ends, strict=True)
        if prefix
    )
    of_tokens = [key for group, own in zip(groups, keys, strict=False) for key in _token_keys(group, own)]
    cut_keys = [key[cut:] for key, cut in zip(of_tokens, cuts, strict=False)]
    keys_T = np.concatenate(cut_keys) if keys else None
    return replace(packed, positions_T=positions, prefixes=shared, keys_T=keys_T)


def _token_keys(group: Sequence[Tokens], key: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """One per token of each document: derived from the group's key, the position and, after the common prefix, the
    document's number."""
    common = common_prefix(group)
    for number, document in enumerate(group):
        positions = np.arange(len(document.ids))
        yield np.where(positions < common, key, seed_for(key, "document", number)) + positions * STRIDE


def prefix_pays(prefix: int, lengths: Sequence[int]) -> bool:
    """Whether documents of these lengths are computed faster with their first `prefix` tokens shared. Merging two
    attentions costs a few percent of a step, plus a few tokens' worth per group (benchmarks/shared_prefix.py)."""
    saved = prefix * (len(lengths) - 1)
    return saved >= max(LEAST_SAVED, LEAST_SHARE * sum(lengths))
