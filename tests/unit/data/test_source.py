"""Every bad file has its error with the line, and nothing legal is refused."""

import contextlib
import datetime
import decimal
import gzip
import io
import json
import math
import os
import pickle
import sqlite3
import sys
import tarfile
import time
import uuid
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad.data import rows as rows_module
from tetrad.data import source
from tetrad.data.parquet import plain
from tetrad.data.records import read_documents
from tetrad.data.rows import paragraphs, parse, rows
from tetrad.data.source import Counts, Span, files, lines, sources, spans
from tetrad.errors import UserError

GOOD = '{"a": 1}\n{"a": 2}\n'


def write(tmp_path, content, name="f.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    counts = Counts()
    return [(row.where.rpartition(":")[2], row.read()) for row in rows(path, counts)], counts


BAD = {
    "empty": (b"", "E-DATA-EMPTY", "no rows"),
    "blank": (b"\n\n  \n", "E-DATA-EMPTY", "3 blank lines"),
    "utf-16": (GOOD.encode("utf-16"), "E-DATA-ENCODING", "UTF-16"),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), "E-DATA-ENCODING", "UTF-16"),
    "bad byte": (b'{"a": 1}\n\n{"a": "x\xff\xfe"}\n', "E-DATA-ENCODING", r":3: .*0xff at byte 9"),
    "CR only": (b'{"a": 1}\r{"a": 2}\r', "E-DATA-SYNTAX", ":1: 1 line with 2 objects; CR line ends"),
    "cut off": (GOOD + '{"a": "hal', "E-DATA-SYNTAX", ":3: file ends inside a row.*copy complete"),
    "cut after a comma": (GOOD + '{"a": 1,', "E-DATA-SYNTAX", ":3: file ends inside a row"),
    "single quotes": ("{'a': 1}\n", "E-DATA-SYNTAX", ":1: .*double quotes"),
    "comment": (GOOD + "// hi\n", "E-DATA-SYNTAX", ":3: JSON has no comments.*column 1$"),
    "comment after": ('{"a": 1} // hi\n', "E-DATA-SYNTAX", ":1: JSON has no comments.*column 10$"),
    "pretty": (json.dumps({"a": 1, "b": 2}, indent=1) + "\n", "E-DATA-SYNTAX", ":1: .*one row per line"),
    "array": (json.dumps([{"a": 1}]) + "\n", "E-DATA-SYNTAX", r":1: a JSON array.*\.json"),
    "two objects": ('{"a": 1} {"a": 2}\n', "E-DATA-SYNTAX", ":1: 1 line with 2 values.*column 10"),
    "trailing comma": ('{"a": 1,}\n', "E-DATA-SYNTAX", ":1: .*delete the comma"),
    "no JSON": ("hello\n", "E-DATA-SYNTAX", ":1: not JSON"),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}\n', "E-DATA-DUPKEY", ':1: .*"c"'),
    "NaN": ('{"a": NaN}\n', "E-DATA-NUMBER", ":1: NaN"),
    "infinity": ('{"a": -Infinity}\n', "E-DATA-NUMBER", ":1: -Infinity"),
    "digits": ('{"a": ' + "9" * 5000 + "}\n", "E-DATA-NUMBER", ":1: .*digits"),
    "surrogate": ('{"a": "\\ud800"}\n', "E-DATA-ENCODING", ":1: .*surrogate"),
    "NUL": (b'{"a": "a\x00b"}\n', "E-DATA-SYNTAX", ":1: .*escape"),
    "tab": (b'{"a": "a\tb"}\n', "E-DATA-SYNTAX", ":1: .*escape"),
    "deep": ('{"a": ' + "[" * 200_000 + "\n", "E-DATA-SYNTAX", ":1: .*deep"),
    "gzip": (gzip.compress(GOOD.encode()), "E-DATA-FORMAT", "gzip"),
    "png": (b"\x89PNG\r\n\x1a\n", "E-DATA-FORMAT", "PNG"),
    "parquet": (b"PAR1....", "E-DATA-FORMAT", "parquet"),
    "html": ("<!DOCTYPE html>\n<html>\n", "E-DATA-FORMAT", "HTML"),
    "csv": ("prompt,completion\nx,y\n", "E-DATA-FORMAT", "CSV"),
    "quoted csv": ('"prompt","completion"\n"x","y"\n', "E-DATA-FORMAT", "CSV"),
}


