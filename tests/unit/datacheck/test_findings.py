"""What matters most stands first, with its fix; and the recipe's values are held against the data that it names."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import planted
from tetrad.cli.main import main
from tetrad.console import Console
from tetrad.datacheck import cost
from tetrad.datacheck.check import check_recipe
from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig
from tetrad.model.inspect import parameter_count
from tetrad.pipeline import recipe
from tetrad.report.sections import FIXES, Finding, Report, Section
from tetrad.settings.common import Run
from tetrad.settings.use import Check
from tetrad.stages import Recipe

Checked = Callable[..., dict[str, Any]]


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    """The report on a recipe with what was said on the terminal; its files are in the current folder."""
    monkeypatch.chdir(tmp_path)

    def check(text: str) -> dict[str, Any]:
        out = io.StringIO()
        Path("r.toml").write_text(text)
        try:
            check_recipe(recipe.read("r.toml"), Check(json="o.json", html="o.html"), Console(out=out))
        except UserError as error:
            assert error.code == "E-DATA-OVERLAP"
        return {**json.loads(Path("o.json").read_text()), "said": out.getvalue(), "html": Path("o.html").read_text()}

    return check


def of(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["name"] == name]


def write(name: str, records: list[dict[str, Any]]) -> None:
    planted.write(Path(name), records)


def test_the_worst_come_first() -> None:
    names = ["epochs", "duplicates", "leakage", "coverage", "memory", "length bias"]
    findings = tuple(Finding("warning", name, name, fix="do it") for name in names)
    findings += (Finding("note", "vocabulary", "n"), Finding("error", "refused", "e", "f:1", "mend it"))
    report = Report("x", (Section("a", "A", findings=findings[:4]), Section("b", "B", findings=findings[4:])))
    assert [f.name for f in report.first] == ["refused", "memory", "leakage", "length bias", "coverage"]
    assert [f.name for f in report.findings[5:]] == ["duplicates", "epochs", "vocabulary"]
    assert all(FIXES[f.name] or f.level == "note" for f in findings)
    twice = Report("x", (Section("a", "A", findings=(*findings[1:3], findings[2], *findings[3:6])),))
    assert [f.name for f in twice.first] == ["memory", "leakage", "length bias", "coverage", "duplicates"]
    assert Report("x", (Section("a", "A", findings=findings[6:7]),)).first == []


def test_every_finding_has_its_rank() -> None:
    with pytest.raises(KeyError, match="strange"):
        Finding("warning", "strange", "text")


def test_check_opens_with_them(checked: Checked) -> None:
    """Leaks, copies and a score scale that is too wide: the leak is first, each has its fix, and all come before the
    first table."""
    train, held = planted.instructions(200, 1), planted.instructions(100, 2)
    write("a.jsonl", [*train, *train[:50]])
    write("b.jsonl", [*held, *train[:5]])
    draw = random.Random(0)
    scores = [
        {"input": p, "output": planted.answer(draw, good=True), "score": 1 + i % 3} for i, p in enumerate("ab" * 150)
    ]
    write("s.jsonl", scores)
    text = '[sft]\ndata = ["a.jsonl"]\nvalidation = ["b.jsonl"]\n'
    report = checked(text + '[reward]\ndata = ["s.jsonl"]\nscore_scale = [0, 10]\n')
    lines = report["said"].splitlines()
    assert lines[0].startswith("what matters most (")
    assert lines[1].startswith(" 1. error: 5 of 105 records of sft.validation are in sft.data too")
    assert lines[1].endswith("(first: b.jsonl:101)") and lines[2].startswith(
        "    Fix: remove them from the training data"
    )
    table = next(i for i, line in enumerate(lines) if line == "Files")
    opening = "\n".join(lines[:table])
    assert "score_scale = [1, 3]" in opening and "awk '!seen[$0]++' a.jsonl" in opening
    assert opening.count("    Fix: ") == sum(line[:4].strip(" .").isdigit() for line in lines[:table])
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels, key=("error", "warning", "note").index)
    assert all(finding["fix"] for finding in report["findings"] if finding["level"] != "note")
    assert report["findings"][0]["name"] == "leakage" and "Fix: " in report["html"]


def test_nothing_is_said_where_there_is_nothing(checked: Checked) -> None:
    write("s.jsonl", planted.instructions(300, 1))
    write("t.jsonl", planted.instructions(60, 2))
    report = checked('[sft]\ndata = ["s.jsonl"]\nvalidation = ["t.jsonl"]\n')
    assert report["said"].startswith("nothing that needs your attention\n")
    assert "Nothing that needs your attention" in report["html"]


def test_the_share_that_is_learned_is_said(checked: Checked) -> None:
    """Long Inputs and answers of one word: of the tokens hardly any is learned."""
    draw = random.Random(0)
    rows = [
        {"Instruction": f"Label {i}.", "Input": planted.answer(draw, good=True, sentences=6), "Output": "yes"}
        for i in range(200)
    ]
    write("s.jsonl", rows)
    report = checked('[sft]\ndata = ["s.jsonl"]\n')
    (finding,) = of(report, "learned share")
    assert "of the tokens of sft.data are learned" in finding["text"]
    lengths = report["sections"]["recipe"]["figures"]["sft.data"]
    assert lengths["learned"] < 0.03 and lengths["prompt"]["median"] > 100 > 5 > lengths["answer"]["median"]
    write("s.jsonl", planted.instructions(200))
    assert not of(checked('[sft]\ndata = ["s.jsonl"]\n'), "learned share")


def test_answers_longer_than_max_new_are_said(checked: Checked) -> None:
    write("s.jsonl", planted.instructions(200))
    write("p.jsonl", planted.instructions(200, 3))
    text = '[sft]\ndata = ["s.jsonl"]\n[ppo]\nprompts = ["p.jsonl"]\n'
    report = checked(text + "max_new_tokens = 16\n")
    (finding,) = of(report, "answer length")
    assert finding["text"].startswith("100% of the answers of sft.data are longer than ppo.max_new_tokens = 16")
    p95 = report["sections"]["recipe"]["figures"]["sft.data"]["answer"]["p95"]
    assert finding["fix"].startswith(f"ppo.max_new_tokens = {p95},")
    assert not of(checked(text + "max_new_tokens = 200\n"), "answer length")


@pytest.mark.parametrize(("tokens", "level"), [(2_000_000, "warning"), (8000, ""), (2048, "note")])
def test_epochs_of_pretraining_are_said(checked: Checked, tokens: int, level: str) -> None:
    Path("t.txt").write_text("\n\n".join(row["Output"] for row in planted.instructions(200)))
    report = checked(f'[pretrain]\ntext = ["t.txt"]\ntokens = {tokens}\nsequence_length = 64\nbatch_tokens = 1024\n')
    assert [finding["level"] for finding in of(report, "epochs")] == ([level] if level else [])
    figures = report["sections"]["recipe"]["figures"]["pretrain.text"]
    assert figures["epochs"] == pytest.approx(tokens / figures["tokens"])


def test_no_judge_and_no_validation_are_said(checked: Checked) -> None:
    write("r.jsonl", planted.comparisons(planted.prompts(300)))
    write("p.jsonl", [{"input": prompt} for prompt in planted.prompts(200, 2)])
    Path("judge.py").write_text("def length(samples):\n    return [len(s['text']) for s in samples]\n")
    text = '[reward]\ndata = ["r.jsonl"]\n[ppo]\nprompts = ["p.jsonl"]\n'
    report = checked(text)
    assert "[evaluate]" in of(report, "judge")[0]["fix"]
    assert of(report, "validation")[0]["fix"].startswith('reward.validation = ["')
    report = checked(text + '[evaluate]\nprompts = ["r.jsonl"]\n')
    assert of(report, "judge")[0]["fix"].startswith("evaluate.judges = [")
    report = checked(text + '[evaluate]\nprompts = ["r.jsonl"]\njudges = ["judge.py:length"]\n')
    assert not of(report, "judge")


@pytest.mark.parametrize(("count", "few"), [(20, True), (300, False)])
def test_few_records_are_said(checked: Checked, count: int, few: bool) -> None:
    write("s.jsonl", planted.instructions(count))
    report = checked('[sft]\ndata = ["s.jsonl"]\n')
    assert [f["text"] for f in of(report, "few records")] == (
        [f"sft.data has only {count} records, fewer than 100"] if few else []
    )


def test_memory_that_is_not_there_is_said(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    write("s.jsonl", planted.instructions(200))
    text = '[sft]\ndata = ["s.jsonl"]\n'
    assert not of(checked(text), "memory")
    monkeypatch.setattr(cost, "machine_memory", lambda: 300 << 20)
    (finding,) = of(checked(text), "memory")
    assert "sft" in finding["text"] and "0.3 GiB" in finding["text"] and "micro_batch_tokens" in finding["fix"]


def test_each_process_has_its_own_memory(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whole, activations of its share of the batch; all processes share the machine."""
    write("s.jsonl", planted.instructions(200))

    def planned(run: str = "") -> int:
        report = checked(f'[sft]\ndata = ["s.jsonl"]\nbatch_size = 32\n[run]\n{run}\n')
        return int(report["sections"]["cost"]["figures"]["sft"]["memory_bytes"])

    one, two, again = planned(), planned("nproc = 2"), planned("activation_checkpointing = true")
    assert 0.5 * one < two < one
    assert again < one
    monkeypatch.setattr(cost, "machine_memory", lambda: int(1.5 * two))
    text = '[sft]\ndata = ["s.jsonl"]\nbatch_size = 32\n'
    assert not of(checked(text), "memory")
    (finding,) = of(checked(text + "[run]\nnproc = 2\n"), "memory")
    assert "2 processes together" in finding["text"]


