"""Every planted fault is found, with its size; what is clean is not accused; and the report is told in three ways."""

import io
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import planted
from tetrad.cli.main import main
from tetrad.console import Console
from tetrad.datacheck.check import check_files, check_recipe
from tetrad.errors import UserError
from tetrad.pipeline import recipe
from tetrad.pipeline.preflight import read_records
from tetrad.settings.use import Check

Checked = Callable[..., dict[str, Any]]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """The report on a recipe of these files, as JSON, with what was said on the terminal."""

    def check(text: str = "", *, files: list[str] | None = None, error: str = "", **settings: Any) -> dict[str, Any]:
        out = io.StringIO()
        asked = Check(json=str(tmp_path / "report.json"), html=str(tmp_path / "report.html"), **settings)
        try:
            if files:
                check_files(files, asked, Console(out=out))
            else:
                (tmp_path / "recipe.toml").write_text(text)
                given = recipe.read(tmp_path / "recipe.toml", ["--run.out", str(tmp_path / "runs")])
                check_recipe(given, asked, Console(out=out))
            assert not error
        except UserError as raised:
            assert re.search(error or "^$", str(raised))
        return {**json.loads((tmp_path / "report.json").read_text()), "said": out.getvalue()}

    return check


def found(report: dict[str, Any], name: str = "", level: str = "") -> list[str]:
    """The texts of the findings of this name; of all but notes where none is named."""
    kept = [f for f in report["findings"] if (f["name"] == name if name else f["level"] != "note")]
    return [f["text"] for f in kept if not level or f["level"] == level]


def figures(report: dict[str, Any], section: str) -> dict[str, Any]:
    return dict(report["sections"][section]["figures"])


def test_clean_data_is_not_accused(tmp_path: Path, checked: Checked) -> None:
    asked = planted.prompts(700)
    people = ["ann", "bob", "cyd"]
    rows = [{**r, "annotator": people[i % 3]} for i, r in enumerate(planted.comparisons(asked))]
    planted.write(tmp_path / "r.jsonl", rows[:600])
    planted.write(tmp_path / "t.jsonl", rows[600:])
    planted.write(tmp_path / "s.jsonl", planted.instructions(300, 1))
    planted.write(tmp_path / "p.jsonl", [{"input": prompt} for prompt in planted.prompts(200, 2)])
    text = '[sft]\ndata = ["s.jsonl"]\n[reward]\ndata = ["r.jsonl"]\nvalidation = ["t.jsonl"]\n'
    text += '[ppo]\nprompts = ["p.jsonl"]\n[evaluate]\nprompts = ["e.jsonl"]\njudges = ["judge.py:length"]\n'
    planted.write(
        tmp_path / "e.jsonl",
        [{"input": f"Describe {a} and {b}."} for a in planted.FILLER[:40] for b in ("rain", "snow")],
    )
    (tmp_path / "judge.py").write_text("def length(samples):\n    return [len(s['text']) for s in samples]\n")
    report = checked(text)
    assert found(report) == []
    assert report["said"].startswith("nothing that needs your attention\n")
    judged = figures(report, "reward_data_judged")
    assert judged["reader_accuracy"] > 0.9 and judged["suspected_flips"] <= 6
    assert 0.4 < judged["longer_wins"] < 0.6
    assert set(figures(report, "cost")) == {"sft", "reward", "ppo", "parameters"}


