"""docs/data.md and docs/zh/data.md: every record shown is read, every form is shown, and both show the same."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tetrad.data.records import read_conversations, read_documents, read_preferences, read_prompts
from tetrad.data.source import SUFFIXES, Counts
from tetrad.pipeline import recipe
from tetrad.settings.names import shown

ROOT = Path(__file__).parents[2] / "docs"
PAGES = ("data.md", "zh/data.md")
READERS = (
    read_documents,
    read_conversations,
    lambda paths, counts: read_preferences(paths, (1, 5), counts),
    read_prompts,
)


def parts(page: str) -> list[str]:
    """The chapters from the tokenizer's to PPO's."""
    return (ROOT / page).read_text(encoding="utf-8").split("\n## ")[2:6]


def records(text: str) -> list[dict[str, Any]]:
    blocks = re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_every_record_is_read_and_every_form_shown(page: str, tmp_path: Path) -> None:
    forms: Counter[str] = Counter()
    for reader, text in zip(READERS, parts(page), strict=True):
        found = records(text)
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
        counts = Counts()
        assert len(list(reader([path], counts))) == len(found) > 0
        assert not counts.unknown
        forms += counts.forms
    named = (Path(__file__).parents[2] / "src/tetrad/data/records.py").read_text()
    known = set(re.findall(r'return "([a-z ]+)", ', named)) | set(re.findall(r'_seen\(counts, "([a-z]+)"', named))
    known |= {"ranked choices", "chosen and rejected", "scores"}
    assert known <= set(forms)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_settings(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in text for suffix in SUFFIXES)
    (block,) = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(block)
    assert recipe.read(tmp_path / "recipe.toml").sft.weights == (2, 1, 0.25)
    (rename,) = re.findall(r"`(\[data\] rename = .*?)`", text)
    (tmp_path / "recipe.toml").write_text(rename.replace("] ", "]\n", 1))
    assert shown(recipe.read(tmp_path / "recipe.toml").data.rename) == '["question=Instruction", "answer=Output"]'


def test_both_pages_show_the_same() -> None:
    shapes = [[sorted(record) for part in parts(page) for record in records(part)] for page in PAGES]
    assert shapes[0] == shapes[1]
    code = [
        re.findall(r"^```(?:toml|bash)\n(.*?)^```", (ROOT / p).read_text(), re.DOTALL | re.MULTILINE) for p in PAGES
    ]
    assert [re.sub(r"#.*", "", block) for block in code[0]] == [re.sub(r"#.*", "", block) for block in code[1]]
    names = [re.findall(r"`([\w.]+) = ", (ROOT / page).read_text()) for page in PAGES]
    assert names[0] == names[1]
