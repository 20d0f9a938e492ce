"""What the reward model reads of an answer under each chat template."""

import json
from io import StringIO
from pathlib import Path

import pytest

import families
from tetrad.console import Console
from tetrad.data.source import Counts
from tetrad.pipeline import recipe
from tetrad.reward.data import read_examples
from tetrad.text.chat_template import TEMPLATES
from tetrad.tracking.trackers import Trackers
from tetrad.training.context import StageContext

CHATS = [row for row in TEMPLATES if row != "instruction"]
TALK = [("user", "q"), ("assistant", "好 one"), ("user", "r"), ("assistant", "two")]


def context(folder: Path, *words: str) -> StageContext:
    messages = [{"role": role, "content": text} for role, text in TALK]
    (folder / "sft.jsonl").write_text(json.dumps({"messages": messages}))
    ranked = {"messages": messages[:-1], "chosen": "two", "rejected": " no\n"}
    (folder / "rm.jsonl").write_text(json.dumps(ranked))
    (folder / "r.toml").write_text("name = 'r'\n[sft]\ndata = ['sft.jsonl']\n[reward]\ndata = ['rm.jsonl']\n")
    return StageContext(
        recipe.read(folder / "r.toml", words),
        folder,
        "",
        {},
        {},
        Console(out=StringIO()),
        Trackers((), "", folder, print),
    )


@pytest.mark.parametrize("row", CHATS)
def test_the_reward_model_reads_the_end_token_last(tmp_path: Path, row: str) -> None:
    """As in PPO, where a reply ends with it: no newline stands behind."""
    ctx, tokenizer, form = context(tmp_path), families.learned(), TEMPLATES[row]
    s = ctx.recipe.reward
    examples = read_examples(s, form, tokenizer, 512, ctx.files(s.data), Counts())
    assert [int(tokens.ids[-1]) for tokens in examples.tokens] == [form.end_id(tokenizer)] * 2
