"""The same rows in any container give the same records, or the same error."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrad.data.records import read_conversations, read_documents, read_preferences, read_prompts
from tetrad.errors import UserError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=6)
WORDS = st.one_of(st.none(), TEXT, st.sampled_from([" ", "a", "b"]))


def fixed(fields):
    """Objects with these fields in this order, as a column's type has them."""
    return st.fixed_dictionaries(fields).map(lambda row: {name: row[name] for name in fields})


TURN = fixed(
    {
        "role": st.sampled_from([None, "user", "assistant"]),
        "content": WORDS,
        "from": st.sampled_from([None, "human", "gpt"]),
        "value": WORDS,
        "weight": st.sampled_from([None, 0, 1]),
    }
)
ANSWER = fixed({"text": WORDS, "rank": st.sampled_from([None, 1, 2]), "votes": st.sampled_from([None, 1, 5])})
ROW = fixed(
    {
        "id": st.just("1"),  # a table's row without any cell is a blank line
        "instruction": WORDS,
        "Input": WORDS,
        "output": WORDS,
        "prompt": WORDS,
        "text": WORDS,
        "messages": st.one_of(st.none(), st.lists(TURN, min_size=1, max_size=3)),
        "choices": st.one_of(st.none(), st.lists(ANSWER, min_size=1, max_size=3)),
        "score": st.sampled_from([None, 1.0, 2.5]),
    }
)
READERS = [read_documents, read_conversations, read_prompts, lambda paths: read_preferences(paths, (1, 5))]


def as_lines(path, rows):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def as_windows_lines(path, rows):
    path.write_bytes("".join(json.dumps(row) + "\r\n" for row in rows).encode("utf-8-sig"))


def as_array(path, rows):
    path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=None).replace("}, {", "},\n{").encode())


def as_table(path, rows):
    """Cells of lists are JSON; what is null is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, quoting=csv.QUOTE_ALL)
        out.writerow(rows[0])
        for row in rows:
            out.writerow([json.dumps(v) if isinstance(v, list) else "" if v is None else v for v in row.values()])


def as_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    turn = pyarrow.struct([*((name, text) for name in ("role", "content", "from", "value")), ("weight", number)])
    answer = pyarrow.struct([("text", text), ("rank", number), ("votes", number)])
    kinds = {"messages": pyarrow.list_(turn), "choices": pyarrow.list_(answer), "score": pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in rows[0]])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


CONTAINERS = {
    "a.jsonl": as_lines, "b.jsonl": as_windows_lines, "c.json": as_array, "d.csv": as_table, "e.parquet": as_parquet
}  # fmt: skip


def outcome(reader, path):
    """What the records say, or the error's code and words."""
    try:
        return [says(record) for record in reader([path])]
    except UserError as error:
        return error.code, error.what


def says(record):
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "where"}
    return fields | ({"prompt": record.prompt.turns} if "prompt" in fields else {})


@pytest.mark.parametrize("reader", READERS, ids=["documents", "conversations", "prompts", "preferences"])
@given(rows=st.lists(ROW, min_size=1, max_size=2))
def test_rows_are_the_same_in_every_container(tmp_path_factory, reader, rows):
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("same")
    outcomes = {}
    for name, write in CONTAINERS.items():
        write(folder / name, rows)
        outcomes[name] = outcome(reader, folder / name)
    for name, other in outcomes.items():
        assert other == outcomes["a.jsonl"], name