@pytest.mark.parametrize("shared", [True, False])
def test_an_annotator_who_flips_is_named(tmp_path: Path, checked: Checked, shared: bool) -> None:
    """3 of 10 people see each pair, or one alone: then a linear reader stands in for the others."""
    draw, rows = random.Random(0), []
    people = [f"p{i}" for i in range(10)]
    for record in planted.comparisons(planted.prompts(600 if shared else 1500)):
        for person in draw.sample(people, 3 if shared else 1):
            said = planted.flipped(record) if draw.random() < (0.3 if person == "p4" else 0.02) else record
            rows.append({**said, "annotator": person})
    report = checked(files=[planted.write(tmp_path / "r.jsonl", rows)])
    (named,) = found(report, "annotator")
    assert named.startswith("annotator p4 agrees in ")
    judged = figures(report, "reward_data_judged")
    rate = judged["annotators"]["p4"]["agreement"]
    assert abs(rate - 0.7) < 0.1
    assert all(other["agreement"] > 0.85 for name, other in judged["annotators"].items() if name != "p4")
    if shared:
        assert 0.7 < judged["alpha_pairs"] < 0.95


def test_flips_are_listed(tmp_path: Path, checked: Checked) -> None:
    rows = planted.comparisons(planted.prompts(800))
    bad = set(random.Random(1).sample(range(800), 40))
    path = planted.write(tmp_path / "r.jsonl", [planted.flipped(r) if i in bad else r for i, r in enumerate(rows)])
    report = checked(files=[path])
    table = next(t for t in report["sections"]["reward_data_judged"]["tables"] if t["title"].startswith("suspected"))
    lines = [int(row[0].rpartition(":")[2]) - 1 for row in table["rows"]]
    assert len(lines) == 20 and sum(line in bad for line in lines) >= 19
    assert 30 <= figures(report, "reward_data_judged")["suspected_flips"] <= 60


def test_leaked_rows_are_found(tmp_path: Path, checked: Checked) -> None:
    """5 % of the held-out records: half exactly, half with a word changed."""
    draw, train, held = random.Random(0), planted.instructions(600, 1), planted.instructions(400, 2)
    held[100:110] = train[50:60]
    held[200:210] = [{**r, "Output": planted.edited(r["Output"], draw)} for r in train[300:310]]
    planted.write(tmp_path / "a.jsonl", train)
    planted.write(tmp_path / "b.jsonl", held)
    report = checked(
        '[sft]\ndata = ["a.jsonl"]\nvalidation = ["b.jsonl"]\n', error=r"E-DATA-OVERLAP\S+ \S+b.jsonl:101: 10 of 400"
    )
    counted = figures(report, "leakage")["sft.validation in sft.data"]
    assert (counted["exact"], counted["records"]) == (10, 400) and 9 <= counted["near"] <= 10
    assert len(found(report, "leakage", "error")) == 1


def test_near_duplicates_and_merged_forms_are_found(tmp_path: Path, checked: Checked) -> None:
    """3 % nearly the same, and five whose Instruction holds the Input already."""
    draw, rows = random.Random(0), planted.instructions(970)
    near = [{**r, "Output": planted.edited(r["Output"], draw)} for r in rows[:30]]
    asked = [{"Instruction": "请帮我翻译一句话", "Input": f"hello {i}", "Output": f"你好 {i}"} for i in range(5)]
    merged = [{"Instruction": f"请帮我翻译一句话:hello {i}", "Input": "", "Output": f"你好 {i}"} for i in range(5)]
    report = checked(files=[planted.write(tmp_path / "s.jsonl", [*rows, *near, *asked, *merged])])
    counted = figures(report, "duplicates")["sft.data"]
    assert counted["exact"] == 5 and 27 <= counted["near"] <= 30
    assert found(report, "duplicates", "warning")


def test_copies_of_one_row_are_counted(tmp_path: Path, checked: Checked) -> None:
    report = checked(files=[planted.write(tmp_path / "s.jsonl", planted.instructions(1) * 500)])
    assert figures(report, "duplicates")["sft.data"]["exact"] == 499
    (text,) = found(report, "duplicates", "warning")
    assert "499 of 500" in text


