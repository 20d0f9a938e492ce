"""docs/align.md: its commands run in order on a stand-in for the base, its plan is what the script computes."""

import importlib.util
import io
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import toys
from tetrad.cli.main import main
from tetrad.datacheck import cost
from tetrad.model.huggingface import model_files
from tetrad.model.transformer import CausalLM
from tetrad.storage import write_folder
from tetrad.text.bpe import learn
from tetrad.text.chat_template import TEMPLATES

ROOT = Path(__file__).parents[2]
PAGES = ("docs/align.md", "docs/zh/align.md")
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
SMALL = (
    "--ppo.steps 1 --ppo.batch-size 4 --ppo.max-new-tokens 8 --reward.normalise 4 --reward.normalise-max-new-tokens 4"
)
SMALL += " --reward.probes 4 --evaluate.samples 8 --evaluate.best-of 2 --evaluate.max-new-tokens 8"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def stand_in(folder: Path) -> None:
    """A base of random weights with the template of the page's, and the three files of data."""
    form = TEMPLATES["qwen2.5"]
    words = learn(["Recommend a book. Emma, if you like wit. No. system user assistant"] * 3, 300)
    end = form.end_id(words)
    model = CausalLM(toys.config(vocab_size=words.size, eos_ids=(end,), pad_id=words.pad_id, max_positions=512))
    toys.randomise(model, std=0.05)
    write_folder(folder / "base", {**model_files(model), **words.files(form)}, {"key": "k"})

    def write(name: str, first: int, count: int, **answers: str) -> None:
        rows = [{"prompt": f"Recommend {n} books.", **answers} for n in range(first, first + count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("sft.jsonl", 0, 24, completion="Emma, if you like wit.")
    write("prefs.jsonl", 100, 24, chosen="Emma, if you like wit.", rejected="No.")
    write("judge.jsonl", 200, 8, chosen="Emma.", rejected="No, no, no.")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path)
    recipe, judge = (block.replace(MODEL, "base") for block in blocks(PAGES[0], "toml"))
    (tmp_path / "judge.toml").write_text(judge)
    (tmp_path / "judge.py").write_text(blocks(PAGES[0], "python")[0])
    lines = [line for block in blocks(PAGES[0], "bash")[1:] for line in block.splitlines()]
    for line in lines:
        if not line.startswith("tetrad "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        words = shlex.split(line.replace(MODEL, "base"))[1:]
        words += shlex.split(SMALL) if words[-1].endswith(".toml") and words[0] != "init" else []
        words += ["--max-new-tokens", "8"] if words[0] in ("generate", "chat") else []
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        assert main(words) == 0, (line, capsys.readouterr())
        if words[0] == "init":  # the page's recipe is what the command writes, but for the length of the answers
            tables = [tomllib.loads(text) for text in (recipe, (tmp_path / "align.toml").read_text())]
            assert [each["ppo"].pop("max_new_tokens") for each in tables] == [208, 32]
            assert tables[0] == tables[1]
    assert {line.split()[1] for line in lines if line.startswith("tetrad ")} >= {"init", "check", "run", "export"}
    report = json.loads((tmp_path / "runs/align/evaluate/report/report.json").read_text())
    assert "people" in report["systems"]["ppo"] and report["verdict"]
    assert json.loads((tmp_path / "agreement.json").read_text())
    assert len((tmp_path / "after.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "aligned/config.json").is_file() and (tmp_path / "aligned.gguf").is_file()


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "benchmarks/sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one base; 0.15 GiB of it depend on the processor. Times follow from the number of records, here few."""
    monkeypatch.setattr(cost, "speed", cost.speed)  # which the script replaces
    sizes = script()
    recipe = sizes.write(tmp_path / "work", "Qwen2.5-0.5B", 60)
    for adapters in (False, True):
        figures = sizes.plan(recipe, adapters=adapters)
        assert figures["parameters"] == 494_032_768  # as published
        gib = [figures[stage]["memory_bytes"] / 2**30 for stage in sizes.STAGES]
        for page in PAGES:
            way = ("adapters" if adapters else "all") if page == PAGES[0] else ("适配器" if adapters else "全部")
            row = re.search(rf"^\| Qwen2.5-0.5B \| {way} \|(.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
            assert row and [float(cell) for cell in re.findall(r"([\d.]+) GiB", row[1])] == pytest.approx(gib, abs=0.2)
            assert sizes.card(max(gib)) in row[1]


def test_both_pages_say_the_same() -> None:
    for language in ("bash", "toml", "python"):
        english, chinese = (re.sub(r"<.*?>| *# .*", "", "".join(blocks(page, language))) for page in PAGES)
        assert english == chinese
    figures = [sorted(re.findall(r"\d+\.\d GiB", (ROOT / page).read_text("utf-8"))) for page in PAGES]
    assert figures[0] == figures[1] and len(figures[0]) >= 30
