"""Readers under mutated input: whatever comes in, a value or a UserError comes out, and soon.

    python tests/faults/fuzz.py --count 300000 --seed 0 --target recipe

A target is made from a folder for its files: it gives valid inputs to begin with, and a function that reads one.
Inputs are mutated by flipped bytes, cuts, splices of two inputs, repeats, and words of the format in other places.
Another exception, or more than a second for one input, is a finding; its input is printed as Python writes it.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from tetrad import storage
from tetrad.data.records import conversations_of, documents_of, preferences_of, prompts_of
from tetrad.data.source import Counts, sources
from tetrad.datacheck.reading import sniff
from tetrad.errors import UserError
from tetrad.model.headers import read_header
from tetrad.pipeline.recipe import read

SLOW_SECONDS = 1.0
WORDS = {
    "toml": [
        *(
            "=",
            "[",
            "]",
            "[[",
            "]]",
            "{",
            "}",
            ",",
            ".",
            "#",
            '"',
            "'",
            '"""',
            "'''",
            "\n",
            "\r",
            "\t",
            "\0",
            "\\",
            "-",
        ),
        *("inf", "-inf", "nan", "true", "1e400", "-1e400", "1e-400", "0x" + "f" * 40, "9" * 400, "9" * 5000, "1_0"),
        *("1979-05-27T07:32:00Z", "25:61:61", '"\\ud800"', '"\\U00110000"', '"\\u0000"', "[sft]", "[run]", "name"),
        *("lr = 1", "seed = -1", "a." * 40, "[" * 400, "{a=" * 400, "\u202e", "\U0001f600", "é", "sk-" + "a" * 20),
        *("from", "\ufeff", "0b2"),
    ],
    "json": [
        *("{", "}", "[", "]", ",", ":", '"', "\\", "null", "true", "NaN", "Infinity", "-Infinity", "1e400", "-1", "0"),
        *("9" * 400, "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * 400, '{"a":' * 400, "\0", "\ufeff", "../", "1.5"),
        *('"version"', '"files"', '"size"', '"sha256"', '"dtype"', '"shape"', '"data_offsets"', '"F32"', "/etc/passwd"),
        "9223372036854775808",
    ],
}


@dataclass(frozen=True)
class Target:
    """What is fuzzed. seeds: valid inputs. read: takes one input; a UserError is an answer. words: of its format."""

    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    words: str


def recipe(folder: Path) -> Target:
    """A recipe's file."""
    from tiny import RECIPE

    path = folder / "recipe.toml"

    def take(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    small = b'name = "a"\nseed = 1\n[ppo]\nprompts = ["p"]\nbatch_size = 10\nnum_minibatches = 5\n'
    dotted = b'sft.data = ["a", \'b\']\nsft.lr = 1e-3\nrun = { out = "x", keep = 3 }\n[model]\nfrom = """m"""\n'
    return Target([RECIPE.encode(), small, dotted], take, "toml")


def manifest(folder: Path) -> Target:
    """The manifest of a folder, and the verification of what it names; every second one has a true checksum."""
    place = folder / "model"
    meta = {"key": "k", "metrics": {"loss": 1.5}, "lineage": {"stage": "sft", "parents": {}, "data": {"sft.data": []}}}
    storage.write_folder(place, {"a.safetensors": b"abc", "state.json": b"{}"}, meta)
    path = place / storage.MANIFEST
    whole = path.read_bytes()

    def take(content: bytes) -> object:
        if sum(content) % 2:
            with suppress(ValueError, RecursionError, AttributeError):
                content = storage._render(json.loads(content))
        path.write_bytes(content)
        try:
            return storage.verify_folder(place)
        finally:
            path.write_bytes(whole)

    return Target([whole], take, "json")


def header(folder: Path) -> Target:
    """The header of a safetensors file. Its length follows the mutated text three times in four."""
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    text += b'"b":{"dtype":"BF16","shape":[3,1],"data_offsets":[8,14]},'
    text += b'"c":{"dtype":"I64","shape":[0],"data_offsets":[14,14]}}'
    path = folder / "x.safetensors"

    def take(content: bytes) -> object:
        length = len(content) if sum(content) % 4 else int.from_bytes(content[:9], "little") % 2**64
        path.write_bytes(length.to_bytes(8, "little") + content + bytes(14))
        found = read_header(path)
        with safe_open(path, "np") as theirs:  # the library reads whatever is accepted here
            assert set(theirs.keys()) == set(found)
        return found

    return Target([text], take, "json")


def _rows(folder: Path, name: str, seeds: Sequence[bytes], words: str = "json") -> Target:
    """A data file that every reader of records is given, bad rows set aside as `check` does."""
    path = folder / name

    def take(content: bytes) -> object:
        path.write_bytes(content)
        given, whole = sources([path]), False
        aside: list[str] = []
        for make in (conversations_of, preferences_of, prompts_of, documents_of):
            counts = Counts()
            with suppress(UserError):
                for _ in make(path, given, counts, lambda error, text: aside.append(f"{error} {text}")):
                    pass
                whole = whole or not counts.refused
            assert counts.read >= counts.kept + counts.refused
        what = sniff(path, given)
        if not whole:  # no reader takes all of it
            raise UserError("E-DATA-TYPE", what)
        return what

    return Target(seeds, take, words)


_SEEDS = [
    b'{"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["q", "a"]]}\n{"text": "d"}\n',
    b'{"messages": [{"role": "user", "content": "\xe4\xbd\xa0"}, {"role": "assistant", "content": "b"}]}\r\n\n',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
    b'{"input": "q", "choices": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2.5}], "annotator": "k"}\n',
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5}\n{"input": "q", "output": "a", "score": 4.5}\n',
]
_TABLES = [
    b'prompt,completion,score\n"a ""b"", c",d,1.5\ne,f,\n',
    b'input,choices\nq,"[{""text"": ""a"", ""rank"": 1}]"\n',
]


