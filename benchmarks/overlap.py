"""Whether the sums of gradients travel while the last backward still computes: two processes, gloo, torch's profiler.

    PYTHONPATH=src:tests python benchmarks/overlap.py [none|full] [TRACE.json]

One step of SFT of a model of 13 million parameters in two micro-batches, after two that are not looked at. Prints, of
the first process, each of its collectives from its start to its end in percent of the last backward's span, and how
much of their time lies within a backward. On one core compute and communication take turns: what is shown is that they
are under way at the same time, not what that saves.
"""

import os
import socket
import sys
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import toys
from tetrad.distributed import collectives, sharding
from tetrad.model.transformer import CausalLM
from tetrad.settings.common import Optim
from tetrad.training import step
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer

NAMES = ("gloo:", "nccl:")


def train(shard: str, trace: str) -> None:
    torch.set_num_threads(1)
    collectives.start("cpu")
    device = replace(toys.CPU, shard=shard)
    model = CausalLM(toys.config(vocab_size=4096, hidden_size=384, layers=8, heads=6, kv_heads=6, head_dim=64, ff=768))
    toys.randomise(model, 1, std=0.02)
    model = sharding.place(model, device)
    optimizer = Optimizer(model, 1e-4, Optim())
    documents = list(collectives.shard([toys.document(toys.ids(64, i)) for i in range(8)]))
    backward = step._backward

    def marked(*given):
        with record_function("backward"):
            backward(*given)

    step._backward = marked
    for number in range(3):
        micros = language_micros(documents, 128, device)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step.update(model, optimizer, micros, step.language_terms, device)
        if collectives.is_main() and number == 2:
            show(seen, trace)
    collectives.stop()


def show(seen: profile, trace: str) -> None:
    events = [event for event in seen.events() if event.name == "backward" or event.name.startswith(NAMES)]
    passes = sorted((e.time_range.start, e.time_range.end) for e in events if e.name == "backward")
    begin, end = passes[-1]
    total = inside = 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        if event.name == "backward" or stop <= begin:
            continue
        shared = max(0.0, min(stop, end) - max(start, begin))
        total, inside = total + stop - start, inside + shared
        place = [100 * (moment - begin) / (end - begin) for moment in (start, stop)]
        print(f"{event.name:24} {(stop - start) / 1000:8.2f} ms, from {place[0]:6.1f} % to {place[1]:6.1f} %")
    print(
        f"the last of {len(passes)} backwards takes {(end - begin) / 1000:.1f} ms; {total / 1000:.1f} ms of collectives"
    )
    print(f"{100 * inside / max(total, 1e-9):.0f} % of them lie in it")
    if trace:
        seen.export_chrome_trace(trace)


def main(shard: str = "none", trace: str = "") -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    second = os.fork()
    os.environ["RANK"] = "0" if second else "1"
    train(shard, trace)
    if second:
        os.waitpid(second, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
