"""Records in, the same records with replies or scores out; mistakes are told before any work is done."""

import datetime
import json
import math
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from served import documents_from_text, score_documents
from tetrad.cli import generate, score
from tetrad.cli.generate import generate_file
from tetrad.cli.score import score_file
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.inference.policy import load
from tetrad.reward.model import load_reward
from tetrad.settings.use import Generate, ScoreFile
from tetrad.types import Prompt, Turn

Lines = list[dict[str, Any]]
PROMPTS: Lines = [
    {"Instruction": "Go on.", "Input": "the plot", "id": 7},
    {"input": "a film"},
    {"MESSAGES": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "这部电影"}]},
    {"Instruction": "Go on.", "Output": "was warm", "Score": 3.5, "response": "x", "given_response": "y"},
    {"prompt": "slow", "completion": "but moving"},
]
NEW = ("response", "tokens", "finished")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("p.jsonl", PROMPTS)
    return tmp_path


def write(name: str, records: Lines) -> None:
    Path(name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read(name: str) -> Lines:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def generated(run: Path, **settings: Any) -> tuple[str, str]:
    """What was said, and the progress."""
    out, err = StringIO(), StringIO()
    given = {"model": str(run / "sft"), "max_new_tokens": 8, **settings}
    generate_file(Generate(**given), Console(out=out, err=err))
    return out.getvalue(), err.getvalue()


def scored(run: Path, data: str, out: str = "", model: str = "reward") -> str:
    said = StringIO()
    score_file(ScoreFile(model=str(run / model), data=data, out=out), Console(out=said, err=StringIO()))
    return said.getvalue()


def refused(function: Any, *arguments: Any, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        function(*arguments, **settings)
    return caught.value


def test_a_file_of_prompts(run: Path, here: Path) -> None:
    said, progress = generated(run, prompts="p.jsonl", out="new/a.jsonl")
    records = read("new/a.jsonl")
    assert said.splitlines() == [
        "cache of keys and values: 5 slots and a spare one of 27 positions, 0.0396 MiB",
        "5 answers: new/a.jsonl",
        "note: 5 answers are not valid UTF-8, wrong bytes are written as U+FFFD; the first answers p.jsonl:1",
    ]
    assert "generate 5/5" in progress
    assert [{k: v for k, v in r.items() if k not in NEW} for r in records[:3]] == PROMPTS[:3]
    for record in records:
        assert (
            isinstance(record["response"], str) and isinstance(record["finished"], bool) and 1 <= record["tokens"] <= 8
        )
        assert list(record)[-3:] == list(NEW)
    assert len({record["response"] for record in records}) == 5


def test_fields_of_the_same_name_are_kept(run: Path, here: Path) -> None:
    generated(run, prompts="p.jsonl", out="a.jsonl")
    record = read("a.jsonl")[3]
    given = ("Output", "Score", "given_given_response", "given_response")
    assert [record[name] for name in given] == ["was warm", 3.5, "x", "y"]
    assert record["response"] not in ("x", "y")


def test_printed_lines_are_those_of_the_file(run: Path, here: Path) -> None:
    generated(run, prompts="p.jsonl", out="a.jsonl")
    said, _ = generated(run, prompts="p.jsonl")
    assert said == Path("a.jsonl").read_text()
    assert "这部电影" in said


def test_one_prompt(run: Path, here: Path) -> None:
    """Printed alone, or as a line of a file; the same as the first of a file."""
    asked = {"instruction": "Go on.", "input": "the plot"}
    said, _ = generated(run, **asked)
    assert generated(run, **asked, out="one.jsonl")[0].splitlines()[1] == "1 answer: one.jsonl"
    (record,) = read("one.jsonl")
    assert said == record["response"] + "\n"
    assert {k: record[k] for k in ("Instruction", "Input")} == {"Instruction": "Go on.", "Input": "the plot"}
    generated(run, prompts="p.jsonl", out="a.jsonl")
    assert read("a.jsonl")[0]["response"] == record["response"]


def test_the_batch_changes_nothing(run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("p.jsonl", PROMPTS * 5)
    every = {"prompts": "p.jsonl", "seed": 3}
    best = every | {"best_of": 3, "reward": str(run / "reward")}

    def replies(settings: dict[str, Any]) -> list[str]:
        generated(run, **settings, out="a.jsonl")
        return [record["response"] for record in read("a.jsonl")]

    before = replies(every), replies(best)
    assert before[0] != before[1]
    monkeypatch.setattr(generate, "SCORES_AT_ONCE", 6)
    for slots in (1, 4):
        assert (replies(every | {"max_num_seqs": slots}), replies(best | {"max_num_seqs": slots})) == before
    assert replies(every | {"seed": 4}) != before[0]


def test_best_of_keeps_the_highest_reward(run: Path, here: Path) -> None:
    """Each of the three is a copy that a larger N may choose from; a reply that is not valid UTF-8 comes last."""
    all_tokens = {"prompts": "p.jsonl", "temperature": 1.0, "top_p": 1.0}
    with_reward = all_tokens | {"reward": str(run / "reward")}
    for n in (1, 2, 4, 8):
        generated(run, **with_reward, best_of=n, out=f"{n}.jsonl")
    scores = [[("\ufffd" not in r["response"], r["score"]) for r in read(f"{n}.jsonl")] for n in (1, 2, 4, 8)]
    for fewer, more in pairwise(scores):
        for (valid, reward), (better, higher) in zip(fewer, more, strict=True):
            assert (valid, reward) <= (better, higher + 1e-6)  # one reply, two sizes of batch
    assert all(a < b for a, b in zip(scores[0], scores[3], strict=True))
    assert {valid for row in scores for valid, _ in row} == {True, False}
    generated(run, **all_tokens, out="first.jsonl")
    assert [r["response"] for r in read("first.jsonl")] == [r["response"] for r in read("1.jsonl")]


def test_best_of_by_a_judge_with_its_own_tokenizer(run: Path, here: Path) -> None:
    generated(run, prompts="p.jsonl", best_of=4, reward=str(run / "judge"), out="a.jsonl")
    scores = [record["score"] for record in read("a.jsonl")]
    write("b.jsonl", [{k: v for k, v in r.items() if k != "score"} for r in read("a.jsonl")])
    scored(run, "b.jsonl", "c.jsonl", "judge")
    assert [record["score"] for record in read("c.jsonl")] == pytest.approx(scores, abs=1e-5)


def test_greedy(run: Path, here: Path) -> None:
    a, b = (generated(run, prompts="p.jsonl", temperature=0.0, seed=seed)[0] for seed in (0, 1))
    assert a == b
    assert a != generated(run, prompts="p.jsonl")[0]


def test_every_form_is_scored_as_it_was_trained_on(run: Path, here: Path) -> None:
    """Prompt and answer in any form give the reward model's number for the same ids."""
    forms: Lines = [
        {"Instruction": "Go on.", "Input": "the plot", "Output": "is warm"},
        {"instruction": "Go on.", "INPUT": "the plot", "response": "is warm", "output": "is not", "reply": "is not"},
        {"messages": [
            {"role": "system", "content": "Go on."},
            {"role": "user", "content": "the plot"},
            {"Role": "assistant", "Content": "is warm"},
        ]},
        {"messages": [{"role": "system", "content": "Go on."}, {"role": "user", "content": "the plot"}],
         "reply": "is warm"},
        {"input": "a film", "output": "is warm"},
        {"prompt": "a film", "completion": "is warm", "score": 4},
        {"Instruction": "a film", "response": "", "finished": False},
        {"Instruction": "a film", "reply": "", "finished": False},  # as earlier versions wrote it
        {"Instruction": "a film", "reply": "", "ended": False},
        {"Instruction": "Go on.", "Input": "the plot", "reply": "is warm", "output": "is not", "finished": True},
    ]  # fmt: skip
    write("s.jsonl", forms)
    assert scored(run, "s.jsonl", "o.jsonl").startswith("10 scores, mean ")
    records = read("o.jsonl")
    judge = load_reward(run / "reward")
    two = [Prompt((Turn("instruction", "Go on."), Turn("input", "the plot"))), Prompt((Turn("user", "a film"),))]
    first, second, nothing = score_documents(
        judge, documents_from_text(judge, [*two, two[1]], ["is warm", "is warm", ""], [True, True, False])
    )
    assert [r["score"] for r in records] == pytest.approx(
        [first] * 4 + [second] * 2 + [nothing] * 3 + [first], abs=1e-5
    )
    assert len({round(value, 3) for value in (first, second, nothing)}) == 3
    assert records[5]["given_score"] == 4
    assert [{k: v for k, v in r.items() if "score" not in k} for r in records[:5]] == forms[:5]


def test_scores_without_a_file_are_printed(run: Path, here: Path) -> None:
    write("s.jsonl", [{"input": "电影", "output": "warm"}])
    said = scored(run, "s.jsonl")
    scored(run, "s.jsonl", "o.jsonl")
    assert said == Path("o.jsonl").read_text()


def test_scores_do_not_depend_on_the_batch(run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Lines = [{"input": "plot " * n, "output": "warm " * (20 - n)} for n in range(1, 20)]
    write("s.jsonl", given)
    scored(run, "s.jsonl", "a.jsonl")
    monkeypatch.setattr(score, "SCORES_AT_ONCE", 4)
    scored(run, "s.jsonl", "b.jsonl")
    a, b = ([record["score"] for record in read(name)] for name in ("a.jsonl", "b.jsonl"))
    assert a == pytest.approx(b, abs=1e-5)
    assert len(set(a)) == 19
    assert [{k: r[k] for k in ("input", "output")} for r in read("b.jsonl")] == given


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"input": "x"}, "E-DATA-MISSING"),
        ({"output": "x"}, "E-DATA-MISSING"),
        ({"messages": [{"role": "user", "content": "x"}]}, "E-DATA-MISSING"),
        ({"input": "x", "output": ["y"]}, "E-DATA-TYPE"),
        ({"input": "x", "output": None}, "E-DATA-NULL"),
        ({"input": "x", "output": "y", "OUTPUT": "z"}, "E-DATA-DUPKEY"),
        ({"input": "x", "output": "plot " * 90}, "E-DATA-LONG"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]}, "E-DATA-CHAT"),
    ],
)
def test_a_bad_record_is_named(run: Path, here: Path, record: dict[str, Any], code: str) -> None:
    write("s.jsonl", [{"input": "x", "output": "y"}, record])
    error = refused(scored, run, "s.jsonl", "o.jsonl")
    assert (error.code, error.where) == (code, "s.jsonl:2")
    assert not Path("o.jsonl").exists()


