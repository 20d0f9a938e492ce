"""All stages of the tiny recipe: what they leave, what a change redoes, and that the reward is normalised."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch

import served
import tetrad
from tetrad.data.loader import order
from tetrad.data.source import Counts
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference.completions import read_encoded_prompts
from tetrad.model.huggingface import read_causal, read_members
from tetrad.model.safetensors_io import read_tensors
from tetrad.report.records import read_runs
from tetrad.report.run_page import page
from tetrad.reward.model import reward_function
from tetrad.rl.rollout import roll_out
from tetrad.settings.common import Sampling
from tetrad.text.chat_template import template
from tetrad.text.tokenizer import Tokenizer
from tiny import STAGES, Chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    assert chain.run() == STAGES
    return chain


def test_every_stage_leaves_a_model_and_every_step_a_line(chain: Chain) -> None:
    for stage, steps in (("pretrain", 20), ("sft", 15), ("reward", 14), ("ppo", 8)):
        lines = chain.lines(stage)
        assert [line["step"] for line in lines] == list(range(steps)), stage
        assert (chain.home / stage / "model" / "model.safetensors").is_file()
        assert not (chain.home / stage / "checkpoints").exists()
    assert chain.lines("pretrain")[-1]["loss"] < chain.lines("pretrain")[0]["loss"] - 0.5


def test_the_public_run_gives_folders_and_verdict(chain: Chain) -> None:
    """Of what is done already, as `tetrad.run` of the same recipe finds it."""
    result = tetrad.run(chain.path, {"run.out": str(chain.runs)}, quiet=True)
    assert (result.folder, result.trained) == (chain.home, ())
    assert result.stages == {stage: chain.home / stage for stage in STAGES}
    report = json.loads((result.stages["evaluate"] / "report" / "report.json").read_text())
    assert result.verdict and result.verdict.outcome == report["verdict"]["outcome"]
    assert tetrad.generate(tetrad.load(result.stages["ppo"]), ["Go on."], max_new_tokens=2)


PHASES = {
    "pretrain": {"data", "update"},
    "sft": {"data", "update"},
    "reward": {"data", "update", "eval"},
    "ppo": {"rollout", "reward", "forward", "update", "eval"},
}


@pytest.mark.parametrize("stage", PHASES)
def test_the_phases_of_a_step_add_up_to_its_seconds(stage: str, chain: Chain) -> None:
    lines = [json.loads(line) for line in (chain.home / stage / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in chain.lines(stage)]
    for line in lines:
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"])
        assert line["tokens_per_second"] > 0 and line["peak_mib"] > 0
    assert set().union(*(line["phases"] for line in lines)) == {*PHASES[stage], "save", "other"}
    assert np.median([line["phases"]["other"] / line["seconds"] for line in lines]) < 0.1


def test_ppo_starts_at_the_reference_and_moves_beta(chain: Chain) -> None:
    lines = chain.lines("ppo")
    assert lines[0]["kl"] == 0 and lines[0]["kl_k3"] == 0
    assert lines[-1]["kl"] > 0
    assert len({line["beta"] for line in lines}) > 1
    actor, sft = (read_causal(chain.home / stage / "model") for stage in ("ppo", "sft"))
    assert not torch.equal(actor.model.norm.weight, sft.model.norm.weight)
    critic, reward = (
        read_tensors(chain.home / stage / "model" / name)
        for stage, name in (("ppo", "critic.safetensors"), ("reward", "model.safetensors"))
    )
    assert critic.keys() == {*reward, "bias"}  # the constant that the critic began with
    assert not torch.equal(critic["score.weight"], reward["score.weight"])


def test_the_reward_is_normalised_on_replies_to_its_held_out_prompts(chain: Chain) -> None:
    folder = chain.home / "sft" / "model"
    actor, tokenizer = read_causal(folder), Tokenizer.load(folder)
    device = Device(torch.device("cpu"), torch.float32)
    files = [chain.path.parent / "validation.jsonl"]
    questions = read_encoded_prompts(files, template("instruction"), tokenizer, Counts(), 64, 8)
    chosen = [questions[i] for i in order(3, 0, len(questions))[:16]]
    sampling = Sampling(max_new_tokens=8)
    rollout = roll_out(actor, chosen, range(16), (3, "normalise", 0), sampling, tokenizer, device)
    scores = np.array(reward_function(read_members(chain.home / "reward" / "model"), device, 512)(rollout.samples))
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)


def test_the_report_holds_the_systems_against_each_other(chain: Chain) -> None:
    report = json.loads((chain.home / "evaluate" / "report" / "report.json").read_text())
    assert list(report["systems"]) == ["sft", "best of 2", "ppo"]
    sft, best = report["systems"]["sft"], report["systems"]["best of 2"]
    assert sft["kl"] == 0 and best["kl"] == pytest.approx(np.log(2) - 0.5)
    assert best["reward"]["mean"] >= sft["reward"]["mean"]
    assert sft["liked_gain"]["mean"] == 0
    assert report["stages"].keys() == {"pretrain", "sft", "reward"}
    assert 0.5 < report["stages"]["reward"]["pair_accuracy"] <= 1


def test_policies_of_other_runs_answer_the_same_prompts_with_the_same_random_numbers(chain: Chain) -> None:
    """A copy of this run's PPO says what it says; every response is kept; another tokenizer is refused at once."""
    other = chain.path.parent / "elsewhere" / "ppo"
    shutil.copytree(chain.home / "ppo", other)
    words = ("--evaluate.others", f'["{other}"]')
    assert chain.run(*words) == ["evaluate"]
    folder = chain.home / "evaluate" / "report"
    report = json.loads((folder / "report.json").read_text())
    systems = report["systems"]
    assert list(systems) == ["sft", "best of 2", "ppo", "elsewhere/ppo"]
    assert systems["elsewhere/ppo"] == systems["ppo"] != systems["sft"]
    assert report["costs"]["elsewhere/ppo"] == report["costs"]["ppo"]
    assert report["costs"]["ppo"]["minutes"] > 0 and report["costs"]["best of 2"]["minutes"] == 0
    assert any(text.startswith("elsewhere/ppo: no difference shown to SFT") for text in report["verdict"]["methods"])
    lines = [json.loads(line) for line in gzip.decompress((folder / "replies.jsonl.gz").read_bytes()).splitlines()]
    assert len(lines) == report["prompts"] and all(list(line["replies"]) == list(systems) for line in lines)
    scores = [line["replies"]["ppo"]["liked"] for line in lines]
    assert np.mean(scores) == pytest.approx(systems["ppo"]["liked"]["mean"])
    assert chain.run(*words) == []  # its key is what is in the folder
    served.write_model(chain.path.parent / "foreign")
    with pytest.raises(UserError, match="E-MODEL-TOKENIZER"):
        chain.run("--evaluate.others", f'["{chain.path.parent / "foreign"}"]')
    assert chain.run() == ["evaluate"]


