"""A linear reward of an answer's words: what a reward model must beat to be worth its size.

Ridge regression on TF-IDF of words (Han characters one by one) and of neighbouring pairs: a score is a row, a
comparison a row for each pair, the difference of its two answers. Fitted in seconds.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrad.data.records import read_preferences
from tetrad.data.source import sources
from tetrad.inference.completions import Completion
from tetrad.reward.batches import Examples, Record, judgements
from tetrad.storage import MANIFEST, read_manifest, sha256_file
from tetrad.training.context import renamed
from tetrad.types import Score

PENALTY = 0.2  # of the squared weights: by cross-validation on 4,700 rated sentences
_WORD = re.compile(r"[^\W\d_\u3400-\u9fff]+(?:'[^\W\d_]+)*|\d+|[\u3400-\u9fff]|[!?！？]")
_ITERATIONS, _TOLERANCE = 300, 1e-5


@dataclass(frozen=True)
class LinearReward:
    """terms: the column of each; idf, weights: of each column."""

    terms: Mapping[str, int]
    idf: Tensor
    weights: Tensor

    def __call__(self, samples: Sequence[Completion]) -> list[float]:
        """The reward of each answer, which reads the prompt's Input or last turn too."""
        rewards: list[float] = _times(_tfidf(map(_counts, samples), self.terms, self.idf), self.weights).tolist()
        return rewards


def fit(records: Sequence[Record]) -> LinearReward:
    """From comparisons and scores: scores in their standard deviations, the better answer of a pair one above the
    worse, the pairs of a list as heavy as one score. Raises ValueError without records."""
    documents = [_counts(sample) for sample in Examples.of(records, ()).samples()]
    document_counts = Counter(term for counts in documents for term in counts)
    terms = {term: column for column, term in enumerate(document_counts)}
    counts = torch.tensor([*document_counts.values()], dtype=torch.float64)
    idf = torch.log((1 + len(documents)) / (1 + counts)) + 1
    texts = _tfidf(documents, terms, idf)
    rows, targets, row_weights = _rows(records, len(documents))
    texts_t, rows_t = texts.t().coalesce(), rows.t().coalesce()

    def normal_product(weights: Tensor) -> Tensor:
        errors = row_weights * _times(rows, _times(texts, weights))
        return _times(texts_t, _times(rows_t, errors)) + PENALTY * weights

    target = _times(texts_t, _times(rows_t, row_weights * targets))
    return LinearReward(terms, idf, _conjugate_gradients(normal_product, target))


def training_records(folder: Path) -> list[Record]:
    """What the reward model of this folder was trained on, read from the files that its manifest names; none if one of
    them is gone or has changed. Errors: E-DATA-*, E-CKPT-*."""
    manifest: Mapping[str, Any] = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    lineage = manifest.get("lineage", {})
    files = {Path(file["path"]): file["sha256"] for file in lineage.get("data", {}).get("reward.data", [])}
    if not files or not all(path.is_file() and sha256_file(path) == digest for path, digest in files.items()):
        return []
    settings = lineage["settings"]
    given = sources(map(str, files), rename=renamed(settings["data.rename"]))
    return list(read_preferences(given, settings["reward.score_scale"]))


def _counts(sample: Completion) -> Counter[str]:
    words = _WORD.findall(f"{sample.input} {sample.text}".lower())
    return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))


def _tfidf(documents: Iterable[Mapping[str, int]], terms: Mapping[str, int], idf: Tensor) -> Tensor:
    """(1 + log count) * idf, each document scaled to length 1, sparse; terms that are not known are left out."""
    entries, size = [], 0
    for size, counts in enumerate(documents, start=1):
        entries += [(size - 1, terms[term], count) for term, count in counts.items() if term in terms]
    rows, columns, numbers = torch.tensor(entries, dtype=torch.int64).view(-1, 3).unbind(1)
    values = (1 + numbers.double().log()) * idf[columns]
    lengths = torch.zeros(size, dtype=torch.float64).index_add(0, rows, values.square()).sqrt()
    return _sparse(rows, columns, values / lengths[rows], (size, len(terms)))


def _rows(records: Sequence[Record], documents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the regression in terms of documents, sparse; their targets and weights."""
    scores = torch.tensor([record.score for record in records if isinstance(record, Score)]).double()
    mean, std = (float(scores.mean()), float(scores.std(correction=0))) if len(scores) else (0.0, 1.0)
    given = judgements(records, mean, std or 1.0)
    scored, pairs = len(given.scored_S), len(given.winners_P)
    rows = torch.arange(scored + pairs)
    columns = torch.cat((given.scored_S, given.winners_P, given.losers_P))
    signs = torch.cat((torch.ones(scored + pairs), -torch.ones(pairs))).double()
    matrix = _sparse(torch.cat((rows, rows[scored:])), columns, signs, (scored + pairs, documents))
    targets = torch.cat((given.targets_S, 2 * given.labels_P - 1)).double()
    return matrix, targets, torch.cat((given.weights_S, given.weights_P)).double()


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack((rows, columns)), values, shape, check_invariants=True).coalesce()


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    product: Tensor = torch.sparse.mm(matrix, vector[:, None])
    return product[:, 0]


def _conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """x with product(x) = target, for a symmetric positive definite matrix (Hestenes and Stiefel 1952)."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), float(residual @ residual)
    least = _TOLERANCE**2 * square
    for _ in range(_ITERATIONS):
        if square <= least:
            break
        image = product(direction)
        step = square / float(direction @ image)
        x, residual = x + step * direction, residual - step * image
        previous, square = square, float(residual @ residual)
        direction = residual + square / previous * direction
    return x
