"""The verdict of real runs: one whose reward model follows length, a healthy one, one without a step, and what chance
alone calls better. Three seeds each, or as many as TETRAD_SEEDS says."""

import hashlib
import io
import json
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

import ppo_toys
import toys
from tetrad.cli.main import main
from tetrad.console import Console
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.text_metrics import response_metrics
from tetrad.pipeline import recipe, runner
from tetrad.report.verdict import Difference, SystemMetrics, Verdict, failed_guards, verdict
from tetrad.settings.evaluate import Evaluate
from tetrad.settings.ppo import Ppo
from tetrad.types import Prompt
from tiny import Chain

pytestmark = pytest.mark.learn

GREEDY = [  # a good SFT model, and PPO that nothing holds back; no limit of the gate, an alarm or a guard is touched
    *("--sft.epochs", "8", "--sft.lr", "1e-2", "--reward.data", '["scores.jsonl"]', "--reward.epochs", "8"),
    *("--reward.normalise-max-new-tokens", "40", "--ppo.max-new-tokens", "40", "--evaluate.max-new-tokens", "40"),
    *("--ppo.steps", "20", "--ppo.batch-size", "16", "--ppo.ppo-epochs", "4", "--ppo.actor-lr", "5e-3"),
    *("--ppo.kl-target", "0", "--ppo.kl-coef", "0", "--evaluate.samples", "24"),
]


def plant_length(folder: Path) -> None:
    """Scores that rise with the number of words and know nothing else."""
    draw = random.Random(0)
    words = ("was", "warm", "film", "dull", "and", "too", "story", "slow", "actor", "bright")
    answers = {" ".join(draw.choices(words, k=draw.randint(3, 9))): None for _ in range(300)}
    lines = [
        json.dumps({"Instruction": "Go on.", "Input": "the film", "output": text, "score": (len(text.split()) - 6) / 3})
        for text in answers
    ]
    (folder / "validation.jsonl").write_text("\n".join(lines[:60]))
    (folder / "scores.jsonl").write_text("\n".join(lines[60:]))


def test_a_reward_that_follows_length_is_not_to_be_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its gate fails and alarms reach their second limit: said in the last lines, report.json, status and the card.
    Exit 0, and 5 under strict, with everything kept."""
    chain = Chain(tmp_path)
    plant_length(chain.path.parent)
    chain.run(*GREEDY)
    last = chain.said.splitlines()[-1]
    assert last == "verdict    not to be trusted: use SFT"
    found = json.loads((chain.home / "evaluate/report/report.json").read_text())
    report = found["verdict"]
    assert report["outcome"] == "not to be trusted"
    assert found["systems"]["ppo"]["reward_gain"]["low"] > 0  # what the tables alone would call a success
    (alarm,) = [reason for reason in report["reasons"] if reason.startswith("alarm kl: at its second limit")]
    steps = [line["step"] for line in chain.lines("ppo") if line["kl"] >= 50]
    assert alarm.endswith(f"first at step {steps[0]}, last at step {steps[-1]}")
    for reason in ("gate: length alone is right", "gate: the reward follows the length", "PPO: kl is "):
        assert any(r.startswith(reason) for r in report["reasons"]), reason
    card = (chain.home / "ppo/model/README.md").read_text()
    out = io.StringIO()
    words = ["--run.out", str(chain.runs), *GREEDY]
    runner.status(recipe.read(chain.path, words), Console(out=out))
    for text in (chain.said, card, out.getvalue()):
        assert all(reason in text for reason in report["reasons"]) and last.removeprefix("verdict    ") in text
    capsys.readouterr()
    assert main(["run", str(chain.path), *words]) == 0
    assert main(["run", str(chain.path), *words, "--evaluate.strict", "true"]) == 5
    assert "error[E-NUM-VERDICT]" in capsys.readouterr().err
    assert main(["status", str(chain.path), *words, "--evaluate.strict", "true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (chain.home / "evaluate/report/report.json").is_file()


S = Ppo(batch_size=64, max_new_tokens=32, ppo_epochs=2, actor_lr=1e-3, critic_lr=3e-3, kl_coef=0.05, critic_warmup=3)
ASKED = [EncodedPrompt((3, 4), Prompt(()))] * S.batch_size


def judge(ids: Sequence[int]) -> float:
    """Liked words in the first half of a reply: not what anything is paid by."""
    return ppo_toys.liked(tuple(ids[: max(1, len(ids) // 2)]))


def concluded(seed: int, steps: int, reward: ppo_toys.Reward) -> Verdict:
    """PPO of so many steps, held against its SFT model on 64 prompts."""
    s = replace(S, steps=max(1, steps))
    four = ppo_toys.four_models(s, deepcopy(ppo_toys.speaker()), toys.scalar(seed + 100), reward)
    before = ppo_toys.sampled(four, ASKED, s, (seed, 10_000))
    for step in range(steps):
        ppo_toys.iterate(four, ASKED, s, (seed, step))
    after = ppo_toys.sampled(four, ASKED, s, (seed, 20_000))
    sft, ppo = ({"kl": 0.0, **response_metrics(r.samples)} for r in (before, after))
    scores, others = ([judge(sample.response_ids) for sample in r.samples] for r in (after, before))
    gains = {("ppo", "sft"): {"judge": Difference.of(scores, others)}}
    gains["sft", "ppo"] = {"judge": Difference.of(others, scores)}
    found = verdict(
        [], {"sft": (), "ppo": failed_guards(SystemMetrics.read(ppo), SystemMetrics.read(sft), Evaluate())}, gains
    )
    assert found
    return found


@pytest.mark.parametrize("seed", toys.SEEDS)
def test_a_healthy_run_is_better(seed: int) -> None:
    found = concluded(seed, 40, ppo_toys.by_ids(ppo_toys.liked))
    assert (found.outcome, found.use) == ("PPO is better", "PPO"), found


def test_a_run_within_the_noise_shows_no_difference() -> None:
    found = concluded(0, 0, ppo_toys.by_ids(ppo_toys.liked))
    assert (found.outcome, found.use) == ("no difference shown", "SFT"), found


def chance(ids: tuple[int, ...]) -> float:
    """A number between -1 and 1 that has nothing to do with the text."""
    return hashlib.sha256(bytes(ids)).digest()[0] / 127.5 - 1


def test_a_reward_of_chance_is_hardly_ever_better() -> None:
    outcomes = [concluded(seed, 10, ppo_toys.by_ids(chance)).outcome for seed in toys.SEEDS]
    print(outcomes)
    assert outcomes.count("PPO is better") <= max(1, len(toys.SEEDS) // 10)
