"""`tetrad rank`: what is asked, how answers are sampled, and what its file is good for."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tetrad.cli import rank as rank_module
from tetrad.cli.main import main
from tetrad.cli.rank import fill, rank, read_controls, read_names, read_prompts, sampled, weighed
from tetrad.console import Console
from tetrad.datacheck.check import check_files
from tetrad.errors import UserError
from tetrad.inference.policy import load
from tetrad.pipeline import recipe, runner
from tetrad.reward.model import load_reward
from tetrad.server.ranking import Item, Ranking, Verdict
from tetrad.settings.use import Check, Rank
from tetrad.types import Prompt, Turn


def silent(out: io.StringIO | None = None) -> Console:
    return Console(out=out or io.StringIO(), err=io.StringIO())


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompt(text: str) -> Prompt:
    return Prompt((Turn("instruction", text), Turn("input", "")))


# --- what is asked ---


def test_records_with_choices_are_asked_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"input": "a", "choices": ["x", {"text": "y", "rank": 2}]},
        {"question": "b"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    )
    items, prompts = read_prompts(Rank(prompts=path, rename=("question=input",)))
    assert [(item.prompt.turns[0].text, item.answers) for item in items] == [("a", ("x", "y"))]
    assert [one.turns[0].text for one in prompts] == ["b", "c"]


@pytest.mark.parametrize("choices", [["x"], ["x", "x"], ["x", " "], "xy", [1, 2], [str(n) for n in range(27)]])
def test_choices_that_are_none(choices: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"input": "a", "choices": choices})
    with pytest.raises(UserError, match=r"E-DATA-RANK.*p\.jsonl:1"):
        read_prompts(Rank(prompts=path))


def test_controls_are_ranked_records(tmp_path: Path) -> None:
    pair = {"prompt": "b", "chosen": "x", "rejected": "y"}
    path = write(
        tmp_path / "c.jsonl", {"input": "a", "choices": [{"text": "x", "rank": 2}, {"text": "y", "rank": 1}]}, pair
    )
    assert [(item.answers, item.ranks) for item in read_controls(path)] == [(("x", "y"), (2, 1)), (("x", "y"), (1, 2))]


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_text(" kim\n\n李雷\n", encoding="utf-8")
    assert read_names(str(path)) == ["kim", "李雷"]
    for text, code in (("", "E-DATA-EMPTY"), ("kim\nkim\n", "E-DATA-OVERLAP"), ("a\u202eb\n", "E-DATA-SYNTAX")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=code):
            read_names(str(path))
    with pytest.raises(UserError, match="E-DATA-PATH"):
        read_names(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], "E-CONF-MISSING"),
        (["--prompts", "PROMPTS"], "E-CONF-MISSING"),
        (["--prompts", "PROMPTS", "--out", "OUT"], "E-CONF-MISSING"),  # prompts, and no model to answer them
        (["--prompts", "PROMPTS", "--out", "OUT", "--host", "0.0.0.0"], "E-CONF-MISSING"),
        (["--prompts", "PROMPTS", "--out", "OUT", "--answers", "1"], "E-CONF-RANGE"),
        (["--prompts", "PROMPTS", "--out", "OUT", "--overlap", "1.5"], "E-CONF-RANGE"),
        (["--prompts", "none.jsonl", "--out", "OUT"], "E-DATA-PATH"),
        (["--prompts", "PROMPTS", "--out", "OUT", "--frm", "x"], "E-CONF-UNKNOWN"),
    ],
)
def test_refusals(words: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"PROMPTS": write(tmp_path / "p.jsonl", {"input": "a"}), "OUT": str(tmp_path / "ranked.jsonl")}
    assert main(["rank", *(places.get(word, word) for word in words), "--port", "0"]) in (2, 3)
    assert f"error[{code}]" in capsys.readouterr().err
    assert not (tmp_path / "ranked.jsonl").exists()


# --- sampling ---


def test_answers_differ_repeat_and_come_from_the_models_in_turn(run: Path) -> None:
    settings = Rank(answers=4, max_new_tokens=4, seed=5)
    models = {name: load(run / name) for name in ("sft", "ppo")}
    prompts = [prompt(f"the plot {number}") for number in range(10)]
    first = list(sampled(models, prompts, settings))
    assert [asked for asked, _ in first] == prompts
    for _, answers in first:
        assert list(answers.values()) == ["sft", "ppo"] * 2
        assert all(text.strip() for text in answers)
    assert list(sampled(models, prompts, settings)) == first
    assert list(sampled(models, prompts, Rank(answers=4, max_new_tokens=4, seed=6))) != first


def test_a_prompt_without_different_answers_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    said, out = io.StringIO(), str(tmp_path / "ranked.jsonl")
    with Ranking(Rank(out=out, temperature=0.0, max_new_tokens=3), ready=False) as ranking:
        fill(ranking, {"sft": load(run / "sft")}, [prompt("a"), prompt("b")], None, silent(said))
        assert ranking.ready
        assert ranking.items == {}
    assert "2 prompts are left out" in said.getvalue()


def test_sampling_ends_with_the_server_and_goes_on_with_the_next(run: Path, tmp_path: Path) -> None:
    settings = Rank(out=str(tmp_path / "ranked.jsonl"), max_new_tokens=4)
    prompts, models = [prompt(f"a {n}") for n in range(3)], {"sft": load(run / "sft")}
    with Ranking(settings) as ranking:
        ranking.ending = True
        fill(ranking, models, prompts, None, silent())
        first = set(ranking.items)
    with Ranking(settings) as ranking:
        assert set(ranking.items) == first and len(first) == 1
        fill(ranking, models, prompts, None, silent())
        assert len(ranking.items) == 3 and first < set(ranking.items)


def test_the_reward_models_doubt_orders_the_items(run: Path, tmp_path: Path) -> None:
    judge = load_reward(run / "reward")
    with Ranking(Rank(out=str(tmp_path / "ranked.jsonl"), max_new_tokens=4), ready=False) as ranking:
        assert ranking.offer("kim") is None
        fill(ranking, {"sft": load(run / "sft")}, [prompt(f"a {n}") for n in range(9)], judge, silent())
        doubts = [item.doubt for item in ranking.items.values()]
        assert len(set(doubts)) == 9 and max(doubts) < 0
        one = ranking.offer("kim")
        assert one and one.doubt == max(doubts)
    again = weighed(Item(one.prompt, one.answers), judge)
    assert again.doubt == pytest.approx(one.doubt, abs=1e-5)


# --- the whole command ---


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """In place of a server: a function that gets a client of the application."""

    def use(function: Callable[[Any], None]) -> None:
        class Server:
            def __init__(self, app: Any, host: str, port: int, started: Callable[[int], None]) -> None:
                self.app, self.started = app, started

            def run(self) -> None:
                self.started(8000)
                function(self.app)

        monkeypatch.setattr(rank_module, "Server", Server)

    return use


def test_links_are_said_and_open_the_page(served: Any, run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"input": "a", "choices": ["x", "y"]})
    (tmp_path / "people.txt").write_text("kim\nlee\n")
    said, seen = io.StringIO(), dict[str, Any]()

    def visit(app: Any) -> None:
        lines = [line for line in said.getvalue().splitlines() if "#" in line]
        links = {line.split(":")[0].strip(): line.split("#")[1] for line in lines}
        assert links.keys() == {"kim", "lee"}
        http = TestClient(app, base_url="http://127.0.0.1:8000")
        assert http.post("/rank/enter", json={"link": links["lee"]}).json() == {"name": "lee"}
        state = http.get("/rank/item").json()
        body = {"item": state["item"]["id"], "verdict": "ranked", "ranks": [2, 1]}
        seen.update(http.post("/rank/submit", json=body, headers={"X-CSRF-Token": state["csrf"]}).json())

    served(visit)
    settings = Rank(prompts=path, out=str(tmp_path / "ranked.jsonl"), annotators=str(tmp_path / "people.txt"))
    assert rank([], settings, silent(said)) == 0
    assert json.loads((tmp_path / "ranked.jsonl").read_text()) == seen["stored"]
    assert "lee: 1 ranked" in said.getvalue()
    assert (tmp_path / "ranked-beside/secret").stat().st_mode & 0o777 == 0o600


def test_the_file_goes_through_check_and_trains_a_reward_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranked.jsonl"
    with Ranking(Rank(out=str(out), overlap=0.5, scale=(1, 5))) as ranking:
        for number in range(12):
            ranking.add(Item(prompt(f"question {number}"), ("a warm story", "a slow plot", "a dull ending")))
        for name in ("kim", "lee", "kim", "lee"):
            while one := ranking.offer(name):
                best_first = sorted(one.answers, reverse=name == "lee")
                ranks = tuple(best_first.index(text) + 1 for text in ranking.shown(one, name))
                ranking.submit(
                    name, one.id, Verdict("ranked", ranks, (3, None, None), edited="A warm and funny story.")
                )
        pairs, alpha = ranking.agreement()
    check_files([str(out)], Check(json=str(tmp_path / "check.json")), silent())
    report = json.loads((tmp_path / "check.json").read_text())
    told = json.dumps(report)
    assert alpha is not None and alpha < 0
    assert f'"alpha_pairs": {alpha}' in told and f'"pairs_judged_again": {pairs}' in told
    assert "annotators hardly agree" in told
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\nfrom = "{run}/sft/model"\n[reward]\ndata = ["{out}"]\nscore_scale = [1, 5]\nepochs = 1\n'
        f'normalise = 4\nnormalise_max_new_tokens = 4\nprobes = 0\n[run]\nout = "{tmp_path}/runs"\n'
    )
    runner.run(recipe.read(path, []), silent())
    (folder,) = (tmp_path / "runs").iterdir()
    load_reward(folder / "reward")
    people = json.loads((folder / "reward/model/annotators.json").read_text())["annotators"]
    assert {person["annotator"] for person in people} == {"kim", "lee"}
    edited = [json.loads(line) for line in (tmp_path / "ranked-beside/sft.jsonl").read_text().splitlines()]
    assert len(edited) == 12 and edited[0]["Output"] == "A warm and funny story."
