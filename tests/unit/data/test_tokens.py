"""Batch encoding equals the one-by-one path; the store gives back what went in, and is used again."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad import storage
from tetrad.data import tokens as tokens_file
from tetrad.data.source import Counts
from tetrad.data.tokens import TokenStore, fit, tokenize, tokenize_documents
from tetrad.errors import UserError
from tetrad.text import bpe
from tetrad.text.template import TEMPLATES
from tetrad.types import Conversation, Document, Prompt, Tokens, Turn

TOKENIZER = bpe.learn(["hello world 你好 instruction answer"] * 5, 320)


def record(ids, train=None, where="f.jsonl:1"):
    marks = [True] * len(ids) if train is None else train
    return Tokens(np.array(ids, np.int32), np.array(marks, np.bool_), where)


def same(a, b):
    return a.ids.tolist() == b.ids.tolist() and a.train.tolist() == b.train.tolist() and a.where == b.where


def conversations(n):
    for i in range(n):
        turns = (Turn("instruction", f"hello {i}"), Turn("input", "你好" * (i % 3)), Turn("assistant", f"answer {i}"))
        yield Conversation(turns, f"f.jsonl:{i + 1}")


@pytest.mark.parametrize("form", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(("records", "characters"), [(512, 1 << 20), (3, 1 << 20), (512, 20)])
def test_tokenize_equals_one_by_one(form, records, characters, monkeypatch):
    monkeypatch.setattr(tokens_file, "CHUNK_RECORDS", records)
    monkeypatch.setattr(tokens_file, "CHUNK_CHARACTERS", characters)
    found = list(tokenize(form, TOKENIZER, conversations(10)))
    expected = [form.conversation(TOKENIZER, c.turns, c.where) for c in conversations(10)]
    assert len(found) == 10 and all(map(same, found, expected))
    assert found[0].ids.dtype == np.int32 and found[0].train.dtype == np.bool_


def test_tokenize_streams(monkeypatch):
    monkeypatch.setattr(tokens_file, "CHUNK_RECORDS", 2)
    taken = []
    stream = tokenize(TEMPLATES["instruction"], TOKENIZER, (taken.append(c) or c for c in conversations(10)))
    next(stream)
    assert len(taken) == 2


def test_prompts_and_training_on_them():
    form, prompt = TEMPLATES["instruction"], Prompt(next(conversations(1)).turns[:2], "p:1")
    (found,) = tokenize(form, TOKENIZER, [prompt])
    assert found.ids.tolist() == form.prompt(TOKENIZER, prompt.turns) and not found.train.any()
    (found,) = tokenize(form, TOKENIZER, conversations(1), train_on_prompt=True)
    assert found.train.all()


def test_documents_end_and_control_strings_are_counted():
    counts = Counts()
    (found,) = tokenize_documents(TOKENIZER, [Document("hello <|sep|><|sep|>", "f:1")], counts)
    assert found.ids.tolist() == [*TOKENIZER.encode("hello <|sep|><|sep|>"), TOKENIZER.document_end]
    assert TOKENIZER.separator_id not in found.ids
    assert found.train.all() and found.where == "f:1" and counts.control_strings == 2


LONG = [record([1] * n, where=f"f:{n}") for n in (3, 9, 4, 7, 5)]


def test_fit_refuses_once_all_are_seen():
    kept = []
    with pytest.raises(UserError, match=r"E-DATA-LONG. f:9: 2 of 5 records.*longest has 9 tokens, the limit is 5"):
        kept.extend(fit(LONG, 5, "refuse", Counts()))
    assert list(fit(LONG, 9, "refuse", Counts())) == LONG


def test_fit_cuts_and_drops_with_counts():
    counts = Counts()
    assert [len(t.ids) for t in fit(LONG, 5, "cut", counts)] == [3, 5, 4, 5, 5]
    assert (counts.cut, counts.dropped) == (2, 0)
    counts = Counts()
    assert [len(t.ids) for t in fit(LONG, 5, "drop", counts)] == [3, 4, 5]
    assert (counts.cut, counts.dropped) == (0, 2)
    with pytest.raises(UserError, match=r"E-DATA-LONG. f:3: 5 of 5"):
        list(fit(LONG, 2, "drop", Counts()))


def test_fit_cuts_the_side_that_is_asked_for():
    long = record(range(6), [False] * 4 + [True] * 2)
    (left,) = fit([long], 3, "cut", Counts(), side="left")
    assert left.ids.tolist() == [3, 4, 5] and left.train.tolist() == [False, True, True]
    counts = Counts()
    short = record([1], where="g:1")
    assert list(fit([long, short], 3, "cut", counts)) == [short]  # nothing of the answer is left
    assert (counts.cut, counts.dropped) == (0, 1)
    (prompt,) = fit([record(range(6), [False] * 6)], 3, "cut", Counts())
    assert prompt.ids.tolist() == [0, 1, 2]


RECORDS = st.lists(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=12
)


@given(RECORDS)
def test_store_gives_back_what_went_in(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("store") / "tokens"
    given_in = [record([i for i, _ in p], [t for _, t in p], f"d/{n % 2}:x.jsonl:{n + 1}") for n, p in enumerate(pairs)]
    store = TokenStore.build(folder, iter(given_in), "key")
    assert len(store) == len(given_in) and store.total == sum(map(len, pairs))
    assert store.lengths.tolist() == list(map(len, pairs))
    assert all(same(store[n], t) for n, t in enumerate(given_in))
    last = given_in[-1]
    half = len(last.ids) // 2
    assert same(
        store.piece(len(store) - 1, half, len(last.ids)), record(last.ids[half:], last.train[half:], last.where)
    )


def test_small_vocabularies_take_two_bytes(tmp_path):
    TokenStore.build(tmp_path / "a", [record([65_535])], "k")
    TokenStore.build(tmp_path / "b", [record([65_536])], "k")
    assert [(tmp_path / name / "ids.bin").stat().st_size for name in "ab"] == [2, 4]


def test_places_without_a_line(tmp_path):
    store = TokenStore.build(tmp_path / "t", [record([1], where=""), record([1], where="chat"), record([1])], "k")
    assert [store.where(i) for i in range(3)] == ["", "chat", "f.jsonl:1"]


def test_store_is_used_again_while_its_key_holds(tmp_path):
    def never():
        raise AssertionError("read again")
        yield

    folder = tmp_path / "tokens"
    TokenStore.build(folder, [record([1, 2])], "key")
    assert TokenStore.build(folder, never(), "key")[0].ids.tolist() == [1, 2]
    assert TokenStore.build(folder, [record([3])], "other")[0].ids.tolist() == [3]
    (folder / "ids.bin").write_bytes(b"\x04\x00")
    assert TokenStore.build(folder, [record([3])], "other")[0].ids.tolist() == [3]


def test_nothing_is_left_where_the_stream_fails(tmp_path):
    with pytest.raises(UserError, match="E-DATA-LONG"):
        TokenStore.build(tmp_path / "t", fit(LONG, 5, "refuse", Counts()), "k")
    with pytest.raises(UserError, match="E-DATA-EMPTY"):
        TokenStore.build(tmp_path / "t", [], "k")
    with pytest.raises(ValueError, match="f:7"):
        TokenStore.build(tmp_path / "t", [record([], where="f:7")], "k")
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_no_store(tmp_path):
    storage.write_folder(tmp_path / "m", {"a.bin": b"x"}, {"kind": "model"})
    with pytest.raises(UserError, match="E-CKPT-MANIFEST"):
        TokenStore(tmp_path / "m")


def test_building_holds_no_corpus_in_memory(tmp_path):
    stream = (record(np.arange(10_000) % 60_000, where=f"f:{i}") for i in range(400))  # 16 MB of int32
    tracemalloc.start()
    store = TokenStore.build(tmp_path / "t", stream, "k")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.total == 4_000_000
    assert peak < 5 << 20
