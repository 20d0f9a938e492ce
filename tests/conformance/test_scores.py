"""A reply's score is the score of what is written: `generate` and `score` say the same of every reply, and best-of-N
takes no reply whose text is not what was sampled."""

import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from served import write_model
from tetrad.cli.generate import generate_file
from tetrad.cli.score import score_file
from tetrad.console import Console
from tetrad.settings.use import Generate, ScoreFile

REPLIES = 1_000
ASKED = (
    "请帮我翻译一句话",
    "这部电影很好看",
    "写一首诗",
    "<|endoftext|>",
    "a film\0 with NUL",
    "  spaces  ",
    "🎬",
    "\ufffd",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained byte-level model writes any bytes; the reward model reads long texts."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_model(folder / "sft", seed=1, max_positions=256)
    write_model(folder / "chat", "chatml", seed=1, max_positions=256)
    write_model(folder / "reward", reward=True, reward_bias=0.25, max_positions=256)
    write_model(folder / "judge", reward=True, size=280, seed=3, max_positions=256)
    return folder


def replies(
    run: Path, out: Path, form: str = "sft", judge: str = "reward", count: int = REPLIES, **settings: Any
) -> list[dict[str, Any]]:
    """Generated with their scores, and what `score` gives for the same file as "again"."""
    draw, prompts = random.Random(0), out / "prompts.jsonl"
    asked = [draw.choice(ASKED) + draw.choice(ASKED) for _ in range(count)]
    prompts.write_text("".join(json.dumps({"Instruction": text}) + "\n" for text in asked))
    said = StringIO()
    given = {
        "model": str(run / form),
        "reward": str(run / judge),
        "prompts": str(prompts),
        "max_new_tokens": 12,
        **settings,
    }
    generate_file(Generate(**given, out=str(out / "replies.jsonl")), Console(out=said, err=StringIO()))
    scored = ScoreFile(model=str(run / judge), data=str(out / "replies.jsonl"), out=str(out / "scores.jsonl"))
    score_file(scored, Console(out=StringIO(), err=StringIO()))
    records, again = (lines(out / name) for name in ("replies.jsonl", "scores.jsonl"))
    for record, other in zip(records, again, strict=True):
        record |= {"again": other["score"], "said": said.getvalue()}
    return records


def lines(path: Path) -> list[dict[str, Any]]:
    """Not by `splitlines`: a reply may hold U+0085 or U+2028."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"form": "chat"},
        {"judge": "judge"},
        {"stop": ("a", "\n"), "max_new_tokens": 2},
        {"temperature": 1.5, "best_of": 2},
    ],
    ids=str,
)
def test_generate_scores_what_score_scores(run: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    found = replies(run, tmp_path, **settings)
    broken = [record for record in found if "\ufffd" in record["response"]]
    assert len(found) == REPLIES and len(broken) > REPLIES / 20  # so that half characters would be seen
    assert len({record["finished"] for record in found}) == 2
    assert max(abs(record["score"] - record["again"]) for record in found) < 1e-6


def test_replies_that_are_no_utf8_are_counted(run: Path, tmp_path: Path) -> None:
    found = replies(run, tmp_path, count=100)
    broken = [number for number, record in enumerate(found, 1) if "\ufffd" in record["response"]]
    first = f"the first answers {tmp_path / 'prompts.jsonl'}:{broken[0]}"
    what = f"note: {len(broken)} answers are not valid UTF-8, wrong bytes are written as U+FFFD; {first}"
    assert what in found[0]["said"]


def test_best_of_n_prefers_what_can_be_written(run: Path, tmp_path: Path) -> None:
    """Of eight replies to a prompt nearly always one is text: then that one is taken, whatever the others' scores."""
    alone = sum("\ufffd" in record["response"] for record in replies(run, tmp_path, count=100, max_new_tokens=2))
    best = sum(
        "\ufffd" in record["response"] for record in replies(run, tmp_path, count=100, max_new_tokens=2, best_of=8)
    )
    assert alone > 50 and best < 20
