"""kill -9 at ten random moments of each stage, or TETRAD_KILLS of them, then the same command: the models equal those
of a run in peace.

Each kill hits the run that the kill before left behind. Children are forked from a parent that has torch loaded, so
that a kill costs no import.
"""

import hashlib
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import tetrad.eval.compare
import tetrad.train.dpo
import tetrad.train.ppo
import tetrad.train.pretrain
import tetrad.train.reward
import tetrad.train.sft
import tetrad.train.tokenizer  # noqa: F401  (loaded before the forks)
from tetrad.console import Console
from tetrad.pipeline import recipe, runner
from tiny import write_tiny

KILLS = int(os.environ.get("TETRAD_KILLS", "10"))
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo")


def run(path: Path, out: Path, only: str, words: Sequence[str] = ()) -> None:
    """In this process: one stage of the recipe."""
    silent = Console(out=io.StringIO(), err=io.StringIO())
    runner.run(recipe.read(path, ["--run.out", str(out), *words]), silent, only=only)


def forked(path: Path, out: Path, only: str, kill_after: float | None = None, words: Sequence[str] = ()) -> float:
    """The same in a child; its seconds, or -1 if it was killed."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run(path, out, only, words)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return -1.0
    assert os.waitstatus_to_exitcode(status) == 0, f"{only} failed"
    return time.monotonic() - began


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all that the stage left and that a resumed run must repeat."""
    found = [*sorted((folder / "model").glob("*.*")), folder / "metrics.jsonl", folder / "samples.jsonl"]
    placed = ("manifest.json", "adapter_config.json")  # they name the run's folder
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found if p.exists() and p.name not in placed}


@pytest.mark.faults
@pytest.mark.timeout(60 * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # os.fork in a process with threads: the child starts none
def test_killed_stages_go_on_to_the_same_bits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seconds = {stage: forked(path, whole, stage) for stage in STAGES}
    for stage in STAGES:
        kill_and_compare(path, whole, broken, stage, seconds[stage])


def kill_and_compare(
    path: Path, whole: Path, broken: Path, stage: str, seconds: float, words: Sequence[str] = (), hits: int = KILLS
) -> None:
    """Kills the stage at random moments until `hits` have hit, lets it end, and compares with the one in peace.

    seconds: what the stage may take; it grows where kills come too early for a checkpoint and shrinks where they come
    too late, as on a machine that is busy now and then.
    """
    draw = random.Random(1)
    kills = resumed = 0
    folder = broken / "tiny" / stage
    while kills < hits:
        if (folder / "model").exists():
            shutil.rmtree(folder)
        if forked(path, broken, stage, draw.uniform(0.1, 1.0) * seconds, words) < 0:
            kills += 1
            inside = (folder / "checkpoints").is_dir()
            resumed += inside
            seconds *= 1.0 if inside else 1.1
        else:
            seconds *= 0.9
    forked(path, broken, stage, words=words)
    assert digests(folder) == digests(whole / "tiny" / stage), stage
    assert stage == "tokenizer" or resumed > 1 or hits < KILLS, f"no kill hit the loop of {stage}"


ADAPTERS = ("--reward.adapters", "true", "--ppo.adapters", "true")


@pytest.mark.faults
@pytest.mark.timeout(60 * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "words", [("--ppo.critic", "shared", "--ppo.ema-decay", "0.9"), ADAPTERS], ids=["shared", "adapters"]
)
def test_killed_ppo_goes_on_with_little_memory_too(tmp_path: Path, words: tuple[str, ...]) -> None:
    """A shared trunk with a moving average; adapters on one base."""
    path, whole, broken = write_tiny(tmp_path / "data"), tmp_path / "whole", tmp_path / "broken"
    for stage in STAGES[:-1]:
        forked(path, whole, stage, words=words)
    shutil.copytree(whole, broken)
    seconds = forked(path, whole, "ppo", words=words)
    kill_and_compare(path, whole, broken, "ppo", seconds, words)


@pytest.mark.faults
@pytest.mark.timeout(60 * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_dpo_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Once, or as often as TETRAD_KILLS says; with adapters too."""
    path, whole, broken = write_tiny(tmp_path / "data"), tmp_path / "whole", tmp_path / "broken"
    words = ("--dpo.data", str(path.parent / "ranked.jsonl"), "--dpo.epochs", "6", "--dpo.batch-size", "8")
    words += ("--dpo.validation", str(path.parent / "held.jsonl"))
    held = '{"Instruction": "Go on.", "Input": "so", "chosen": "was warm", "rejected": "was flat"}\n'
    (path.parent / "held.jsonl").write_text(held)
    for stage in ("tokenizer", "pretrain", "sft"):
        forked(path, whole, stage, words=words)
    shutil.copytree(whole, broken)
    for adapters in ("false", "true"):
        both = (*words, "--dpo.adapters", adapters)
        seconds = forked(path, whole, "dpo", words=both)
        kill_and_compare(path, whole, broken, "dpo", seconds, both, KILLS if "TETRAD_KILLS" in os.environ else 1)


@pytest.mark.faults
@pytest.mark.timeout(60 * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_grpo_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """With a moving average."""
    words = ("--grpo.prompts", '["sft.jsonl"]', "--grpo.steps", "8", "--grpo.batch-size", "4", "--grpo.max-new-tokens")
    words = (*words, "8", "--grpo.samples-per-prompt", "4", "--grpo.actor-lr", "0.001", "--grpo.ema-decay", "0.5")
    path, whole, broken = write_tiny(tmp_path / "data"), tmp_path / "whole", tmp_path / "broken"
    for stage in STAGES[:-1]:
        forked(path, whole, stage, words=words)
    shutil.copytree(whole, broken)
    seconds = forked(path, whole, "grpo", words=words)
    kill_and_compare(path, whole, broken, "grpo", seconds, words, KILLS if "TETRAD_KILLS" in os.environ else 3)