@pytest.mark.parametrize(("content", "code", "words"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, content, code, words):
    with pytest.raises(UserError, match=words) as caught:
        read(write(tmp_path, content))
    assert caught.value.code == code
    assert "f.jsonl" in caught.value.where


GOOD_FILES = {
    "CRLF": (b'{"a": "x"}\r\n{"a": "y"}\r\n', [("1", {"a": "x"}), ("2", {"a": "y"})], 0),
    "blank line": (b'{"a": 1}\n\n \n{"a": 2}', [("1", {"a": 1}), ("4", {"a": 2})], 2),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}\n', [("1", {"a": 1})], 0),
    "odd line ends in text": ('{"a": "x\u2028\u0085y"}\n', [("1", {"a": "x\u2028\u0085y"})], 0),
    "escaped control": ('{"a": "\\u000b\\u0000"}\n', [("1", {"a": "\x0b\0"})], 0),
    "escaped pair": ('{"a": "\\ud83e\\udd8a"}\n', [("1", {"a": "🦊"})], 0),
    "other values": ('"x,y"\nnull\n', [("1", "x,y"), ("2", None)], 0),
    "large id": ('{"id": 1180591620717411303424}\n', [("1", {"id": 2**70})], 0),
}


@pytest.mark.parametrize(("content", "expected", "blank"), GOOD_FILES.values(), ids=GOOD_FILES)
def test_good_files(tmp_path, content, expected, blank):
    found, counts = read(write(tmp_path, content))
    assert found == expected
    assert (counts.read, counts.blank) == (len(expected), blank)


def test_long_lines(tmp_path, monkeypatch):
    text = "a" * (12 << 20)
    assert read(write(tmp_path, json.dumps({"a": text})))[0] == [("1", {"a": text})]
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 100)
    with pytest.raises(UserError, match=r"E-DATA-HUGE.*:2:"):
        read(write(tmp_path, GOOD[:9] + json.dumps({"a": "a" * 100})))


def test_json_arrays_and_objects(tmp_path):
    array = '\n[\n {"a": 1},\n\n {"a":\n  2}, {"a": 3}\n]\n'
    expected = [("3", {"a": 1}), ("5", {"a": 2}), ("6", {"a": 3})]
    assert read(write(tmp_path, array, "f.json"))[0] == expected
    assert read(write(tmp_path, '{"a":\n1}\n{"a": 2}', "f.json"))[0] == [("1", {"a": 1}), ("3", {"a": 2})]
    assert read(write(tmp_path, '[{"a": 1}]', "f.JSON"))[0] == [("1", {"a": 1})]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("[]", "E-DATA-EMPTY", "no rows"),
        (" \n", "E-DATA-EMPTY", "no rows"),
        ('[\n// first\n{"a": 1}]', "E-DATA-SYNTAX", ":2: JSON has no comments.*column 1$"),
        ('{\n "a": 1, // best\n "b": 2}', "E-DATA-SYNTAX", ":2: JSON has no comments.*column 10$"),
        ('[\n{"a": 1}, // best\n{"a": 2}]', "E-DATA-SYNTAX", ":2: JSON has no comments.*column 11$"),
        ('[{"a": 1}\n{"a": 2}]', "E-DATA-SYNTAX", ":2: .*Expecting ','"),
        ('[{"a": 1},\n]', "E-DATA-SYNTAX", "delete the comma"),
        ('[{"a": 1},\n{"a', "E-DATA-SYNTAX", ":2: file ends inside a row"),
        ('[{"a": 1}', "E-DATA-SYNTAX", "file ends inside a row"),
        ("[", "E-DATA-SYNTAX", "file ends inside a row"),
        ('[{"a": 1},', "E-DATA-SYNTAX", "file ends inside a row"),
        ('[{"a": 1}]\n[{"a": 2}]', "E-DATA-SYNTAX", "2 values"),
        ('[{"a": 1},\n{"b": 1, "b": 2}]', "E-DATA-DUPKEY", ":2: .*b"),
        ('[{"a": 1},\n{"b": "\\udfff"}]', "E-DATA-ENCODING", ":2: "),
        ('[{"a": 1},\n{"b": ' + "9" * 5000 + "}]", "E-DATA-NUMBER", ":2: "),
    ],
)
def test_bad_json(tmp_path, content, code, words):
    with pytest.raises(UserError, match=words) as caught:
        read(write(tmp_path, content, "f.json"))
    assert caught.value.code == code


