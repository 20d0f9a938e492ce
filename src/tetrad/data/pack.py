"""Documents one after another in one flat row, without padding; `bounds` keeps them apart.

A position's target is the next token of its own document where that token is a label; the last position of a document
has none. Numpy only: the batch becomes tensors where it reaches the device.
"""

from collections.abc import Sequence

import numpy as np

from tetrad.types import IGNORE, Packed, Tokens


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
