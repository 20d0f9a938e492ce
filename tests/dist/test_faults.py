"""Of two processes one fails, hangs or is killed: one message that names it, one exit code, nobody left behind."""

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing import SignalException

from dist.faulty import PATIENCE
from dist.workers import ROOT, alive, children, pair, popen
from tetrad.distributed import launch, watchdog
from tetrad.errors import Stopped
from tiny import Chain

pytestmark = pytest.mark.dist
HERE = socket.gethostname()
EXPECTED = re.compile(r"(tokenizer|pretrain|sft|reward|ppo|evaluate)\b|.*; a second Ctrl-C stops at once")


def errors(text: str) -> list[str]:
    """The lines of stderr that are neither progress nor the answer to a signal: also what a library prints there."""
    return [line for line in text.splitlines() if not EXPECTED.match(line)]


@pytest.mark.parametrize(
    ("case", "rank", "code", "parts"),
    [
        ("nan", 1, 5, ["error[E-NUM-NONFINITE]", "bad.jsonl:7", "rank1.jsonl"]),
        ("nan, sharded", 1, 5, ["error[E-NUM-NONFINITE]", "bad.jsonl:7", "rank1.jsonl"]),
        ("more", 0, 8, ["error[E-RANK-LOST] sft: rank 0 ", "waits in exchange of values", "rank 1", "barrier"]),
        ("more", 1, 8, ["error[E-RANK-LOST] sft: rank 1 ", "waits in exchange of values", "rank 0", "barrier"]),
        ("raises", 0, 1, ["error[internal]", "only here"]),
        ("raises", 1, 1, ["error[internal]", "only here"]),
    ],
)
def test_one_message_and_one_code(case: str, rank: int, code: int, parts: list[str]) -> None:
    """Also where the rank that ends first is rank 0, which holds the store by which the other learns of it."""
    workers = pair(str(ROOT / "tests/dist/faulty.py"), case, str(rank))
    outputs = [worker.communicate(timeout=170) for worker in workers]
    said = [line for _, err in outputs for line in errors(err)]
    assert len(said) == 1, said
    assert [part for part in parts if part not in said[0]] == [], said[0]
    assert code == 8 or said[0].endswith(f"[rank {rank} of 2, {HERE}]")
    assert "rank0.jsonl" not in said[0]
    assert [worker.returncode for worker in workers] == [code, code]


@pytest.mark.parametrize(
    ("case", "then"),
    [
        ("killed", "stopped in sft."),  # outside of a collective the launcher's SIGTERM is what a rank hears first
        ("stopped", "has waited "),  # at the end: the other one, which is done, does not leave it behind
    ],
)
def test_a_rank_that_is_lost_outside_of_collectives(case: str, then: str) -> None:
    workers = pair(str(ROOT / "tests/dist/faulty.py"), case, "1")
    outputs = [worker.communicate(timeout=170) for worker in workers]
    (said,) = (line for _, err in outputs for line in errors(err))
    lost = f"rank 1 ({HERE}, process {workers[1].pid}) no longer answers"
    assert said.startswith(f"error[E-RANK-LOST] sft: {lost}; rank 0 ({HERE}) {then}")
    assert [worker.returncode for worker in workers] == [8, -9]