def test_a_json_file_is_held_whole_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_JSON_BYTES", 10)
    with pytest.raises(UserError, match=r"E-DATA-HUGE.*jsonl"):
        read(write(tmp_path, "[" + GOOD, "f.json"))


def test_paragraphs(tmp_path):
    counts = Counts()
    path = write(tmp_path, "\nfirst\n  line\r\n\r\n \nsecond\u2028same\n\n\nthird", "f.txt")
    found = [(where.rpartition(":")[2], text) for where, text in paragraphs(path, counts)]
    assert found == [("2", "first\n  line"), ("6", "second\u2028same"), ("9", "third")]
    assert counts.read == 3
    assert [t for _, t in paragraphs(write(tmp_path, b"a\rb\r\rc\r", "f.txt"), counts)] == ["a\nb", "c"]
    with pytest.raises(UserError, match=r"E-DATA-EMPTY.*2 blank"):
        list(paragraphs(write(tmp_path, "\n \n", "f.txt"), counts))
    with pytest.raises(UserError, match=r"E-DATA-FORMAT.*gzip"):
        list(paragraphs(write(tmp_path, gzip.compress(b"x"), "f.txt"), counts))
    with pytest.raises(UserError, match=r"E-DATA-FORMAT.*txt"):
        read(path)


@pytest.mark.parametrize("name", ["f.parquet", "f.jsonl.gz", "f", "f.xlsx", "f.tar.gz"])
def test_other_kinds_are_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=r"E-DATA-FORMAT. \S*f\S*: this is"):
        read(write(tmp_path, GOOD, name))


def test_gzip(tmp_path):
    assert read(write(tmp_path, gzip.compress(GOOD.encode()), "f.jsonl.gz"))[0] == [("1", {"a": 1}), ("2", {"a": 2})]
    array = gzip.compress(b'[{"a": 1},\n{"a": 2}]')
    assert read(write(tmp_path, array, "f.json.gz"))[0] == [("1", {"a": 1}), ("2", {"a": 2})]
    whole = gzip.compress(os.urandom(9000).hex().encode() + b"\n" + GOOD.encode() * 900)
    for damaged in (whole[:-9], whole[:4000], whole[:3000] + b"\0" * 9 + whole[3009:]):
        with pytest.raises(UserError, match=r"E-DATA-(FORMAT|SYNTAX)"):
            read(write(tmp_path, damaged, "f.jsonl.gz"))


TABLE = 'Instruction,Output,score,choices\r\n"say ""hi"",\nthen go",x,4.5,\n\n你好,y,,"[{""rank"": 1}]"\n'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "separator"), [("f.csv", ","), ("f.tsv", "\t")])
def test_line_ends_of_a_table_are_one_thing(tmp_path, end, last, mark, name, separator):
    table = f'input{separator}output\n"a\nb"{separator}"c\n\nd"\n\ne{separator}"f\n"'.replace("\n", end)
    found, counts = read(write(tmp_path, mark + table + end * last, name))
    assert found == [("2", {"input": "a\nb", "output": "c\n\nd"}), ("7", {"input": "e", "output": "f\n"})]
    assert counts.blank == 1


def test_a_table_is_renamed_before_its_cells_are_read(tmp_path):
    """A cell is a number or JSON by the name that its column gets."""
    table = 'Rating,talk,score\n4.5,"[{""role"": ""user""}]",007\n'
    path = write(tmp_path, table, "f.csv")
    renamed = {"rating": "score", "talk": "messages", "score": "id"}
    (row,) = rows(path, Counts(), renamed)
    assert row.read() == {"Rating": 4.5, "talk": [{"role": "user"}], "score": "007"}
    (row,) = rows(path, Counts(), {"talk": "choices", "rating": "margin"})
    assert row.read() == {"Rating": 4.5, "talk": [{"role": "user"}], "score": 7.0}
    (row,) = rows(path, Counts())
    assert row.read() == {"Rating": "4.5", "talk": '[{"role": "user"}]', "score": 7.0}


