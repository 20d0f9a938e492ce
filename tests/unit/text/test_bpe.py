"""A learned tokenizer loses nothing, repeats, and says how well it fits."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tetrad.errors import UserError
from tetrad.text import bpe

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！" * 4,
    "a\nb\r\n\tc 12345",
]


@pytest.fixture(scope="module")
def learned():
    return bpe.learn(TEXTS * 3, 320)


def test_sizes_and_controls(learned):
    assert 261 < learned.size <= 320
    ids = [learned.control(name) for name in bpe.CONTROLS]
    assert ids == list(range(learned.size - 5, learned.size))
    assert learned.eos_ids == (learned.control("<|endoftext|>"),)
    assert learned.pad_id == learned.control("<|pad|>")


def test_learning_repeats(learned):
    assert bpe.learn(iter(TEXTS * 3), 320).fingerprint == learned.fingerprint
    assert bpe.learn(iter(TEXTS[:1]), 320).fingerprint != learned.fingerprint


@given(st.text())
@example("cafe\u0301 ㍿")
def test_any_text_comes_back(text):
    tokenizer = bpe.learn(TEXTS, 300)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_numbers_are_single_digits(learned):
    assert len(learned.encode("12345")) == 5


def test_min_frequency():
    assert bpe.learn(["abcabc abd"], 400, min_frequency=50).size == bpe.SMALLEST


def test_max_bytes_reads_no_further():
    def texts():
        yield "abc " * 10
        yield "def " * 10
        raise AssertionError("read too far")

    tokenizer = bpe.learn(texts(), 300, max_bytes=50)
    assert len(tokenizer.encode("abc")) == 1 and len(tokenizer.encode("def")) == 3


def test_report(learned):
    text = "狐狸鑫"
    report = bpe.report(learned, [text, text])
    assert report.characters == 6 and report.han == 3
    assert report.tokens == 2 * len(learned.encode(text))
    singles = sum(len(learned.encode(c)) == 1 for c in text)
    assert report.single_han == singles / 3
    assert report.characters_per_token == 6 / report.tokens


def test_refusals():
    with pytest.raises(UserError, match=r"E-CONF-RANGE.*at least 261"):
        bpe.learn(TEXTS, 260)
    for nothing in ([], [""], ["", ""]):
        with pytest.raises(UserError, match="E-DATA-EMPTY"):
            bpe.learn(nothing, 300)