def test_a_length_bias_is_found(tmp_path: Path, checked: Checked) -> None:
    draw, rows = random.Random(0), []
    for prompt in planted.prompts(300):
        long, short = planted.answer(draw, good=True, sentences=3), planted.answer(draw, good=True, sentences=1)
        first = draw.random() < 0.85
        rows.append({"prompt": prompt, "chosen": long if first else short, "rejected": short if first else long})
    report = checked(files=[planted.write(tmp_path / "r.jsonl", rows)])
    (text,) = found(report, "length bias")
    assert text.startswith("the longer answer wins in 8")
    scores = [{"input": "q", "output": "word " * n, "score": n + draw.random() * 9} for n in range(1, 60)]
    report = checked(files=[planted.write(tmp_path / "s.jsonl", scores)])
    assert "Spearman" in found(report, "length bias")[0]


def test_prompts_that_the_reward_model_never_saw_are_found(tmp_path: Path, checked: Checked) -> None:
    planted.write(tmp_path / "r.jsonl", planted.comparisons(planted.prompts(400)))
    seen = [{"input": prompt} for prompt in planted.prompts(200, 5)]
    strange = [
        {"input": f"写一首关于{word}的诗，要有{n}行。"} for word in ("春天", "月亮", "故乡", "雨") for n in range(25)
    ]
    planted.write(tmp_path / "p.jsonl", seen + strange)
    report = checked('[reward]\ndata = ["r.jsonl"]\n[ppo]\nprompts = ["p.jsonl"]\n[model]\nfrom = ""\n')
    (text,) = found(report, "coverage")
    assert re.match(r"3[3-9]% of the PPO prompts are unlike", text)
    assert figures(report, "languages")["ppo.prompts"]["languages"]["zh"] > 0.2


def test_contradictions_circles_and_ties(tmp_path: Path, checked: Checked) -> None:
    def ranked(prompt: str, *texts: str, tie: bool = False) -> dict[str, Any]:
        return {"input": prompt, "choices": [{"text": t, "rank": 1 if tie else i} for i, t in enumerate(texts)]}

    rows = [ranked("q", "a", "b"), ranked("q", "b", "a"), ranked("q", "b", "a"), ranked("q", "c", "d", tie=True)]
    rows += [ranked("w", "x", "y"), ranked("w", "y", "z"), ranked("W?", "z", "x"), ranked("v", "x", "y", "z")]
    scores = [{"input": "s", "output": "t", "score": n} for n in (1, 2)]
    scores += [{"input": "s", "output": "u", "score": n, "annotator": f"p{n}"} for n in (1, 2)]
    report = checked(files=[planted.write(tmp_path / "r.jsonl", [*rows, *scores])])
    judged = figures(report, "reward_data_judged")
    assert (judged["comparisons"], judged["pairs"], judged["different_pairs"]) == (8, 10, 8)
    assert (judged["contradicting_pairs"], judged["circular_prompts"], judged["tied_pairs"]) == (1, 1, 1)
    assert (judged["scored_texts"], judged["contradicting_scored_texts"]) == (2, 1)
    assert found(report, "circles") and found(report, "contradictions") and found(report, "contradicting scores")


def test_alpha_is_that_of_the_definition(tmp_path: Path, checked: Checked) -> None:
    """Two people, four texts: observed disagreement over what chance would give, worked out by hand."""
    marks = {"t1": (1, 1), "t2": (2, 2), "t3": (3, 3), "t4": (1, 3)}
    rows = [
        {"input": "q", "output": t, "score": s, "annotator": str(k)}
        for t, two in marks.items()
        for k, s in enumerate(two)
    ]
    values = [s for two in marks.values() for s in two]
    observed = sum((a - b) ** 2 for a, b in marks.values()) * 2 / len(values)
    expected = sum((a - b) ** 2 for a in values for b in values) / (len(values) * (len(values) - 1))
    report = checked(files=[planted.write(tmp_path / "r.jsonl", rows)])
    assert figures(report, "reward_data_judged")["alpha_scores"] == pytest.approx(1 - observed / expected)