def test_csv(tmp_path):
    found, counts = read(write(tmp_path, TABLE, "f.csv"))
    assert found == [
        ("2", {"Instruction": 'say "hi",\nthen go', "Output": "x", "score": 4.5, "choices": None}),
        ("5", {"Instruction": "你好", "Output": "y", "score": None, "choices": [{"rank": 1}]}),
    ]
    assert (counts.read, counts.blank) == (2, 1)
    tabs = "\ufeffprompt\tcompletion\na, b\t007\n"
    assert read(write(tmp_path, tabs, "f.tsv"))[0] == [("2", {"prompt": "a, b", "completion": "007"})]
    assert read(write(tmp_path, gzip.compress(tabs.encode()), "f.tsv.gz"))[1].read == 1
    odd = read(write(tmp_path, "score\n\x1e.5\n" + "9" * 40_000 + "x\n", "f.csv"))[0]
    assert odd[0] == ("2", {"score": 0.5}) and odd[1][1]["score"].startswith("99")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("a,b\n1,2,3\n", "E-DATA-SYNTAX", ":2: 3 cells.* 2 columns"),
        ("a;b\n1;2\n", "E-DATA-FORMAT", ":1: .*separated by ';'"),
        ("a,A\n1,2\n", "E-DATA-DUPKEY", ':1: the column "a"'),
        ('a,b\n1,"2\n', "E-DATA-SYNTAX", ":2: not a table: unexpected end"),
        ('a,b\n1,"2"x\n', "E-DATA-SYNTAX", ":2: not a table"),
        ("a,choices\n1,[\n", "E-DATA-SYNTAX", ":2: "),
        ("a,b\n", "E-DATA-EMPTY", "no rows"),
        (b"a,b\n1,\xff\n", "E-DATA-ENCODING", ":2: .*0xff"),
        ("<!DOCTYPE html>\n", "E-DATA-FORMAT", "HTML"),
    ],
)
def test_bad_csv(tmp_path, content, code, words):
    with pytest.raises(UserError, match=words) as caught:
        read(write(tmp_path, content, "f.csv"))
    assert caught.value.code == code


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a"}, {"text": None, "messages": [{"role": "user", "content": "你好"}]}, {"score": 1.5}]
    path = tmp_path / "f.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows, schema=arrow.schema(
        [("text", arrow.string()), ("score", arrow.float64()),
         ("messages", arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.string())])))]
    )), path)  # fmt: skip
    assert read(path)[0] == [
        ("1", {"text": "a", "score": None, "messages": None}),
        ("2", {"text": None, "score": None, "messages": [{"role": "user", "content": "你好"}]}),
        ("3", {"text": None, "score": 1.5, "messages": None}),
    ]
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:60] + b"\xff" * 40 + whole[100:], b"PAR1" + b"\0" * 40 + b"PAR1"):
        with pytest.raises(UserError, match="E-DATA-FORMAT"):
            read(write(tmp_path, damaged, "f.parquet"))


def test_parquet_without_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"E-DATA-FORMAT.*pip install pyarrow"):
        read(write(tmp_path, b"PAR1....", "f.parquet"))


