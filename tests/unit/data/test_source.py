"""Every bad file has its error with the line, and nothing legal is refused."""

import gzip
import json
import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad.data import rows as rows_module
from tetrad.data import source
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


def test_csv(tmp_path):
    found, counts = read(write(tmp_path, TABLE, "f.csv"))
    assert found == [
        ("2", {"Instruction": 'say "hi",\nthen go', "Output": "x", "score": 4.5}),
        ("5", {"Instruction": "你好", "Output": "y", "choices": [{"rank": 1}]}),
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
        ("1", {"text": "a"}),
        ("2", {"messages": [{"role": "user", "content": "你好"}]}),
        ("3", {"score": 1.5}),
    ]
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:60] + b"\xff" * 40 + whole[100:], b"PAR1" + b"\0" * 40 + b"PAR1"):
        with pytest.raises(UserError, match="E-DATA-FORMAT"):
            read(write(tmp_path, damaged, "f.parquet"))


def test_parquet_without_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"E-DATA-FORMAT.*tetrad\[parquet\]"):
        read(write(tmp_path, b"PAR1....", "f.parquet"))


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