def test_bad_rows_are_told_and_set_aside(tmp_path: Path, checked: Checked) -> None:
    good = planted.instructions(3)
    lines = [
        json.dumps(good[0]),
        "{'Instruction': 1}",
        "",
        json.dumps(good[1]),
        '{"Instruction": "a"}',
        json.dumps(good[2]),
    ]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(lines) + "\n")
    report = checked(
        files=[str(path)],
        error=r"E-DATA-SYNTAX\S+ \S+s.jsonl:2: .*\(1 more in the report\)",
        quarantine=str(tmp_path / "q.jsonl"),
    )
    counted = figures(report, "files")[f"sft.data: {path}"]
    assert (counted["read"], counted["kept"], counted["refused"], counted["blank"]) == (5, 3, 2, 1)
    aside = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [row["row"] for row in aside] == [lines[1], lines[4]]
    assert [row["code"] for row in aside] == ["E-DATA-SYNTAX", "E-DATA-MISSING"]
    assert aside[1]["where"] == f"{path}:5" and aside[1]["fix"] and aside[1]["why"]
    table = report["sections"]["files"]["tables"][-1]
    assert table["title"] == "Refused rows" and [row[1] for row in table["rows"]] == ["E-DATA-SYNTAX", "E-DATA-MISSING"]