def test_a_judge_that_fails_does_so_before_the_others_answer(chain: Chain) -> None:
    judge = chain.path.parent / "broken.py"
    judge.write_text("def lost(samples):\n    raise FileNotFoundError('no model')\n")
    with pytest.raises(UserError, match="E-NUM-REWARD") as fault:
        chain.run("--evaluate.judges", f'["{judge}:lost"]')
    assert "1 samples" in str(fault.value) and "no model" in str(fault.value)
    assert chain.run() == ["evaluate"]


def test_test_records_need_held_out_ones(chain: Chain) -> None:
    with pytest.raises(UserError, match="E-CONF-MISSING"):
        chain.run("--reward.validation", "[]", "--reward.test", '["validation.jsonl"]')


def test_a_change_redoes_what_depends_on_it(chain: Chain) -> None:
    assert chain.run() == []
    assert chain.run("--run.micro-batch-tokens", "100", "--run.log-every", "3") == []
    before = list((chain.home / "old").glob("*"))
    assert chain.run("--ppo.kl-coef", "0.2") == ["ppo", "evaluate"]
    assert len(list((chain.home / "old").iterdir())) == len(before) + 2
    scores = chain.path.parent / "scores.jsonl"
    scores.write_text(scores.read_text().replace("1.0}\n", "0.5}\n", 1))
    assert chain.run("--ppo.kl-coef", "0.2") == ["reward", "ppo", "evaluate"]


def test_annotators_are_told(chain: Chain) -> None:
    """Both of the ranked file, beside the model; without their names there is nothing to tell."""
    told = json.loads((chain.home / "reward" / "model" / "annotators.json").read_text())
    assert {found["annotator"] for found in told["annotators"]} == {"kim", "lee"}
    assert all(0 < found["low"] <= found["right"] <= found["high"] < 1 for found in told["annotators"])
    assert all(suspect["where"].rpartition("/")[2].startswith("ranked.jsonl:") for suspect in told["suspects"])
    least = min(told["annotators"], key=lambda person: person["right"])
    top = page(read_runs([str(chain.home)])).partition("<nav")[0]  # of the page of this run
    assert re.search(rf"{least['annotator']}\b.{{0,40}}right in {least['right']:.0%}", top)


def test_the_gate_is_told_and_heeded(chain: Chain) -> None:
    """What it judges is noted with the model; under `strict` PPO refuses one that fails, and moves no earlier stage."""
    figures = json.loads((chain.home / "reward" / "model" / "manifest.json").read_text())["metrics"]
    assert abs(figures["fresh_mean"]) < 3 and 0.2 < figures["fresh_std"] < 5
    assert 0.5 <= figures["length_accuracy"] <= 1
    chain.run()
    assert chain.run("--gate.strict", "true", "--gate.least-std", "0") == []
    with pytest.raises(UserError, match="E-NUM-GATE"):
        chain.run("--gate.strict", "true", "--gate.accuracy", "1", "--ppo.steps", "9")
