"""Best-of-N is chosen by what is written, and of what can be written."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import served
import toys
from tetrad import storage
from tetrad.eval.compare import Task, best_of_frontier, metrics_of, responses_of_all, unpaid_judges
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


def test_a_judge_that_paid_any_of_the_policies_decides_nothing(tmp_path: Path) -> None:
    """Of this recipe by its name; of another run by the function's name and its file's content, wherever that lay."""
    paid = {"path": "there/rule.py", "sha256": "b" * 64, "function": "there/rule.py:score"}
    storage.write_folder(tmp_path / "ppo", {"a.bin": b""}, {"lineage": {"data": {"ppo.rewards": [paid]}}})
    judges = ("a.py:ridge", "a.py:mine", "here/rule.py:score", "here/rule.py:other")
    sums = [{"path": spec.partition(":")[0], "sha256": "ab"["rule" in spec] * 64, "function": spec} for spec in judges]
    recipe = SimpleNamespace(
        evaluate=Evaluate(judges=judges, others=("x/ppo",)), ppo=SimpleNamespace(rewards=("a.py:mine",))
    )
    lineage = {"data": {"evaluate.judges": sums}}
    ctx: Any = SimpleNamespace(recipe=recipe, parents={"x/ppo": tmp_path / "ppo"}, lineage=lineage)
    assert unpaid_judges(ctx) == {"a.py:ridge", "here/rule.py:other"}
