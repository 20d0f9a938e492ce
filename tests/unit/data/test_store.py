"""The store gives back what went in, in parts that are built side by side, used again, and resumed."""

import gzip
import json
import os
import resource
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad import storage
from tetrad.data import store as store_file
from tetrad.data.source import Counts, sources, spans
from tetrad.data.store import Encoding, TokenStore, build, write_part
from tetrad.errors import UserError
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES
from tetrad.types import Tokens

TOKENIZER = bpe.learn(["hello world 你好 instruction answer"] * 5, 320)
CHAT = Encoding(TOKENIZER.text, TOKENIZER.eos_ids, TEMPLATES["instruction"], max_tokens=500)
DOCUMENTS = Encoding(TOKENIZER.text, TOKENIZER.eos_ids)


def record(ids, train=None, where="f.jsonl:1"):
    marks = [True] * len(ids) if train is None else train
    return Tokens(np.array(ids, np.int32), np.array(marks, np.bool_), where)


def same(a, b):
    return a.ids.tolist() == b.ids.tolist() and a.train.tolist() == b.train.tolist() and a.where == b.where


def stored(folder, records):
    write_part(folder, records, Counts())
    return TokenStore([folder])


RECORDS = st.lists(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=12
)


@given(RECORDS)
def test_store_gives_back_what_went_in(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("store") / "tokens"
    given_in = [record([i for i, _ in p], [t for _, t in p], f"d/{n % 2}:x.jsonl:{n + 1}") for n, p in enumerate(pairs)]
    store = stored(folder, iter(given_in))
    assert len(store) == len(given_in) and store.total == sum(map(len, pairs))
    assert store.lengths.tolist() == list(map(len, pairs))
    assert all(same(store[n], t) for n, t in enumerate(given_in))
    last = given_in[-1]
    half = len(last.ids) // 2
    assert same(
        store.piece(len(store) - 1, half, len(last.ids)), record(last.ids[half:], last.train[half:], last.where)
    )


def test_small_vocabularies_take_two_bytes(tmp_path):
    stored(tmp_path / "a", [record([65_535])])
    stored(tmp_path / "b", [record([65_536])])
    assert [(tmp_path / name / "ids.bin").stat().st_size for name in "ab"] == [2, 4]


def test_places_without_a_line(tmp_path):
    store = stored(tmp_path / "t", [record([1], where=""), record([1], where="chat"), record([1])])
    assert [store.where(i) for i in range(3)] == ["", "chat", "f.jsonl:1"]


def test_another_folder_is_no_store(tmp_path):
    storage.write_folder(tmp_path / "m", {"a.bin": b"x"}, {"kind": "model"})
    with pytest.raises(UserError, match="E-CKPT-MANIFEST"):
        TokenStore([tmp_path / "m"])


def test_building_holds_no_corpus_in_memory(tmp_path):
    stream = (record(np.arange(10_000) % 60_000, where=f"f:{i}") for i in range(400))  # 16 MB of int32
    tracemalloc.start()
    store = stored(tmp_path / "t", stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.total == 4_000_000
    assert peak < 5 << 20


def test_nothing_is_left_where_the_stream_fails(tmp_path):
    def failing():
        yield record([1])
        raise UserError("E-DATA-TYPE", "x")

    for stream, error in ((failing(), UserError), ([record([], where="f:7")], ValueError)):
        with pytest.raises(error):
            write_part(tmp_path / "t", stream, Counts())
    assert list(tmp_path.iterdir()) == []
    write_part(tmp_path / "none", [], Counts(read=3))
    with pytest.raises(UserError, match="E-DATA-EMPTY"):
        TokenStore([tmp_path / "none"])


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Three files of conversations, cut into parts of 400 bytes."""
    monkeypatch.setattr(store_file, "PART_BYTES", 400)
    files = []
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        rows = [json.dumps({"instruction": f"hello {number} {i}", "output": "你好" * (i % 4 + 1)}) for i in range(30)]
        path.write_text("\n\n".join(rows) + "\n")
        files.append(path)
    return files


def made(folder, files, encoding=CHAT, **how):
    given = sources(files)
    return build(folder, encoding, given, [storage.sha256_file(path) for path in given.paths], **how)


def test_parts_give_the_records_of_the_whole_in_order(tmp_path, many, monkeypatch):
    store, counts = made(tmp_path / "parts", many)
    assert len(list((tmp_path / "parts").iterdir())) > 9
    monkeypatch.setattr(store_file, "PART_BYTES", 1 << 20)
    plain, expected = made(tmp_path / "whole", many)
    assert len(list((tmp_path / "whole").iterdir())) == 3
    assert len(store) == len(plain) == 90 and all(same(store[i], plain[i]) for i in range(90))
    assert (
        list(store.places())
        == [store.where(i) for i in range(90)]
        == [f"{f}:{n}" for f in many for n in range(1, 60, 2)]
    )
    assert counts == expected and (counts.read, counts.kept, counts.blank) == (90, 90, 87)
    assert counts.forms == {"instruction and output": 90}


def test_processes_give_the_same_parts(tmp_path, many, monkeypatch):
    monkeypatch.setattr(store_file, "ALONE_BYTES", 0)
    told = []
    store, counts = made(tmp_path / "two", many, workers=2, progress=lambda done, parts: told.append((done, parts)))
    plain, expected = made(tmp_path / "one", many)
    assert counts == expected and all(same(store[i], plain[i]) for i in range(90))
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == len(told) - 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_record_is_named_whoever_reads_it(tmp_path, many, monkeypatch, workers):
    monkeypatch.setattr(store_file, "ALONE_BYTES", 0)
    for path, line in ((many[2], 1), (many[1], 41)):
        lines = path.read_text().split("\n")
        lines[line - 1] = '{"instruction": 5, "output": "x"}'
        path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"E-DATA-TYPE.*1.jsonl:41: .*instruction"):
        made(tmp_path / "t", many, workers=workers)


def test_what_is_there_is_used_again(tmp_path, many, monkeypatch):
    folder = tmp_path / "t"
    made(folder, many)
    before = {p.name: p.stat().st_ino for p in folder.iterdir()}
    streamed = []
    plain = Encoding.stream
    monkeypatch.setattr(Encoding, "stream", lambda self, span, *rest: streamed.append(span) or plain(self, span, *rest))
    assert made(folder, many)[1].kept == 90 and not streamed
    victim = sorted(folder.iterdir())[4]
    store_file._whole.clear()
    (victim / "ids.bin").write_bytes(b"\0" * (victim / "ids.bin").stat().st_size)
    made(folder, many)
    assert len(streamed) == 1  # the damaged part alone
    many[0].write_text(many[0].read_text() + '{"instruction": "more", "output": "x"}\n')
    assert made(folder, many)[1].kept == 91
    assert {s.path for s in streamed[1:]} == {many[0]}
    assert {f"{path}" for path in many[1:]}.isdisjoint(str(span.path) for span in streamed[1:])
    made(folder, many[1:])
    assert {p.name for p in folder.iterdir()} < before.keys()  # what nothing needs is gone


def test_a_build_that_was_stopped_goes_on(tmp_path, many, monkeypatch):
    plain = Encoding.stream
    streamed = []

    def stopping(self, span, *rest):
        streamed.append(span)
        if len(streamed) == 5:
            raise KeyboardInterrupt
        return plain(self, span, *rest)

    monkeypatch.setattr(Encoding, "stream", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "t", many)
    assert len([p for p in (tmp_path / "t").iterdir() if not p.name.startswith(".")]) == 4
    made(tmp_path / "t", many)
    assert len({(s.path, s.start) for s in streamed}) == len(streamed) - 1


def test_over_long_records_are_counted_over_all_parts(tmp_path, many):
    short = Encoding(TOKENIZER.text, TOKENIZER.eos_ids, TEMPLATES["instruction"], max_tokens=14)
    with pytest.raises(UserError, match=r"E-DATA-LONG. .*0.jsonl:\d+: \d+ of 90 records.*limit is 14") as caught:
        made(tmp_path / "t", many, short)
    with pytest.raises(UserError) as again:  # from the parts that are there
        made(tmp_path / "t", many, short)
    assert str(again.value) == str(caught.value)


def test_txt_is_cut_between_paragraphs(tmp_path, monkeypatch):
    monkeypatch.setattr(store_file, "PART_BYTES", 300)
    path = tmp_path / "t.txt"
    path.write_text("".join(f"hello {i}\nworld\n\n" + "\n" * (i % 3) for i in range(60)), newline="")
    store, counts = made(tmp_path / "a", [path], DOCUMENTS)
    zipped = tmp_path / "z.txt.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    plain, expected = made(tmp_path / "b", [zipped], DOCUMENTS)
    assert len(spans(path, 300)) > 3 and len(spans(zipped, 300)) == 1
    assert counts.kept == expected.kept == len(store) == 60
    assert all(store[i].ids.tolist() == plain[i].ids.tolist() for i in range(60))
    assert [w.rpartition(":")[2] for w in store.places()] == [w.rpartition(":")[2] for w in plain.places()]


def test_the_names_of_fields_are_part_of_the_key(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"question": "hello", "answer": "x"}\n')
    with pytest.raises(UserError, match=r'E-DATA-MISSING.*rename = \["question=instruction", "answer=output"\]'):
        made(tmp_path / "t", [path])
    given = sources([path], rename={"question": "instruction", "answer": "output"})
    store, _ = build(tmp_path / "t", CHAT, given, ["k"])
    assert TOKENIZER.decode(store[0].ids, keep_control=True) == "hello<|sep|><|sep|>x<|endoftext|>"
    assert CHAT.key(given) != CHAT.key(sources([path]))


def test_workers_end_with_their_parent(tmp_path, many, monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 0)
    finished = []
    monkeypatch.setattr(os, "_exit", lambda code: finished.append(code) or (_ for _ in ()).throw(SystemExit))
    monkeypatch.setattr(store_file.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        store_file.threading, "Thread", lambda target, daemon: type("T", (), {"start": staticmethod(target)})
    )
    with pytest.raises(SystemExit):
        store_file._begin_worker(123, CHAT)
    assert finished == [1]


def test_open_files_do_not_grow_with_the_number_of_parts(tmp_path):
    """A corpus of many small files: everything is read with a few more files than are open already."""
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"Book {i}.\n\nIts end.\n")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 16, before[1]))
    try:
        store, counts = made(tmp_path / "t", [folder / "*.txt"], DOCUMENTS)
        texts = {TOKENIZER.decode(store[i].ids.tolist()) for i in range(len(store))}
        places = list(store.places())
        again, _ = made(tmp_path / "t", [folder / "*.txt"], DOCUMENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(store) == len(again) == counts.kept == 240 and len(texts) == 121
    assert places == [store.where(i) for i in range(240)]


def test_records_with_nothing_to_learn_are_counted(tmp_path):
    """The last answer alone is wanted, and it is marked; the answers before it are context."""
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    last = [{"role": "assistant", "content": "x", "weight": weight} for weight in (0, 1)]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"messages": [*turns, end]}) + "\n" for end in last))
    tokenizer = bpe.learn(["user assistant x"] * 5, 320).with_control("<|im_start|>").with_control("<|im_end|>")
    chat = Encoding(tokenizer.text, tokenizer.eos_ids, TEMPLATES["chatml"], last_only=True)
    store, counts = made(tmp_path / "t", [path], chat)
    assert (len(store), counts.excluded, counts.kept) == (1, 1, 2)
    every, _ = made(tmp_path / "u", [path], replace(chat, last_only=False, train_on_prompt=True))
    unlearned = [i for i, trained in zip(every[0].ids.tolist(), every[0].train, strict=True) if not trained]
    assert tokenizer.decode(unlearned, keep_control=True) == "x<|im_end|>" and every[1].train.all()
    path.write_text(json.dumps({"messages": [*turns, last[0]]}) + "\n")
    with pytest.raises(UserError, match=r"E-DATA-EMPTY.*all 1 records are marked"):
        made(tmp_path / "v", [path], chat)