def test_sharded_models_are_planned_in_parts() -> None:
    """Weights, their optimizer and frozen models; what a micro-batch keeps is each process's own."""
    config = DecoderConfig("qwen2", 1000, 512, 8, 8, 2, 64, 1408, 256)
    stage, n = cost.StageCost("dpo", 1, 1, 100, 100, 100, 100, batch=4096), parameter_count(config)
    whole, parts = (cost.memory(stage, config, Recipe(run=Run(nproc=2, shard=how))) for how in ("none", "full"))
    assert whole - parts == pytest.approx(16 * n / 2, rel=1e-3)


def test_many_scored_test_answers_are_planned_as_pairs(checked: Checked) -> None:
    """Their number grows with the square, until no more are paired."""
    scored = [{"input": f"Question {i}", "output": "It was good.", "score": i % 9 - 4} for i in range(1050)]
    write("train.jsonl", scored[1000:])

    def planned(count: int) -> int:
        write("test.jsonl", scored[:count])
        text = '[reward]\ndata = ["train.jsonl"]\nvalidation = ["test.jsonl"]\nscore_scale = [-4, 4]\n'
        figures: dict[str, int] = checked(text)["sections"]["cost"]["figures"]["reward"]
        return figures["memory_bytes"]

    few, many = planned(40), planned(1000)
    assert many - few == pytest.approx(cost.PAIR * 1000**2 / 2, rel=0.2)