def test_asked_to_stop_before_the_ranks_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has left a code: the launcher itself says what it was."""

    def stopping(*_: object) -> None:
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch.logging, "disable", lambda _: None)
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: stopping)
    with pytest.raises(Stopped, match="the same command goes on"):
        launch.launch(["sft"], 2, 1.0, 60.0)


def test_a_restart_does_not_read_why_the_ranks_before_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives all attempts on one machine the same store."""
    store = HashStore()
    monkeypatch.setattr(watchdog, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(watchdog, "on_stop_request", [])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    codes = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        dog = watchdog.Watchdog(60.0, lambda _: 1)
        codes.append(watchdog.claimed_code(dog.store))
        dog.claim(8)
        codes.append(watchdog.claimed_code(dog.store))
        dog.stop()
    assert codes == [None, 8, None, 8]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A recipe of which one process has done all."""
    chain = Chain(tmp_path_factory.mktemp("tuned"))
    chain.run()
    return chain


def again(tuned: Chain, folder: Path) -> list[str]:
    """Words for its SFT in a copy of its runs, many steps long and saved often."""
    shutil.copytree(tuned.runs, folder / "runs")
    for stage in ("sft", "reward", "ppo", "evaluate"):
        shutil.rmtree(folder / "runs/tiny" / stage)
    long = ("--sft.epochs", "3000", "--run.save-every", "5", "--run.out", str(folder / "runs"))
    return ["-m", "tetrad", "sft", str(tuned.path), "--nproc", "2", *long]


@pytest.mark.parametrize(
    ("number", "code", "part", "shard"),
    [
        (signal.SIGSTOP, 8, "no longer answers", "none"),
        (signal.SIGSTOP, 8, "no longer answers", "full"),
        (signal.SIGKILL, 8, "no longer answers", "full"),
    ],
)
def test_a_rank_that_no_longer_answers(
    tuned: Chain, tmp_path: Path, number: int, code: int, part: str, shard: str
) -> None:
    """The others say which one within their patience; nobody is left, not even the one that was stopped."""
    launcher = popen([*again(tuned, tmp_path), "--run.patience", str(PATIENCE), "--run.shard", shard])
    ranks = when_it_runs(launcher.pid, tmp_path)
    os.kill(ranks[1], number)
    began = time.monotonic()
    _, err = launcher.communicate(timeout=170)
    assert time.monotonic() - began < PATIENCE + 60
    (said,) = errors(err)
    assert said.startswith(f"error[E-RANK-LOST] sft: rank 1 ({HERE}, process {ranks[1]}) {part}; rank 0 ")
    assert launcher.returncode == code
    assert not any(map(alive, ranks.values()))


def test_rank_0_killed_without_a_launcher(tuned: Chain, tmp_path: Path) -> None:
    """With it the store is gone: the other says so at once, in one line."""
    words = again(tuned, tmp_path)
    words.remove("--nproc")
    words.remove("2")
    workers = pair(*words)
    when_it_runs(workers[0].pid, tmp_path)
    workers[0].kill()
    began = time.monotonic()
    _, err = workers[1].communicate(timeout=170)
    (said,) = errors(err)
    assert said.startswith("error[E-RANK-LOST] sft: rank 1 ")
    assert workers[1].returncode == 8
    assert time.monotonic() - began < 30
    workers[0].communicate(timeout=170)


def test_asked_to_stop_inside_a_collective(tuned: Chain, tmp_path: Path) -> None:
    """A rank that waits for one that was stopped hears SIGTERM all the same, long before its patience ends."""
    launcher = popen(again(tuned, tmp_path))
    ranks = when_it_runs(launcher.pid, tmp_path)
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(1)
    launcher.terminate()
    _, err = launcher.communicate(timeout=170)
    (said,) = errors(err)
    assert said.startswith(f"stopped: rank 1 ({HERE}, process {ranks[1]}) no longer answers")
    assert launcher.returncode == 75
    assert not any(map(alive, ranks.values()))


def when_it_runs(launcher: int, folder: Path) -> dict[int, int]:
    """The ranks, once there is a new checkpoint."""
    place = folder / "runs/tiny/sft/checkpoints"
    before = set(place.glob("step-*"))
    for _ in range(1500):
        if set(place.glob("step-*")) - before:
            return children(launcher)
        time.sleep(0.1)
    raise AssertionError("it never began")


def test_stopped_and_gone_on(tuned: Chain, tmp_path: Path) -> None:
    """SIGTERM: one word, exit 75, a checkpoint; the same command goes on from it on both ranks."""
    words = again(tuned, tmp_path)
    for _ in range(2):
        launcher = popen(words)
        when_it_runs(launcher.pid, tmp_path)
        launcher.terminate()
        out, err = launcher.communicate(timeout=170)
        assert [line.partition(" ")[0] for line in errors(err)] == ["stopped:"], err
        assert launcher.returncode == 75
    assert "resumes after step" in out


def test_an_error_of_one_rank(tuned: Chain, tmp_path: Path) -> None:
    """A rule that raises on rank 1: its error, its code, once."""
    rule = tmp_path / "rule.py"
    rule.write_text("import os\ndef pays(samples):\n    return [1 / (1 - int(os.environ['RANK']))] * len(samples)\n")
    shutil.copytree(tuned.runs, tmp_path / "runs")
    out = ("--run.out", str(tmp_path / "runs"))
    words = ["ppo", str(tuned.path), "--nproc", "2", *out, "--ppo.rewards", f"{rule}:pays"]
    done = popen(["-m", "tetrad", *words])
    _, err = done.communicate(timeout=170)
    (said,) = errors(err)
    assert said.startswith("error[E-NUM-REWARD]")
    assert said.endswith(f"[rank 1 of 2, {HERE}]")
    assert done.returncode == 5


def test_an_error_of_what_rank_0_does_beforehand(tuned: Chain, tmp_path: Path) -> None:
    """It reads the records, and the stage has not begun."""
    (tmp_path / "bad.jsonl").write_text('{"Instruction": "a", "Output": "b"}\n{"Instruction"\n')
    shutil.copytree(tuned.runs, tmp_path / "runs", ignore=shutil.ignore_patterns("sft"))
    own = ["--run.out", str(tmp_path / "runs"), "--sft.data", str(tmp_path / "bad.jsonl")]
    done = popen(["-m", "tetrad", "sft", str(tuned.path), "--nproc", "2", *own])
    _, err = done.communicate(timeout=170)
    (said,) = errors(err)
    assert "bad.jsonl:2" in said
    assert said.endswith(f"[rank 0 of 2, {HERE}]")
    assert done.returncode == 3


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_mistake_is_told_once(tuned: Chain, torchrun: bool) -> None:
    """Of the recipe, and of a command that is for one process."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tetrad"] if torchrun else ["-m", "tetrad"]
    own = [] if torchrun else ["--nproc", "2"]
    cases = {"E-CONF-UNKNOWN": ["run", str(tuned.path), *own, "--ppo.stepps", "3"]}
    if torchrun:
        cases["E-CONF-CONFLICT"] = ["generate", str(tuned.home / "sft/model"), "--prompt", "x"]
    for code, words in cases.items():
        done = popen([*run, *words])
        _, err = done.communicate(timeout=170)
        assert err.count("error[") == 1, err
        assert f"error[{code}]" in err
        assert done.returncode == (1 if torchrun else 2)