def jsonl(folder: Path) -> Target:
    """Records a line."""
    return _rows(folder, "f.jsonl", _SEEDS)


def json_array(folder: Path) -> Target:
    """Records in an array."""
    return _rows(folder, "f.json", [b"[" + b",\n".join(s.strip() for s in _SEEDS[1:4]) + b"]", *_SEEDS])


def csv_table(folder: Path) -> Target:
    """Records in a table."""
    return _rows(folder, "f.csv", _TABLES)


def txt(folder: Path) -> Target:
    """Paragraphs."""
    return _rows(folder, "f.txt", [b"one\ntwo\n\nthree\r\n \r\nfour", "一\n\n二\u2028三".encode()])


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipe": recipe,
    "manifest": manifest,
    "header": header,
    "jsonl": jsonl,
    "json": json_array,
    "csv": csv_table,
    "txt": txt,
}
"""What can be fuzzed, by name; each gets an empty folder."""


def mutations(target: Target, seed: int, count: int) -> Iterator[bytes]:
    """`count` inputs, the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        content = draw.choice(target.seeds)
        for _ in range(draw.choice((1, 1, 2, 3, 6))):
            content = _mutated(content, target, draw)
        yield content


def _mutated(content: bytes, target: Target, draw: random.Random) -> bytes:
    at, end = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
    word = draw.choice(WORDS[target.words]).encode()
    match draw.randrange(8):
        case 0:  # another byte
            return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        case 1:  # a flipped bit
            return content[:at] + bytes(b ^ 1 << draw.randrange(8) for b in content[at : at + 1]) + content[at + 1 :]
        case 2:  # cut, at the end or within
            return content[:at] if draw.random() < 0.3 else content[:at] + content[min(end, at + 20) :]
        case 3:  # the start of one and the end of another
            other = draw.choice(target.seeds)
            return content[:at] + other[draw.randrange(len(other)) :]
        case 4:  # a word of the format
            return content[:at] + word + content[at:]
        case 5:  # a word of the format in the place of another
            spans = [found.span() for found in re.finditer(rb"[\w.+-]+|\"[^\"\n]*\"|[^\w\s]", content)]
            start, stop = draw.choice(spans) if spans else (at, at)
            return content[:start] + word + content[stop:]
        case 6:  # a word in the place of a value
            spans = [found.span(1) for found in re.finditer(rb"[=:]\s*([^\n,}]*)", content)]
            start, stop = draw.choice(spans) if spans else (at, at)
            return content[:start] + word + content[stop:]
        case _:  # a part again
            return content[:end] + content[at : min(end, at + 200)] * draw.choice((1, 1, 2, 50)) + content[end:]


def findings(make: Callable[[Path], Target], seed: int, count: int) -> list[str]:
    """What went wrong, each with its input."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        target = make(Path(folder))
        for content in mutations(target, seed, count):
            began = time.perf_counter()
            try:
                target.read(content)
            except UserError:
                pass
            except Exception as error:  # exactly what is looked for
                found.append(f"{type(error).__name__}: {error!s:.100} from {content!r}")
            seconds = time.perf_counter() - began
            if seconds > SLOW_SECONDS:
                found.append(f"{seconds:.1f} s for {content!r}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Runs one target for long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    began = time.monotonic()
    found = findings(TARGETS[given.target], given.seed, given.count)
    print("\n".join(found[:20]))
    seconds = time.monotonic() - began
    print(f"{given.target}: {given.count} inputs, seed {given.seed}, {seconds:.0f} s, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