def test_a_gpu_reads_in_16_bit() -> None:
    """Frozen matrices, the cache and what is kept take half; the base of adapters stays whole."""
    config = DecoderConfig("qwen2", 1000, 512, 8, 8, 2, 64, 1408, 256)

    def planned(adapters: float = 0.0, **run: Any) -> int:
        stage = cost.StageCost("dpo", 0 if adapters else 1, 1, 100, 100, 100, 100, adapters=adapters, batch=4096)
        return cost.memory(stage, config, Recipe(run=Run(device="cuda", **run)))

    wide, half = planned(dtype="float32"), planned()
    kept = cost.kept_bytes(config, 4096)
    assert 0.35 * kept < wide - half < kept
    assert planned(activation_checkpointing=True) < half
    assert planned(1.0) - half > -12 * parameter_count(config)


def test_the_head_costs_where_logits_are_needed_and_frozen_blocks_cost_less() -> None:
    config = DecoderConfig("qwen2", 1000, 64, 2, 4, 2, 16, 128, 64)
    blocks = parameter_count(config) - 64_000
    all_labels = cost.StageCost("pretrain", 1, 0, tokens=100, labels=100)
    assert cost.work(all_labels, config) == 6 * parameter_count(config) * 100
    reward = cost.StageCost("reward", 1, 1, tokens=100, read=10)
    assert cost.work(reward, config) == 600 * blocks + 20 * blocks
    adapters = cost.StageCost("sft", 0, 1, tokens=100, labels=40, adapters=1)
    assert cost.work(adapters, config) == 4 * (100 * blocks + 40 * 64_000)
    untied = replace(config, tied=False)
    assert cost.work(all_labels, untied) == cost.work(all_labels, config)


