"""What it costs that two processes train together: data parallel and sharding, against the same work side by side.

    python benchmarks/parallel.py --shapes 256x4 512x8 >> benchmarks/results/parallel.jsonl

For each shape, hidden size and layers, two processes with one thread each take optimizer steps with as many tokens,
three ways in turn: "apart", two that know nothing of each other; "none", gradients summed over both; "full", sharded.
The step of "apart" is what the machine leaves two processes to compute; what the others take beyond it is communication
and waiting for each other. The weights are random: time does not depend on them. One JSON line a shape: seconds of the
median step (the slower process; least and most of the rounds) and the shares.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from tetrad.distributed import collectives, sharding
from tetrad.distributed.device import choose
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import CausalLM, initialise
from tetrad.settings.common import Optim, Run
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update
from tetrad.types import Tokens

WAYS = ("apart", "none", "full")
LENGTH, VOCABULARY = 256, 8192


def step_seconds(way: str, hidden: int, layers: int, tokens: int, steps: int) -> float:
    """Of the median step of this process, after two that are not counted."""
    torch.set_num_threads(1)
    collectives.start("cpu")
    device = replace(choose(Run(device="cpu", dtype="float32", threads=1)), shard="full" if way == "full" else "none")
    heads = hidden // 64
    config = DecoderConfig("qwen2", VOCABULARY, hidden, layers, heads, heads, 64, 4 * hidden, LENGTH)
    model = CausalLM(config)
    initialise(model, 0)
    model = sharding.place(model, device)
    optimizer = Optimizer(model, 1e-4, Optim())
    ids = np.random.default_rng(collectives.rank()).integers(VOCABULARY, size=(tokens // LENGTH, LENGTH))
    documents = [Tokens(row.astype(np.int32), np.ones(LENGTH, bool)) for row in ids]
    micros = language_micros(documents, tokens // 2, device)
    seconds = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        update(model, optimizer, micros, language_terms, device, max_norm=1.0)
        seconds.append(time.perf_counter() - begun)
    collectives.stop()
    return median(seconds[2:])


def together(way: str, words: list[str]) -> float:
    """Seconds of a step of the slower of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    given = os.environ | {"OMP_NUM_THREADS": "1"} | (group if way != "apart" else {})
    command = [sys.executable, __file__, "--worker", way, *words]
    ranks = [
        subprocess.Popen(command, env=given | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    return max(float(output.split()[-1]) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["256x4"])
    parser.add_argument("--tokens", type=int, default=4096, help="of each process and step, in two micro-batches")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=5)
    given = parser.parse_args()
    if given.worker:
        print(step_seconds(given.worker[0], *map(int, given.worker[1:])))
        return
    for shape in given.shapes:
        hidden, layers = map(int, shape.split("x"))
        words = list(map(str, (hidden, layers, given.tokens, given.steps)))
        rounds = [{way: together(way, words) for way in WAYS} for _ in range(given.rounds)]
        row = {way: [round(f(each[way] for each in rounds), 4) for f in (median, min, max)] for way in WAYS}
        shares = {way: round(median(1 - each["apart"] / each[way] for each in rounds), 3) for way in WAYS[1:]}
        print(json.dumps({"shape": shape, "tokens": given.tokens, "seconds": row, "share": shares}), flush=True)


if __name__ == "__main__":
    main()
