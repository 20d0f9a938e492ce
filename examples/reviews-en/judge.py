"""Two judges that no model is trained on: `ridge` and `lexicon`. Both read whole sentences, prompt and reply.

ridge    linear regression on TF-IDF of words and word pairs, fitted on the human ratings of the valid and test
         sentences alone. The reward model learns from the train sentences, so the two share no rating. The answer is in
         rating points; people's scale is -4..4, and more than that means a text unlike anything people rated.
lexicon  the compound score (-1..1) of the VADER word list and rules; it has seen none of these ratings.

A pile of praising words fools both: read them beside KL, length, distinct pairs and the guard language model.
`python judge.py` prints how well they agree with people. Needs numpy and what fetch.py puts into `data/`.
"""

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parent / "data"
PENALTY = 0.2  # by cross-validation on the valid + test ratings (`tune`): within 0.1 % of the least error, slope 1.00
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*|[!?]")
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
class Ridge:
    """A fitted regression: rating = base + weights . tfidf(text)."""

    vocabulary: Mapping[str, int]
    idf: Numbers
    weights: Numbers
    base: float

    def predict(self, texts: Sequence[str]) -> Numbers:
        """Ratings, one a text."""
        return self.base + tfidf([terms(text) for text in texts], self.vocabulary, self.idf).times(self.weights)


# --- the judges -------------------------------------------------------------------------------------------------------


def ridge(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rating points per sample, a dict with `input` (its first words) and `text` (the reply)."""
    return [float(x) for x in judge_model().predict([sentence(sample) for sample in samples])]


def ridge_baseline(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The same ridge fitted on the train ratings: what to hold a reward model against, on test sentences."""
    return [float(x) for x in baseline_model().predict([sentence(sample) for sample in samples])]


def lexicon(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Compound scores, -1..1."""
    analyzer = lexicon_analyzer()
    return [float(analyzer(sentence(sample))["compound"]) for sample in samples]


def sentence(sample: Mapping[str, Any]) -> str:
    """The whole sentence: prompt and reply with one space between."""
    return " ".join(f"{sample['input']} {sample['text']}".split())


@cache
def judge_model() -> Ridge:
    """The ridge of the valid and test ratings."""
    return fit_ridge(*ratings(("valid", "test")), PENALTY)


@cache
def baseline_model() -> Ridge:
    """The ridge of the train ratings."""
    return fit_ridge(*ratings(("train",)), PENALTY)


@cache
def lexicon_analyzer() -> Callable[[str], Mapping[str, float]]:
    """polarity_scores of the package that fetch.py unpacked to data/vader, imported from there."""
    folder = DATA / "vader"
    spec = importlib.util.spec_from_file_location(
        "reviews_vader", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not folder.is_dir() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"{folder} is missing: run fetch.py first")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Callable[[str], Mapping[str, float]] = module.polarity_scores
    return found


# --- ratings and features ---------------------------------------------------------------------------------------------


def ratings(splits: Sequence[str], kinds: Sequence[str] = ()) -> tuple[list[str], Numbers]:
    """Sentences and mean human ratings of these splits; of all kinds where none are named."""
    path = DATA / "ratings.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run fetch.py first")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["split"] in splits and (not kinds or row["kind"] in kinds)]
    return [row["text"] for row in rows], np.array([row["score"] for row in rows], np.float64)


def terms(text: str) -> Counter[str]:
    """Words and pairs of neighbouring words, in lower case, with their counts."""
    words = WORD.findall(text.lower())
    return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))


def tfidf(counts: Sequence[Mapping[str, int]], vocabulary: Mapping[str, int], idf: Numbers) -> Rows:
    """(1 + log count) * idf, each row scaled to length 1; unknown terms are left out."""
    found = [(i, vocabulary[term], n) for i, row in enumerate(counts) for term, n in row.items() if term in vocabulary]
    rows, columns, numbers = np.array(found, np.int64).reshape(-1, 3).T
    values = (1 + np.log(numbers)) * idf[columns]
    length = np.sqrt(sums(rows, values**2, len(counts)))
    return Rows(rows, columns, values / length[rows], (len(counts), len(vocabulary)))


def fit_ridge(texts: Sequence[str], scores: Numbers, penalty: float) -> Ridge:
    """Least squares with `penalty` times the squared weights, by conjugate gradients (Hestenes & Stiefel 1952)."""
    counts = [terms(text) for text in texts]
    seen = Counter(term for row in counts for term in row)
    vocabulary = {term: i for i, term in enumerate(sorted(seen))}
    idf = np.log((1 + len(texts)) / (1 + np.array([seen[term] for term in vocabulary], np.float64))) + 1
    x, base = tfidf(counts, vocabulary, idf), float(scores.mean())
    weights = solve(lambda w: x.transposed_times(x.times(w)) + penalty * w, x.transposed_times(scores - base))
    return Ridge(vocabulary, idf, weights, base)


def solve(times: Callable[[Numbers], Numbers], target: Numbers, tolerance: float = 1e-6) -> Numbers:
    """x with times(x) = target, for a symmetric positive definite `times`."""
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


# --- agreement with people --------------------------------------------------------------------------------------------


def spearman(a: Numbers, b: Numbers) -> float:
    """Rank correlation; equal numbers share their mean rank."""
    return float(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1])


def mean_ranks(numbers: Numbers) -> Numbers:
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pair_accuracy(guess: Numbers, scores: Numbers, apart: float = 0.5) -> float:
    """Share of the pairs whose ratings differ by `apart` or more that `guess` orders rightly; a tie counts half."""
    right, pairs = 0.0, 0
    for i in range(len(scores)):
        above = scores[i] - scores >= apart
        gap = guess[i] - guess[above]
        right += float((gap > 0).sum() + 0.5 * (gap == 0).sum())
        pairs += int(above.sum())
    return right / pairs


def agreement(guess: Numbers, scores: Numbers) -> dict[str, float]:
    return {"spearman": spearman(guess, scores), "pair_accuracy": pair_accuracy(guess, scores)}


def cross_validated(penalty: float = PENALTY, folds: int = 5, kinds: Sequence[str] = ()) -> dict[str, float]:
    """Agreement of the judge with ratings that it was not fitted on."""
    texts, scores = ratings(("valid", "test"), kinds)
    fold = np.random.default_rng(0).permutation(len(texts)) % folds
    guess = np.empty(len(texts))
    for k in range(folds):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        model = fit_ridge([texts[i] for i in inside], scores[inside], penalty)
        guess[outside] = model.predict([texts[i] for i in outside])
    error, slope = float(np.sqrt(np.mean((guess - scores) ** 2))), float(np.polyfit(guess, scores, 1)[0])
    return agreement(guess, scores) | {"error": error, "slope": slope}


def tune(penalties: Iterable[float] = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)) -> dict[float, dict[str, float]]:
    """Cross-validated agreement, root mean squared error and slope (1: its points are people's points) by penalty."""
    return {penalty: cross_validated(penalty) for penalty in penalties}


def main() -> None:
    """Print the agreement of both judges and of the baseline."""
    texts, scores = ratings(("test",))
    samples = [{"input": "", "text": text} for text in texts]
    rows = {
        "judge ridge, cross-validated": cross_validated(),
        "lexicon": agreement(np.array(lexicon(samples)), scores),
        "baseline": agreement(np.array(ridge_baseline(samples)), scores),
    }
    for name, row in rows.items():
        print(f"{name:>30}  Spearman {row['spearman']:.3f}  pair accuracy {row['pair_accuracy']:.3f}")


if __name__ == "__main__":
    main()
