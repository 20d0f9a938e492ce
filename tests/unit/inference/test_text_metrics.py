"""Figures about sets of replies, by hand."""

import pytest

from tetrad.inference.completions import Completion
from tetrad.inference.text_metrics import commonest_word, distinct_2, response_metrics


def test_distinct_2() -> None:
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)  # (1,2) three times, (2,1) once
    assert distinct_2([[5], []]) == 0


def test_commonest_word_counts_texts_not_words() -> None:
    assert commonest_word(["great great great", "Great film", "a moving story", "moving"]) == ("moving", 0.5)
    assert commonest_word(["a bad day", "1234567"]) == ("", 0.0)


@pytest.mark.parametrize(
    ("texts", "word", "share"),
    [
        (["这部电影很好看,很感人", "电影不错", "很好看!"], "电影", 2 / 3),
        (["好!好!好!", "真好。好"], "好", 1.0),
        (["映画はとても良い", "良い映画"], "良い", 1.0),
        (["영화가 좋았다", "좋은 영화"], "영화", 1.0),
        (["这film电影", "film电影"], "电影", 1.0),
        (["a moving电影", "a film, moving"], "moving", 1.0),
        (["𠮷野家", "𠮷野"], "𠮷野", 1.0),
        (["123 4567", "。。。"], "", 0.0),
    ],
    ids=lambda value: str(value),
)
def test_a_word_of_text_without_spaces_is_a_pair_of_characters(texts: list[str], word: str, share: float) -> None:
    """By spaces and punctuation alone a whole clause would be one word, which no other text holds."""
    assert commonest_word(texts) == (word, pytest.approx(share))


def test_reply_figures() -> None:
    samples = [
        Completion((1,), (2, 3), (), "lovely thing"),
        Completion((1,), (2, 3, 4, 5), (), "lovely\ufffd", finished=False, valid_utf8=False),
    ]
    found = response_metrics(samples)
    assert found == {"length": 3, "finished": 0.5, "invalid_utf8": 0.5, "distinct_2": 3 / 4, "commonest_word": 1}
