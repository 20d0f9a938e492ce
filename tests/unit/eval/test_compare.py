"""Best-of-N is chosen by what is written, and of what can be written."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

import served
import toys
from tetrad.eval.compare import Task, best_of_frontier, metrics_of, responses_of_all
from tetrad.inference.completions import Completion, EncodedPrompt
from tetrad.settings.common import Sampling
from tetrad.settings.evaluate import Evaluate
from tetrad.types import Prompt, Turn


def test_best_of_n_takes_no_broken_reply_where_there_is_another() -> None:
    """A judge that is fond of U+FFFD is not obeyed; the share of such replies is a figure of every system."""
    words = served.tokenizer()
    model = toys.causal(seed=1, std=0.25, vocab_size=words.size, eos_ids=words.eos_ids, pad_id=words.pad_id)
    prompt = Prompt((Turn("instruction", "Go on."),))
    questions = [EncodedPrompt((5, 6, number), prompt) for number in range(7, 47)]
    recipe = SimpleNamespace(evaluate=Evaluate(best_of=8))
    task = Task(questions, words, Sampling(max_new_tokens=2), (0, "evaluate", 0), toys.CPU, 1000)
    seen: list[Completion] = []

    def fond(samples: Any) -> list[float]:
        seen.extend(samples)
        return [float("\ufffd" in sample.text) for sample in samples]

    systems = responses_of_all(SimpleNamespace(recipe=recipe, parents={}), model, task, fond)  # type: ignore[arg-type]
    groups = [seen[at : at + 8] for at in range(0, len(seen), 8)]
    assert list(systems["sft"].samples) == [group[0] for group in groups]
    for chosen, group in zip(systems["best of 8"].samples, groups, strict=True):
        assert chosen in group
        assert chosen.valid_utf8 == any(sample.valid_utf8 for sample in group)
    share = {name: metrics_of(found, {}, {}, None, 0)["invalid_utf8"] for name, found in systems.items()}
    assert share["sft"] > 0.5 > share["best of 8"]


def test_the_frontier_of_best_of_n() -> None:
    """The expected best of n drawn without replacement from a prompt's scores, by counting, and its KL."""
    points = best_of_frontier([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 6.0]])
    means = [(1.5 + 1.5) / 2, (14 / 6 + 3) / 2, (3 + 6) / 2]
    assert points == [
        (n, pytest.approx(math.log(n) - (n - 1) / n), pytest.approx(mean))
        for n, mean in zip((1, 2, 4), means, strict=True)
    ]
    assert [n for n, *_ in best_of_frontier([[0.0] * 6])] == [1, 2, 4, 6]
    assert best_of_frontier([[5.0]]) == [(1, 0.0, 5.0)]