def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would load a model fails."""
    for module, name in ((generate.policy, "load"), (generate, "load_reward")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded"))


@pytest.mark.parametrize(
    "bad", ['{"input": "x", "output": "y", "id": NaN}', '{"input": "x", "output": "\\ud800"}', "5"]
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(
    run: Path, here: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    unloaded(monkeypatch)
    Path("s.jsonl").write_text('{"input": "x", "output": "y"}\n' + bad + "\n")
    for error in (
        refused(scored, run, "s.jsonl", "o.jsonl"),
        refused(generated, run, prompts="s.jsonl", out="o.jsonl"),
    ):
        assert error.code in ("E-DATA-NUMBER", "E-DATA-ENCODING", "E-DATA-TYPE") and error.where == "s.jsonl:2"


def test_foreign_values_of_fields_that_nobody_reads_are_written(run: Path, here: Path) -> None:
    """A table of numbers that are none, and of times: text or null beside the reply, and no reply is lost."""
    Path("s.csv").write_text("input,output,score,margin\nx,y,1e999,-1e999\n")
    Path("deep.jsonl").write_text('{"input": "x", "output": "y", "far": 1e999, "deep": ' + "[" * 90 + "]" * 90 + "}\n")
    for name in ("s.csv", "deep.jsonl"):
        generated(run, prompts=name, out="a.jsonl")
        scored(run, name, "b.jsonl")
        for new in ("a.jsonl", "b.jsonl"):
            (record,) = (json.loads(line, parse_constant=pytest.fail) for line in Path(new).read_text().splitlines())
            assert None in record.values()
    Path("deep.jsonl").write_text('{"input": "x", "deep": ' + "[" * 700 + "]" * 700 + "}\n")
    assert refused(generated, run, prompts="deep.jsonl").code == "E-DATA-SYNTAX"


def test_a_parquet_file_keeps_its_columns(run: Path, here: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = [datetime.datetime(2025, 1, 2, 3, 4, 5), None]
    rows = {"input": ["a film", "the plot"], "output": ["x", "y"], "when": when, "raw": [b"z", None]}
    parquet.write_table(arrow.table(rows | {"nan": [math.nan, 0.5], "reply": [None, "is warm"]}), "p.parquet")
    generated(run, prompts="p.parquet", out="a.jsonl")
    scored(run, "p.parquet", "b.jsonl")
    for name in ("a.jsonl", "b.jsonl"):
        assert [(r["when"], r["raw"], r["nan"]) for r in read(name)] == [
            ("2025-01-02T03:04:05", "z", None),
            (None, None, 0.5),
        ]
    assert [r["reply"] for r in read("b.jsonl")] == [None, "is warm"]  # a null reply is none: the output is scored


def test_a_prompt_without_room_is_named(run: Path, here: Path) -> None:
    error = refused(generated, run, prompts="p.jsonl", max_new_tokens=95, out="a.jsonl")
    assert (error.code, error.where) == ("E-DATA-LONG", "p.jsonl:1")
    assert refused(generated, run, instruction="x", max_new_tokens=95).code == "E-DATA-LONG"
    assert not Path("a.jsonl").exists()


def test_results_have_a_place_of_their_own(run: Path, here: Path) -> None:
    """Told before the model is read."""
    nowhere = here / "none"
    before = Path("p.jsonl").read_text()
    assert refused(generated, nowhere, prompts="p.jsonl", out="./p.jsonl").code == "E-CONF-CONFLICT"
    assert refused(generated, nowhere, prompts="p.jsonl", out=".").code == "E-IO-WRITE"
    assert refused(scored, nowhere, "p.jsonl", str(here / "p.jsonl")).code == "E-CONF-CONFLICT"
    assert Path("p.jsonl").read_text() == before


def test_roles(run: Path, here: Path) -> None:
    write("s.jsonl", [{"input": "x", "output": "y"}])
    assert refused(scored, run, "s.jsonl", model="sft").code == "E-CKPT-ROLE"
    assert refused(generated, run, model=str(run / "reward"), instruction="x").code == "E-CKPT-ROLE"
    assert refused(generated, run, instruction="x", best_of=2, reward=str(run / "sft")).code == "E-CKPT-ROLE"


def test_template_of_a_base_model(run: Path, here: Path) -> None:
    base = str(run / "pretrain")
    assert refused(generated, run, model=base, instruction="x").code == "E-MODEL-TEMPLATE"
    assert refused(generated, run, model=base, prompts="p.jsonl").code == "E-MODEL-TEMPLATE"
    for form in ("instruction", "chatml"):
        generated(run, model=base, instruction="x", template=form, out=f"{form}.jsonl")
    assert read("instruction.jsonl") != read("chatml.jsonl")
    assert load(base).template is None


def test_stop_texts_and_penalties(run: Path, here: Path) -> None:
    asked = {"instruction": "Go on.", "input": "the plot", "out": "a.jsonl", "max_new_tokens": 40, "seed": 4}
    generated(run, **asked)
    (whole,) = read("a.jsonl")
    stop = whole["response"][3:6]
    generated(run, **asked, stop=("never", stop))
    (cut,) = read("a.jsonl")
    assert cut["response"] == whole["response"][: whole["response"].index(stop)] and cut["finished"] is True
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        generated(run, **asked, **{name: 20.0})
        (varied,) = read("a.jsonl")
        assert varied["response"] != whole["response"]


def test_logprobs(run: Path, here: Path) -> None:
    """One entry a token; the sampled token of a greedy reply is the likeliest."""
    asked = {"instruction": "Go on.", "input": "the plot", "out": "a.jsonl"}
    generated(run, **asked, greedy=True, temperature=0.0, top_logprobs=3)
    (record,) = read("a.jsonl")
    assert len(record["logprobs"]) == record["tokens"]
    for entry in record["logprobs"]:
        assert entry["top"][0]["id"] == entry["id"] and len(entry["top"]) == 3
        assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"], abs=1e-5)
        assert entry["top"][0]["token"] == entry["token"]
    generated(run, **asked)
    assert "logprobs" not in read("a.jsonl")[0]
