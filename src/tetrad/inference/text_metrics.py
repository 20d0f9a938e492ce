"""Metrics of a set of responses: how they differ, how long they are, how they end."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tetrad.inference.completions import Completion

# Han, kana and Hangul, with the marks 々 and 〇.
_CJK = (
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u1100-\u11ff\uac00-\ud7af"
)
_RUN = re.compile(rf"([{_CJK}]+)|([^\W\d_{_CJK}]{{5,}})")


def distinct_2(responses: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens as a share of all (Li et al. 2016). Compare equal numbers of responses."""
    pairs = [pair for ids in responses for pair in pairwise(ids)]
    return len(set(pairs)) / max(1, len(pairs))


def words(text: str) -> set[str]:
    """The different words of a text: runs of at least five letters and, of Chinese, Japanese and Korean, each pair of
    neighbouring characters (a single one is a word itself), as search engines index them."""
    runs = _RUN.findall(text.lower())
    pairs = {cjk[at : at + 2] for cjk, _ in runs for at in range(max(1, len(cjk) - 1))}
    return (pairs | {letters for _, letters in runs}) - {""}


def commonest_word(texts: Sequence[str]) -> tuple[str, float]:
    """The word that most texts contain, and the share of texts that contain it."""
    counts = Counter(word for text in texts for word in words(text))
    if not counts:
        return "", 0.0
    word, count = max(counts.items(), key=lambda item: (item[1], item[0]))
    return word, count / len(texts)


def response_metrics(samples: Sequence[Completion]) -> dict[str, float]:
    """Mean length in tokens, shares that ended by themselves and that are not valid UTF-8, distinct-2, share of answers
    with the commonest word."""
    n = max(1, len(samples))
    return {
        "length": sum(len(s.response_ids) for s in samples) / n,
        "finished": sum(s.finished for s in samples) / n,
        "invalid_utf8": sum(not s.valid_utf8 for s in samples) / n,
        "distinct_2": distinct_2([s.response_ids for s in samples]),
        "commonest_word": commonest_word([s.text for s in samples])[1],
    }