def test_a_file_that_ends_early_is_told(tmp_path: Path, checked: Checked) -> None:
    (tmp_path / "a.json").write_text('[{"Instruction": "a", "Output": "b"},\n{"Instruction": "c", "Outp')
    planted.write(tmp_path / "b.jsonl", planted.instructions(2))
    report = checked(
        files=[str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")],
        error=r"E-DATA-SYNTAX.*a.json:2: file ends inside a row",
    )
    assert [row[2:5] for row in report["sections"]["files"]["tables"][0]["rows"]] == [[1, 1, 1], [2, 2, 0]]


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_asks_nobody_and_shows_texts_as_texts(tmp_path: Path, checked: Checked) -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x1b[2J"
    rows = [{"Instruction": nasty, "Output": nasty + str(i)} for i in range(3)]
    report = checked(files=[planted.write(tmp_path / "<b>s.jsonl", rows)])
    html = (tmp_path / "report.html").read_text()
    page = Reader()
    page.feed(html)
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags and "b" in page.tags
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "\x1b" not in html and "\u202e" not in html and "<mark>" in html and "svg" in page.tags
    assert (
        nasty in json.dumps(report, ensure_ascii=False).encode().decode("unicode_escape", errors="replace")
        or report["samples"]
    )


def test_samples_show_what_the_loss_reads(tmp_path: Path, checked: Checked) -> None:
    report = checked(
        files=[planted.write(tmp_path / "s.jsonl", [{"Instruction": "Say", "Input": "hi", "Output": "你好"}])]
    )
    (sample,) = report["samples"]
    assert [(run["text"], run["trained"]) for run in sample["runs"]] == [
        ("Say<|sep|>hi<|sep|>", False),
        ("你好<|endoftext|>", True),
    ]
    assert "Say<|sep|>hi<|sep|>⟦你好<|endoftext|>⟧" in report["said"]


def test_samples_show_the_system_prompt(tmp_path: Path, checked: Checked) -> None:
    planted.write(tmp_path / "s.jsonl", [{"Instruction": "Say", "Output": "hi"}])
    for setting, text in (("", "You are a helpful assistant."), ('system = ""', ""), ('system = "Rhyme."', "Rhyme.")):
        report = checked(f'[sft]\ndata = ["s.jsonl"]\ntemplate = "qwen2"\n{setting}\n')
        head = f"<|im_start|>system\n{text}<|im_end|>\n" if text else ""
        assert report["samples"][0]["runs"][0]["text"].startswith(head + "<|im_start|>user\nSay")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planted.write(tmp_path / "s.jsonl", [{"question": "a", "answer": "b"}] * 3)
    assert main(["check", "s.jsonl"]) == 3
    err = capsys.readouterr().err
    assert (
        err.startswith("error[E-DATA-MISSING] s.jsonl:1:")
        and 'rename = ["question=instruction", "answer=output"]' in err
    )
    assert main(["check", "s.jsonl", "--rename", "question=Instruction", "answer=Output", "--json", "o.json"]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["target"] == "s.jsonl"
    (tmp_path / "r.toml").write_text('[sft]\ndata = ["s.jsonl"]\n')
    assert main(["check", "r.toml"]) == 3
    assert main(["check", "--html", "o.html", "r.toml", "--data.rename", "question=Instruction", "answer=Output"]) == 0
    assert (tmp_path / "o.html").is_file()
    (kept,) = (path for path in (tmp_path / "runs").rglob("*") if path.is_file())  # nothing else is left
    assert kept.name == "check.json" and json.loads(kept.read_text())["findings"]
    for words, code in (
        (["check"], "E-CONF-MISSING"),
        (["check", "s.jsonl", "--ppo.steps", "3"], "E-CONF-SYNTAX"),
        (["check", "no.jsonl"], "E-DATA-PATH"),
    ):
        assert main(words) == (3 if code == "E-DATA-PATH" else 2)
        assert code in capsys.readouterr().err


def test_reading_ahead_finds_a_bad_line_of_the_text_beside_ppo(tmp_path: Path) -> None:
    planted.write(tmp_path / "p.jsonl", [{"input": "a"}])
    planted.write(tmp_path / "t.jsonl", [{"text": "a"}, {"texts": "b"}])
    (tmp_path / "r.toml").write_text('[ppo]\nprompts = ["p.jsonl"]\n[ptx]\ntext = ["t.jsonl"]\n')
    with pytest.raises(UserError, match=r"t.jsonl:2"):
        read_records(recipe.read(tmp_path / "r.toml"), ["ppo"], ["k"], tmp_path / "memory.json")


def test_reading_ahead_finds_what_the_last_stage_would(tmp_path: Path) -> None:
    planted.write(tmp_path / "s.jsonl", planted.instructions(3))
    planted.write(tmp_path / "p.jsonl", [{"input": "a"}, {"input": ""}])
    (tmp_path / "r.toml").write_text('[sft]\ndata = ["s.jsonl"]\n[ppo]\nprompts = ["p.jsonl"]\n')
    read, memory = recipe.read(tmp_path / "r.toml"), tmp_path / "memory.json"
    with pytest.raises(UserError, match=r"E-DATA-BLANK. \S+p.jsonl:2"):
        read_records(read, ["sft", "ppo"], ["k1", "k2"], memory)
    assert not memory.exists()
    read_records(read, ["sft"], ["k1"], memory)
    (tmp_path / "s.jsonl").write_text("{")
    read_records(read, ["sft"], ["k1"], memory)  # the key says that these very files passed
    with pytest.raises(UserError, match="E-DATA-SYNTAX"):
        read_records(read, ["sft"], ["k3"], memory)


def test_reading_ahead_finds_validation_records_that_are_trained_on(tmp_path: Path) -> None:
    """As `check` does: also where the prompts differ only in letter case and punctuation."""
    planted.write(tmp_path / "s.jsonl", planted.instructions(20))
    shouted = [{**row, "Instruction": row["Instruction"].upper() + "!"} for row in planted.instructions(20)[3:5]]
    planted.write(tmp_path / "v.jsonl", [*planted.instructions(4, 7), *shouted])
    (tmp_path / "r.toml").write_text('[sft]\ndata = ["s.jsonl"]\nvalidation = ["v.jsonl"]\n')
    for stages, error in ((["ppo"], ""), (["sft"], r"E-DATA-OVERLAP. \S+v.jsonl:5: 2 of 6 held-out")):
        try:
            read_records(recipe.read(tmp_path / "r.toml"), stages, ["k", *stages], tmp_path / "memory.json")
            assert not error
        except UserError as raised:
            assert re.search(error or "^$", str(raised))
