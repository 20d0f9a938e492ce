"""Bad recipes and command lines."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from faults.bad_inputs import Case, world, write

BASE = '[tokenizer]\ntext = ["t.txt"]\n'
SECRET = "sk-" + "a1" * 12


def toml(text: str) -> Callable[[Path], object]:
    return lambda folder: write(folder / "r.toml", text)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: write(folder / "r.toml", content)


def sparse(folder: Path) -> None:
    with write(folder / "r.toml", "").open("wb") as file:
        file.truncate(1 << 30)


def full_run(folder: Path) -> None:
    write(folder / "r.toml", BASE)
    write(folder / "t.txt", "some text\n\n" * 30)


def locked(folder: Path) -> None:
    """A process that holds the lock of the stage for as long as this one lives, and leaves its name."""
    full_run(folder)
    (folder / "runs/r/tokenizer").mkdir(parents=True)
    code = (
        "import fcntl, os, sys, time\n"
        "f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "f.write(f'pid {os.getpid()} on host since 2026-01-01 00:00:00'); f.flush()\n"
        "print('held', flush=True); time.sleep(20)"
    )
    path = folder / "runs/r/tokenizer/lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    HOLDERS.append(holder)


HOLDERS: list["subprocess.Popen[bytes]"] = []


def release() -> None:
    """Ends the processes that hold locks."""
    while HOLDERS:
        holder = HOLDERS.pop()
        holder.kill()
        holder.communicate()


def stale_lock(folder: Path) -> None:
    full_run(folder)
    write(folder / "runs/r/tokenizer/lock", "pid 4000000 on host since 2026-01-01 00:00:00")


def positions(folder: Path) -> None:
    world(folder)
    write(folder / "r.toml", '[model]\nfrom = "runs/tiny/sft"\n[sft]\ndata = ["sft.jsonl"]\nmax_tokens = 600\n')


RECIPES: list[tuple[str, str, str, str]] = [
    # what, the recipe, the code, the place
    ("misspelt-key", "[sft]\nlerning_rate = 1e-4\n", "E-CONF-UNKNOWN", "r.toml:2: unknown setting sft.lerning"),
    ("misspelt-table", "[stf]\nlr = 1e-4\n", "E-CONF-UNKNOWN", "r.toml:2"),
    ("key-of-no-table", "lr = 1e-4\n", "E-CONF-UNKNOWN", "r.toml:1"),
    ("key-twice", "[sft]\nlr = 1e-4\nlr = 1e-5\n", "E-CONF-DUPKEY", "r.toml:3: lr is given twice"),
    ("table-twice", "[sft]\nlr = 1e-4\n[sft]\nbatch_size = 2\n", "E-CONF-DUPKEY", "r.toml:3"),
    ("dotted-twice", "sft.lr = 1e-4\nsft.lr = 1e-5\n", "E-CONF-DUPKEY", "r.toml:2"),
    ("tag-of-yaml", "lr: !!python/object/apply:os.system ['id']\n", "E-CONF-SYNTAX", "r.toml:1"),
    ("yaml", "sft:\n  lr: 1e-4\n", "E-CONF-SYNTAX", "r.toml:1"),
    ("json", '{"sft": {"lr": 1e-4}}', "E-CONF-SYNTAX", "r.toml:1"),
    ("lr-negative", "[sft]\nlr = -1\n", "E-CONF-RANGE", "r.toml:2: sft.lr = -1 must be a number, above 0 and at"),
    ("lr-zero", "[sft]\nlr = 0\n", "E-CONF-RANGE", "above 0"),
    ("lr-nan", "[sft]\nlr = nan\n", "E-CONF-RANGE", "above 0"),
    ("lr-infinite", "[sft]\nlr = inf\n", "E-CONF-RANGE", "above 0"),
    ("lr-1e400", "[sft]\nlr = 1e400\n", "E-CONF-RANGE", "above 0"),
    ("lr-1e30", "[sft]\nlr = 1e30\n", "E-CONF-RANGE", "at most 1"),
    ("lr-text", '[sft]\nlr = "1e-4"\n', "E-CONF-TYPE", "r.toml:2"),
    ("lr-truth", "[sft]\nlr = true\n", "E-CONF-TYPE", "r.toml:2"),
    ("lr-list", "[sft]\nlr = [1e-4]\n", "E-CONF-TYPE", "r.toml:2"),
    ("lr-date", "[sft]\nlr = 2026-01-01\n", "E-CONF-TYPE", "r.toml:2"),
    ("lr-table", "[sft.lr]\na = 1\n", "E-CONF-TYPE", "sft.lr"),
    ("stage-is-a-number", "sft = 3\n", "E-CONF-TYPE", "r.toml:1"),
    ("stage-is-a-list", "[[sft]]\nlr = 1e-4\n", "E-CONF-TYPE", "sft"),
    ("batch-float", "[sft]\nbatch_size = 2.0\n", "E-CONF-TYPE", "r.toml:2"),
    ("batch-zero", "[sft]\nbatch_size = 0\n", "E-CONF-RANGE", "at least 1"),
    ("batch-beyond-counting", "[sft]\nbatch_size = 9007199254740993\n", "E-CONF-RANGE", "r.toml:2"),
    ("batch-5000-digits", f"[sft]\nbatch_size = 1{'0' * 5000}\n", "E-CONF-SYNTAX", "r.toml"),
    ("batch-400-digits", f"[sft]\nbatch_size = 1{'0' * 400}\n", "E-CONF-RANGE", "r.toml:2"),
    ("seed-text", 'seed = "1"\n', "E-CONF-TYPE", "r.toml:1"),
    ("seed-float", "seed = 1.0\n", "E-CONF-TYPE", "r.toml:1"),
    ("seed-negative", "seed = -1\n", "E-CONF-RANGE", "r.toml:1"),
    ("seed-2-70", f"seed = {2**70}\n", "E-CONF-RANGE", "below 2^63"),
    ("choice", '[ppo]\ncritic = "rewrad"\n', "E-CONF-RANGE", 'did you mean "reward"?'),
    ("files-text", '[sft]\ndata = "a.jsonl"\n', "E-CONF-TYPE", 'write data = ["a.jsonl"]'),
    ("mini-batches", "[ppo]\nbatch_size = 10\nnum_minibatches = 4\n", "E-CONF-DIVIDE", "batch_size = 8 or 12"),
    ("mini-batches-huge", "[ppo]\nbatch_size = 999999999999989\nnum_minibatches = 4\n", "E-CONF-DIVIDE", "r.toml:2"),
    ("heads", "[model]\nhidden_size = 100\nheads = 3\n", "E-CONF-DIVIDE", "r.toml:2"),
    ("kv-heads", "[model]\nheads = 4\nkv_heads = 3\n", "E-CONF-DIVIDE", "r.toml:2"),
    ("row-tokens", BASE + '[pretrain]\ntext = ["t"]\nbatch_tokens = 1000\n', "E-CONF-DIVIDE", "r.toml:5"),
    ("too-long", BASE + '[pretrain]\ntext = ["t"]\nsequence_length = 4096\n', "E-CONF-RANGE", "max_positions = 1024"),
    ("model-beyond-machines", "[model]\nlayers = 1000000000\n", "E-CONF-RANGE", "r.toml:2"),
    ("two-tokenizers", '[model]\nfrom = "m"\n' + BASE, "E-CONF-CONFLICT", "r.toml:4"),
    ("kl-target", "[ppo]\nkl_target = 2.0\nkl_coef = 0.0\n", "E-CONF-CONFLICT", "r.toml:2"),
    ("test-without-held-out", '[reward]\ntest = ["a"]\n', "E-CONF-MISSING", "r.toml:2"),
    ("scale-turned", "[reward]\nscore_scale = [5, 1]\n", "E-CONF-RANGE", "score_scale = [1, 5]"),
    ("secret-key", 'api_key = "x"\n', "E-CONF-SECRET", "r.toml:1"),
    ("secret-value", f'[sft]\nseparator = "{SECRET}"\n', "E-CONF-SECRET", "r.toml:2"),
    ("secret-in-a-list", f'[sft]\ndata = ["{SECRET}"]\n', "E-CONF-SECRET", "r.toml:2"),
    ("name-flag", 'name = "-rf"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-up", 'name = ".."\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-path", 'name = "../../x"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-newline", 'name = "a\\nb"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-zero", 'name = "a\\u0000b"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-emoji", 'name = "\U0001f600"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-300", f'name = "{"a" * 300}"\n', "E-CONF-RANGE", "r.toml:1"),
    ("name-300-bytes", f'name = "{"字" * 100}"\n', "E-CONF-RANGE", "r.toml:1"),
    ("path-zero", '[sft]\ndata = ["a\\u0000b"]\n', "E-CONF-RANGE", "r.toml:2"),
    ("path-300", f'[sft]\ndata = ["{"a" * 300}"]\n', "E-CONF-RANGE", "r.toml:2"),
    ("from-zero", '[model]\nfrom = "a\\u0000b"\n[sft]\ndata = ["a"]\n', "E-CONF-RANGE", "r.toml:2"),
    ("from-300", f'[model]\nfrom = "{"a" * 300}"\n[sft]\ndata = ["a"]\n', "E-CONF-RANGE", "r.toml:2"),
    ("out-zero", '[run]\nout = "a\\u0000b"\n', "E-CONF-RANGE", "r.toml:2"),
    ("judge", '[evaluate]\njudges = ["judge"]\n', "E-CONF-RANGE", "r.toml:2"),
    ("no-stage", "", "E-CONF-MISSING", "[sft]"),
    ("no-model", '[sft]\ndata = ["r.toml"]\n', "E-CONF-MISSING", "sft"),
    ("lists-1000-deep", f"a = {'[' * 1000}{']' * 1000}\n", "E-CONF-SYNTAX", "r.toml"),
    ("lists-40-deep", f"a = {'[' * 40}{']' * 40}\n", "E-CONF-SYNTAX", "r.toml"),
    ("keys-100000-deep", f"{'a.' * 100_000}a = 1\n", "E-CONF-SYNTAX", "r.toml"),
    ("keys-quoted-and-deep", 'x = { ' + '"a" . ' * 1000 + 'a = 1 }\n', "E-CONF-SYNTAX", "r.toml"),
    ("key-of-a-million", f"{'a' * 1_000_000} = 1\n", "E-CONF-UNKNOWN", "r.toml:1"),
    ("word-of-a-million", "a" * 1_000_000, "E-CONF-SYNTAX", "r.toml:1"),
    ("text-of-a-million", f'name = "{"a" * 1_000_000}"\n', "E-CONF-RANGE", "r.toml:1"),
    ("tables-1000-deep", f"a = {'{a=' * 1000}1{'}' * 1000}\n", "E-CONF-SYNTAX", "r.toml"),
]  # fmt: skip

CASES = [Case(f"recipe-{name}", toml(text), "run r.toml", code, place) for name, text, code, place in RECIPES]
CASES += [
    Case("recipe-number-without-point", toml("[sft]\nlr = 1e-4\n"), "status r.toml", "E-CONF-MISSING", "[sft]"),
    Case("recipe-none", lambda folder: None, "run r.toml", "E-CONF-MISSING", "r.toml: no such file"),
    Case("recipe-folder", lambda f: (f / "r.toml").mkdir(), "run r.toml", "E-CONF-SIZE", "r.toml: is a folder"),
    Case("recipe-1-gib", sparse, "run r.toml", "E-CONF-SIZE", "r.toml: is larger than 1 MiB"),
    Case("recipe-pipe", lambda f: os.mkfifo(f / "r.toml"), "run r.toml", "E-CONF-SIZE", "r.toml: is not a plain file"),
    Case("recipe-device", lambda f: (f / "r.toml").symlink_to("/dev/zero"), "run r.toml", "E-CONF-SIZE", "r.toml"),
    Case("recipe-loop", lambda f: (f / "r.toml").symlink_to("r.toml"), "run r.toml", "E-CONF-MISSING", "r.toml"),
    Case("recipe-binary", raw(bytes(range(256)) * 40), "run r.toml", "E-CONF-SYNTAX", "r.toml"),
    Case("recipe-zeros", raw(bytes(1000)), "run r.toml", "E-CONF-SYNTAX", "r.toml"),
    Case("recipe-utf16", raw("name = 'a'\n".encode("utf-16")), "run r.toml", "E-CONF-SYNTAX", "r.toml"),
    Case("words-none", toml(BASE), ("run",), "E-CONF-MISSING", "run: no recipe is given"),
    Case("words-verb", toml(BASE), ("rnu", "r.toml"), "E-CONF-UNKNOWN", "`tetrad run`"),
    Case("words-stray", toml(BASE), ("run", "r.toml", "x"), "E-CONF-SYNTAX", "'x'"),
    Case("words-flag", toml(BASE), ("run", "r.toml", "--sft.lrr", "1"), "E-CONF-UNKNOWN", "--sft.lrr"),
    Case("words-twice", toml(BASE), ("run", "r.toml", "--seed", "1", "--seed", "2"), "E-CONF-DUPKEY", "--seed"),
    Case("words-no-value", toml(BASE), ("run", "r.toml", "--seed"), "E-CONF-MISSING", "--seed"),
    Case("words-no-number", toml(BASE), ("run", "r.toml", "--sft.lr", "fast"), "E-CONF-TYPE", "--sft.lr"),
    Case("words-nan", toml(BASE), ("run", "r.toml", "--sft.lr", "nan"), "E-CONF-RANGE", "--sft.lr"),
    Case("words-1e400", toml(BASE), ("run", "r.toml", "--sft.lr", "1e400"), "E-CONF-RANGE", "--sft.lr"),
    Case("words-5000-digits", toml(BASE), ("run", "r.toml", "--seed", "9" * 5000), "E-CONF-TYPE", "--seed"),
    Case("words-list", toml(BASE), ("run", "r.toml", "--sft.data", "["), "E-CONF-SYNTAX", "--sft.data"),
    Case("words-list-deep", toml(BASE), ("run", "r.toml", "--sft.data", "[" * 9000), "E-CONF-SYNTAX", "--sft.data"),
    Case("words-secret", toml(BASE), ("run", "r.toml", "--api-key", "x"), "E-CONF-SECRET", "api_key"),
    Case("words-newline", toml(BASE), ("run", "a\nb\x1b[31m.toml"), "E-CONF-MISSING", "a\\nb\\x1b[31m.toml"),
    Case("words-not-utf8", toml(BASE), ("run", "\udcff.toml"), "E-CONF-MISSING", "no such file"),
    Case("words-name-not-utf8", toml(BASE), ("run", "r.toml", "--name", "\udcff"), "E-CONF-TYPE", "--name"),
    Case("words-path-not-utf8", toml(BASE), ("run", "r.toml", "--sft.data", "\udcff"), "E-CONF-TYPE", "--sft.data"),
    Case("words-300", toml(BASE), ("run", "a" * 300), "E-CONF-MISSING", "File name too long"),
    Case("words-dash", toml(BASE), ("run", "-rf"), "E-CONF-MISSING", "-rf: no such file"),
    Case("options-both", toml(BASE), "generate m --instruction a --prompts b", "E-CONF-CONFLICT", "generate"),
    Case("options-greedy", toml(BASE), "chat m --greedy --temperature 1", "E-CONF-CONFLICT", "--greedy"),
    Case("options-best-of", toml(BASE), "generate m --instruction a --best-of 4", "E-CONF-MISSING", "--best-of"),
    Case("options-range", toml(BASE), "chat m --max-new-tokens 0", "E-CONF-RANGE", "--max-new-tokens"),
    Case("lengths-over-a-folder", positions, "run r.toml", "E-CONF-RANGE", "r.toml:5: sft.max_tokens = 600 tokens are"),
    Case("lengths-over-a-folder-64", positions, "run r.toml", "E-CONF-RANGE", "= 64"),
    Case("run-in-use", locked, "run r.toml", "E-RUN-LOCKED", "since 2026-01-01"),
    Case("run-out-is-a-file", lambda f: (full_run(f), write(f / "runs", "x")), "run r.toml", "E-IO-WRITE", "runs"),
    Case("run-folder-is-a-file", lambda f: (full_run(f), write(f / "runs/r", "x")), "run r.toml", "E-IO-WRITE", "runs"),
    # This one ends well, and says what was odd.
    Case("lock-of-a-dead-process", stale_lock, "run r.toml", "", "took over the lock of pid 4000000 on host", 30, 2000),
]  # fmt: skip
