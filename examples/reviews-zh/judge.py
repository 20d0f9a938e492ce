"""The judge that no model is trained on: `linear`. It reads whole reviews, prompt and reply.

linear    linear regression on TF-IDF of single characters, pairs and triples, fitted on the verdicts (1 good, -1 bad)
          of the valid and test reviews alone. The reward model learns from the train reviews, so the two share none.
baseline  the same fitted on the train reviews: what to hold a reward model against, on test reviews.

A pile of praising words fools both: read them beside KL, length, distinct pairs and the share of ended replies.
`python judge.py` prints how well they agree with the verdicts. Needs numpy and what fetch.py puts into `data/`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parent / "data"
PENALTY = 0.5  # by cross-validation on the valid + test verdicts (`tune`): the least error
LONGEST = 3  # characters of a term
Numbers = NDArray[np.float64]


def sums(places: NDArray[np.int64], numbers: Numbers, size: int) -> Numbers:
    """Sums of the numbers that share a place, for the places 0..size-1."""
    return np.bincount(places, numbers, minlength=size).astype(np.float64)


@dataclass(frozen=True)
class Rows:
    """A sparse matrix: row i has `values[k]` in column `columns[k]` for every k with rows[k] = i."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Numbers
    shape: tuple[int, int]

    def times(self, weights: Numbers) -> Numbers:
        """This matrix times a vector with one number a column."""
        return sums(self.rows, self.values * weights[self.columns], self.shape[0])

    def transposed_times(self, numbers: Numbers) -> Numbers:
        """Its transpose times a vector with one number a row."""
        return sums(self.columns, self.values * numbers[self.rows], self.shape[1])


@dataclass(frozen=True)
class Linear:
    """A fitted regression: verdict = base + weights . tfidf(text)."""

    vocabulary: Mapping[str, int]
    idf: Numbers
    weights: Numbers
    base: float

    def predict(self, texts: Sequence[str]) -> Numbers:
        """One number a text, about -1 to 1."""
        return self.base + tfidf([terms(text) for text in texts], self.vocabulary, self.idf).times(self.weights)


# --- the judges -------------------------------------------------------------------------------------------------------


def linear(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Verdicts per sample, a dict with `input` (its first characters) and `text` (the reply)."""
    return [float(x) for x in fitted(("valid", "test")).predict([whole(sample) for sample in samples])]


def baseline(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The same of the train reviews."""
    return [float(x) for x in fitted(("train",)).predict([whole(sample) for sample in samples])]


def whole(sample: Mapping[str, Any]) -> str:
    """The whole review: prompt and reply, with nothing between."""
    return f"{sample['input']}{sample['text']}"


@cache
def fitted(splits: tuple[str, ...]) -> Linear:
    """The regression of these splits."""
    return fit(*verdicts(splits), PENALTY)


# --- reviews and features ---------------------------------------------------------------------------------------------


def verdicts(splits: Sequence[str]) -> tuple[list[str], Numbers]:
    """Reviews of these splits and their verdicts."""
    path = DATA / "verdicts.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run fetch.py first")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["split"] in splits]
    return [row["text"] for row in rows], np.array([row["score"] for row in rows], np.float64)


def terms(text: str) -> Counter[str]:
    """Runs of one to three characters, in lower case and without spaces, with their counts."""
    text = "".join(text.lower().split())
    return Counter(text[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


def tfidf(counts: Sequence[Mapping[str, int]], vocabulary: Mapping[str, int], idf: Numbers) -> Rows:
    """(1 + log count) * idf, each row scaled to length 1; unknown terms are left out."""
    found = [(i, vocabulary[term], n) for i, row in enumerate(counts) for term, n in row.items() if term in vocabulary]
    rows, columns, numbers = np.array(found, np.int64).reshape(-1, 3).T
    values = (1 + np.log(numbers)) * idf[columns]
    length = np.sqrt(sums(rows, values**2, len(counts)))
    return Rows(rows, columns, values / length[rows], (len(counts), len(vocabulary)))


def fit(texts: Sequence[str], targets: Numbers, penalty: float) -> Linear:
    """Least squares with `penalty` times the squared weights; terms of a single text are left out."""
    counts = [terms(text) for text in texts]
    seen = Counter(term for row in counts for term in row)
    vocabulary = {term: i for i, term in enumerate(sorted(term for term, n in seen.items() if n > 1))}
    idf = np.log((1 + len(texts)) / (1 + np.array([seen[term] for term in vocabulary], np.float64))) + 1
    x, base = tfidf(counts, vocabulary, idf), float(targets.mean())
    weights = solve(lambda w: x.transposed_times(x.times(w)) + penalty * w, x.transposed_times(targets - base))
    return Linear(vocabulary, idf, weights, base)


def solve(times: Callable[[Numbers], Numbers], target: Numbers, tolerance: float = 1e-4) -> Numbers:
    """x with times(x) = target, for a symmetric positive definite `times`: conjugate gradients (Hestenes 1952)."""
    x, residual = np.zeros_like(target), target.copy()
    direction, old = residual.copy(), float(residual @ residual)
    stop = tolerance**2 * old
    for _ in range(1000):
        if old <= stop:
            break
        image = times(direction)
        step = old / float(direction @ image)
        x, residual = x + step * direction, residual - step * image
        new = float(residual @ residual)
        direction, old = residual + new / old * direction, new
    return x


# --- agreement with the verdicts --------------------------------------------------------------------------------------


def agreement(guess: Numbers, verdict: Numbers) -> dict[str, float]:
    """Share of all pairs of a good and a bad review in order (a tie counts half), and of verdicts that are right."""
    gaps = guess[verdict > 0][:, None] - guess[verdict < 0][None, :]
    return {"pairs": float(((np.sign(gaps) + 1) / 2).mean()), "right": float((np.sign(guess) == verdict).mean())}


def cross_validated(penalty: float = PENALTY, folds: int = 5) -> dict[str, float]:
    """Agreement of the judge with verdicts that it was not fitted on, and its squared error."""
    texts, verdict = verdicts(("valid", "test"))
    fold = np.random.default_rng(0).permutation(len(texts)) % folds
    guess = np.empty(len(texts))
    for k in range(folds):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        guess[outside] = fit([texts[i] for i in inside], verdict[inside], penalty).predict([texts[i] for i in outside])
    return agreement(guess, verdict) | {"error": float(np.mean((guess - verdict) ** 2))}


def tune(penalties: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0)) -> dict[float, dict[str, float]]:
    """Cross-validated figures by penalty."""
    return {penalty: cross_validated(penalty) for penalty in penalties}


def main() -> None:
    """Print the agreement of the judge and of the baseline."""
    texts, verdict = verdicts(("test",))
    guess = np.array(baseline([{"input": "", "text": text} for text in texts]))
    rows = {"judge, cross-validated": cross_validated(), "baseline, on test": agreement(guess, verdict)}
    for name, row in rows.items():
        print(f"{name:>24}  pairs in order {row['pairs']:.3f}  verdicts right {row['right']:.3f}")


if __name__ == "__main__":
    main()
