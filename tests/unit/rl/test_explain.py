"""`tetrad explain` prints one real step: its arithmetic adds up, and what is not there is told."""

import io
import re
from pathlib import Path

import pytest

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.pipeline import recipe
from tetrad.rl.explain import _added, explain
from tetrad.settings.ppo import Ppo
from tetrad.settings.use import Explain
from tiny import Chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    found = Chain(tmp_path_factory.mktemp("chain"))
    found.run("--ppo.critic-warmup", "2", "--ppo.eval-every", "3", "--ppo.samples-per-prompt", "2")
    return found


def said(folder: Path, **given: int) -> str:
    out = io.StringIO()
    explain(Explain(model=str(folder), **given), Console(out=out, err=io.StringIO()), recipe.read)
    return out.getvalue()


NUMBER = r"([+-]?[\d.]+)"


@pytest.mark.parametrize("step", [0, 3, 7])
def test_the_arithmetic_adds_up(chain: Chain, step: int) -> None:
    text = said(chain.home, step=step, responses=3)
    deltas = re.findall(rf"= {NUMBER} \+ {NUMBER} \* {NUMBER} - {NUMBER} = {NUMBER}", text)
    assert len(deltas) == 3
    for row in deltas:
        r, gamma, after, before, delta = map(float, row)
        assert r + gamma * after - before == pytest.approx(delta, abs=2e-3)
    sums = re.findall(rf"A_next = {NUMBER} \+ {NUMBER} \* {NUMBER} = {NUMBER}; return = A \+ V = {NUMBER}", text)
    for (delta, decay, later, a, end), (*_, value, _) in zip(sums, deltas, strict=True):
        assert float(decay) == (1.0 if step < 2 else 0.95)
        assert float(delta) + float(decay) * float(later) == pytest.approx(float(a), abs=2e-3)
        assert float(a) + float(value) == pytest.approx(float(end), abs=3e-3)
    assert f"step {step} of 8" in text
    assert "8 prompts 2 times each" in text
    assert ("the actor is frozen" in text) == (step < 2)
    assert text.count("greedy response to") == 3


def test_how_the_score_is_added_is_told() -> None:
    assert _added(Ppo()) == "the score, clipped to ±5, is added"
    assert _added(Ppo(reward_clip=0.0)) == _added(Ppo(rewards=("f.py:f",))) == "the score is added"
    assert "so far, clipped to ±3" in _added(Ppo(reward_scaling="running", reward_clip=3.0, rewards=("f.py:f",)))
    assert "scaled to standard deviation 1 about their mean" in _added(Ppo(reward_scaling="whiten"))


def test_a_row_a_token(chain: Chain) -> None:
    text = said(chain.home / "ppo")
    table = text[text.index("token by token") : text.index("first token")].splitlines()[2:]
    assert len(table) == 8  # max_new_tokens of the recipe, from which no reply of this model ends early
    assert all(len(re.findall(r"[+-]\d+\.\d{3}", line)) == 7 for line in table)


def test_a_cut_reply_goes_on_in_the_critics_value(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.run("--ppo.bootstrap-truncated", "true")
    text = said(chain.home, step=7)
    assert "the response was truncated" in text and "nothing comes after it" not in text
    (row,) = re.findall(rf"gamma V_after - V = {NUMBER} \+ {NUMBER} \* {NUMBER} - {NUMBER} = {NUMBER}", text)
    r, gamma, after, before, advantage = map(float, row)
    assert after != 0
    assert r + gamma * after - before == pytest.approx(advantage, abs=2e-3)


def test_steps_that_were_not_recorded_are_named(chain: Chain) -> None:
    with pytest.raises(UserError) as caught:
        said(chain.home, step=2)
    assert caught.value.code == "E-CONF-RANGE"
    assert "0, 3, 6, 7" in caught.value.what


def test_where_no_ppo_was_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        said(tmp_path)
    assert caught.value.code == "E-CKPT-MISSING"


@pytest.mark.parametrize("advantage", ["normalised", "centred", "leave_one_out"])
def test_a_step_of_grpo_compares_with_the_group(chain: Chain, advantage: str) -> None:
    """The advantage that is worked out is that of the table."""
    chain.run(
        "--grpo.prompts",
        '["sft.jsonl"]',
        "--grpo.steps",
        "1",
        "--grpo.max-new-tokens",
        "8",
        "--grpo.advantage",
        advantage,
    )
    text = said(chain.home / "grpo", step=0, responses=1)
    assert "Actor and reference read them" in text and "k3 * 0.04 is a loss at each token" in text
    assert "value" not in text and "critic" not in text
    (worked,) = re.findall(rf"advantage of all its tokens = .* = {NUMBER}$", text, re.MULTILINE)
    rows = [line.split() for line in text.splitlines() if re.match(r"\s+\d+ .*[+-]\d\.\d{3}$", line)]
    assert rows and {row[-1] for row in rows} == {f"{float(worked):+.3f}"}
