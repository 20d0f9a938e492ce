"""Which regular expressions of a tokenizer are refused."""

import pytest

from tetrad.text.bpe import QWEN2
from tetrad.text.patterns import LONGEST, may_explode, patterns

IN_USE = [
    QWEN2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}",
    r"[一-龥ࠀ-一가-퟿]+",
    r"(?:[A-Z](?![a-z]))+",
    r"(?:a++b)+",
    r"(a+){3}b",
    r"\(a+\)+",
    r"[(a+)]+",
]


@pytest.mark.parametrize("pattern", IN_USE)
def test_patterns_in_use(pattern: str) -> None:
    assert not may_explode(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", r"(\w+\s?)+$", "(x+x+)+y", "(?:(a*)b)*", "([a-z]+){2,}", "((a+)?)+", "(a+){3}+", "(a|b*)+", "(a{1,})*"],
)
def test_a_repeat_inside_a_repeat(pattern: str) -> None:
    assert may_explode(pattern)


@pytest.mark.parametrize("pattern", ["", "(", ")", "[", "\\", "{", "a{", "((((", "))))", "[[]", "(a+", "{,}"])
def test_broken_patterns_are_the_librarys(pattern: str) -> None:
    assert not may_explode(pattern)


def test_length() -> None:
    assert not may_explode("a" * LONGEST)
    assert may_explode("a" * (LONGEST + 1))


def test_where_they_stand() -> None:
    spec = {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "a"}},
        "pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": "b"}}, {"pattern": {"String": "c"}}]},
        "model": {"vocab": {"Regex": 0}},
    }
    assert sorted(patterns(spec)) == ["a", "b"]
