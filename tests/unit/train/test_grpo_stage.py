"""The GRPO stage as a whole from recipes: it runs with each kind of reward, tells what it did, and goes on exactly."""

import json
from pathlib import Path

import pytest

from tetrad.errors import UserError
from tiny import Chain, stop_at

ON = {
    "ppo.prompts": "[]",
    "grpo.prompts": '["sft.jsonl"]',
    "grpo.steps": "6",
    "grpo.batch-size": "4",
    "grpo.samples-per-prompt": "4",
    "grpo.max-new-tokens": "8",
    "grpo.actor-lr": "0.001",
}
RLOO = {"grpo.advantage": "leave_one_out", "grpo.kl-in": "reward", "grpo.loss-mean": "constant"}
DAPO = {"grpo.loss-mean": "token", "grpo.clip-high": "0.28", "grpo.kl-coef": "0"}
SEVERAL = {"grpo.epochs": "2", "grpo.num-minibatches": "2", "grpo.ema-decay": "0.5"}
OPTIONS: dict[str, dict[str, str]] = {
    "GRPO": {},
    "RLOO": RLOO,
    "DAPO, a function, an average": {**DAPO, **SEVERAL, "grpo.rewards": '["judge.py:liked"]'},
    "adapters": {"reward.adapters": "true", "grpo.adapters": "true"},
}


def words(changes: dict[str, str]) -> list[str]:
    return [word for name, value in {**ON, **changes}.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def result(chain: Chain) -> dict[str, bytes]:
    home = chain.home / "grpo"
    files = [*sorted((home / "model").glob("*.safetensors")), home / "metrics.jsonl", home / "samples.jsonl"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("option", OPTIONS)
def test_goes_on_exactly(chain: Chain, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its fourth step and taken up again, it leaves the same bytes."""
    given = OPTIONS[option]
    assert "grpo" in chain.run(*words(given))
    whole = result(chain)
    assert len(whole["metrics.jsonl"].splitlines()) == 6
    chain.run(*words({**given, "grpo.steps": "5"}))  # the finished one moves aside
    stop_at(4, monkeypatch)
    with pytest.raises(BaseException, match="stopped"):
        chain.run(*words(given))
    monkeypatch.undo()
    chain.run(*words(given))
    assert result(chain) == whole


def test_adapters_leave_the_reference_what_the_sft_model_is(chain: Chain) -> None:
    """KL is nothing before the first update, and something after it: the reference has no adapter."""
    chain.run(*words(OPTIONS["adapters"]))
    first, *others = chain.lines("grpo")
    assert first["kl"] == first["kl_loss"] == 0
    assert all(line["kl_loss"] > 1e-6 for line in others)


def test_what_it_says(chain: Chain) -> None:
    """Each step has the gap between the sampler's log-probabilities and those of training; no critic is spoken of."""
    chain.run(*words({}))
    assert "sampler_gap" in chain.bars
    for line in chain.lines("grpo"):
        assert line["sampler_gap"] < 1e-4
        assert 0 <= line["equal_groups"] <= 1
        assert line["kl_loss"] >= 0
        assert not {"explained_variance", "value_loss", "critic_lr"} & line.keys()
    assert chain.lines("grpo")[0]["kl"] == 0
    samples = [json.loads(line) for line in (chain.home / "grpo/samples.jsonl").read_text().splitlines()]
    sampled = [sample for sample in samples if "tokens" in sample]
    assert {len(sample["group"]) for sample in sampled} == {4}
    assert not {"value", "return"} & sampled[0]["tokens"].keys()
    assert (chain.home / "evaluate/report/report.json").is_file()
    systems = json.loads((chain.home / "evaluate/report/report.json").read_text())["systems"]
    assert "grpo" in systems and "ppo" not in systems


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"grpo.kl-estimator": "k1"}, "no gradient on average"),
        ({"grpo.samples-per-prompt": "1"}, "at least 2"),
        ({"grpo.batch-size": "5", "grpo.num-minibatches": "2"}, "can't be divided"),
        ({"grpo.adapters": "true"}, "reward.adapters is false"),
        ({"grpo.rewards": '["judge.py:liked", "judge.py:liked"]'}, "twice"),
        ({"grpo.max-prompt": "60"}, "are more than"),
    ],
)
def test_what_does_not_go_together_is_refused(chain: Chain, changes: dict[str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        chain.run(*words(changes))


def test_changed_settings_without_an_effect_are_named(chain: Chain) -> None:
    chain.run(*words({"grpo.clip-high": "0.28"}))
    assert "note: grpo.clip_high has no effect: one update an iteration" in chain.said


def test_a_key_knows_no_other_stage(tmp_path: Path) -> None:
    """Settings of GRPO change no key of PPO, nor the other way round."""
    from tetrad.pipeline import recipe
    from tetrad.pipeline.plan import hashes_of, plan
    from tiny import write_tiny

    path = write_tiny(tmp_path)

    def keys(*words: str) -> dict[str, str]:
        read = recipe.read(path, ["--run.out", str(tmp_path / "runs"), "--grpo.prompts", '["sft.jsonl"]', *words])
        return {step.stage: step.key for step in plan(read, hashes_of(read))}

    before, after = keys(), keys("--grpo.epochs", "2")
    assert {stage for stage in before if before[stage] != after[stage]} == {"grpo", "evaluate"}
    assert keys("--ppo.ppo-epochs", "3")["grpo"] == before["grpo"]
