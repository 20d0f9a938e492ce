"""Resident memory by step: what a stage holds while every batch has other lengths.

    python examples/reviews-en/fetch.py
    python benchmarks/rss.py pretrain sft reward ppo --steps 2000 >> results.jsonl

Each named stage runs as a process of its own, on rows of 8 to 512 tokens that are joined from the reviews of that
example; those before it take a few steps. One JSON line each: MiB of resident memory at some steps, the mean of twenty
steps each (one alone is as large as its batch), and the growth from step 50 on (Linux only).
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

TEXT = Path(__file__).parent.parent / "examples/reviews-en/data/reviews.txt"
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo")
RECORDS = 2000
WINDOW = 20  # steps: what is freed goes back to the system every 20, so each window holds one such time
ROW_TOKENS = 512
RECIPE = """\
name = "rss"
[run]
out = "{folder}/runs"
save_every = 1_000_000
[model]
hidden_size = {hidden}
layers = {layers}
heads = {heads}
kv_heads = {kv_heads}
ff = {ff}
[tokenizer]
text = ["{folder}/text.txt"]
vocab_size = {vocab}
[pretrain]
text = ["{folder}/text.txt"]
tokens = {pretrain_tokens}
sequence_length = {sequence_length}
batch_tokens = {batch_tokens}
[sft]
data = ["{folder}/sft.jsonl"]
batch_size = {batch}
epochs = {sft_epochs}
max_tokens = {sequence_length}
overlong = "cut"
[reward]
data = ["{folder}/pairs.jsonl", "{folder}/scores.jsonl"]
score_scale = [0, 1]
batch_size = {batch}
epochs = {reward_epochs}
max_tokens = {sequence_length}
overlong = "cut"
normalise = 16
normalise_max_new_tokens = 32
[ppo]
prompts = ["{folder}/sft.jsonl"]
steps = {ppo_steps}
batch_size = {batch}
max_prompt = 448
overlong = "cut"
max_new_tokens = 32
ppo_epochs = 1
actor_lr = 1e-6
critic_lr = 1e-6
eval_every = 1_000_000
"""
SIZE = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ff": 512, "vocab": 4096}


def texts() -> Iterator[str]:
    """Neighbouring reviews joined to any length: about 8 to 512 tokens."""
    draw = random.Random(0)
    reviews = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line]
    while True:
        words, wanted, at = [], draw.randint(6, 380), draw.randrange(len(reviews))
        while len(words) < wanted:
            words += reviews[at % len(reviews)].split()
            at += 1
        yield " ".join(words[:wanted])


def write_data(folder: Path) -> None:
    source, draw = texts(), random.Random(1)
    (folder / "text.txt").write_text("".join(next(source) + "\n\n" for _ in range(RECORDS)), encoding="utf-8")

    def halves() -> tuple[str, str]:
        words = next(source).split()
        cut = draw.randrange(2, len(words) - 1)
        return " ".join(words[:cut]), " ".join(words[cut:])

    def rows() -> Iterator[dict[str, Any]]:
        for _ in range(RECORDS):
            begin, rest = halves()
            yield {"Instruction": "Go on.", "Input": begin, "Output": rest}

    sft, pairs, scores = list(rows()), list(rows())[: RECORDS // 2], list(rows())[: RECORDS // 2]
    judged = [{"Instruction": r["Instruction"], "Input": r["Input"], "chosen": r["Output"]} for r in pairs]
    for row in judged:
        row["rejected"] = halves()[1]
    for row in scores:
        row["score"] = round(draw.random(), 3)
    for name, made in {"sft": sft, "pairs": judged, "scores": scores}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def write_recipe(folder: Path, steps: dict[str, int], batch: int) -> Path:
    path = folder / "recipe.toml"
    batch_tokens = max(1, batch // 2) * ROW_TOKENS
    text = RECIPE.format(
        folder=folder,
        batch=batch,
        sequence_length=ROW_TOKENS,
        batch_tokens=batch_tokens,
        pretrain_tokens=steps["pretrain"] * batch_tokens,
        sft_epochs=steps["sft"] * batch / RECORDS,
        reward_epochs=steps["reward"] * batch / RECORDS,
        ppo_steps=steps["ppo"],
        **SIZE,
    )
    path.write_text(text, encoding="utf-8")
    return path


def resident_mib(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) >> 10 if found else 0


def curve(path: Path, stage: str, metrics: Path) -> tuple[dict[int, int], float]:
    """Runs a stage. The most MiB seen during each step, by its number; and the seconds it took."""
    began, seen, most = time.monotonic(), {0: 0}, 0
    child = subprocess.Popen([sys.executable, "-m", "tetrad", stage, str(path)], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        time.sleep(0.05)
        most = max(most, resident_mib(child.pid))
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if steps > max(seen):
            seen[steps], most = most, 0
    if child.returncode:
        raise SystemExit(f"{stage} failed")
    del seen[0]
    return seen, time.monotonic() - began


def measured(stage: str, steps: int, batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        path = write_recipe(folder, dict.fromkeys(STAGES, 4) | {stage: steps}, batch)
        for before in STAGES[: STAGES.index(stage)]:
            curve(path, before, folder / f"runs/rss/{before}/metrics.jsonl")
        seen, seconds = curve(path, stage, folder / f"runs/rss/{stage}/metrics.jsonl")
        last = max(seen)
        points = sorted({min(step, last) for step in (10, 50, 100, 200, 300, 500, 1000, 1500, last)})
        mib = {step: round(mean(most for s, most in seen.items() if step - WINDOW < s <= step)) for step in points}
        row = {
            "stage": stage,
            **SIZE,
            "batch": batch,
            "steps": last,
            "window": WINDOW,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
        }
        growth = round(mib[last] / mib[50], 3) if 50 in mib else None
        return {**row, "mib": mib, "growth": growth, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES[1:])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    for stage in asked.stages:
        print(json.dumps(measured(stage, asked.steps, asked.batch)), flush=True)


if __name__ == "__main__":
    main()
