"""The order in which records are read: pure functions of (seed, epoch, index), so that a cursor is one number.

Nothing is replayed on resume and no state is kept; permutations are cached only because they are requested repeatedly.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from tetrad.data.store import TokenStore
from tetrad.errors import UserError
from tetrad.seeds import generator_for, seed_for
from tetrad.types import Tokens

Indices = np.ndarray[Any, np.dtype[np.int64]]
Mixture = tuple[tuple[int, float], ...]
"""Runs of records in the order of the store: how many, and how often an epoch reads each. Fractions of a record
are carried over: a weight of 0.01 reads one of 32 records in every third epoch or so, and each of them exactly as often
as any other in the long run."""


@lru_cache(maxsize=32)  # several epochs of each member of an ensemble
def order(seed: int, epoch: int, n: int) -> Indices:
    """The permutation of n records in this epoch, read-only."""
    permutation = generator_for(seed, "order", epoch).permutation(n).astype(np.int64, copy=False)
    permutation.flags.writeable = False
    return permutation


def mixed(seed: int, epoch: int, mixture: Mixture) -> Indices:
    """The records of this epoch in their order, read-only. A weight of 2 reads each record of its run twice; with
    a weight below 1 every epoch reads a different share, so that all are read in time."""
    if all(weight == 1 for _, weight in mixture):
        return order(seed, epoch, sum(n for n, _ in mixture))
    return _mixed(seed, epoch, mixture)


@lru_cache(maxsize=4)
def _mixed(seed: int, epoch: int, mixture: Mixture) -> Indices:
    first, chosen = 0, []
    for number, (n, weight) in enumerate(mixture):
        copies = int(weight)
        start, stop = (_reads(n, weight, e) - e * copies * n for e in (epoch, epoch + 1))
        some = _cycle(seed_for(seed, "mixture", number), whole(n), start, stop)
        chosen.append(first + np.concatenate([np.tile(np.arange(n), copies), some]))
        first += n
    read = np.concatenate(chosen)
    read = read[order(seed, epoch, len(read))]
    read.flags.writeable = False
    return read


@lru_cache
def _ratio(weight: float) -> tuple[int, int]:
    """The weight as the decimal it was written as: numerator and denominator."""
    return Fraction(str(weight)).as_integer_ratio()


def _reads(n: int, weight: float, epochs: int) -> int:
    """How many records of a run this many epochs read, rounded."""
    above, below = _ratio(weight)
    return (2 * epochs * n * above + below) // (2 * below)


def _before(mixture: Mixture, epoch: int) -> int:
    """Records read by the epochs before this one."""
    return sum(_reads(n, weight, epoch) for n, weight in mixture)


def whole(n: int) -> Mixture:
    """n records, each read once per epoch."""
    return ((n, 1.0),)


def epoch_size(mixture: Mixture) -> float:
    """Records that an epoch reads on average; it may be less than one."""
    return float(sum(n * Fraction(*_ratio(weight)) for n, weight in mixture))


def batch_indices(seed: int, mixture: Mixture, batch: int, step: int) -> Indices:
    """The `batch` records of a step (int64). An incomplete batch at an epoch's end is filled from the next epoch, so
    that every record is read exactly once per epoch (or as often as its weight says)."""
    return _cycle(seed, mixture, step * batch, (step + 1) * batch)


def _cycle(seed: int, mixture: Mixture, start: int, stop: int) -> Indices:
    """Positions start to stop of the concatenated epochs; epochs that read nothing are skipped."""
    parts, wanted = [np.zeros(0, np.int64)], stop - start
    if wanted:
        later = range(int((start + len(mixture)) / epoch_size(mixture)) + 2)
        epoch = bisect_right(later, start, key=lambda e: _before(mixture, e)) - 1
        skipped = start - _before(mixture, epoch)
    while wanted:
        parts.append(mixed(seed, epoch, mixture)[skipped : skipped + wanted])
        epoch, skipped, wanted = epoch + 1, 0, wanted - len(parts[-1])
    return np.concatenate(parts)


def steps_for(n: float, batch: int, epochs: float) -> int:
    """Steps that read n records `epochs` times; the last one may reach into the next epoch."""
    return max(1, math.ceil(round(n * epochs, 6) / batch))


class Rows:
    """Rows of `sequence_length` tokens for pre-training, cut from the concatenated documents of an epoch.

    Each epoch has its own permutation (of the documents that the mixture gives it); the remainder after its last full
    row is not read in that epoch. per_epoch: full rows of the first epoch.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int, mixture: Mixture | None = None) -> None:
        """Errors: E-DATA-EMPTY where the text is shorter than one row."""
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        self._mixture = mixture or whole(len(store))
        self._ends = [0]  # rows before each epoch
        self._epoch = lru_cache(maxsize=1)(self._documents)
        tokens = int(self._epoch(0)[1][-1])
        self.per_epoch = tokens // sequence_length
        if not self.per_epoch:
            what = f"the first epoch has {tokens} tokens, less than one row of {sequence_length}"
            hint = "give more text, lower sequence_length, or raise the weights"
            raise UserError("E-DATA-EMPTY", what, where=store.where(0), hint=hint)

    def row(self, k: int) -> list[Tokens]:
        """The pieces of documents in row k, together `sequence_length` tokens, all of them labels of what precedes them
        in the same piece. A piece that continues a document from another row has no context."""
        while k >= self._ends[-1]:
            tokens = int(self._epoch(len(self._ends) - 1)[1][-1])
            self._ends.append(self._ends[-1] + tokens // self.sequence_length)
        epoch = bisect_right(self._ends, k) - 1
        documents, starts = self._epoch(epoch)
        at = (k - self._ends[epoch]) * self.sequence_length
        end = at + self.sequence_length
        number = int(np.searchsorted(starts, at, side="right")) - 1
        pieces = []
        while at < end:
            start, stop = int(starts[number]), min(int(starts[number + 1]), end)
            piece = self.store.piece(int(documents[number]), at - start, stop - start)
            pieces.append(Tokens(piece.ids, np.ones(len(piece.ids), np.bool_), piece.where))
            at, number = stop, number + 1
        return pieces

    def _documents(self, epoch: int) -> tuple[Indices, Indices]:
        """The documents of an epoch in their order, and where each begins among its tokens."""
        documents = mixed(self.seed, epoch, self._mixture)
        return documents, np.concatenate([[0], np.cumsum(self.store.lengths[documents])])


def micro_batches(documents: Sequence[Tokens], micro_batch_tokens: int) -> list[list[int]]:
    """Indices in order, in groups of at most `micro_batch_tokens` tokens; a longer document gets its own group."""
    return groups_of([len(document.ids) for document in documents], micro_batch_tokens)


def groups_of(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """The same for given lengths."""
    groups: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if not groups or tokens + length > micro_batch_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return groups