def test_values_that_json_and_python_cannot_hold(tmp_path):
    """Never an error in a field that nobody reads, and text or null where the row is written."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fine, large = 1234567890123456789, 2**53
    columns = {
        "ns": (arrow.array([fine, None], arrow.timestamp("ns")), "2009-02-13T23:31:30.123456789"),
        "far": (arrow.array([large, None], arrow.timestamp("s")), "<value out of range"),
        "inner": (arrow.array([{"a": large}, None], arrow.struct([("a", arrow.timestamp("s"))])), "<struct"),
        "zone": (arrow.array([fine, None], arrow.timestamp("us", tz="Mars/Olympus")), "<timestamp[us, tz=Mars"),
        "day": (arrow.array([datetime.date(2025, 1, 2), None]), "2025-01-02"),
        "span": (arrow.array([datetime.timedelta(1), None]), "1 day, 0:00:00"),
        "money": (arrow.array([decimal.Decimal("1.10"), None]), "1.10"),
        "raw": (arrow.array([b"\0\xff", None]), "\0\\xff"),
        "nan": (arrow.array([math.nan, None]), None),
        "list": (arrow.array([[math.inf, 1.0], None]), [None, 1.0]),
        "map": (arrow.array([[("k", b"v")], None], arrow.map_(arrow.string(), arrow.binary())), [["k", "v"]]),
    }
    path = tmp_path / "f.parquet"
    parquet.write_table(
        arrow.table({"text": ["a", "b"]} | {name: column for name, (column, _) in columns.items()}), path
    )
    assert [d.text for d in read_documents([path])] == ["a", "b"]
    first, second = (plain(row.read()) for row in rows(path, Counts()))
    json.dumps([first, second], allow_nan=False)
    for name, (_, text) in columns.items():
        assert first[name] == text or str(first[name]).startswith(str(text)), name
        assert second[name] is None
    assert plain([uuid.UUID(int=1), "\ud800", 2**70, True]) == [str(uuid.UUID(int=1)), "\\ud800", 2**70, True]


def packed(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        item = tarfile.TarInfo(name)
        item.size = len(content)
        archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


def zipped(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def exported(write_file):
    import pyarrow

    buffer = io.BytesIO()
    write_file(pyarrow.table({"a": [1]}), buffer)
    return buffer.getvalue()


def database(folder):
    path = folder / "x.db"
    with contextlib.closing(sqlite3.connect(path)) as opened:
        opened.execute("create table t (a)")
        opened.commit()
    return path.read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
OTHERS = {
    "lfs": (lambda folder: LFS, "git-lfs.*git lfs pull"),
    "page": (lambda folder: b"\n <!DOCTYPE HTML>\n<html></html>", "HTML.*download"),
    "zip": (lambda folder: zipped("a.jsonl"), "zip archive.*unpack"),
    "tar": (lambda folder: packed("a.jsonl", GOOD.encode()), "tar archive.*unpack"),
    "xlsx": (lambda folder: zipped("[Content_Types].xml", "xl/workbook.xml"), "Excel.*CSV UTF-8"),
    "xls": (lambda folder: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "Excel.*CSV UTF-8"),
    "sqlite": (database, "SQLite.*jsonl"),
    "pickle": (lambda folder: pickle.dumps([{"prompt": "p"}]), "pickle.*never read"),
    "old pickle": (lambda folder: pickle.dumps([{"prompt": "p"}], 2), "pickle.*never read"),
    "jpeg": (lambda folder: b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG"),
    "pdf": (lambda folder: b"%PDF-1.7\n", "PDF"),
    "safetensors": (lambda folder: b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"}}', "safetensors"),
    "gguf": (lambda folder: b"GGUF\3\0\0\0", "gguf"),
    "numpy": (lambda folder: b"\x93NUMPY\1\0", "numpy"),
    "utf-16": (lambda folder: GOOD.encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
}


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.parquet", "f.txt", "f.jsonl.gz"])
@pytest.mark.parametrize(("make", "words"), OTHERS.values(), ids=OTHERS)
def test_what_is_plainly_something_else(tmp_path, make, words, name):
    """By its opening, whatever it is called; text is free to be a page."""
    path = write(tmp_path, make(tmp_path), name)
    if name == "f.txt" and words.startswith("HTML"):
        return
    if name == "f.jsonl.gz" and words.startswith(("HTML", "UTF-16")):
        words = "no gzip file.*without .gz"
    with pytest.raises(UserError, match=words) as caught:
        list(read_documents([path]))
    assert caught.value.code in ("E-DATA-FORMAT", "E-DATA-ENCODING") and name in caught.value.where


def test_arrow_files_and_swapped_endings(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import feather, parquet

    def stream(table, file):
        with pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)

    for content, words in ((exported(feather.write_feather), "Arrow"), (exported(stream), "stream of Arrow")):
        with pytest.raises(UserError, match=rf"E-DATA-FORMAT.*{words}.*parquet"):
            read(write(tmp_path, content))
    with pytest.raises(UserError, match=r"this is parquet.*\.parquet"):
        read(write(tmp_path, exported(parquet.write_table)))
    with pytest.raises(UserError, match=r"not parquet.*\.jsonl"):
        read(write(tmp_path, GOOD, "f.parquet"))
    with pytest.raises(UserError, match=r"JSON.*\.jsonl"):
        read(write(tmp_path, GOOD, "f.csv"))


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        ("请把这句话翻译成英文，谢谢。", "gb18030", "iconv -f GB18030 -t UTF-8"),
        ("問題與答案", "gbk", "iconv -f GB18030 -t UTF-8"),
        ("café crème à la carte", "latin-1", "iconv -f WINDOWS-1252 -t UTF-8"),
        ("“quoted” text – and more of it", "cp1252", "iconv -f WINDOWS-1252 -t UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.txt"])
def test_the_encoding_that_a_text_probably_has(tmp_path, text, encoding, words, name):
    first = b"" if name == "f.txt" else b"text\n" if name == "f.csv" else b'{"text": "a"}\n'
    path = write(tmp_path, b"\n"[: name == "f.txt"] + first + text.encode(encoding), name)
    with pytest.raises(UserError, match=rf"E-DATA-ENCODING.*:2: not UTF-8.*{words} \S*{name} >"):
        list(read_documents([path]))


def test_weights_and_places(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        write(tmp_path, GOOD, name)
    given = sources([str(tmp_path / "a*"), str(tmp_path / "b.jsonl")], (2, 0.5))
    assert [p.name for p in given.paths] == ["a1.jsonl", "a2.jsonl", "b.jsonl"] and given.entry == (0, 0, 1)
    places = [f"{path}:{line}" for path in given.paths for line in (1, 2)]
    assert given.mixture(places) == ((4, 2), (2, 0.5))
    assert sources(given.paths).mixture(places) == ((6, 1.0),)


@given(st.lists(st.sampled_from([b"{}", b"", b"  ", b'"\xe4\xbd\xa0"', b"x" * 30]), max_size=30), st.integers(1, 60))
@pytest.mark.parametrize("name", ["f.txt", "f.jsonl"])
def test_spans_give_the_lines_of_the_whole(tmp_path_factory, name, parts, size):
    path = tmp_path_factory.mktemp("spans") / name
    path.write_bytes(b"\n".join(parts))
    found = spans(path, size)
    assert [line for span in found for line in lines(span)] == list(lines(Span(path)))
    if name == "f.txt" and path.read_bytes().strip():
        whole, cut = Counts(), Counts()
        assert [p for s in found for p in paragraphs(s, cut)] == list(paragraphs(path, whole))


def test_paths(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    started = time.monotonic()
    for name in (".", "fifo.jsonl", "link.jsonl", "missing.jsonl", "x" * 300, "nul\0.jsonl", "*.none"):
        with pytest.raises(UserError) as caught:
            files([f"{tmp_path}/{name}"])
        assert caught.value.code == "E-DATA-PATH", name
    assert time.monotonic() - started < 1


def test_names_are_never_options_or_patterns_where_the_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-rf.jsonl", "~.jsonl", "a[1].jsonl", "new\nline.jsonl", "🦊.jsonl"):
        write(tmp_path, GOOD, name)
        assert [str(p) for p in files([name])] == [name]
        assert read(files([name])[0])[1].read == 2


@pytest.mark.parametrize("folder", ["exp[1]", "a*b", "what?", "[!x]", "plain"])
def test_a_folder_before_a_glob_is_taken_literally(tmp_path, monkeypatch, folder):
    """Siblings that the folder's name would match as a pattern are never read."""
    for name in (folder, "exp1", "aXb", "whatX", "y"):
        (tmp_path / name / "data").mkdir(parents=True)
        write(tmp_path / name / "data", GOOD, "s.jsonl")
        write(tmp_path / name / "data", GOOD, "t[1].jsonl")
    monkeypatch.chdir(tmp_path)
    for start in (str(tmp_path / folder), folder, f"./{folder}", f"../{tmp_path.name}/{folder}"):
        assert files([f"{start}/data/s*.jsonl"]) == [Path(f"{start}/data/s.jsonl")]
        assert files([f"{start}/**/t?1?.jsonl"]) == [Path(f"{start}/data/t[1].jsonl")]
        assert files([f"{start}/data/t[1].jsonl"]) == [Path(f"{start}/data/t[1].jsonl")]
        for missing in ("none.jsonl", "none*.jsonl"):
            with pytest.raises(UserError, match="E-DATA-PATH"):
                files([f"{start}/data/{missing}"])


@pytest.mark.parametrize("name", ["数据".encode("gb18030"), "données".encode("latin-1"), b"\xff\xfe"])
def test_a_name_in_other_bytes_is_a_name(tmp_path, name):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b".jsonl")
    with open(path, "w") as file:
        file.write(GOOD)
    for pattern in (path, tmp_path / "*.jsonl", tmp_path / "**/*"):
        assert files([pattern]) == [Path(path)]


def test_globs_are_sorted_and_a_file_counts_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path, GOOD, name)
    (tmp_path / "d.jsonl").mkdir()
    assert [p.name for p in files([tmp_path / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "again.txt").symlink_to(tmp_path / "c.txt")
    for twice in (["a.jsonl", "*.jsonl"], ["c.txt", "again.txt"]):
        with pytest.raises(UserError, match="E-DATA-OVERLAP"):
            files([tmp_path / name for name in twice])


def test_parse_is_strict():
    assert parse('{"a": [1, "x"]}', "f:1") == {"a": [1, "x"]}
    with pytest.raises(UserError, match=r"E-DATA-DUPKEY. f:1: "):
        parse('{"a": 1, "a": 1}', "f:1")
