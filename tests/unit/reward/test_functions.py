"""Rewards: what a sample says of itself, Python functions that misbehave, a trained model on ids."""

import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch

import toys
from tetrad.errors import Stopped, UserError
from tetrad.inference.completions import Completion, best
from tetrad.reward.functions import python_function
from tetrad.reward.model import documents_from_ids, reward_function, score_sequences
from tetrad.types import Turn

SAMPLES = [
    Completion((3, 4), (5, 6), (Turn("instruction", "Do it."), Turn("input", "this")), "done", "a.jsonl:1"),
    Completion((3,), (7,), (Turn("instruction", "Do it."),), "so", "a.jsonl:2"),
    Completion((3,), (8,), (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v")), "ho"),
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
    assert [sample.input for sample in SAMPLES] == ["this", "", "v"]
    assert [sample.prompt for sample in SAMPLES] == ["Do it.\nthis", "Do it.", "s\nu\na\nv"]


def test_a_python_function(tmp_path):
    told = {
        "prompt": "Do it.\nthis",
        "input": "this",
        "text": "done",
        "messages": [{"role": turn.role, "content": turn.text} for turn in SAMPLES[0].turns],
        "prompt_ids": list(SAMPLES[0].prompt_ids),
        "ids": list(SAMPLES[0].response_ids),
        "finished": True,
    }
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
        ("return [10**400] * 3", "OverflowError"),
        ("return ({} for _ in samples)", "TypeError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise BaseExceptionGroup('all', [SystemExit(0)])", "BaseExceptionGroup"),
        ("class Own(BaseException): pass\n    raise Own('mine')", "Own: mine"),
    ],
)
def test_what_a_function_must_not_do(tmp_path, body, said):
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
        ("judge.py:f", "raise SystemExit(0)"),
        ("judge.py:f", "import sys; sys.exit()"),
        ("judge.py:f", "raise GeneratorExit"),
        ("judge.txt:f", ""),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, spec, body):
    function(tmp_path, body)
    (tmp_path / "judge.txt").write_text("def f(s): return []")
    error = refused(lambda: python_function(f"{tmp_path}/{spec}"), "E-CONF-FUNCTION")
    assert error.hint


@pytest.mark.parametrize(
    "scores",
    [
        "(float(len(s['text'])) for s in samples)",
        "torch.tensor([4, 2, 2], dtype=torch.bfloat16)",
        "['4', '2.0', '2']",
        "map(len, (s['text'] for s in samples))",
        "(4, 2.0, True + True)",
    ],
)
def test_whatever_is_one_number_each(tmp_path, scores):
    assert python_function(function(tmp_path, f"import torch\ndef f(samples):\n    return {scores}\n"))(SAMPLES) == [
        4,
        2,
        2,
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_a_stop_is_no_failure_of_the_function(tmp_path, error):
    """A signal raises it in whatever runs."""
    spec = function(
        tmp_path, f"from tetrad.errors import Stopped\ndef f(samples):\n    raise {error.__name__}('now')\n"
    )
    with pytest.raises(error, match="now"):
        python_function(spec)(SAMPLES)
    spec = function(tmp_path, f"from tetrad.errors import Stopped\nraise {error.__name__}('now')\n")
    with pytest.raises(error, match="now"):
        python_function(spec)


STATE = """
    torch.manual_seed(7); torch.rand(3)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(not torch.is_grad_enabled())
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device("meta")
    os.chdir("/")
    sys.stdout = sys.stderr = None
"""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_state_of_the_process_is_what_it_was(tmp_path, monkeypatch, fails, grad):
    """Whether it is set when the file is loaded or when it is called, and whether that ends well."""
    monkeypatch.chdir(tmp_path)
    last = "raise ValueError" if fails else "return [0.0] * len(samples)"
    body = f"import os, sys, torch\ndef change():{STATE}change()\ndef f(samples):\n    change()\n    {last}\n"
    spec = function(tmp_path, body)

    def state():
        random = torch.get_rng_state().tolist()
        kinds = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        ways = torch.get_float32_matmul_precision(), torch.get_deterministic_debug_mode(), torch.get_num_threads()
        return random, kinds, ways, os.getcwd(), sys.stdout, sys.stderr

    with torch.set_grad_enabled(grad):
        before = state()
        reward = python_function(spec)
        assert state() == before
        with pytest.raises(UserError) if fails else nullcontext():
            reward(SAMPLES)
        assert state() == before


def test_samples_are_not_the_functions_to_change(tmp_path):
    body = "def f(samples):\n    samples[0]['ids'].clear(); samples[0].clear(); samples.clear()\n    return [1.0] * 3\n"
    spec = function(tmp_path, body)
    before = repr(SAMPLES)
    assert python_function(spec)(SAMPLES) == [1.0] * 3
    assert repr(SAMPLES) == before


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_a_function_prints_may_be_lost(tmp_path, monkeypatch, name):
    """Its terminal has gone, has no room, or was closed: it is paid all the same."""
    spec = function(
        tmp_path,
        f"import sys\ndef f(samples):\n    print('x' * 99, file=sys.{name}, flush=True)\n    return [1.0] * 3\n",
    )
    reading, writing = os.pipe()
    os.close(reading)
    for place, mode in ((writing, "w"), ("/dev/full", "w"), (os.devnull, "r")):
        stream = open(place, mode)  # noqa: SIM115
        monkeypatch.setattr(sys, name, stream)
        assert python_function(spec)(SAMPLES) == [1.0] * 3
        assert getattr(sys, name) is stream
        monkeypatch.undo()
        with suppress(OSError):
            stream.close()


def test_joined():
    first = documents_from_ids(SAMPLES)[0]
    assert first.ids.tolist() == [3, 4, 5, 6]
    assert not first.train.any()


def test_a_trained_model_keeps_the_order():
    """Documents are read by length, scores come back in their own order."""
    model = toys.scalar(seed=1)
    reward = reward_function([model], toys.CPU, 8)
    assert reward(SAMPLES) == pytest.approx([reward([sample])[0] for sample in SAMPLES], abs=1e-6)
    assert len({round(score, 4) for score in reward(SAMPLES)}) == 3
    assert score_sequences(model, [], toys.CPU, 8) == []


def test_the_best_of_several():
    """The first of the highest; what is not valid UTF-8 only where nothing else is."""
    valid = [SAMPLES[0], SAMPLES[1], SAMPLES[2]]
    assert best(valid, [1.0, 2.0, 2.0]) == 1
    broken = [replace(sample, valid_utf8=False) for sample in valid]
    assert best([valid[0], broken[1], valid[2]], [-3.0, 9.0, -2.0]) == 2
    assert best(broken, [1.0, 3.0, 2.0]) == 1
