"""`tetrad score` on what people prefer: pairs, ranked lists, benchmarks; their order, subsets, intervals, baselines."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tetrad.cli import score
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.settings.use import ScoreFile
from tetrad.storage import sha256_file, write_folder

Lines = list[dict[str, Any]]
WORDS = ("warm", "slow", "dull", "a film", "the plot", "moving", "kind", "long", "short", "loud")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, records: Lines) -> None:
    Path(name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read(name: str) -> Lines:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def scored(model: Path, data: str = "d.jsonl", **settings: Any) -> str:
    out = StringIO()
    score.score_file(ScoreFile(model=str(model), data=data, **settings), Console(out=out, err=StringIO()))
    return out.getvalue()


def single_scores(model: Path, answers: Lines) -> list[float]:
    write("single.jsonl", answers)
    scored(model, "single.jsonl", out="single.out.jsonl")
    return [record["score"] for record in read("single.out.jsonl")]


def test_every_form_of_comparison_gets_the_scores_of_its_answers(run: Path, here: Path) -> None:
    """As one by one: pairs, pairs of whole conversations, ranked choices, and a benchmark's lists."""
    talk = [{"role": "user", "content": "the plot"}]
    records: Lines = [
        {"prompt": "the plot", "chosen": "is warm", "rejected": "is dull", "subset": "easy", "id": 1},
        {"chosen": [*talk, {"role": "assistant", "content": "is warm"}],
         "rejected": [*talk, {"role": "assistant", "content": "is dull"}]},
        {"input": "a film", "choices": [{"text": t, "rank": r} for t, r in (("slow", 2), ("kind", 1), ("loud", 2))]},
        {"prompt": "a film", "chosen": ["kind"], "rejected": ["slow", "loud"], "num_correct": 1},
    ]  # fmt: skip
    write("d.jsonl", records)
    scored(run / "reward", out="a.jsonl")
    new = read("a.jsonl")
    pair = single_scores(
        run / "reward", [{"prompt": "the plot", "completion": text} for text in ("is warm", "is dull")]
    )
    three = single_scores(run / "reward", [{"input": "a film", "output": text} for text in ("slow", "kind", "loud")])
    slow, kind, loud = three
    expected = [pair, pair, three, [kind, slow, loud]]
    assert [record["scores"] for record in new] == [pytest.approx(scores, abs=1e-5) for scores in expected]
    of_list = ((kind > slow) + (kind > loud)) / 2
    assert [record["accuracy"] for record in new] == [float(pair[0] > pair[1])] * 2 + [of_list] * 2
    assert [{k: v for k, v in a.items() if k not in ("scores", "accuracy")} for a in new] == records


