"""Properties of 10^5 random records on their way from files to batches.

The end token of every answer that was not cut is learned, prompts and padding never are, no batch is without labels,
and the counters add up to the rows read. Records take every form, texts spell control tokens, some rows are bad.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tetrad import storage
from tetrad.data.loader import batch_indices, epoch_size, whole
from tetrad.data.pack import pack
from tetrad.data.records import conversations_of, read_preferences
from tetrad.data.source import Counts, sources
from tetrad.data.store import Encoding, TokenStore, build
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES, Template
from tetrad.types import IGNORE

RECORDS = 20_000  # of each of five tests
WORDS = ["the", "plot", "is", "warm", "funny", "你好", "世界", "42", "é", "🦊", "x=1;", "\n", "  ", "<|endoftext|>"]
WORDS += ["<|im_end|>", "<|im_start|>system", "<|sep|>", "<|pad|>", "<think>", "a\u2028b", "\u0000", '"', "\\n", "。"]
TOKENIZER = bpe.learn([" ".join(WORDS)] * 3, 400)


def said(draw: random.Random, most: int = 8) -> str:
    """A text that is not blank."""
    return draw.choice(["ok", "好", "-"]) + "".join(draw.choice(WORDS) for _ in range(draw.randrange(most)))


def talk(draw: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A conversation of SFT in a random form, and its answers."""
    asked, reply = said(draw), said(draw, 30)
    name = draw.choice([str.lower, str.upper, str.title])
    match draw.randrange(5):
        case 0:
            extra = {name("input"): draw.choice(["", None, said(draw)])} if draw.random() < 0.7 else {}
            return {name("instruction"): asked, **extra, name("output"): reply}, [reply]
        case 1:
            return {name("prompt"): asked, name("completion"): reply, "id": draw.randrange(9)}, [reply]
    turns = [(role, said(draw, 12)) for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]
    answers = [text for role, text in turns if role == "assistant"]
    if draw.random() < 0.5:
        return {"conversations": [{"from": r.replace("user", "human"), "value": t} for r, t in turns]}, answers
    system = [{"role": "system", "content": said(draw)}] if draw.random() < 0.3 else []
    return {"messages": [*system, *({"role": r, "content": t} for r, t in turns)]}, answers


BAD = ['{"instruction": 1, "output": "x"}', "{", "null", '{"a": 1}', '{"prompt": "p", "completion": ""}', "[1]", '"x"']


def written(path: Path, seed: int, *, bad: float = 0.0, one_turn: bool = False) -> tuple[list[list[str]], int, int]:
    """A file of RECORDS rows; the answers of the good ones, and the number of bad rows and blank lines."""
    draw = random.Random(seed)
    expected: list[list[str]] = []
    wrong = blank = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for _ in range(RECORDS):
            if draw.random() < bad:
                file.write(draw.choice(BAD) + "\n")
                wrong += 1
                continue
            if draw.random() < 0.02:
                file.write(draw.choice(["\n", " \n", "\r\n"]))
                blank += 1
            record, answers = talk(draw)
            while one_turn and (len(answers) > 1 or "messages" in record):
                record, answers = talk(draw)
            expected.append(answers)
            file.write(json.dumps(record, ensure_ascii=draw.random() < 0.5) + draw.choice(["\n", "\r\n"]))
    return expected, wrong, blank


def stored(folder: Path, path: Path, form: Template, **how: Any) -> tuple[TokenStore, Counts]:
    encoding = Encoding(TOKENIZER.text, TOKENIZER.eos_ids, form, **how)
    return build(folder, encoding, sources([path]), [storage.sha256_file(path)])


def normal(text: str) -> str:
    return TOKENIZER.decode(TOKENIZER.encode(text))


