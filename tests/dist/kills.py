"""Faults at random moments of every stage, sharded over two processes: more than each change is tested with.

    PYTHONPATH=src:tests python tests/dist/kills.py [HITS] [STAGE,...] [kill,hang,error,stop,restart] [full|none]

A rank of `tetrad STAGE --nproc 2` is killed or stopped for good (SIGSTOP), fails alone (a record, NaN, a full disk), or
the launcher gets SIGTERM, HITS times each. Each fault must end the job within 30 seconds (a hang: and the patience)
with one message that names rank and stage, and the code that belongs to it, and leave no process behind. The next fault
hits what the one before left, until the stage is done: then its model and logs must be those of a run without faults,
bit by bit. Prints a line for each fault that was not answered so, and one for each stage; exits 1 if there was any.
"restart" is one kill under `torchrun --max-restarts 2`, which goes on by itself.

Launcher and ranks are the command's own, forked from a process that has done the imports.
"""

import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}

import forks
from dist.workers import PYTHONPATH, alive
from tiny import write_tiny

HERE, PATIENCE, LIMIT = socket.gethostname(), 8.0, 30.0
STAGES = ("pretrain", "sft", "reward", "ppo", "dpo", "grpo")
ERRORS = {"record": 3, "nan": 5, "disk": 6}
OWN = {
    "dpo": "--dpo.data ranked.jsonl --dpo.validation held.jsonl --dpo.epochs 6 --dpo.batch-size 8",
    "grpo": "--grpo.prompts sft.jsonl --grpo.steps 8 --grpo.batch-size 4 --grpo.max-new-tokens 8 "
    "--grpo.samples-per-prompt 4 --grpo.actor-lr 0.001 --grpo.ema-decay 0.5",
}
EXPECTED = re.compile(r"(tokenizer|pretrain|sft|reward|dpo|grpo|ppo)\b|.*; a second Ctrl-C stops at once")


def plant(kind: str, rank: int, due: float) -> None:
    """In a rank's own process: from this moment of the monotonic clock on it fails, if it is that rank."""
    import errno
    import math

    from tetrad import disk
    from tetrad.errors import UserError
    from tetrad.training import step

    here, accumulate, loss = int(os.environ["RANK"]) == rank, step._accumulate, step._loss

    def reading(*given: Any) -> Any:
        if here and time.monotonic() > due:
            raise UserError("E-DATA-FORMAT", "planted", where="planted.jsonl:7")
        return accumulate(*given)

    def poisoned(*given: Any) -> Any:
        late = here and time.monotonic() > due
        return [part * math.nan for part in loss(*given)] if late else loss(*given)

    def full(descriptor: int, view: memoryview) -> int:
        if here and time.monotonic() > due:
            raise OSError(errno.ENOSPC, "planted")
        return os.write(descriptor, view)

    if kind == "record":
        step._accumulate = reading
    elif kind == "nan":
        step._loss = poisoned
    else:
        disk.calls.write = full  # type: ignore[assignment]


