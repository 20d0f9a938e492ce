"""Example A: fetch.py and judge.py on a handful of made-up rows. Nothing is downloaded and `data/` is not needed."""

import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parents[3] / "examples" / "reviews-en"
PRAISE = ("moving", "funny", "wonderful", "superb", "warm", "clever")
BLAME = ("dull", "stupid", "boring", "lifeless", "clumsy", "awful")
NOUNS = ("the film", "this story", "her performance", "a camera", "the ending", "his music", "my player", "the cast")


def load(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"reviews_en_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def fetch() -> Iterator[ModuleType]:
    yield from load("fetch")


@pytest.fixture
def judge() -> Iterator[ModuleType]:
    yield from load("judge")


def made_up(fetch: ModuleType, count: int = 400) -> list[Any]:
    """Distinct sentences whose rating follows their words."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        good = draw.random() < 0.5
        words = draw.sample(PRAISE if good else BLAME, 2)
        start = draw.choice(
            ("It is a fact that", "This is a case where", "It is no news that", "Two of the friends said")
        )
        text = f"{start} {draw.choice(NOUNS)} number {i} was {words[0]} and {words[1]}."
        votes = [draw.choice((2, 3) if good else (-3, -2)) for _ in range(4)]
        rows.append(fetch.Rated(("movie", "product", "tweet", "editorial")[i % 4], text, sum(votes) / 4, tuple(votes)))
    return rows


def records(files: dict[str, str], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files[name].splitlines()]


def whole(record: dict[str, Any], rest: str) -> str:
    return f"{record['Input']} {rest}".strip()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_rows_are_joined_by_id_and_cleaned(fetch: ModuleType) -> None:
    texts = "1\t2.0\tA  ''fine''   film &amp; more.\r\n2_1\t-1.5\tDull.\r\n"
    votes = "2_1\t-1.5\t0.5\t[-1, -2]\r\n1\t2.0\t1.0\t[3, 1]\r\n"
    first, second = fetch.parse_rated("movie", texts, votes)
    assert first == fetch.Rated("movie", 'A "fine" film & more.', 2.0, (3, 1))
    assert (second.text, second.score, second.votes) == ("Dull.", -1.5, (-1, -2))


def test_a_row_with_a_missing_column_is_refused(fetch: ModuleType) -> None:
    with pytest.raises(fetch.FetchError, match="2 columns instead of 3"):
        fetch.parse_rated("movie", "1\t2.0\n", "1\t2.0\t1.0\t[2]\n")


def test_equal_sentences_become_one_with_all_votes(fetch: ModuleType) -> None:
    rows = [fetch.Rated("movie", "Well made.", 3.0, (3,)), fetch.Rated("product", "well made.", 1.0, (2, 0))]
    assert fetch.merge_equal(rows) == [fetch.Rated("movie", "Well made.", 5 / 3, (3, 2, 0))]


def test_paragraphs_lose_their_title_and_their_copies(fetch: ModuleType) -> None:
    passages = ["Bread -- Bread is  food -- often.", "Bread -- Bread is food -- often.", "Tea -- Tea is a drink."]
    assert fetch.unique_paragraphs(passages) == [("Bread", "Bread is food -- often."), ("Tea", "Tea is a drink.")]


# --- splits and records -----------------------------------------------------------------------------------------------


def test_splits_are_80_10_10_and_ignore_letter_case(fetch: ModuleType) -> None:
    splits = [fetch.split_of(fetch.key_of(f"sentence {i}")) for i in range(5000)]
    shares = [splits.count(split) / 5000 for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert fetch.key_of("A Film.") == fetch.key_of("a film.")


def test_no_sentence_is_in_two_splits_or_twice_in_one(fetch: ModuleType) -> None:
    files = fetch.build(made_up(fetch), [(f"title {i}", f"Paragraph {i}.") for i in range(300)])
    scored = {split: [whole(r, r["Output"]) for r in records(files, f"scores.{split}.jsonl")] for split in fetch.SPLITS}
    ranked = [whole(r, c["text"]) for r in records(files, "ranked.train.jsonl") for c in r["choices"]]
    everything = [*ranked, *(text for texts in scored.values() for text in texts)]
    assert ranked and all(scored.values())
    assert len(everything) == len(set(everything)) == 400

    train, validation = {*scored["train"], *ranked}, {*scored["valid"], *scored["test"]}
    assert {whole(r, r["Output"]) for r in records(files, "sft.train.jsonl")} <= train
    assert {whole(r, r["Output"]) for r in records(files, "sft.valid.jsonl")} <= set(scored["valid"])
    assert set(files["reviews.txt"].strip().split("\n\n")) == train
    held_out_texts = {*files["valid.txt"].strip().split("\n\n"), *files["human.txt"].strip().split("\n\n")}
    assert validation <= held_out_texts
    assert not held_out_texts & (train | set(files["wiki.txt"].strip().split("\n\n")))


def test_test_prompts_begin_test_sentences_and_are_no_train_prompts(fetch: ModuleType) -> None:
    rows = made_up(fetch)
    files = fetch.build(rows, [])
    prompts = {
        split: {(r["Instruction"], r["Input"]) for r in records(files, f"prompts.{split}.jsonl")}
        for split in ("train", "test")
    }
    begins = {row.text for row in rows if row.split == "test" and row.kind in ("movie", "product")}
    assert all(any(text.startswith(start + " ") for text in begins) for _, start in prompts["test"])
    assert not prompts["train"] & prompts["test"]
    assert {start.split()[0] for _, start in prompts["train"]} == {"It", "This", "Two"}


def test_first_words_are_two_to_five_and_at_most_half(fetch: ModuleType) -> None:
    lengths = {fetch.first_words(f"one two three four five six seven eight nine ten number {i}") for i in range(100)}
    assert lengths == {2, 3, 4, 5}
    assert fetch.first_words("Great!") == 0
    record = fetch.score_record(fetch.Rated("movie", "Great!", 3.5, (3, 4)))
    assert record == {"Instruction": "Continue this movie review.", "Input": "", "Output": "Great!", "score": 3.5}


@pytest.mark.parametrize(
    ("kind", "text", "used"),
    [
        ("movie", "It is a very fine film.", True),
        ("tweet", "It is a very fine film.", False),
        ("product", "It is very fine.", False),
        ("movie", "word " * 60, False),
    ],
)
def test_scraps_long_sentences_and_other_kinds_are_not_continued(
    fetch: ModuleType, kind: str, text: str, used: bool
) -> None:
    assert fetch.is_continued(fetch.Rated(kind, text, 0.0, (0,))) is used


def test_lists_share_kind_and_first_words_three_before_two(fetch: ModuleType) -> None:
    rows = [fetch.Rated("movie", f"It is a film of kind {i}.", i / 2, (0,)) for i in range(5)]
    rows += [fetch.Rated("movie", f"It is the film of kind {i}.", i / 2, (0,)) for i in range(3)]
    rows += [fetch.Rated("product", f"It is a tool of kind {i}.", i / 2, (0,)) for i in range(3)]
    groups = fetch.ranked_groups(rows)
    assert [(words, len(members)) for words, members in groups] == [(3, 4), (2, 4)]
    assert all(row.kind == "movie" for _, members in groups for row in members)
    used = [row.text for _, members in groups for row in members]
    assert len(used) == len(set(used)) == 8


def test_ranks_follow_the_ratings_and_close_ones_tie(fetch: ModuleType) -> None:
    scores = (1.0, 3.0, 2.8, -1.0, 2.7)
    rows = [fetch.Rated("movie", f"It is a film{i}.", score, (0,)) for i, score in enumerate(scores)]
    record = fetch.ranked_record(3, rows)
    assert record["Input"] == "It is a"
    assert [c["text"] for c in record["choices"]] == [f"film{i}." for i in range(5)]
    assert [c["rank"] for c in record["choices"]] == [3, 1, 1, 4, 2]  # 2.7 is 0.3 below the best of its neighbours


# --- downloading ------------------------------------------------------------------------------------------------------


def archive(fetch: ModuleType, folder: Path, content: bytes) -> Any:
    return fetch.Package("some-package", "1.0", "some.zip", hashlib.sha256(content).hexdigest())


def test_a_whole_archive_is_not_downloaded_again(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PACKAGES", (archive(fetch, tmp_path, b"data"),))
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    (tmp_path / "some.zip").write_bytes(b"data")
    assert fetch.download(tmp_path) == {"some-package": tmp_path / "some.zip"}


def test_without_network_the_error_says_what_to_do(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PACKAGES", (archive(fetch, tmp_path, b"data"),))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no route to host\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch.FetchError, match=r"ERROR: no route to host\nWithout one, put some\.zip into") as error:
        fetch.download(tmp_path)
    assert "WARNING" not in str(error.value)


def test_an_archive_with_another_hash_is_refused(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PACKAGES", (archive(fetch, tmp_path, b"data"),))

    def tampered(command: list[str], **_: Any) -> Any:
        assert {"pip", "download", "--no-deps", "--require-hashes"} <= set(command)
        (tmp_path / "some.zip").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", tampered)
    with pytest.raises(fetch.FetchError, match=r"some\.zip is not some-package 1\.0: its sha256 is another"):
        fetch.download(tmp_path)


def test_converted_once_and_again_when_a_file_is_short(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "read_rated", lambda _: made_up(fetch))
    monkeypatch.setattr(fetch, "read_paragraphs", lambda _: [("Tea", "Tea is a drink.")])
    with zipfile.ZipFile(tmp_path / "lexicon.whl", "w") as wheel:
        wheel.writestr("vader/__init__.py", "x = 1\n")
        wheel.writestr("other/evil.py", "x = 2\n")
    data = tmp_path / "data"
    (tmp_path / ".tmp-data-1").mkdir()
    paths = {package.name: tmp_path / "lexicon.whl" for package in fetch.PACKAGES}
    assert not fetch.is_done(data)
    counts = fetch.convert(paths, data)
    assert fetch.is_done(data)
    assert counts["ratings.jsonl"] == 400
    assert counts["reviews.txt"] == len((data / "reviews.txt").read_text().strip().split("\n\n"))
    assert (data / "vader/__init__.py").is_file() and not (data / "other").exists()
    assert not list(tmp_path.glob(".tmp-data-*"))
    (data / "wiki.txt").write_text("cut")
    assert not fetch.is_done(data)


# --- judges -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(fetch: ModuleType, judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """judge.py on a `data/` of made-up ratings and a two-word lexicon."""
    (tmp_path / "ratings.jsonl").write_text(fetch.build(made_up(fetch), [])["ratings.jsonl"])
    (tmp_path / "vader").mkdir()
    code = """
from .words import WORDS

def polarity_scores(text):
    return {"compound": WORDS.get(text.split()[-1], 0)}
"""
    (tmp_path / "vader/__init__.py").write_text(code)
    (tmp_path / "vader/words.py").write_text("WORDS = {'funny': 0.5, 'dull': -0.5}\n")
    monkeypatch.setattr(judge, "DATA", tmp_path)
    return judge


def test_ridge_prefers_what_people_rate_high(judged: ModuleType) -> None:
    texts = ("was moving and warm.", "was blue.", "was dull and awful.")
    good, plain, bad = judged.ridge([{"input": "It is a fact that the film", "text": text} for text in texts])
    assert good > plain + 1 > bad + 2
    assert judged.ridge([{"input": "", "text": ""}]) == pytest.approx([judged.judge_model().base])
    assert judged.ridge([]) == []


def test_ridge_reads_prompt_and_reply_as_one_sentence(judged: ModuleType) -> None:
    texts = [
        {"input": "the film was", "text": "warm and dull"},
        {"input": "", "text": " the film  was warm and dull"},
    ]
    first, second = judged.ridge(texts)
    assert first == second


def test_ridge_never_reads_train_ratings(judged: ModuleType) -> None:
    path = judged.DATA / "ratings.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sample = [{"input": "the film", "text": "was moving and dull"}]
    before = judged.ridge(sample)
    path.write_text("".join(json.dumps(r | ({"score": 99} if r["split"] == "train" else {})) + "\n" for r in rows))
    judged.judge_model.cache_clear()
    assert judged.ridge(sample) == before


def test_lexicon_uses_the_unpacked_package(judged: ModuleType) -> None:
    samples = [{"input": "it is", "text": word} for word in ("funny", "dull", "blue")]
    assert judged.lexicon(samples) == [0.5, -0.5, 0.0]
    assert all(name in sys.modules for name in ("reviews_vader", "reviews_vader.words"))
    del sys.modules["reviews_vader"], sys.modules["reviews_vader.words"]


def test_missing_data_says_run_fetch(judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "DATA", tmp_path)
    for name in ("ridge", "lexicon"):
        with pytest.raises(FileNotFoundError, match=r"run fetch\.py first"):
            getattr(judge, name)([{"input": "", "text": "x"}])


def test_fit_equals_the_normal_equations(judge: ModuleType) -> None:
    texts = ["good film", "bad film", "good good sound", "bad ending of a film", "so so"]
    scores = np.array([3.0, -2.0, 2.5, -3.0, 0.2])
    model = judge.fit_ridge(texts, scores, 0.7)
    sparse = judge.tfidf([judge.terms(text) for text in texts], model.vocabulary, model.idf)
    x = np.zeros(sparse.shape)
    x[sparse.rows, sparse.columns] = sparse.values
    assert np.allclose((x**2).sum(1), 1)
    exact = np.linalg.solve(x.T @ x + 0.7 * np.eye(x.shape[1]), x.T @ (scores - scores.mean()))
    assert model.weights == pytest.approx(exact, abs=1e-5)
    assert model.predict(["unknown"]) == pytest.approx([scores.mean()])


def test_words_and_pairs(judge: ModuleType) -> None:
    found = judge.terms("Don't, don't  stop!")
    assert found == {"don't": 2, "stop": 1, "!": 1, "don't don't": 1, "don't stop": 1, "stop !": 1}


def test_spearman_and_pair_accuracy_by_hand(judge: ModuleType) -> None:
    scores = np.array([0.0, 0.4, 1.0, 2.0])
    assert judge.spearman(np.array([1.0, 2.0, 3.0, 40.0]), scores) == pytest.approx(1)
    assert judge.mean_ranks(np.array([5.0, 1.0, 5.0])).tolist() == [2.5, 1, 2.5]
    # pairs at least 0.5 apart: 1.0>0.0, 1.0>0.4, 2.0>0.0, 2.0>0.4, 2.0>1.0; the guess has 2 right, 1 tie, 2 wrong
    assert judge.pair_accuracy(np.array([2.0, 1.0, 2.0, 1.5]), scores) == pytest.approx((0.5 + 1 + 0 + 1 + 0) / 5)


def test_baseline_learns_from_train_and_is_tested_on_test(judged: ModuleType) -> None:
    texts, scores = judged.ratings(("test",))
    guess = np.array(judged.ridge_baseline([{"input": "", "text": text} for text in texts]))
    assert judged.pair_accuracy(guess, scores) > 0.85  # ratings differ by chance within good and bad
    crossed = judged.cross_validated()
    assert crossed["spearman"] > 0.7 and crossed["error"] < 1


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recipe", "quick"])
def test_recipes_name_files_that_fetch_makes_and_never_train_on_held_out(fetch: ModuleType, name: str) -> None:
    recipe = tomllib.loads((HERE / f"{name}.toml").read_text())
    made = set(fetch.build(made_up(fetch), []))
    tables = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
    trained = {file for t in tables for key in ("text", "data") for file in recipe[t].get(key, ())}
    trained |= set(recipe["ppo"]["prompts"])
    validation = {file for t in tables for key in ("validation", "test") for file in recipe[t].get(key, ())}
    validation |= set(recipe["evaluate"]["prompts"])
    assert {file.removeprefix("data/") for file in trained | validation} <= made
    assert not trained & validation
    assert not {file for file in trained if ".test." in file or ".valid." in file}
    judges = (judge.rpartition(":")[2] for judge in recipe["evaluate"]["judges"])
    assert all(f"def {function}(" in (HERE / "judge.py").read_text() for function in judges)
