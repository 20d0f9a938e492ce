"""kill -9 while people rank, at TETRAD_KILLS (or 5) random moments: what was answered is on the disk, once, and whole.

A child ranks as three people and says each stored item over a pipe, as the server says 200; the next child goes on with
what the kill left behind.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tetrad.server.ranking import Item, Ranking, Verdict
from tetrad.settings.use import Rank
from tetrad.types import Prompt, Turn

KILLS = int(os.environ.get("TETRAD_KILLS", "5"))
NAMES = ("kim", "lee", "李雷")


def rank(out: Path, says: int, draw: random.Random) -> None:
    """In the child, until it is killed: items are added, asked and answered, at most 5,000."""
    with Ranking(Rank(out=str(out), overlap=0.3, scale=(1, 5))) as ranked:
        for number in range(len(ranked.items), 5_000):
            prompt = Prompt((Turn("instruction", f"问题 {number}"), Turn("input", "")))
            ranked.add(Item(prompt, tuple(f"answer {number}.{i} " + "长" * draw.randrange(300) for i in range(3))))
            for name in NAMES:
                if one := ranked.offer(name):
                    ranks = tuple(draw.randint(1, 3) for _ in range(3))
                    kind = "skip" if draw.random() < 0.1 else "ranked"
                    edited = one.answers[0] + "!" if draw.random() < 0.2 else ""
                    ranked.submit(name, one.id, Verdict(kind, ranks, (1, None, 5), edited=edited))
                    os.write(says, f"{one.id} {name}\n".encode())


def lines(path: Path) -> list[dict[str, object]]:
    """Fails at a torn line."""
    raw = path.read_bytes()
    assert raw.endswith(b"\n") or not raw
    return [json.loads(line) for line in raw.splitlines()]


@pytest.mark.faults
@pytest.mark.timeout(60 + 20 * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # os.fork in a process with threads: the child starts none
def test_what_was_answered_outlives_kills(tmp_path: Path) -> None:
    out, draw = tmp_path / "ranked.jsonl", random.Random(0)
    answered: list[str] = []
    for number in range(KILLS):
        reads, says = os.pipe()
        if (child := os.fork()) == 0:
            try:
                rank(out, says, random.Random(number))
            finally:
                os._exit(1)
        os.close(says)
        with os.fdopen(reads) as pipe:
            answered.append(pipe.readline().strip())  # it has begun
            time.sleep(draw.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            answered += pipe.read().splitlines()
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with Ranking(Rank(out=str(out), overlap=0.3)) as ranked:  # cuts a torn line
            stored = [f"{item_id} {name}" for item_id, judged in ranked.judged.items() for name in judged]
        assert set(answered) <= set(stored)
        records = [r for r in [*lines(out), *lines(tmp_path / "ranked-beside/aside.jsonl")] if "choices" in r]
        assert len(records) == len(stored) <= len(answered) + number + 1  # none twice; one unanswered a kill at most
    edits = [json.dumps(record) for record in lines(tmp_path / "ranked-beside/sft.jsonl")]
    assert len(edits) == len(set(edits)) > 0
    scores = [(r["input"], r["output"], r["annotator"]) for r in lines(out) if "score" in r]
    assert len(scores) == len(set(scores)) == 2 * sum("choices" in r for r in lines(out))
    print(f"{KILLS} kills, {len(answered)} answered, {len(stored)} stored")