def launch(folder: Path, words: list[str], planted: str) -> None:
    """`tetrad WORDS` in this process, which ends with it; the ranks leave their process numbers in the folder."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from tetrad.distributed import launch as launching

    def start(words: tuple[str, ...], env: dict[str, str], **how: Any) -> forks.Fork:
        words = words[words.index("-m") :]
        process = forks.Fork([__file__, "--rank", planted, *words[2:]] if planted else words, env=env, **how)
        (folder / f"new-{env['RANK']}").write_text(str(process.pid))
        (folder / f"new-{env['RANK']}").rename(folder / f"rank-{env['RANK']}")
        return process

    def ranks() -> set[int]:
        """Here they are children of the process that forks."""
        return {int(path.read_text()) for path in folder.glob("rank-*")}

    subprocess_handler.Popen = lambda args, **how: start(args, **how)  # type: ignore[assignment,misc]
    launching._children = ranks
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    from torch.distributed.run import main as torchrun

    from tetrad.cli.main import main as command

    sys.argv[:] = ["tetrad", *words]
    code = 1
    try:
        code = command(words) if words[0] != "torchrun" else torchrun(words[1:]) or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Job:
    """One launcher and its ranks."""

    folder: Path
    words: list[str]
    planted: str = ""
    ranks: dict[int, int] = field(default_factory=dict)
    code: int | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob("rank-*"):
            path.unlink()
        self.pid = os.fork()
        if not self.pid:
            launch(self.folder, self.words, self.planted)
        began = time.monotonic()
        while len(self.ranks) < 2 and not self.over() and time.monotonic() - began < 60:
            time.sleep(0.02)
            self.ranks = {int(path.name[5:]): int(path.read_text()) for path in self.folder.glob("rank-*")}
        self.began = time.monotonic()

    def over(self) -> bool:
        if self.code is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.code = -2
        return self.code is not None

    def wait(self, limit: float) -> float:
        """Seconds until its end, infinite if it has not ended by then; nothing is left running."""
        began = time.monotonic()
        while self.code is None and time.monotonic() - began < limit:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
            time.sleep(0.02)
        took = time.monotonic() - began if self.code is not None else float("inf")
        self.left = [rank for rank, process in self.ranks.items() if alive(process)]
        for process in [*([self.pid] if self.code is None else []), *(self.ranks[rank] for rank in self.left)]:
            os.kill(process, signal.SIGKILL)
        return took

    def messages(self) -> list[str]:
        lines = (self.folder / "err").read_text().splitlines()
        return [line for line in lines if line and not EXPECTED.match(line)]


def answered(job: Job, fault: str, kind: str, rank: int, stage: str, took: float) -> list[str]:
    """What is wrong with the answer to a fault."""
    lines = job.messages()
    line = lines[0] if len(lines) == 1 else ""
    wrong = [f"{len(lines)} messages"] * (len(lines) != 1) + [f"left {job.left}"] * bool(job.left)
    code = {"kill": 8, "hang": 8, "stop": 75}.get(fault) or ERRORS[kind]
    wrong += [f"exit {job.code}"] * (job.code != code)
    wrong += [f"{took:.1f} s"] * (took > LIMIT + PATIENCE * (fault == "hang"))
    if fault in ("kill", "hang"):
        wrong += ["names another"] * (f"rank {rank} " not in line.partition(";")[0] or "E-RANK-LOST" not in line)
        wrong += ["no stage"] * (stage not in line and "said nothing" not in line)
    elif fault == "error":
        wrong += ["names another"] * (not line.endswith(f"[rank {rank} of 2, {HERE}]"))
    return wrong


class Stage:
    """One stage of the tiny recipe, done once without faults."""

    def __init__(self, name: str, path: Path, root: Path, shard: str) -> None:
        self.name, self.root, self.home = name, root, root / "runs/tiny" / name
        own = [str(path.parent / word) if word.endswith(".jsonl") else word for word in OWN.get(name, "").split()]
        self.words = [name, str(path), "--run.out", str(root / "runs"), "--run.nproc", "2", "--run.shard", shard, *own]
        job = Job(root / "job", self.words)
        self.seconds = job.wait(600)
        if job.code:
            raise SystemExit(f"{name}: exit {job.code}: {(root / 'job/err').read_text()[-2000:]}")
        self.right = digests(self.home)
        shutil.move(self.home, root / f"whole-{name}")

    def faults(self, fault: str, hits: int, draw: random.Random) -> bool:
        counts, good, longest, seconds, number = Counter[str](), True, 0.0, self.seconds, 0
        while counts["hits"] < hits and number < 4 * hits:
            number += 1
            kind = list(ERRORS)[counts["hits"] % 3] if fault == "error" else ""
            rank, delay = 0 if kind == "disk" else draw.randrange(2), draw.uniform(0.05, 0.95) * seconds
            planted = f"{kind},{rank},{time.monotonic() + delay + 0.5}" if kind else ""
            patience = ["--run.patience", str(PATIENCE)] if fault == "hang" else []
            job = Job(self.root / "job", [*self.words, *patience], planted)
            if not kind:
                time.sleep(delay)
            counts["resumed"] += (self.home / "checkpoints").is_dir()
            hit = bool(kind) or (len(job.ranks) == 2 and not job.over() and alive(job.ranks[rank]))
            if hit and not kind:
                wanted = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "stop": signal.SIGTERM}[fault]
                os.kill(job.pid if fault == "stop" else job.ranks[rank], wanted)
            took = job.wait(180)
            if job.code in (0, -2) or not hit:  # it was done before the fault came
                seconds *= 0.9
                good = self.ended(job, fault) and good
                continue
            counts["hits"] += 1
            longest = max(longest, took if not kind else 0.0)
            if wrong := answered(job, fault, kind, rank, self.name, took):
                counts["badly answered"] += 1
                print(f"{self.name} {fault} {kind} rank {rank}: {', '.join(wrong)}: {job.messages()}", flush=True)
        job = Job(self.root / "job", self.words)
        job.wait(600)
        good = self.ended(job, fault) and good
        print(f"{self.name} {fault}: {dict(counts)}, at most {longest:.1f} s, same bits {good}", flush=True)
        return good and not counts["badly answered"]

    def restarts(self, draw: random.Random) -> bool:
        """A rank is killed under `torchrun --max-restarts 2`, which goes on by itself."""
        given = "torchrun --nproc-per-node 2 --max-restarts 2 -m tetrad".split()
        job = Job(self.root / "job", [*given, *self.words])
        time.sleep(draw.uniform(0.4, 0.8) * self.seconds)
        saved, killed = (self.home / "checkpoints").is_dir(), dict(job.ranks)
        os.kill(killed[draw.randrange(2)], signal.SIGKILL)
        job.wait(600)
        begun = {int(path.name[5:]): int(path.read_text()) for path in job.folder.glob("rank-*")}
        again = begun.keys() == killed.keys() and not set(begun.values()) & set(killed.values())
        good = self.ended(job, "restart") and again and job.code == 0
        print(f"{self.name} restart: exit {job.code}, new ranks {again}, checkpoint {saved}, good {good}", flush=True)
        return good

    def ended(self, job: Job, fault: str) -> bool:
        """Whether a run that came to its end has the right bits; the next starts anew."""
        same = digests(self.home) == self.right
        if not same:
            print(f"{self.name} {fault}: other bits, exit {job.code}: {job.messages()}", flush=True)
        shutil.rmtree(self.home, ignore_errors=True)
        return same


def digests(folder: Path) -> dict[str, str]:
    from faults.test_kill import digests

    return digests(folder)


def main(
    hits: str = "5", stages: str = ",".join(STAGES), faults: str = "kill,hang,error,stop", shard: str = "full"
) -> int:
    import tetrad.distributed.launch  # noqa: F401  (before the forks)

    forks.HEAVY += " train.dpo train.grpo torch.distributed.fsdp"
    os.environ["PYTHONPATH"] = PYTHONPATH
    start = tuple(sorted((name, value) for name, value in os.environ.items() if forks.READ_AT_START.match(name)))
    server = forks._server(False, start)
    forks._server = lambda *_: server  # type: ignore[assignment]
    draw, good = random.Random(int(os.environ.get("TETRAD_SEED", "1"))), True
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        path = write_tiny(root / "data")
        held = '{"Instruction": "Go on.", "Input": "so", "chosen": "was warm", "rejected": "was flat"}\n'
        (path.parent / "held.jsonl").write_text(held)
        job = Job(root / "job", ["tokenizer", str(path), "--run.out", str(root / "runs"), "--nproc", "2"])
        job.wait(600)
        done: dict[str, Stage] = {}
        for each in STAGES:
            done[each] = Stage(each, path, root, shard)
            if each in stages.split(","):
                for fault in faults.split(","):
                    stage = done[each]
                    good = (
                        stage.restarts(draw) if fault == "restart" else stage.faults(fault, int(hits), draw)
                    ) and good
            shutil.move(root / f"whole-{each}", root / "runs/tiny" / each)
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        kind, rank, due = sys.argv[2].split(",")
        plant(kind, int(rank), float(due))
        sys.argv[1:3] = []
        from tetrad.__main__ import main as command

        sys.exit(command())
    sys.exit(main(*sys.argv[1:]))
