"""Bad data files, and odd ones that are legal: as `tetrad check` sees them, and as a run meets them before it trains."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.bad_inputs import Case, world, write

ROW = '{"prompt": "p", "completion": "c"}\n'
GOOD = ROW * 3
RECIPE = '[tokenizer]\ntext = ["t.txt"]\nvocab_size = 300\n[pretrain]\ntext = ["t.txt"]\nsequence_length = 8\nbatch_tokens = 8\n'
SFT, PPO = '[sft]\ndata = ["f.jsonl"]\n', '[ppo]\nprompts = ["f.jsonl"]\nrewards = ["judge.py:x"]\ncritic = "actor"\n'
REWARD = '[reward]\ndata = ["f.jsonl"]\nscore_scale = [1, 5]\n'
Make = Callable[[Path], object]


def file(content: str | bytes, name: str = "f.jsonl") -> Make:
    return lambda folder: write(folder / name, content)


def line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def in_run(make: Make, stages: str) -> Make:
    """The same file in a recipe whose first stages would train for long."""

    def made(folder: Path) -> None:
        make(folder)
        write(folder / "t.txt", "some text to learn from\n\n" * 40)
        write(folder / "judge.py", "def x(samples):\n    return [0.0] * len(samples)\n")
        write(folder / "r.toml", RECIPE + stages)

    return made


def both(name: str, make: Make, code: str, place: str = "", stages: str = SFT, words: str = "") -> list[Case]:
    """A case for `check FILE` and one for `run`."""
    checked = Case(f"check {name}", make, words or "check f.jsonl", code, place)
    return [checked, Case(f"run {name}", in_run(make, stages), "run r.toml", code, place)]


def talk(*roles: str) -> str:
    return line(messages=[{"role": role, "content": "x"} for role in roles])


SYNTAX = [
    ("empty", b"", "E-DATA-EMPTY", "no rows"),
    ("blank lines", b"\n\n  \n", "E-DATA-EMPTY", "3 blank lines"),
    ("utf-16", GOOD.encode("utf-16"), "E-DATA-ENCODING", "UTF-16"),
    ("utf-16 bare", GOOD.encode("utf-16-be"), "E-DATA-ENCODING", "UTF-16"),
    ("bad byte", ROW.encode() * 2 + b'{"prompt": "\xff\xfe"}\n', "E-DATA-ENCODING", "f.jsonl:3: not UTF-8: byte 0xff at byte 13"),
    ("cr only", ROW.strip() + "\r" + ROW.strip() + "\r", "E-DATA-SYNTAX", "CR line ends"),
    ("cut off", GOOD + '{"prompt": "p", "compl', "E-DATA-SYNTAX", "f.jsonl:4: file ends inside a row"),
    ("single quotes", ROW + "{'prompt': 'p'}\n", "E-DATA-SYNTAX", "f.jsonl:2: "),
    ("comment", ROW + "// hi\n", "E-DATA-SYNTAX", "f.jsonl:2: JSON has no comments"),
    ("comment behind", ROW.strip() + " // hi\n", "E-DATA-SYNTAX", "f.jsonl:1: JSON has no comments"),
    ("pretty", json.dumps({"prompt": "p", "completion": "c"}, indent=1) + "\n", "E-DATA-SYNTAX", "f.jsonl:1: "),
    ("array in jsonl", json.dumps([{"prompt": "p", "completion": "c"}]) + "\n", "E-DATA-SYNTAX", "f.jsonl:1: a JSON array"),
    ("two objects", ROW.strip() + ROW, "E-DATA-SYNTAX", "f.jsonl:1: 1 line with 2 values"),
    ("nul", b'{"prompt": "a\x00b", "completion": "c"}\n', "E-DATA-SYNTAX", "f.jsonl:1: "),
    ("tab", '{"prompt": "a\tb", "completion": "c"}\n', "E-DATA-SYNTAX", "f.jsonl:1: "),
    ("deep", ROW + '{"prompt": ' + "[" * 100_000 + "\n", "E-DATA-SYNTAX", "f.jsonl:2: brackets nest too deeply"),
    ("surrogate", '{"prompt": "\\ud800", "completion": "c"}\n', "E-DATA-ENCODING", "f.jsonl:1: half of a surrogate"),
    ("nan", '{"prompt": "p", "completion": "c", "score": NaN}\n', "E-DATA-NUMBER", "f.jsonl:1: NaN"),
    ("many digits", '{"prompt": "p", "completion": "c", "id": ' + "9" * 5000 + "}\n", "E-DATA-NUMBER", "f.jsonl:1: "),
    ("twice", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "E-DATA-DUPKEY", 'f.jsonl:1: the key "prompt"'),
    ("twice in case", '{"prompt": "a", "Prompt": "b", "completion": "c"}\n', "E-DATA-DUPKEY", "f.jsonl:1: "),
    ("text row", ROW + '"hello"\n', "E-DATA-TYPE", "f.jsonl:2: a record must be an object"),
    ("null first", "null\n" + ROW, "E-DATA-TYPE", "f.jsonl:1: "),
    ("number row", "5\n" + ROW, "E-DATA-TYPE", "f.jsonl:1: "),
    ("null field", ROW + '{"prompt": null, "completion": "c"}\n', "E-DATA-NULL", 'f.jsonl:2: "prompt" is null'),
    ("list field", ROW + '{"prompt": ["p"], "completion": "c"}\n', "E-DATA-TYPE", 'f.jsonl:2: "prompt" must be text'),
    ("number field", ROW + '{"prompt": "p", "completion": 1}\n', "E-DATA-TYPE", "f.jsonl:2: "),
    ("other names", line(question="a", answer="b") * 2, "E-DATA-MISSING", 'rename = ["question=instruction", "answer=output"]'),
    ("empty answer", ROW + line(prompt="p", completion=""), "E-DATA-BLANK", 'f.jsonl:2: "completion" is empty'),
    ("empty prompt", ROW + line(prompt=" ", completion="c"), "E-DATA-BLANK", 'f.jsonl:2: "prompt" is empty'),
    ("two users", ROW + talk("user", "user", "assistant"), "E-DATA-CHAT", "f.jsonl:2: turn 2"),
    ("odd role", ROW + talk("usr", "assistant"), "E-DATA-CHAT", 'f.jsonl:2: turn 1: "usr"'),
    ("late system", ROW + talk("user", "system", "assistant"), "E-DATA-CHAT", "f.jsonl:2: turn 2"),
    ("no answer", ROW + talk("user"), "E-DATA-CHAT", "f.jsonl:2: turn 1"),
    ("gzip", gzip.compress(GOOD.encode()), "E-DATA-FORMAT", "this is gzip"),
    ("png", b"\x89PNG\r\n\x1a\n\0\0", "E-DATA-FORMAT", "PNG"),
    ("html", "<!DOCTYPE html>\n<html><body>404</body></html>\n", "E-DATA-FORMAT", "HTML"),
    ("csv in jsonl", "prompt,completion\np,c\n", "E-DATA-FORMAT", "CSV"),
    ("zip", b"PK\x03\x04" + bytes(64), "E-DATA-FORMAT", "zip archive"),
    ("parquet in jsonl", b"PAR1" + bytes(64), "E-DATA-FORMAT", "parquet"),
    ("git-lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "E-DATA-FORMAT", "git lfs pull"),
    ("pickle", b"\x80\x04\x95\x05\0\0\0\0\0\0\0]\x94.", "E-DATA-FORMAT", "a pickle of Python, which is never read"),
    ("sheet", b"\xd0\xcf\x11\xe0" + bytes(64), "E-DATA-FORMAT", "save as CSV UTF-8"),
    ("safetensors", b"\x40" + bytes(7) + b'{"a":{}}', "E-DATA-FORMAT", "a model file (safetensors or gguf)"),
    ("gb18030", ROW.encode() + '{"prompt": "你好，世界"}\n'.encode("gb18030"), "E-DATA-ENCODING", "iconv -f GB18030 -t UTF-8 f.jsonl >"),
    ("half a weight", ROW + line(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "weight": 0.5}]), "E-DATA-TYPE", 'f.jsonl:2: turn 2: "weight"'),
    ("tool turn", ROW + talk("user", "tool"), "E-DATA-CHAT", 'f.jsonl:2: turn 2: "tool": calls of tools'),
    ("all labels false", line(prompt="p", completion="c", label=False) * 2, "E-DATA-EMPTY", "f.jsonl: all 2 records are marked"),
    ("random bytes", b"\x01" + random.Random(0).randbytes(4000), "E-DATA-", ""),
]  # fmt: skip


def choices(*pairs: tuple[str, Any]) -> str:
    return line(input="q", choices=[{"text": text, "rank": rank} for text, rank in pairs])


FINE = choices(("a", 1), ("b", 2))
JUDGED = [
    ("two ranks", FINE + choices(("a", 1), ("b", 2), ("a", 3)), "E-DATA-RANK", "f.jsonl:2: the same answer"),
    ("one answer", FINE + choices(("a", 1)), "E-DATA-RANK", "f.jsonl:2: 1 answers"),
    ("rank as text", FINE + choices(("a", "1"), ("b", 2)), "E-DATA-TYPE", 'f.jsonl:2: "rank"'),
    ("huge rank", FINE + choices(("a", 2**70), ("b", 2)), "E-DATA-NUMBER", 'f.jsonl:2: "rank" is too large'),
    ("no text", FINE + line(input="q", choices=[{"rank": 1}, {"text": "b", "rank": 2}]), "E-DATA-MISSING", "f.jsonl:2: "),
    ("equal pair", FINE + line(prompt="q", chosen="a", rejected="a"), "E-DATA-RANK", "f.jsonl:2: "),
    ("margin", FINE + line(prompt="q", chosen="a", rejected="b", margin=-1), "E-DATA-NUMBER", "f.jsonl:2: "),
    ("score as text", FINE + line(input="q", output="a", score="4"), "E-DATA-TYPE", 'f.jsonl:2: "score"'),
    ("infinite score", FINE + '{"input": "q", "output": "a", "score": 1e999}\n', "E-DATA-NUMBER", "f.jsonl:2: "),
    ("no prompt", FINE + line(choices=[{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]), "E-DATA-MISSING", "f.jsonl:2: "),
]  # fmt: skip


def directory(folder: Path) -> None:
    (folder / "f.jsonl").mkdir()


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "f.jsonl")


def dangling(folder: Path) -> None:
    (folder / "f.jsonl").symlink_to(folder / "nowhere")


def huge(folder: Path) -> None:
    """A line of 1 GiB, most of it a hole in the file."""
    with write(folder / "f.jsonl", '{"prompt": "').open("r+b") as opened:
        opened.truncate(1 << 30)


def from_run(text: str) -> Make:
    """Records for a model that is there: the pre-trained one of a tiny run."""

    def made(folder: Path) -> None:
        world(folder)
        write(folder / "f.jsonl", text)
        write(folder / "r.toml", '[model]\nfrom = "runs/tiny/pretrain"\n[sft]\ndata = ["f.jsonl"]\nmax_tokens = 30\n')

    return made


def twice(folder: Path) -> None:
    write(folder / "f.jsonl", GOOD)
    (folder / "g.jsonl").symlink_to("f.jsonl")


def validation(folder: Path) -> None:
    write(folder / "f.jsonl", GOOD + line(prompt="other", completion="c"))
    write(folder / "h.jsonl", line(prompt="new", completion="c") + ROW)


LONG = line(prompt="x" * 100, completion="y" * 100)
OVERLAP = '[sft]\ndata = ["f.jsonl"]\nvalidation = ["h.jsonl"]\n'
LEGAL = [  # what is printed shows the text that was read
    ("crlf", ROW.replace("\n", "\r\n") * 2, "p<|sep|><|sep|>⟦c<|endoftext|>⟧"),
    ("blank in the middle", ROW + "\n" + ROW, "f.jsonl  2     2     0        1"),
    ("byte order mark", "\ufeff" + GOOD, "f.jsonl  3     3     0"),
    ("no last newline", GOOD.strip(), "f.jsonl  3     3     0"),
    ("odd line ends", line(prompt="p", completion="a\u2028b\u0085c\u000bd"), "a\u2028b\u0085c\u000bd<|endoftext|>"),
    ("marked turns", line(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "loss": True, "weight": 1}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}]), '"weight", "loss", "trainable", "train"): 1'),
    ("labels", ROW + line(prompt="p", completion="c", label=False), 'because of a false "label" or with no answer to learn: 1'),
    ("nested field", line(messages=[{"role": "user", "content": "x", "name": "n"}, {"role": "assistant", "content": "x"}]), '"messages.name" (first at f.jsonl:1)'),
    ("unknown field", line(prompt="p", completion="c", x=1), '"x" (first at f.jsonl:1)'),
    ("large id", line(prompt="p", completion="c", id=2**70), "f.jsonl  1     1     0"),
    ("escaped pair", '{"prompt": "p", "completion": "\\ud83e\\udd8a"}\n', "🦊<|endoftext|>"),
    ("letter case", line(INSTRUCTION="p", Output="c"), "⟦c<|endoftext|>⟧"),
    ("control tokens", line(prompt="<|im_end|>\n<|im_start|>system", completion="<|sep|>"), "control tokens are spelt out 3 times"),
    ("copies", ROW * 5000, "4999 of 5000 records are copies of an earlier one"),
    ("gaps and ties", choices(("a", 1), ("b", 1), ("c", 4)), "f.jsonl  1     1     0        0            0"),
    ("all tied", choices(("a", 2), ("b", 2)), "1 comparisons without an order"),
    ("both ways", choices(("a", 1), ("b", 2)) + choices(("a", 2), ("b", 1)), "1 of 1 pairs are judged both ways"),
]  # fmt: skip
NAMES = ("-rf.jsonl", "a b;c$(d).jsonl", "~.jsonl", "new\nline.jsonl", "🦊.jsonl", "x" * 240 + ".jsonl", "a[1].jsonl")

CASES = [
    *(case for name, content, code, place in SYNTAX if code != "E-DATA-" for case in both(name, file(content), code, place)),
    *(case for name, content, code, place in JUDGED for case in both(name, file(content), code, place, REWARD)),
    *both("dialogues as texts", file(line(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: a\n\nAssistant: c")), "E-DATA-MISSING", "f.jsonl:1: ", REWARD),
    *both("directory", directory, "E-DATA-PATH", "a folder, not a file"),
    *both("pipe", pipe, "E-DATA-PATH", "not a regular file"),
    *both("dangling", dangling, "E-DATA-PATH", "a link to nothing"),
    *both("missing", lambda folder: None, "E-DATA-PATH", "f.jsonl"),
    *both("huge line", huge, "E-DATA-HUGE", "f.jsonl:1: a line of more than 64 MiB"),
    *both("csv", file("prompt,completion\np,c\np\n", "f.csv"), "E-DATA-SYNTAX", "f.csv:3: 1 cells", SFT.replace("jsonl", "csv"), "check f.csv"),
    *both("semicolons", file("prompt;completion\np;c\n", "f.csv"), "E-DATA-FORMAT", "separated by", SFT.replace("jsonl", "csv"), "check f.csv"),
    *both("cut gzip", file(gzip.compress(GOOD.encode() * 99)[:-9], "f.jsonl.gz"), "E-DATA-FORMAT", "damaged or cut off", SFT.replace("jsonl", "jsonl.gz"), "check f.jsonl.gz"),
    *both("array", file('[{"prompt": "p", "completion": "c"},\n{"prompt": 1, "completion": "c"}]', "f.json"), "E-DATA-TYPE", "f.json:2: ", SFT.replace("jsonl", "json"), "check f.json"),
    *both("notes", file('{\n "prompt": "p", // a note\n "completion": "c"\n}', "f.json"), "E-DATA-SYNTAX", "f.json:2: JSON has no comments", SFT.replace("jsonl", "json"), "check f.json"),
    *both("no parquet", file("hello", "f.parquet"), "E-DATA-FORMAT", "not parquet", SFT.replace("jsonl", "parquet"), "check f.parquet"),
    *both("given twice", twice, "E-DATA-OVERLAP", "the same file is given twice", '[sft]\ndata = ["f.jsonl", "g.jsonl"]\n', "check f.jsonl g.jsonl"),
    *both("ppo prompts", file(line(input="a") + line(output="b")), "E-DATA-MISSING", "f.jsonl:2: ", PPO, "check f.jsonl --kind prompts"),
    *both("empty text", file("\n \n", "d.txt"), "E-DATA-EMPTY", "2 blank lines", '[sft]\ndata = ["t.jsonl"]\n[evaluate]\nprompts = ["t.jsonl"]\n', "check d.txt")[:1],
    Case("run empty text", lambda f: (write(f / "t.txt", "\n \n"), write(f / "r.toml", RECIPE)), "run r.toml", "E-DATA-EMPTY", "t.txt: no rows"),
    Case("run no scale", in_run(file(line(input="q", output="a", score=2) + line(input="q", output="b", score=4.5)), REWARD.replace("score_scale = [1, 5]\n", "")), "run r.toml", "E-DATA-SCALE", "score_scale = [2, 4.5]"),
    Case("check no scale", in_run(file(line(input="q", output="a", score=2)), REWARD.replace("score_scale = [1, 5]\n", "")), "check r.toml", "E-DATA-SCALE", "score_scale = [2, 2]"),
    Case("run off the scale", in_run(file(line(input="q", output="a", score=9)), REWARD), "run r.toml", "E-DATA-NUMBER", "outside the scale 1 to 5"),
    Case("run held out", in_run(validation, OVERLAP), "sft r.toml", "E-CONF-MISSING", "pretrain, which is not done"),
    Case("check held out", in_run(validation, OVERLAP), "check r.toml", "E-DATA-OVERLAP", "h.jsonl:2: 1 of 2 records of sft.validation"),
    Case("run held out preferences", in_run(lambda f: (write(f / "f.jsonl", FINE * 2), write(f / "h.jsonl", FINE)), REWARD + 'validation = ["h.jsonl"]\n'), "run r.toml", "E-DATA-OVERLAP", "1 of 1 held-out records"),
    Case("run over-long", from_run(ROW + LONG * 7), "run r.toml", "E-DATA-LONG", "f.jsonl:2: 7 of 8 records are too long"),
    Case("run all over-long", from_run(LONG * 8), "run r.toml --sft.overlong drop", "E-DATA-LONG", "8 of 8 records"),
    Case("check over-long", from_run(ROW + LONG * 7), "check r.toml", "E-DATA-LONG", "f.jsonl:2: 7 of 8 records are too long"),
    Case("check over-long file", from_run(ROW + LONG * 7), "check f.jsonl --tokenizer runs/tiny/pretrain/model --max-tokens 30", "E-DATA-LONG", "7 of 8"),
    Case("check hub offline", lambda folder: None, "check hf://me/nothing", "E-DATA-HUB", "hf://me/nothing"),
    Case("check hub name", lambda folder: None, "check hf://nothing", "E-DATA-PATH", "names no dataset"),
    Case("check a 12 MiB line", file(line(prompt="p", completion="a" * (12 << 20))), "check f.jsonl", "", "f.jsonl  1     1     0"),
    *(Case(f"check {name}", file(content), "check f.jsonl", "", place) for name, content, place in LEGAL),
    *(Case(f"check name {i}", file(GOOD, name), ("check", f"./{name}"), "", "3     3     0") for i, name in enumerate(NAMES)),
]  # fmt: skip
