"""DPO as a stage: what it reads, what it leaves, what it says and what it refuses."""

import io
import json
import math

import pytest
import torch

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.model.huggingface import read_causal
from tetrad.pipeline import recipe, runner
from tiny import Chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Up to the SFT model."""
    chain = Chain(tmp_path_factory.mktemp("dpo"))
    for stage in ("tokenizer", "pretrain", "sft"):
        run(chain, stage)
    return chain


def run(chain: Chain, only: str, *words: str) -> str:
    """What the stage says."""
    said = io.StringIO()
    given = recipe.read(chain.path, ["--run.out", str(chain.runs), *words])
    runner.run(given, Console(out=said, err=said), only=only)
    return said.getvalue()


def dpo(chain: Chain, *words: str, data: str = "ranked.jsonl", lr: float = 1e-3) -> str:
    folder = chain.path.parent
    given = ("--dpo.data", str(folder / data), "--dpo.validation", str(folder / "held.jsonl"))
    ranked = [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]
    held = [{**record, "Input": f"a {record['Input']}"} for record in ranked[:12]]
    (folder / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held))
    return run(chain, "dpo", *given, "--dpo.batch-size", "8", "--dpo.lr", str(lr), *words)


def metrics(chain: Chain) -> dict[str, float]:
    manifest = json.loads((chain.home / "dpo/model/manifest.json").read_text())
    return dict(manifest["metrics"])


def test_a_run(chain: Chain) -> None:
    said = dpo(chain, "--dpo.epochs", "4")
    first, *_, last = rows = chain.lines("dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-9) and first["accuracy"] == 0.5
    assert first["grad_norm"] > 0 and last["margin"] > 0 and last["preference_loss"] < math.log(2)
    kept = metrics(chain)
    assert f"held-out loss {kept['eval_loss']:.3f}, accuracy {kept['eval_accuracy']:.1%}" in said
    assert kept["eval_accuracy"] > 0.5 and len(rows) == math.ceil(
        4 * int(said.split(" records read, ")[1].split()[0]) / 8
    )
    policy, sft = (read_causal(chain.home / stage / "model") for stage in ("dpo", "sft"))
    assert policy.config == sft.config
    assert not torch.equal(policy.model.norm.weight, sft.model.norm.weight)


@pytest.mark.parametrize("loss", ["ipo", "plackett-luce"])
def test_other_losses_learn(chain: Chain, loss: str) -> None:
    dpo(chain, "--dpo.epochs", "4", "--dpo.loss", loss)
    first, *_, last = chain.lines("dpo")
    assert last["preference_loss"] < first["preference_loss"] and last["margin"] > 0


def test_adapters(chain: Chain) -> None:
    dpo(chain, "--dpo.epochs", "2", "--dpo.adapters", "true", lr=1e-2)
    assert (chain.home / "dpo/model/adapter_model.safetensors").is_file()
    assert not (chain.home / "dpo/model/model.safetensors").exists()
    first, *_, last = chain.lines("dpo")
    assert first["margin"] == 0.0 and last["margin"] > 0


def test_scores_become_lists_where_that_is_asked_for(chain: Chain) -> None:
    folder = chain.path.parent
    answers = {"was warm": 0.9, "was fine": 0.85, "was dull": -0.5}
    rows = [
        {"Instruction": "Go on.", "Input": f"film {n}", "output": a, "score": s}
        for n in range(8)
        for a, s in answers.items()
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        dpo(chain, data="rated.jsonl")
    assert (
        error.value.code == "E-CONF-MISSING"
        and "score_gap" in error.value.hint
        and "rated.jsonl:1" in error.value.where
    )
    assert "24 records read, 8 kept" in dpo(chain, "--dpo.score-gap", "0.5", data="rated.jsonl")
    with pytest.raises(UserError) as error:
        run(chain, "dpo", "--dpo.data", str(folder / "rated.jsonl"), "--dpo.score-gap", "5")
    assert error.value.code == "E-DATA-EMPTY"


def test_it_warns_where_the_chosen_answers_are_unlearned(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with what to do. That a small model forgets half of its answers takes long: here a tenth is enough."""
    monkeypatch.setattr("tetrad.train.dpo.CHOSEN_DROP", 0.1)
    words = ("--dpo.epochs", "6", "--dpo.loss", "ipo", "--dpo.beta", "0.003")
    said = dpo(chain, *words, lr=2e-2)
    falls = [row["reward_chosen"] / 0.003 < 0.1 * row["logprob_chosen"] for row in chain.lines("dpo")]
    assert said.count("they are unlearned too; try sft_coef = 0.1") == 1 and any(falls)
    assert "they are unlearned" not in dpo(chain, lr=1e-4)


def test_settings_that_do_not_go_together(chain: Chain) -> None:
    with pytest.raises(UserError) as error:
        dpo(chain, "--dpo.loss", "plackett-luce", "--dpo.label-smoothing", "0.1")
    assert error.value.code == "E-CONF-CONFLICT"
    with pytest.raises(UserError) as error:
        dpo(chain, "--dpo.weights", "[1, 2]")
    assert error.value.code == "E-CONF-CONFLICT"
