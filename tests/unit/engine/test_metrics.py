"""Figures about sets of replies, by hand."""

import pytest

from tetrad.engine.metrics import commonest_word, distinct_2, reply_figures
from tetrad.engine.scoring import Sample


def test_distinct_2() -> None:
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)  # (1,2) three times, (2,1) once
    assert distinct_2([[5], []]) == 0


def test_commonest_word_counts_texts_not_words() -> None:
    assert commonest_word(["great great great", "Great film", "a moving story", "moving"]) == ("moving", 0.5)
    assert commonest_word(["a bad day", "1234567"]) == ("", 0.0)


def test_reply_figures() -> None:
    samples = [
        Sample((1,), (2, 3), (), "lovely thing"),
        Sample((1,), (2, 3, 4, 5), (), "lovely\ufffd", valid_utf8=False),
    ]
    found = reply_figures(samples, [True, False])
    assert found == {"length": 3, "ended": 0.5, "invalid_utf8": 0.5, "distinct_2": 3 / 4, "commonest_word": 1}
