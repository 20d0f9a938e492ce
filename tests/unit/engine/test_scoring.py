"""Rewards: what a sample says of itself, Python functions that misbehave, a trained model on ids."""

from dataclasses import replace

import pytest

import toys
from tetrad.engine.scoring import Sample, best, joined, python_function, score_tokens, trained
from tetrad.errors import UserError
from tetrad.types import Turn

SAMPLES = [
    Sample((3, 4), (5, 6), (Turn("instruction", "Do it."), Turn("input", "this")), "done", "a.jsonl:1"),
    Sample((3,), (7,), (Turn("instruction", "Do it."),), "so", "a.jsonl:2"),
    Sample((3,), (8,), (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v")), "ho"),
]


def function(tmp_path, body, name="f"):
    (tmp_path / "judge.py").write_text(body)
    return f"{tmp_path / 'judge.py'}:{name}"


def refused(make, code):
    with pytest.raises(UserError) as raised:
        make()
    assert raised.value.code == code
    return raised.value


def test_what_was_asked():
    assert [sample.asked for sample in SAMPLES] == ["this", "", "v"]
    assert [sample.prompt for sample in SAMPLES] == ["Do it.\nthis", "Do it.", "s\nu\na\nv"]


def test_a_python_function(tmp_path):
    told = {"prompt": "Do it.\nthis", "input": "this", "text": "done", "ids": list(SAMPLES[0].reply_ids), "ended": True}
    body = f"def f(samples):\n    assert samples[0] == {told!r}\n"
    reward = python_function(function(tmp_path, body + "    return [len(s['text']) for s in samples]\n"))
    assert reward(SAMPLES) == [4.0, 2.0, 2.0]


def test_numpy_and_helpers_of_its_own(tmp_path):
    """A file may be any module: constants, helpers, dataclasses with postponed annotations."""
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\n"
        "@dataclass\nclass Word:\n    text: str\n    weight: float = 1.0\n"
        "WORDS = [Word('o', 2.0)]\ndef f(samples):\n"
        "    return np.array([sum(w.weight * s['text'].count(w.text) for w in WORDS) for s in samples])"
    )
    assert python_function(function(tmp_path, body))(SAMPLES) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "3 samples went in, 1 numbers came out"),
        ("return [1.0] * 4", "4 numbers came out"),
        ("return [1.0, float('nan'), 2.0]", "a.jsonl:2"),
        ("return [1.0, 2.0, float('inf')]", "inf"),
        ("return [1.0, 'x', 2.0]", "ValueError"),
        ("return None", "TypeError"),
        ("return samples[99]", "IndexError"),
    ],
)
def test_what_a_function_must_not_return(tmp_path, body, said):
    spec = function(tmp_path, f"def f(samples):\n    {body}\n")
    error = refused(lambda: python_function(spec)(SAMPLES), "E-NUM-REWARD")
    assert error.where == spec
    assert said in error.what


@pytest.mark.parametrize(
    ("spec", "body"),
    [
        ("none.py:f", ""),
        ("judge.py", "def f(s): return []"),
        ("judge.py:g", "def f(s): return []"),
        ("judge.py:f", "def f(s) return []"),
        ("judge.py:f", "import no_such_module"),
        ("judge.py:f", "1 / 0"),
        ("judge.txt:f", ""),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, spec, body):
    function(tmp_path, body)
    (tmp_path / "judge.txt").write_text("def f(s): return []")
    error = refused(lambda: python_function(f"{tmp_path}/{spec}"), "E-CONF-FUNCTION")
    assert error.hint


def test_joined():
    first = joined(SAMPLES)[0]
    assert first.ids.tolist() == [3, 4, 5, 6]
    assert not first.train.any()


def test_a_trained_model_keeps_the_order():
    """Documents are read by length, scores come back in their own order."""
    model = toys.scalar(seed=1)
    reward = trained([model], toys.CPU, 8)
    assert reward(SAMPLES) == pytest.approx([reward([sample])[0] for sample in SAMPLES], abs=1e-6)
    assert len({round(score, 4) for score in reward(SAMPLES)}) == 3
    assert score_tokens(model, [], toys.CPU, 8) == []


def test_the_best_of_several():
    """The first of the highest; what is not valid UTF-8 only where nothing else is."""
    valid = [SAMPLES[0], SAMPLES[1], SAMPLES[2]]
    assert best(valid, [1.0, 2.0, 2.0]) == 1
    broken = [replace(sample, valid_utf8=False) for sample in valid]
    assert best([valid[0], broken[1], valid[2]], [-3.0, 9.0, -2.0]) == 2
    assert best(broken, [1.0, 3.0, 2.0]) == 1
