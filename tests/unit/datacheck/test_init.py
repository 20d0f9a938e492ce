"""`tetrad init`: the recipe that it writes is short, says what the data shows, and runs."""

import json
import shutil
import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tetrad.console import Console
from tetrad.datacheck.check import check_recipe
from tetrad.datacheck.init import init
from tetrad.errors import UserError
from tetrad.pipeline.recipe import read
from tetrad.settings.use import Check, Init
from tetrad.text.chat_template import TEMPLATES
from tetrad.text.tokenizer import Tokenizer

Lines = list[dict[str, Any]]
SFT: Lines = [{"Instruction": f"Say {i}.", "Output": f"It is {i}, " * 3} for i in range(40)]
RANKED: Lines = [
    {"input": f"Say {i}.", "choices": [{"text": f"{i}", "rank": 1}, {"text": f"no {i}", "rank": 2}]} for i in range(40)
]
PAIRS: Lines = [{"prompt": f"{i}?", "chosen": "!", "rejected": "no"} for i in range(9)]
SCORED: Lines = [{"input": f"Name {i}.", "output": f"the {i}", "score": 1 + i % 5} for i in range(40)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("A text.\n\nAnother text.\n")
    return tmp_path


def write(name: str, records: Lines) -> str:
    Path(name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return name


def records_of(name: str) -> Lines:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def made(*paths: str, **settings: Any) -> tuple[dict[str, Any], str]:
    """The tables of the recipe, and what was said; the recipe is read and its data checked as `tetrad check` does."""
    out = StringIO()
    path = init(Init(**settings), paths, Console(out=out, err=StringIO()))
    check_recipe(read(path), Check(), Console(out=StringIO(), err=StringIO()))
    return tomllib.loads(path.read_text()), out.getvalue()


def test_the_whole_chain_in_a_few_lines(here: Path) -> None:
    recipe, said = made("texts.txt", write("sft.jsonl", SFT), write("ranked.jsonl", RANKED))
    assert recipe == {
        "tokenizer": {"text": ["texts.txt"]},
        "pretrain": {"text": ["texts.txt"]},
        "sft": {"data": ["sft.train.jsonl"], "validation": ["sft.valid.jsonl"]},
        "reward": {"data": ["ranked.train.jsonl"], "validation": ["ranked.valid.jsonl"]},
        "ppo": {"prompts": ["sft.train.jsonl"], "max_new_tokens": 32},
        "evaluate": {"prompts": ["sft.valid.jsonl"]},
    }
    assert said.count("is split by its prompts") == 2 and "tetrad run recipe.toml" in said
    assert len(Path("recipe.toml").read_text().splitlines()) <= 16


def test_a_split_keeps_every_record_and_no_prompt_on_both_sides(here: Path) -> None:
    many = [{"prompt": f"Say {i % 60}.", "completion": f"{i}", "extra": i} for i in range(300)]
    made("texts.txt", write("sft.json.jsonl", many), split=0.2)
    train, valid = records_of("sft.train.jsonl"), records_of("sft.valid.jsonl")
    assert sorted(record["extra"] for record in train + valid) == list(range(300))
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in valid}
    assert 20 < len(valid) < 110
    Path("recipe.toml").rename("old.toml")
    with pytest.raises(UserError, match="there already") as error:
        made("texts.txt", "sft.json.jsonl", split=0.2)
    assert error.value.where == "sft.train.jsonl"
    assert records_of("sft.train.jsonl") == train and not Path("recipe.toml").exists()


def test_names_say_what_is_held_out(here: Path) -> None:
    names = {
        name: write(name, SCORED[i::4]) for i, name in enumerate(("s-train.jsonl", "s.valid.jsonl", "s_test.jsonl"))
    }
    prompts = write("devices.jsonl", [{"Instruction": "Say it."}])  # not "dev"
    recipe, _ = made("texts.txt", *names, prompts)
    assert recipe["reward"] == {
        "data": ["s-train.jsonl"],
        "validation": ["s.valid.jsonl"],
        "test": ["s_test.jsonl"],
        "score_scale": [1, 5],
    }
    assert recipe["ppo"]["prompts"] == ["devices.jsonl"] and recipe["evaluate"]["prompts"] == ["s_test.jsonl"]
    assert "# seen: 1 to 5" in Path("recipe.toml").read_text()


def test_usual_names_of_fields_are_renamed(here: Path) -> None:
    sft = [{"question": f"q {i}", "answer": "a"} for i in range(20)]
    rated = [{"question": f"p {i}", "answer": "b", "rating": i % 3 - 1} for i in range(20)]
    recipe, _ = made("texts.txt", write("qa.jsonl", sft), write("rated.jsonl", rated), split=0)
    assert set(recipe["data"]["rename"]) == {"question=Instruction", "answer=Output", "rating=Score"}
    assert (recipe["sft"], recipe["reward"]["score_scale"]) == ({"data": ["qa.jsonl"]}, [-1, 1])
    known = [{"prompt": "x", "completion": "y"}]  # a format of its own, although `prompt` often means Instruction
    Path("recipe.toml").unlink()
    assert "data" not in made("texts.txt", write("known.jsonl", known), split=0)[0]


def test_conversations_and_long_records(here: Path) -> None:
    talk = [{"role": role, "content": "字" * 700} for role in ("user", "assistant") * 2]
    recipe, _ = made("texts.txt", write("talks.jsonl", [{"messages": talk}]), split=0)
    assert recipe["sft"] == {"data": ["talks.jsonl"], "template": "chatml"}
    assert recipe["model"] == {"max_positions": 4096}


def test_a_preference_after_several_turns_is_a_conversation_too(here: Path) -> None:
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    pairs = [{"messages": talk, "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    recipe, _ = made("texts.txt", write("sft.jsonl", SFT), write("pairs.jsonl", pairs), split=0)
    assert recipe["sft"]["template"] == "chatml"


def test_from_a_base(run: Path, here: Path) -> None:
    """Its template, and a rate for a model that has learned already; what it cannot read is dropped and counted."""
    base, long = str(run / "sft"), {"Instruction": "Say. " * 300, "Output": "x"}
    recipe, _ = made(write("sft.jsonl", [*SFT, long]), write("ranked.jsonl", RANKED), from_=base, split=0)
    assert "tokenizer" not in recipe and "pretrain" not in recipe
    assert recipe["model"] == {"from": base}
    assert recipe["sft"]["overlong"] == recipe["ppo"]["overlong"] == "drop"
    assert recipe["sft"]["lr"] == recipe["reward"]["lr"] == 5e-5
    assert "# 1 records are longer than the base reads" in Path("recipe.toml").read_text()


def test_room_for_the_answers_of_a_template_that_ends_with_a_line_end(run: Path, here: Path) -> None:
    shutil.copytree(run / "chat/model", "base")
    for name, content in Tokenizer.load(Path("base")).files(TEMPLATES["qwen2.5"]).items():
        (Path("base") / name).write_bytes(content)
    (Path("base") / "manifest.json").unlink()
    long = [{"prompt": f"{i}?", "completion": "!" * 39} for i in range(20)]
    recipe, _ = made(write("sft.jsonl", long), write("pairs.jsonl", PAIRS), from_="base", split=0.0)
    assert recipe["ppo"]["max_new_tokens"] == 48  # 39 tokens and the end token, by steps of 16


def test_mistakes(here: Path) -> None:
    def refused(*paths: str, **settings: Any) -> UserError:
        with pytest.raises(UserError) as error:
            made(*paths, **settings)
        return error.value

    assert refused(write("sft.jsonl", SFT)).code == "E-CONF-MISSING"
    bad = write("bad.jsonl", [*SFT, {"Instruction": "x", "Output": 3}])
    error = refused("texts.txt", bad)
    assert (error.code, error.where) == ("E-DATA-TYPE", "bad.jsonl:41")
    assert refused("texts.txt", "none.jsonl").code == "E-DATA-PATH"
    assert sorted(path.name for path in here.iterdir()) == ["bad.jsonl", "sft.jsonl", "texts.txt"]
    Path("recipe.toml").write_text("mine")
    assert refused("texts.txt", "sft.jsonl").code == "E-CONF-CONFLICT"
    assert Path("recipe.toml").read_text() == "mine"
