"""What is said about a set of replies: how they differ, how long they are, how they end."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tetrad.engine.scoring import Sample

_WORD = re.compile(r"[^\W\d_]{5,}")


def distinct_2(replies: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens as a share of all (Li et al. 2016). Compare equal numbers of replies."""
    pairs = [pair for ids in replies for pair in pairwise(ids)]
    return len(set(pairs)) / max(1, len(pairs))


def commonest_word(texts: Sequence[str]) -> tuple[str, float]:
    """The word of at least five letters that most texts hold, and the share of texts that hold it."""
    found = Counter(word for text in texts for word in set(_WORD.findall(text.lower())))
    if not found:
        return "", 0.0
    word, count = max(found.items(), key=lambda item: (item[1], item[0]))
    return word, count / len(texts)


def reply_figures(samples: Sequence[Sample], ended: Sequence[bool]) -> dict[str, float]:
    """Mean length in tokens, share that ended by itself, that is not valid UTF-8, distinct-2, share of answers with the
    commonest word."""
    n = max(1, len(samples))
    return {
        "length": sum(len(s.reply_ids) for s in samples) / n,
        "ended": sum(ended) / n,
        "invalid_utf8": sum(not s.valid_utf8 for s in samples) / n,
        "distinct_2": distinct_2([s.reply_ids for s in samples]),
        "commonest_word": commonest_word([s.text for s in samples])[1],
    }