def check_batches(store: TokenStore, seed: int) -> None:
    """Every batch of an epoch has labels, and none stands where a document ends or belongs to another one."""
    mixture = whole(len(store))
    for step in range(int(epoch_size(mixture)) // 16):
        packed = pack([store[i] for i in batch_indices(seed, mixture, 16, step).tolist()])
        last = np.array(packed.bounds[1:]) - 1
        assert (packed.targets_T != IGNORE).any() and (packed.targets_T[last] == IGNORE).all()
        learned = np.flatnonzero(packed.targets_T != IGNORE)
        assert (packed.targets_T[learned] == packed.ids_T[learned + 1]).all()


@pytest.mark.parametrize("name", ["instruction", "chatml"])
def test_what_is_learned(tmp_path: Path, name: str) -> None:
    """Exactly the answers with their end tokens; not one control token more than the template places."""
    form = TEMPLATES[name]
    expected, _, blank = written(tmp_path / "s.jsonl", 1, one_turn=name == "instruction")
    store, counts = stored(tmp_path / "t", tmp_path / "s.jsonl", form)
    assert (counts.read, counts.kept, counts.blank, counts.refused) == (RECORDS, RECORDS, blank, 0)
    assert len(store) == RECORDS and sum(counts.forms.values()) == RECORDS
    end = form.end_id(TOKENIZER)
    controls = {TOKENIZER.control(control) for control in bpe.CONTROLS}
    for index, answers in enumerate(expected):
        tokens = store[index]
        learned = tokens.ids[tokens.train].tolist()
        assert TOKENIZER.decode(learned) == "".join(map(normal, answers))
        assert [i for i in learned if i in controls] == [end] * len(answers)
        assert tokens.ids[-1] == end and tokens.train[-1] and not tokens.train[0]
    assert counts.control_strings > RECORDS // 10
    check_batches(store, 3)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenStore]:
    """Records as they were written, in a file and as tokens."""
    folder = tmp_path_factory.mktemp("whole")
    expected, _, _ = written(folder / "s.jsonl", 2)
    store, _ = stored(folder / "w", folder / "s.jsonl", TEMPLATES["chatml"])
    assert len(expected) == len(store) == RECORDS
    return folder / "s.jsonl", store


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_over_long_records(tmp_path: Path, overlong: str, untouched: tuple[Path, TokenStore]) -> None:
    """A record that fits keeps its end token; a cut one has no end that is not its own; the counters add up."""
    limit = 40
    form = TEMPLATES["chatml"]
    path, whole_store = untouched
    store, counts = stored(tmp_path / "t", path, form, max_tokens=limit, overlong=overlong)
    long = [i for i in range(RECORDS) if whole_store.lengths[i] > limit]
    assert counts.kept == RECORDS == len(store) + counts.dropped
    assert counts.long == len(long) == counts.cut + counts.dropped and counts.longest == whole_store.lengths.max()
    assert store.lengths.max() <= limit
    place = {where: i for i, where in enumerate(whole_store.places())}
    for index, where in enumerate(store.places()):
        before, now = whole_store[place[where]], store[index]
        assert now.ids.tolist() == before.ids[: len(now.ids)].tolist() and now.train.any()
        assert len(now.ids) == min(len(before.ids), limit)
        if len(before.ids) <= limit:
            assert now.train[-1] and now.ids[-1] == form.end_id(TOKENIZER)
    check_batches(store, 4)


def test_counters_with_bad_rows(tmp_path: Path) -> None:
    """read = kept + refused, each refused row with its own line; what is kept is what was good."""
    expected, wrong, blank = written(tmp_path / "s.jsonl", 5, bad=0.2)
    counts, aside = Counts(), []
    given = sources([tmp_path / "s.jsonl"])
    kept = conversations_of(given.paths[0], given, counts, lambda error, text: aside.append((error, text)))
    found = list(kept)
    assert [c.turns[-1].text for c in found] == [answers[-1] for answers in expected]
    assert (counts.read, counts.kept, counts.refused, counts.blank) == (RECORDS, len(expected), wrong, blank)
    lines = (tmp_path / "s.jsonl").read_bytes().split(b"\n")
    for error, text in aside:
        assert lines[int(error.where.rpartition(":")[2]) - 1].decode() == text and text in BAD


def test_preferences(tmp_path: Path) -> None:
    """Lists, pairs and scores in one file: none lost, none changed, ties counted."""
    draw = random.Random(6)
    rows: list[dict[str, Any]] = []
    for _ in range(RECORDS // 4):
        texts = [*{said(draw) for _ in range(draw.randint(2, 5))}, "another"]
        ranks = [draw.randint(1, 3) for _ in texts]
        rows.append(
            {"input": said(draw), "choices": [{"text": t, "rank": r} for t, r in zip(texts, ranks, strict=True)]}
        )
        rows.append({"prompt": said(draw), "chosen": "a" + said(draw), "rejected": "b" + said(draw), "margin": 0.5})
        rows.append({"instruction": said(draw), "output": said(draw), "score": draw.random() * 4 + 1, "annotator": 3})
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = Counts()
    found = read_preferences([path], (1, 5), counts)
    assert len(found) == counts.read == counts.kept == len(rows) == sum(counts.forms.values())
    for row, record in zip(rows, found, strict=True):
        if "choices" in row:
            assert [(c["text"], c["rank"]) for c in row["choices"]] == list(
                zip(record.answers, record.ranks, strict=True)
            )  # type: ignore[union-attr]
        elif "chosen" in row:
            assert record.answers == (row["chosen"], row["rejected"])  # type: ignore[union-attr]
        else:
            assert (record.answer, record.score) == (row["output"], row["score"])  # type: ignore[union-attr]
    assert counts.tied == sum(len({c["rank"] for c in row["choices"]}) == 1 for row in rows if "choices" in row)
