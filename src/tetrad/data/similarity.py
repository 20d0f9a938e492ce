"""How similar texts are, by counting alone: their words and short runs of letters, hashed into signed buckets and
weighted by rarity; no model is used."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Rows = np.ndarray[Any, np.dtype[np.float32]]
PLACES = 1024
BLOCK = 512  # rows at once: what is computed of all of them together would need a multiple of their memory
MOST = 20_000  # texts that are compared
LONGEST = 20_000  # characters of a text that are compared, counted and classified
_PIECE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W_]+")


def features(text: str) -> list[int]:
    """The hashed features of a text: words, bigrams and word prefixes; Han characters count as words."""
    words = _PIECE.findall(text[:LONGEST].lower())
    pieces = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    pieces += [f"^{word[:4]}" for word in words if len(word) > 4]
    return [zlib.crc32(piece.encode(errors="surrogatepass")) for piece in pieces]


class Texts:
    """Texts as rows of unit length, [n, PLACES] float32, whose dot products are the similarities of the texts; equal
    texts are computed once."""

    def __init__(self, texts: Sequence[str], weights: Rows | None = None) -> None:
        different = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        rows = np.zeros((len(different), PLACES), np.float32)
        for text, i in different.items():
            hashed = np.array(features(text), np.int64)
            signs = np.where(hashed >> 31 & 1, 1.0, -1.0).astype(np.float32)
            np.add.at(rows[i], hashed % PLACES, signs)
        np.clip(rows, -1, 1, out=rows)  # counts count once
        rare = np.log((1 + len(rows)) / (1 + (rows != 0).sum(0))) + 1
        self.weights: Rows = rare.astype(np.float32) if weights is None else weights
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            block *= self.weights
            block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-9)
        self.rows: Rows = rows if len(rows) == len(texts) else rows[[different[text] for text in texts]]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced from first to last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


@dataclass(frozen=True)
class Coverage:
    """How close new texts are to known ones. each: a text's similarity to its nearest; nearest: their median; usual:
    the same of known texts among themselves, of which 95 % are closer than `limit`; far: the share of new ones that
    are not; farthest: the farthest new text."""

    each: Rows
    nearest: float
    usual: float
    limit: float
    far: float
    farthest: str


def covered(new: Sequence[str], known: Sequence[str]) -> Coverage | None:
    """Whether new texts lie where the known ones do; None where there are fewer than ten of either."""
    new, known = (spread(list(dict.fromkeys(texts)), MOST // 2) for texts in (new, known))
    if len(new) < 10 or len(known) < 10:
        return None
    base = Texts(known)
    usual = _nearest(base.rows, base.rows, itself=True)
    each = _nearest(Texts(new, base.weights).rows, base.rows, itself=False)
    limit = float(np.quantile(usual, 0.05))
    far = float((each < limit - 1e-6).mean())
    farthest = new[int(each.argmin())]
    return Coverage(each, float(np.median(each)), float(np.median(usual)), limit, far, farthest)


def _nearest(rows: Rows, others: Rows, *, itself: bool) -> Rows:
    """Each row's largest dot product with another. itself: the rows are the others, and none is its own neighbour."""
    best = []
    for start in range(0, len(rows), BLOCK):
        alike = rows[start : start + BLOCK] @ others.T
        if itself:
            alike[np.arange(len(alike)), np.arange(start, start + len(alike))] = -1
        best.append(alike.max(1))
    return np.concatenate(best)
