"""Files whose names are not UTF-8, as unzip leaves those of an archive from Windows, work from the first command on."""

import json
import os
from pathlib import Path

import pytest

from served import write_model
from tetrad.cli.main import main

TEXT = "海边的小镇在清晨醒来。\n\nThe harbour wakes before the sun.\n\n" * 20


@pytest.mark.parametrize("name", ["数据".encode("gb18030"), "données".encode("latin-1"), b"\xff\xfe", b"a\xe4\xbd"])
def test_names_in_other_bytes(
    tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("sft"))
    write_model(Path("reward"), reward=True)
    corpus, prompts = (os.fsdecode(b"d/" + name + ending) for ending in (b".txt", b".jsonl"))
    os.mkdir("d")
    Path(corpus).write_text(TEXT)
    Path(prompts).write_text('{"Instruction": "Go on.", "Output": "so"}\n')
    Path("r.toml").write_text('name = "r"\n[tokenizer]\ntext = ["d/*.txt"]\nvocab_size = 300\n')
    for words in (
        ["check", "r.toml", "--json", "r.json", "--html", "r.html"],
        ["run", "r.toml"],
        ["run", "r.toml"],
        ["status", "r.toml"],
        ["check", prompts],
        ["generate", "sft", "--prompts", prompts, "--max-new-tokens", "2", "--out", prompts + ".out"],
        ["score", "reward", "--data", prompts, "--out", "s.jsonl"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads(Path(prompts + ".out").read_text())["Instruction"] == "Go on."
    lineage = json.loads(Path("runs/r/tokenizer/lineage.json").read_text())
    assert os.path.samefile(lineage["data"]["tokenizer.text"][0]["path"], corpus)