def test_accuracy_by_subset_with_intervals(run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first answer of every pair gets 1, the second 0; so each subset's accuracy is what the file says."""
    pairs = [(i, f"{WORDS[i % 10]} {i}", f"{WORDS[(i + 3) % 10]} and nothing more {i}") for i in range(60)]
    kinds = ["easy" if i < 40 else "hard" for i in range(60)]
    right = [i < 36 or i >= 55 for i in range(60)]  # 36 of 40, and 5 of 20
    write("d.jsonl", [
        {"prompt": f"the plot {i}", "chosen": (good, bad)[not ok], "rejected": (bad, good)[not ok], "Subset": kind}
        for (i, good, bad), kind, ok in zip(pairs, kinds, right, strict=True)
    ])  # fmt: skip
    shorter = {good for _, good, _ in pairs}

    def planted(_: Any, documents: Any) -> Any:
        texts = texts_of.pop(0)
        return score.np.array([[1.0 if text in shorter else 0.0 for text in texts]])

    texts_of: list[list[str]] = []
    real = score.documents_from_text

    def documents(template: Any, tokenizer: Any, samples: Any) -> Any:
        texts_of.append([sample.text for sample in samples])
        return real(template, tokenizer, samples)

    monkeypatch.setattr(score, "documents_from_text", documents)
    monkeypatch.setattr(score, "score_documents", planted)
    table = scored(run / "reward", json="r.json")
    rows = {row["subset"]: row for row in json.loads(Path("r.json").read_text())}
    assert list(rows) == ["all", "easy", "hard"]
    assert [(row["records"], row["pairs"]) for row in rows.values()] == [(60, 60), (40, 40), (20, 20)]
    assert [row["accuracy"] for row in rows.values()] == pytest.approx([41 / 60, 0.9, 0.25])
    assert all(row["low"] < row["accuracy"] < row["high"] for row in rows.values())
    assert 0.78 < rows["easy"]["low"] < 0.86 and 0.95 < rows["easy"]["high"] <= 1  # a binomial's: 0.81 to 0.99
    assert [row["best_first"] for row in rows.values()] == [row["accuracy"] for row in rows.values()]
    assert [row["longer"] for row in rows.values()] == pytest.approx([1 - 41 / 60, 0.1, 0.75])
    assert "easy" in table and "0.9" in table and "scores" not in table  # the records are printed only where asked


def test_ratings_of_people_give_a_rank_correlation(run: Path, here: Path) -> None:
    answers = [f"{a} {b}" for a in WORDS for b in WORDS[:3]]
    own = single_scores(run / "reward", [{"input": "a film", "output": answer} for answer in answers])
    rated = enumerate(zip(answers, own, strict=True))
    write("d.jsonl", [{"input": "a film", "output": a, "score": s, "part": i % 2} for i, (a, s) in rated])
    scored(run / "reward", json="r.json", by="part", out="a.jsonl")
    rows = json.loads(Path("r.json").read_text())
    assert [(row["subset"], row["spearman"]) for row in rows] == [
        (name, pytest.approx(1.0)) for name in ("all", "0", "1")
    ]
    assert [row["accuracy"] for row in rows] == [1.0] * 3
    assert read("a.jsonl")[0].keys() == {"input", "output", "given_score", "part", "score"}
    gap = max(own) - min(own)
    scored(run / "reward", json="r.json", pair_gap=gap * 0.99)
    assert json.loads(Path("r.json").read_text())[0]["pairs"] == 1


def test_the_linear_baseline_is_fitted_on_the_reward_model_s_own_data(run: Path, here: Path) -> None:
    """On the very files, if they are there unchanged; else the table says that it is missing."""
    write("t.jsonl", [{"prompt": "x", "chosen": f"warm {i}", "rejected": f"dull {i}"} for i in range(20)])
    write("d.jsonl", [{"prompt": "x", "chosen": f"warm, no {i}", "rejected": f"dull, no {i}"} for i in range(5)])
    file = {"path": str(here / "t.jsonl"), "sha256": sha256_file(here / "t.jsonl")}
    settings: Any = {"data.rename": [], "reward.score_scale": []}
    contents = {p.name: p.read_bytes() for p in (run / "reward" / "model").iterdir() if p.name != "manifest.json"}
    lineage: Any = {"data": {"reward.data": [file]}, "settings": settings}
    write_folder(here / "model", contents, {"lineage": lineage})
    assert "no linear baseline" not in scored(here / "model", json="r.json")
    assert json.loads(Path("r.json").read_text())[0]["linear"] == 1.0
    write("t.jsonl", [{"prompt": "x", "chosen": "dull", "rejected": "warm"}])
    assert "no linear baseline" in scored(here / "model", json="r.json")
    assert "no linear baseline" in scored(run / "reward", json="s.json")
    assert {json.loads(Path(name).read_text())[0]["linear"] for name in ("r.json", "s.json")} == {None}


def test_ties_and_files_of_both_kinds(run: Path, here: Path) -> None:
    write("d.jsonl", [
        {"input": "x", "output": "only an answer"},
        {"input": "x", "choices": [{"text": t, "rank": 1} for t in ("warm", "dull")]},
        {"input": "x", "choices": [{"text": t, "rank": r} for r, t in enumerate(("warm", "dull"))]},
    ])  # fmt: skip
    scored(run / "reward", out="a.jsonl", json="r.json")
    plain, tied, ordered = read("a.jsonl")
    assert "score" in plain and tied["accuracy"] is None and ordered["accuracy"] in (0.0, 1.0)
    row = json.loads(Path("r.json").read_text())[0]
    assert (row["records"], row["pairs"], row["best_first"]) == (2, 1, ordered["accuracy"])


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"chosen": "a", "rejected": "b"}, "E-DATA-MISSING"),
        ({"prompt": "x", "chosen": ["a"], "rejected": ["b", " "]}, "E-DATA-BLANK"),
        ({"prompt": "x", "chosen": ["a"], "rejected": ["a"]}, "E-DATA-RANK"),
        ({"prompt": "x", "chosen": ["a"], "rejected": ["b"], "votes": [1, 2]}, "E-DATA-RANK"),
        ({"input": "x", "choices": [{"text": "a", "rank": 1}]}, "E-DATA-RANK"),
    ],
)
def test_a_bad_comparison_is_named(run: Path, here: Path, record: dict[str, Any], code: str) -> None:
    write("d.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}, record])
    with pytest.raises(UserError) as error:
        scored(run / "reward", out="a.jsonl")
    assert (error.value.code, error.value.where) == (code, "d.jsonl:2")
    assert not Path("a.jsonl").exists()
