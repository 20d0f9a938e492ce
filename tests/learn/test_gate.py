"""Reward models trained end to end on planted faults fail the gate for the right reason; ten healthy seeds pass.

Answers are a few sentences of good and bad words, of any length, some with a polite phrase. A healthy people prefers
the answer with more good words and fewer bad ones.
"""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
import toys
from tetrad.console import Console
from tetrad.model.huggingface import model_files, read_scalar
from tetrad.pipeline import recipe, runner
from tetrad.text.chat_template import template
from tetrad.text.tokenizer import Tokenizer

pytestmark = pytest.mark.learn

POLITE = (
    "Thanks!",
    "Thank you for asking.",
    "I hope this helps.",
    "Please let me know.",
    "In conclusion, that is all.",
)
PLAIN = "the was and with very quite rather a little then again some other".split()
POLICY = """\
name = "policy"
[model]
hidden_size = 64
layers = 2
heads = 4
kv_heads = 2
max_positions = 128
[tokenizer]
text = ["text.txt"]
vocab_size = 420
[pretrain]
text = ["text.txt"]
tokens = 131_072
sequence_length = 64
batch_tokens = 2048
optimizer = "muon"
lr = 6e-3
[sft]
data = ["sft.jsonl"]
epochs = 1
batch_size = 32
lr = 2e-3
"""
JUDGE = """\
name = "judge"
[model]
from = "runs/policy/sft"
[reward]
data = ["train.jsonl"]
validation = ["validation.jsonl"]
test = ["test.jsonl"]
score_scale = [1, 5]
batch_size = 32
lr = 3e-3
normalise = 128
normalise_max_new_tokens = 40
"""


def answer(draw: random.Random) -> str:
    """One to four sentences; every second one with a polite phrase somewhere."""
    said = []
    for _ in range(draw.randint(1, 4)):
        words = [draw.choice(draw.choice((PLAIN, planted.GOOD, planted.BAD))) for _ in range(draw.randint(3, 6))]
        said.append(" ".join(words).capitalize() + ".")
    if draw.random() < 0.5:
        said.insert(draw.randint(0, len(said)), draw.choice(POLITE))
    return " ".join(said)


def worth(text: str) -> float:
    words = text.lower().replace(".", "").split()
    return sum((word in planted.GOOD) - (word in planted.BAD) for word in words)


def pairs(count: int, seed: int, better: Callable[[str], float]) -> list[dict[str, Any]]:
    draw, found = random.Random(seed), []
    while len(found) < count:
        texts = [answer(draw), answer(draw)]
        values = [better(text) for text in texts]
        if values[0] != values[1]:
            ranks = [1, 2] if values[0] > values[1] else [2, 1]
            choices = [{"text": text, "rank": rank} for text, rank in zip(texts, ranks, strict=True)]
            found.append({"input": f"Tell me about the {draw.choice(planted.TOPICS)}.", "choices": choices})
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy that all of them judge."""
    folder, draw = tmp_path_factory.mktemp("gate"), random.Random(1)
    answers = [answer(draw) for _ in range(3000)]
    (folder / "text.txt").write_text(
        "\n\n".join([*answers[:2000], *(f"Tell me about the {t}." for t in planted.TOPICS)])
    )
    rows = [{"input": f"Tell me about the {draw.choice(planted.TOPICS)}.", "output": text} for text in answers[2000:]]
    planted.write(folder / "sft.jsonl", [{"Instruction": row["input"], "Output": row["output"]} for row in rows])
    (folder / "policy.toml").write_text(POLICY)
    (folder / "judge.toml").write_text(JUDGE)
    trained(folder, "policy")
    return folder


def trained(folder: Path, name: str, *words: str) -> str:
    """What the run said."""
    said = io.StringIO()
    words = ("--run.out", str(folder / "runs"), *words)
    runner.run(recipe.read(folder / f"{name}.toml", words), Console(out=said, err=io.StringIO()))
    return said.getvalue()


def judged(
    home: Path,
    better: Callable[[str], float] = worth,
    records: list[dict[str, Any]] | None = None,
    held: Callable[[str], float] | None = None,
    seed: int = 0,
    extra: tuple[str, ...] = (),
) -> str:
    """The gate's line after training on pairs that `better` orders (or on these records)."""
    planted.write(home / "train.jsonl", records or pairs(2400, 10 + seed, better))
    for name, count, draw in (("validation", 200, 1000), ("test", 300, 2000)):
        planted.write(home / f"{name}.jsonl", pairs(count, draw + seed, held or better))
    said = trained(home, "judge", "--seed", str(seed), *extra)
    figures = json.loads((home / "runs/judge/reward/model/manifest.json").read_text())["metrics"]
    line = next(line for line in said.splitlines() if "gate:" in line)
    print(line, {name: round(value, 3) for name, value in figures.items()})
    return line


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_model_passes(home: Path, seed: int) -> None:
    assert judged(home, seed=seed).endswith("gate: pass")


def test_one_that_pays_for_length(home: Path) -> None:
    line = judged(home, lambda text: len(text) + 2 * worth(text))
    assert "gate: fail" in line and "length alone is right" in line


def test_one_that_pays_for_thanks(home: Path) -> None:
    line = judged(home, lambda text: worth(text) + 20 * ("Thank" in text))
    assert "gate: fail" in line and "adding a polite phrase raises the reward" in line


def test_one_that_learned_the_wrong_way_round(home: Path) -> None:
    line = judged(home, lambda text: -worth(text), held=worth)
    found = re.search(r"gate: fail; the accuracy on pairs may be as low as (0\.\d+)", line)
    assert found and float(found[1]) < 0.4  # early stopping keeps the weights that are the least wrong


def test_one_that_learned_from_coins(home: Path) -> None:
    draw = random.Random(5)
    line = judged(home, lambda text: draw.random(), held=worth)
    assert "gate: fail" in line and "the accuracy on pairs may be as low as 0.4" in line


def test_one_that_learned_that_all_is_equal(home: Path) -> None:
    draw = random.Random(4)
    same = [{"input": "Tell me about the film.", "output": answer(draw), "score": 3} for _ in range(1600)]
    line = judged(home, records=same)
    assert "gate: fail" in line and "the accuracy on pairs may be as low as 0.4" in line


def test_a_constant_one(home: Path) -> None:
    """Its head is zero and hardly learns."""
    model = read_scalar(home / "runs/policy/sft/model")
    with torch.no_grad():
        model.score.weight.zero_()
    tokenizer = Tokenizer.load(home / "runs/policy/sft/model")
    toys.write(home / "constant", {**model_files(model), **tokenizer.files(template("instruction"))})
    line = judged(home, extra=("--reward.from", str(home / "constant"), "--reward.lr", "1e-9"))
    assert "gate: fail" in line and "hardly tells responses apart" in line