def test_what_is_done_is_left_alone(tuned: Chain) -> None:
    done = popen(["-m", "tetrad", "run", str(tuned.path), "--nproc", "2", "--run.out", str(tuned.runs)])
    out, err = done.communicate(timeout=170)
    assert (done.returncode, errors(err)) == (0, [])
    assert out.count("unchanged, skipped") == 6


def test_a_rank_that_hangs_before_its_first_heartbeat(tuned: Chain, tmp_path: Path) -> None:
    """No rank knows its process; the launcher does not wait for it to hear SIGTERM."""
    launcher = popen([*again(tuned, tmp_path), "--run.patience", str(PATIENCE)])
    ranks = dict[int, int]()
    while 0 not in ranks:
        ranks = children(launcher.pid)
    os.kill(ranks[0], signal.SIGSTOP)
    began = time.monotonic()
    _, err = launcher.communicate(timeout=170)
    (said,) = errors(err)
    late = r"(\(.*?\) )?"  # where it had one after all
    assert re.match(rf"error\[E-RANK-LOST\] sft: rank 0 {late}no longer answers; rank 1 ", said)
    assert launcher.returncode == 8 and time.monotonic() - began < PATIENCE + 20
    assert not any(map(alive, ranks.values()))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_when_all_is_done(tuned: Chain, tmp_path: Path, rank: int) -> None:
    """After the last barrier, where no rank waits for it any more: the launcher ends it, and the run is whole."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import os, signal\nimport torch.distributed as dist\n"
        f"if os.environ['RANK'] == '{rank}':\n"
        "    dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "def pays(samples):\n    return [1.0 * (len(sample['text']) % 3) for sample in samples]\n"
    )
    shutil.copytree(tuned.runs, tmp_path / "runs")
    out = ("--run.out", str(tmp_path / "runs"), "--run.patience", str(PATIENCE))
    done = popen(["-m", "tetrad", "ppo", str(tuned.path), "--nproc", "2", *out, "--ppo.rewards", f"{rule}:pays"])
    began, ranks = time.monotonic(), dict[int, int]()
    while not ranks:
        ranks = children(done.pid)
    said, err = done.communicate(timeout=170)
    assert (done.returncode, errors(err)) == (0, [])
    assert "ppo        done in" in said and time.monotonic() - began < PATIENCE + 60
    assert not any(map(alive, ranks.values()))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_when_there_is_nothing_to_do(tuned: Chain, rank: int) -> None:
    """No rank ever waits for another, and none says that it is done."""
    words = ["run", str(tuned.path), "--nproc", "2", "--run.out", str(tuned.runs), "--run.patience", str(PATIENCE)]
    launcher = popen(["-m", "tetrad", *words])
    began, ranks = time.monotonic(), dict[int, int]()
    while rank not in ranks:
        ranks = children(launcher.pid)
    os.kill(ranks[rank], signal.SIGSTOP)
    _, err = launcher.communicate(timeout=170)
    (said,) = errors(err)
    assert said.startswith(f"error[E-RANK-LOST] rank {rank} (process {ranks[rank]}) no longer answers"), said
    assert launcher.returncode == 8 and time.monotonic() - began < PATIENCE + 30
    assert not any(map(alive, ranks.values()))
