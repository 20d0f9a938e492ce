"""A recipe that runs all stages in seconds: generated text in which some words are liked and others not."""

import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tetrad import stages
from tetrad.console import Console
from tetrad.pipeline import recipe, runner

STAGES = ["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"]

GOOD, BAD = ("warm", "funny", "bright", "moving"), ("dull", "flat", "slow", "empty")
THINGS = ("film", "story", "scene", "score", "actor", "ending")

RECIPE = """\
name = "tiny"
seed = 3
[model]
hidden_size = 32
layers = 1
heads = 2
kv_heads = 1
ff = 48
max_positions = 64
[tokenizer]
text = ["text.txt"]
vocab_size = 320
[pretrain]
text = ["text.txt"]
validation = ["text.txt"]
tokens = 10_240
sequence_length = 32
batch_tokens = 512
optimizer = "muon"
[sft]
data = ["sft.jsonl"]
validation = ["validation.jsonl"]
epochs = 1.5
batch_size = 16
[reward]
data = ["scores.jsonl", "ranked.jsonl"]
validation = ["validation.jsonl"]
score_scale = [-1, 1]
epochs = 2
batch_size = 16
token_dropout = 0.1
patience = 9
normalise = 16
normalise_max_new_tokens = 8
[ppo]
prompts = ["sft.jsonl"]
steps = 8
batch_size = 8
max_new_tokens = 8
ppo_epochs = 2
num_minibatches = 2
actor_lr = 1e-3
critic_lr = 1e-3
kl_target = 2.0
kl_horizon = 100.0
[evaluate]
prompts = ["validation.jsonl"]
judges = ["judge.py:liked"]
samples = 8
best_of = 2
max_new_tokens = 8
[run]
save_every = 2
report = false
"""

JUDGE = f"""\
def liked(samples):
    return [sum(w in s["text"] for w in {GOOD}) - sum(w in s["text"] for w in {BAD}) for s in samples]
"""


def write_tiny(folder: Path) -> Path:
    """The recipe with its data in `folder`; returns the recipe's path."""
    draw = random.Random(0)

    def sentence() -> tuple[str, str, float]:
        good = draw.random() < 0.5
        word = draw.choice(GOOD if good else BAD)
        return f"the {draw.choice(THINGS)}", f"was {word} and {draw.choice(THINGS)} too", 1.0 if good else -1.0

    def lines(name: str, records: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def asked(first: str) -> dict[str, object]:
        return {"Instruction": "Go on.", "Input": first}

    folder.mkdir(parents=True, exist_ok=True)
    made = [sentence() for _ in range(160)]
    (folder / "text.txt").write_text("\n\n".join(f"{first} {rest}" for first, rest, _ in made))
    fresh = [s for s in (sentence() for _ in range(200)) if s not in made]
    lines("sft.jsonl", [{**asked(a), "Output": b} for a, b, _ in made])
    lines("scores.jsonl", [{**asked(a), "output": b, "score": s} for a, b, s in made[:80]])
    lines("validation.jsonl", [{**asked(a), "output": b, "score": s} for a, b, s in fresh[:24]])
    ranked = []
    for first, rest, score in made[80:110]:
        others = [sentence() for _ in range(2)]
        answers = {rest: score} | {text: value for _, text, value in others}
        choices = [{"text": text, "rank": 1 if value > 0 else 2} for text, value in answers.items()]
        ranked.append({**asked(first), "choices": choices, "annotator": ("kim", "lee")[len(ranked) % 2]})
    lines("ranked.jsonl", [record for record in ranked if len(record["choices"]) > 1])  # type: ignore[arg-type]
    (folder / "judge.py").write_text(JUDGE)
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    return path


class Chain:
    """The recipe in a folder, and what running it said."""

    def __init__(self, folder: Path) -> None:
        self.path, self.runs = write_tiny(folder / "data"), folder / "runs"
        self.home, self.said, self.bars = self.runs / "tiny", "", ""

    def run(self, *overrides: str) -> list[str]:
        """The stages that were done, not skipped."""
        said, bars = io.StringIO(), io.StringIO()
        read = recipe.read(self.path, ["--run.out", str(self.runs), *overrides])
        runner.run(read, Console(out=said, err=bars))
        self.said, self.bars = said.getvalue(), bars.getvalue()
        return [stage for stage in stages.STAGES if f"{stage:<10} done in" in self.said]

    def lines(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / stage / "metrics.jsonl").read_text().splitlines()]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in this step of PPO or GRPO."""
    from tetrad.rl.monitor import Monitor

    check = Monitor.check

    def stopping(self: Monitor, ctx: Any, at: int, figures: Any) -> Any:
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return check(self, ctx, at, figures)

    monkeypatch.setattr(Monitor, "check", stopping)
