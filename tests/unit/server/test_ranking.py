"""Ranking without HTTP: who gets what, what is stored, what a new process knows."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrad import disk
from tetrad.data.records import preferences_of
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.server.ranking import Invalid, Item, Ranking, Stored, Verdict, clean_name, doubt
from tetrad.settings.use import Rank
from tetrad.types import Prompt, Turn


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def item(number: int, answers: int = 3, doubt: float = 0.0) -> Item:
    prompt = Prompt((Turn("instruction", f"question {number}"), Turn("input", "")))
    return Item(prompt, tuple(f"answer {number}.{i}" for i in range(answers)), doubt=doubt)


@contextmanager
def ranking(
    folder: Path, items: int = 0, clock: Clock | None = None, controls: Any = (), **changes: Any
) -> Iterator[Ranking]:
    with Ranking(Rank(out=str(folder / "ranked.jsonl"), **changes), controls, clock or Clock()) as opened:
        for number in range(items):
            opened.add(item(number))
        yield opened


def by_text(ranked: Ranking, name: str, one: Item) -> Verdict:
    """An order of the answers that everyone shares and that no place favours."""
    answers = ranked.shown(one, name)
    best_first = sorted(answers, key=lambda answer: hashlib.sha256(answer.encode()).digest())
    return Verdict("ranked", tuple(best_first.index(answer) + 1 for answer in answers))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- the file ---


def test_a_ranking_is_a_record_of_the_reward_stage(tmp_path: Path) -> None:
    with ranking(tmp_path) as ranked:
        ranked.add(Item(Prompt((Turn("instruction", "Translate."), Turn("input", "好"))), ("good", "bad", "well")))
        ranked.add(Item(Prompt((Turn("system", "Be kind."), Turn("user", "hi"))), ("hello", "go")))
        for _ in range(2):
            one = ranked.offer("kim")
            assert one
            verdict = by_text(ranked, "kim", one)
            tied = Verdict("ranked", (1,) * len(verdict.ranks), comment="both") if len(verdict.ranks) == 2 else verdict
            ranked.submit("kim", one.id, tied)
        assert ranked.offer("kim") is None
    counts = Counts()
    best = sorted(("good", "bad", "well"), key=lambda text: hashlib.sha256(text.encode()).digest())
    records = list(preferences_of(tmp_path / "ranked.jsonl", sources([tmp_path / "ranked.jsonl"]), counts))
    assert counts.unknown == {}
    assert [(r.prompt.turns, r.annotator) for r in records] == [  # type: ignore[union-attr]
        ((Turn("instruction", "Translate."), Turn("input", "好")), "kim"),
        ((Turn("system", "Be kind."), Turn("user", "hi")), "kim"),
    ]
    assert dict(zip(records[0].answers, records[0].ranks, strict=True)) == {
        text: rank for rank, text in enumerate(best, 1)
    }  # type: ignore[union-attr]
    assert records[1].ranks == (1, 1)  # type: ignore[union-attr]
    assert [choice["text"] for choice in lines(tmp_path / "ranked.jsonl")[0]["choices"]] == ranked.shown(
        ranked.items[next(iter(ranked.items))], "kim"
    )


def test_scores_and_an_edited_answer_are_records_too(tmp_path: Path) -> None:
    with ranking(tmp_path, 1, scale=(1, 5)) as ranked:
        one = ranked.offer("kim")
        assert one
        ranked.submit("kim", one.id, Verdict("ranked", (2, 1, 2), (None, 5, 1.5), edited="Better."))
    score, other, order = lines(tmp_path / "ranked.jsonl")
    shown = ranked.shown(one, "kim")
    assert score == {"input": "question 0", "output": shown[1], "score": 5, "annotator": "kim"}
    assert (other["output"], other["score"]) == (shown[2], 1.5)
    assert [choice["rank"] for choice in order["choices"]] == [2, 1, 2]
    assert lines(tmp_path / "ranked-beside/sft.jsonl") == [{"Instruction": "question 0", "Output": "Better."}]


def test_what_is_no_ranking_lies_beside(tmp_path: Path) -> None:
    clock = Clock()
    with ranking(tmp_path, 3, clock, min_seconds=2.0) as ranked:
        kinds = []
        for verdict in (Verdict("skip"), Verdict("all bad", (1, 2, 3)), Verdict("ranked", (1, 2, 3))):
            one = ranked.offer("kim")
            assert one
            clock.now += 1
            kinds.append(ranked.submit("kim", one.id, verdict).get("verdict"))
        assert kinds == ["skip", "all bad", "too fast"]
        assert ranked.done() == 1  # all bad is an answer; the two others are asked of someone else
        assert ranked.offer("kim") is None
        assert ranked.offer("lee")
    assert lines(tmp_path / "ranked.jsonl") == []
    aside = lines(tmp_path / "ranked-beside/aside.jsonl")
    assert [record["verdict"] for record in aside] == kinds
    assert ["rank" in record["choices"][0] for record in aside] == [False, False, True]


# --- who gets what ---


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 30), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_no_two_people_have_the_same_open_item_unless_overlap_wants_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int, people: int, items: int, overlap: float
) -> None:
    draw, clock = random.Random(seed), Clock()
    names = [f"p{number}" for number in range(people)]
    with ranking(tmp_path_factory.mktemp("r"), items, clock, overlap=overlap, seed=seed % 97) as ranked:
        twice = {item_id for item_id, wanted in ranked._wanted.items() if wanted == 2}
        assert len(twice) == int(items * overlap + 1e-9)
        holders: dict[str, set[str]] = defaultdict(set)
        for _ in range(6 * items):
            name = draw.choice(names)
            one = ranked.offer(name)
            if one is None:
                continue
            assert name not in ranked.judged[one.id]
            holders[one.id].add(name)
            assert len(holders[one.id]) <= (2 if one.id in twice else 1)
            if draw.random() < 0.7:
                ranked.submit(name, one.id, by_text(ranked, name, one))
        for name in names * 2:  # those who hold something finish it
            while one := ranked.offer(name):
                ranked.submit(name, one.id, by_text(ranked, name, one))
        judged = Counter({item_id: len(judged) for item_id, judged in ranked.judged.items()})
        assert all(judged[item_id] == (2 if item_id in twice else 1) for item_id in ranked.items)
        assert ranked.done() == items
        assert ranked.agreement()[0] == 3 * len(twice)


def test_what_is_not_answered_comes_back(tmp_path: Path) -> None:
    clock = Clock()
    with ranking(tmp_path, 1, clock, minutes=10.0) as ranked:
        one = ranked.offer("kim")
        assert one == ranked.offer("kim")  # a reload shows the same
        assert ranked.offer("lee") is None
        clock.now += 601
        assert ranked.offer("lee") == one
        assert ranked.offer("kim") is None  # lee has it now
        ranked.submit("kim", one.id, by_text(ranked, "kim", one))  # the work is not thrown away
        ranked.submit("lee", one.id, by_text(ranked, "lee", one))
        assert ranked.agreement() == (3, None)


def test_the_least_certain_first(tmp_path: Path) -> None:
    with ranking(tmp_path) as ranked:
        for number, much in enumerate((0.1, 0.7, 0.3)):
            ranked.add(item(number, doubt=much))
        offered = []
        for _ in range(3):
            one = ranked.offer("kim")
            assert one
            offered.append(one.doubt)
            ranked.submit("kim", one.id, Verdict("skip"))
    assert offered == [0.7, 0.3, 0.1]
    with ranking(tmp_path) as ranked:
        assert ranked.offer("lee").doubt == 0.7  # type: ignore[union-attr]


def test_doubt_is_the_spread_of_an_ensemble_or_the_smallest_margin() -> None:
    assert doubt(np.array([[1.0, 2.0, 4.0]])) == -1.0
    assert doubt(np.array([[1.0, 2.0, 4.0], [3.0, 4.0, 6.0]])) == pytest.approx(0)  # an offset changes no order
    assert doubt(np.array([[0.0, 2.0], [2.0, 0.0]])) == 1.0


def test_the_order_is_drawn_per_person_and_item_and_stored(tmp_path: Path) -> None:
    with ranking(tmp_path, 40) as ranked:
        firsts = Counter(ranked.shown(one, name)[0][-1] for one in ranked.items.values() for name in ("kim", "lee"))
        assert set(firsts) == {"0", "1", "2"}
        assert max(firsts.values()) < 45  # of 80
        assert any(ranked.shown(one, "kim") != ranked.shown(one, "lee") for one in ranked.items.values())
    with ranking(tmp_path) as again:
        assert all(again.shown(one, "kim") == ranked.shown(one, "kim") for one in again.items.values())


# --- agreement, controls, flags ---


def test_agreement_is_that_of_check(tmp_path: Path) -> None:
    with ranking(tmp_path, 30, overlap=1.0) as ranked:
        for name in ("kim", "lee"):
            number = 0
            while one := ranked.offer(name):
                verdict, number = by_text(ranked, name, one), number + 1
                if name == "lee" and number % 3 == 0:
                    verdict = Verdict("ranked", tuple(4 - rank for rank in verdict.ranks))
                ranked.submit(name, one.id, verdict)
        pairs, alpha = ranked.agreement()
    from tetrad.datacheck.judgements import section
    from tetrad.datacheck.reading import Reading

    path = tmp_path / "ranked.jsonl"
    reading = Reading("reward.data", "preferences")
    reading.records = list(preferences_of(path, sources([path]), Counts()))
    metrics = section(reading).metrics
    assert (pairs, alpha) == (metrics["pairs_judged_again"], metrics["alpha_pairs"]) == (90, alpha)
    assert alpha is not None and 0.1 < alpha < 0.6


def test_controls_come_at_random_and_stay_out_of_the_file(tmp_path: Path) -> None:
    controls = [Item(item(number).prompt, ("good", "bad"), ranks=(1, 2)) for number in range(1_000, 1_040)]
    with ranking(tmp_path, 250, controls=controls) as ranked:
        given = 0
        while (one := ranked.offer("kim")) and len(ranked.judged) < 250:
            given += one.id in ranked.controls
            good_first = tuple(1 if text == "good" else 2 for text in ranked.shown(one, "kim"))
            ranked.submit("kim", one.id, Verdict("ranked", good_first if one.ranks else (1, 2, 3)))
        assert 4 <= given <= 25  # 12 expected
        assert ranked.people()["kim"]["right"] == 1.0
        assert ranked.people()["kim"]["control"] == given
    assert "good" not in (tmp_path / "ranked.jsonl").read_text()


def test_a_bot_is_flagged_and_nothing_of_it_is_lost_in_silence(tmp_path: Path) -> None:
    clock = Clock()
    with ranking(tmp_path, 60, clock) as ranked:
        for name, pace in (("bot", 0.2), ("kim", 9.0)):
            for _ in range(30):
                one = ranked.offer(name)
                assert one
                clock.now += pace
                ranked.submit(
                    name, one.id, Verdict("ranked", (1, 2, 3)) if name == "bot" else by_text(ranked, name, one)
                )
        people = ranked.people()
    assert people["bot"]["flags"] == ["under a second for most items", "nearly always the same place first"]
    assert people["kim"]["flags"] == []
    assert people["bot"]["ranked"] == 30


# --- refusals ---


@pytest.mark.parametrize(
    ("verdict", "field"),
    [
        (Verdict("ranked", (1, 2)), "ranks"),
        (Verdict("ranked", (1, 2, 3, 3)), "ranks"),
        (Verdict("ranked", (0, 1, 2)), "ranks"),
        (Verdict("ranked", (1, 2, 4)), "ranks"),
        (Verdict("ranked"), "ranks"),
        (Verdict("best"), "verdict"),
        (Verdict("skip", comment="\0"), "comment"),
        (Verdict("skip", comment="\ud800"), "comment"),
        (Verdict("skip", comment="x" * 2_001), "comment"),
        (Verdict("ranked", (1, 2, 3), edited="x" * 50_001), "edited"),
        (Verdict("ranked", (1, 2, 3), (1, 2)), "scores"),
        (Verdict("ranked", (1, 2, 3), (1, 2, 6)), "scores"),
        (Verdict("ranked", (1, 2, 3), (1, 2, float("nan"))), "scores"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_field(verdict: Verdict, field: str, tmp_path: Path) -> None:
    with ranking(tmp_path, 1, scale=(1, 5)) as ranked:
        one = ranked.offer("kim")
        assert one
        with pytest.raises(Invalid) as caught:
            ranked.submit("kim", one.id, verdict)
        assert caught.value.field == field
        assert ranked.offer("kim") == one
    assert [(tmp_path / name).read_bytes() for name in ("ranked.jsonl", "ranked-beside/aside.jsonl")] == [b"", b""]


def test_scores_without_a_scale_are_refused(tmp_path: Path) -> None:
    with ranking(tmp_path, 1) as ranked:
        one = ranked.offer("kim")
        assert one
        with pytest.raises(Invalid, match="not asked"):
            ranked.submit("kim", one.id, Verdict("ranked", (1, 2, 3), (1, 2, 3)))


def test_nobody_answers_what_others_were_given(tmp_path: Path) -> None:
    with ranking(tmp_path, 2) as ranked:
        one = ranked.offer("kim")
        assert one
        for item_id in (one.id, "0" * 24, ""):
            with pytest.raises(LookupError):
                ranked.submit("lee", item_id, Verdict("skip"))
        assert not ranked.judged["0" * 24]


def test_the_same_answer_again_is_one_line_and_another_is_refused(tmp_path: Path) -> None:
    with ranking(tmp_path, 1) as ranked:
        one = ranked.offer("kim")
        assert one
        first = ranked.submit("kim", one.id, Verdict("ranked", (1, 2, 3), comment="a"))
        assert ranked.submit("kim", one.id, Verdict("ranked", (1, 2, 3), comment="a")) == first
    with ranking(tmp_path) as ranked:  # a new process knows it too
        assert ranked.submit("kim", one.id, Verdict("ranked", (1, 2, 3), comment="a")) == first
        for other in (Verdict("ranked", (3, 2, 1), comment="a"), Verdict("ranked", (1, 2, 3)), Verdict("skip")):
            with pytest.raises(Stored) as caught:
                ranked.submit("kim", one.id, other)
            assert caught.value.record == first
    assert lines(tmp_path / "ranked.jsonl") == [first]


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "x" * 2**20, "a\nb", "a\0b", "\u202eevil", "\ud800", "\u200b"])
def test_bad_names(name: str) -> None:
    with pytest.raises(Invalid, match="name must have"):
        clean_name(name)


@pytest.mark.parametrize("name", ["Robert'); DROP", "<b>kim</b>", "=HYPERLINK(1)", "李雷", "x" * 64])
def test_names_are_data(name: str, tmp_path: Path) -> None:
    assert clean_name(f" {name}") == name
    with ranking(tmp_path, 1) as ranked:
        one = ranked.offer(name)
        assert one
        ranked.submit(name, one.id, by_text(ranked, name, one))
    assert lines(tmp_path / "ranked.jsonl")[0]["annotator"] == name


def test_names_that_look_the_same_are_one() -> None:
    assert clean_name("Jose\u0301") == clean_name("Jos\u00e9")


# --- another process ---


def test_a_new_process_goes_on(tmp_path: Path) -> None:
    with ranking(tmp_path, 3, overlap=0.4) as ranked:
        for verdict in (Verdict("ranked", (1, 1, 2)), Verdict("skip")):
            one = ranked.offer("kim")
            assert one
            ranked.submit("kim", one.id, verdict)
        held, other = ranked.offer("kim"), ranked.offer("lee")
        assert held and other
        before = ranked.people(), ranked.done(), dict(ranked._wanted)
        size = (tmp_path / "ranked.jsonl").stat().st_size
    with (tmp_path / "ranked.jsonl").open("ab") as file:
        file.write(b'{"input": "torn')
    with ranking(tmp_path, 3, overlap=0.4) as again:
        assert (again.people(), again.done(), again._wanted) == before
        assert (tmp_path / "ranked.jsonl").stat().st_size == size
        assert [one and one.id for one in map(again.offer, ("kim", "lee"))] == [held.id, other.id]
        again.submit("kim", held.id, by_text(again, "kim", held))


def test_one_process_holds_the_file(tmp_path: Path) -> None:
    with ranking(tmp_path, 1), pytest.raises(UserError, match="E-RUN-LOCKED") as caught, ranking(tmp_path):
        pass
    assert caught.value.exit_code == 7
    with ranking(tmp_path):
        pass


def test_a_damaged_file_is_named_with_its_line_and_left_alone(tmp_path: Path) -> None:
    raw = b'{"input": "a"}\n{broken\n{"input": "b"}\n'
    (tmp_path / "ranked.jsonl").write_bytes(raw)
    with pytest.raises(UserError, match=r"ranked\.jsonl:2.*") as caught, ranking(tmp_path):
        pass
    assert caught.value.code == "E-DATA-SYNTAX"
    assert (tmp_path / "ranked.jsonl").read_bytes() == raw


def test_lines_of_others_are_kept(tmp_path: Path) -> None:
    pair = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'
    (tmp_path / "ranked.jsonl").write_bytes(pair)  # without a line end
    with ranking(tmp_path, 1) as ranked:
        one = ranked.offer("kim")
        assert one
        ranked.submit("kim", one.id, by_text(ranked, "kim", one))
    assert lines(tmp_path / "ranked.jsonl")[0] == json.loads(pair)
    assert len(lines(tmp_path / "ranked.jsonl")) == 2


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_refuses_stores_nothing_and_the_retry_does(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ranking(tmp_path, 1, scale=(1, 5)) as ranked:
        one = ranked.offer("kim")
        assert one
        verdict = Verdict("ranked", (1, 2, 3), (5, 4, 3))

        def fails(*_: object) -> int:
            raise OSError(28, "full")

        with monkeypatch.context() as patched:
            patched.setattr(disk.Calls, call, staticmethod(fails))
            with pytest.raises(UserError, match="E-IO-SPACE"):
                ranked.submit("kim", one.id, verdict)
        assert (tmp_path / "ranked.jsonl").read_bytes() == b""
        ranked.submit("kim", one.id, verdict)
    assert len(lines(tmp_path / "ranked.jsonl")) == 4
