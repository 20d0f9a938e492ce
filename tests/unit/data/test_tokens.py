"""Batch encoding equals the one-by-one path; over-long records are refused, cut or dropped, and counted."""

import numpy as np
import pytest

from families import conversation
from tetrad.data import tokens as tokens_file
from tetrad.data.source import Counts
from tetrad.data.tokens import limit_length, refuse_long, tokenize, tokenize_documents
from tetrad.errors import UserError
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES
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


@pytest.mark.parametrize("form", [TEMPLATES[name] for name in ("instruction", "chatml", "qwen2.5")])
@pytest.mark.parametrize(("records", "characters"), [(512, 1 << 20), (3, 1 << 20), (512, 20)])
def test_tokenize_equals_one_by_one(form, records, characters, monkeypatch):
    monkeypatch.setattr(tokens_file, "CHUNK_RECORDS", records)
    monkeypatch.setattr(tokens_file, "CHUNK_CHARACTERS", characters)
    found = list(tokenize(form, TOKENIZER, conversations(10)))
    expected = [conversation(form, TOKENIZER, c.turns, c.where) for c in conversations(10)]
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
    assert TOKENIZER.control("<|sep|>") not in found.ids
    assert found.train.all() and found.where == "f:1" and counts.control_strings == 2


LONG = [record([1] * n, where=f"f:{n}") for n in (3, 9, 4, 7, 5)]


def fitted(limit, overlong):
    counts = Counts(read=5, kept=5)
    found = list(limit_length(LONG, limit, overlong, counts))
    refuse_long(counts, limit, overlong)
    return found


def test_fit_refuses_once_all_are_seen():
    with pytest.raises(UserError, match=r"E-DATA-LONG. f:9: 2 of 5 records.*longest has 9 tokens, the limit is 5"):
        fitted(5, "refuse")
    assert fitted(9, "refuse") == LONG


def test_fit_cuts_and_drops_with_counts():
    counts = Counts()
    assert [len(t.ids) for t in limit_length(LONG, 5, "truncate", counts)] == [3, 5, 4, 5, 5]
    assert (counts.cut, counts.dropped) == (2, 0)
    counts = Counts()
    assert [len(t.ids) for t in limit_length(LONG, 5, "drop", counts)] == [3, 4, 5]
    assert (counts.cut, counts.dropped) == (0, 2)
    with pytest.raises(UserError, match=r"E-DATA-LONG. f:3: 5 of 5"):
        fitted(2, "drop")
    assert len(fitted(2, "truncate")) == 5


def test_fit_truncates_on_the_right_and_drops_what_has_no_answer_left():
    long = record(range(6), [False] * 4 + [True] * 2)
    counts = Counts()
    short = record([1], where="g:1")
    assert list(limit_length([long, short], 3, "truncate", counts)) == [short]  # nothing of the answer is left
    assert (counts.cut, counts.dropped) == (0, 1)
    (prompt,) = limit_length([record(range(6), [False] * 6)], 3, "truncate", Counts())
    assert prompt.ids.tolist() == [0, 1, 2]
