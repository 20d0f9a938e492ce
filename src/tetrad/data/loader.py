"""The order in which records are read: pure functions of (seed, epoch, index), so that a cursor is one number.

Nothing is replayed on resume and no state is kept; permutations are cached only because they are asked for in turn.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tetrad.data.tokens import TokenStore
from tetrad.errors import UserError
from tetrad.seeds import generator_for
from tetrad.types import Tokens

Indices = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> Indices:
    """The permutation of n records in this epoch, read-only."""
    permutation = generator_for(seed, "order", epoch).permutation(n).astype(np.int64)
    permutation.flags.writeable = False
    return permutation


def batch_indices(seed: int, n: int, batch: int, step: int) -> Indices:
    """The `batch` records of a step (int64). A short rest of an epoch is filled from the next epoch's start, so that
    every record is read exactly once an epoch."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // n
    return np.concatenate([order(seed, int(e), n)[places[epochs == e] % n] for e in np.unique(epochs)])


def steps_for(n: int, batch: int, epochs: float) -> int:
    """Steps that read n records `epochs` times; the last one may reach into a further epoch."""
    return max(1, math.ceil(round(n * epochs, 6) / batch))


class Rows:
    """Rows of `row_tokens` tokens for pre-training, cut from the documents of an epoch laid end to end.

    Each epoch's stream is a permutation of its own; it gives `per_epoch` = total // row_tokens rows, and the
    `left_out` tokens after them are not read in that epoch. Row k belongs to epoch k // per_epoch.
    """

    def __init__(self, store: TokenStore, row_tokens: int, seed: int) -> None:
        """Errors: E-DATA-EMPTY where the text is shorter than one row."""
        self.store, self.row_tokens, self.seed = store, row_tokens, seed
        self.per_epoch, self.left_out = divmod(store.total, row_tokens)
        self._epoch, self._documents, self._starts = -1, np.zeros(0, np.int64), np.zeros(1, np.int64)
        if not self.per_epoch:
            what = f"the text has {store.total} tokens, less than one row of {row_tokens}"
            raise UserError("E-DATA-EMPTY", what, where=store.where(0), hint="give more text or lower row_tokens")

    def row(self, k: int) -> list[Tokens]:
        """The pieces of documents in row k, together `row_tokens` tokens, all of them labels of what precedes them in
        the same piece. A piece that continues a document from another row starts afresh."""
        epoch, index = divmod(k, self.per_epoch)
        self._enter(epoch)
        at, end = index * self.row_tokens, (index + 1) * self.row_tokens
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        pieces = []
        while at < end:
            start, stop = int(self._starts[number]), min(int(self._starts[number + 1]), end)
            piece = self.store.piece(int(self._documents[number]), at - start, stop - start)
            pieces.append(Tokens(piece.ids, np.ones(len(piece.ids), np.bool_), piece.where))
            at, number = stop, number + 1
        return pieces

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._documents = epoch, order(self.seed, epoch, len(self.store))
            self._starts = np.concatenate([[0], np.cumsum(self.store.lengths[self._documents])])


def micro_batches(documents: Sequence[Tokens], micro_tokens: int) -> list[list[int]]:
    """Indices in order, in groups of at most `micro_tokens` tokens; a longer document alone."""
    groups: list[list[int]] = []
    tokens = 0
    for index, document in enumerate(documents):
        length = len(document.ids)
        if not groups or tokens + length > micro_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return groups
