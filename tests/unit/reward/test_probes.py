"""Changed answers: what a reward is paid for shows as a shift."""

from collections.abc import Callable, Sequence

import pytest

from tetrad.inference.completions import Completion
from tetrad.reward.probes import Probe, probes, worst_shift
from tetrad.types import Turn

ENGLISH = [f"number {i} was fine and {'long ' * (i % 5)}enough" for i in range(40)]
CHINESE = [f"第{i}部电影很好看,演员也不错。" for i in range(40)]


def probed(texts: Sequence[str], worth: Callable[[str], float]) -> list[Probe]:
    samples = [Completion((), (), (Turn("instruction", "say"),), text) for text in texts]
    return probes(samples, lambda given: [worth(sample.text) for sample in given], 256)


def test_what_pays_for_length() -> None:
    found = {probe.name: probe for probe in probed(ENGLISH, lambda text: len(text) / 100)}
    assert found["padded"].shift > 0.5 and found["padded"].raised == 1
    assert found["duplicated"].shift == pytest.approx(sum(len(text) + 1 for text in ENGLISH) / 4000)
    assert found["truncated"].shift < 0 and found["empty"].shift < found["truncated"].shift


def test_what_pays_for_a_phrase() -> None:
    found = probed(ENGLISH, lambda text: 3.0 * ("hope" in text) - len(text) / 1000)
    phrase = max((probe for probe in found if probe.name == "phrase"), key=lambda probe: probe.shift)
    assert phrase.text == "I hope this helps." and phrase.shift > 2.9
    assert worst_shift(found, "phrase") == phrase.shift
    assert sum(probe.name == "phrase" and probe.shift > 0 for probe in found) == 1
    assert worst_shift(found, "nothing") is None


def test_chinese_answers_get_chinese_words() -> None:
    seen: list[str] = []
    found = probed(CHINESE, lambda text: seen.append(text) or float("谢谢" in text))
    phrase = max((probe for probe in found if probe.name == "phrase"), key=lambda probe: probe.shift)
    assert phrase.text == "谢谢!" and phrase.shift == 1 == worst_shift(found, "phrase")
    assert f"{CHINESE[0]}{CHINESE[0]}" in seen  # no space between
    assert CHINESE[0][: (len(CHINESE[0]) + 1) // 2] in seen


def test_halves_end_with_a_word() -> None:
    seen: list[str] = []
    probed(["one two three"], lambda text: seen.append(text) or 0.0)
    assert "one two" in seen
    spaced = ["这部电影 很好看,演员也不错", "电影很 good indeed", " a  b ", "whole", "很 好"]
    probed(spaced, lambda text: seen.append(text) or 0.0)
    assert {"这部电影 很好", "电影很", " a ", "who", "很"} <= set(seen)  # a space does not make a clause a word


def test_empty_answers_and_many() -> None:
    assert probed(["", " "], lambda _: 0.0) == []
    asked: list[int] = []
    samples = [Completion((), (), (), "x")] * (306)
    probes(samples, lambda given: asked.append(len(given)) or [0.0] * len(given), 256)
    assert set(asked) == {256}