def test_responses_are_planned_as_long_as_the_answers_of_sft(checked: Checked) -> None:
    write("s.jsonl", planted.instructions(200))
    write("p.jsonl", planted.instructions(200))
    text = '[ppo]\nprompts = ["p.jsonl"]\nrewards = ["judge.py:length"]\ncritic = "actor"\nmax_new_tokens = 500\n'
    alone = checked(text)["sections"]["cost"]["figures"]["ppo"]
    beside = checked('[sft]\ndata = ["s.jsonl"]\n' + text)["sections"]["cost"]["figures"]["ppo"]
    assert beside["flop"] < alone["flop"]


def test_a_vocabulary_that_the_text_cannot_fill_is_said(checked: Checked) -> None:
    Path("t.txt").write_text("a b c d e f\n\n" * 30)
    text = '[tokenizer]\ntext = ["t.txt"]\nvocab_size = {}\n[pretrain]\ntext = ["t.txt"]\n'
    (finding,) = of(checked(text.format(900)), "vocabulary")
    size = checked(text.format(900))["sections"]["vocabulary"]["figures"]["size"]
    assert f"{size} of the 900" in finding["text"] and f"tokenizer.vocab_size = {size}" in finding["fix"]
    assert not of(checked(text.format(size)), "vocabulary")


def test_clauses_that_became_one_token_are_named(checked: Checked) -> None:
    """Forty reviews that were copied five times: whole clauses are one token, and the longest are shown."""
    draw = random.Random(0)
    clauses = ["".join(chr(0x4E00 + draw.randrange(900)) for _ in range(12)) for _ in range(40)]
    text = '[tokenizer]\ntext = ["t.txt"]\nvocab_size = 4096\n[pretrain]\ntext = ["t.txt"]\n'
    Path("t.txt").write_text("\n\n".join(clauses * 5), encoding="utf-8")
    report = checked(text)
    (finding,) = of(report, "long tokens")
    assert finding["level"] == "warning" and any(clause in finding["text"] for clause in clauses)
    assert report["sections"]["vocabulary"]["figures"]["long_tokens"] >= 40
    Path("t.txt").write_text("\n\n".join(clauses), encoding="utf-8")
    assert not of(checked(text), "long tokens")


def test_the_tokenizer_stage_says_that_it_stayed_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("a b c d e f\n\n" * 30)
    Path("r.toml").write_text('[tokenizer]\ntext = ["t.txt"]\nvocab_size = 900\n')
    assert main(["tokenizer", "r.toml"]) == 0
    assert "of the 900 tokens that tokenizer.vocab_size asks for" in capsys.readouterr().out
