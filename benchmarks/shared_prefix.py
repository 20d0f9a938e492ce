"""What it brings to compute a prompt once for all its answers when the reward model trains.

    python benchmarks/shared_prefix.py --lines benchmarks/results/shared-prefix.jsonl
    python benchmarks/shared_prefix.py --sizes M --answers 4 --prompts 256 --tokens 64

Each case is one micro-batch of whole records, forward and backward, with the loss summed over all pairs: each document
by itself, and with the prefix shared. Answers have half to one and a half times the given tokens. Both take turns; a
line has the median of the pairs' ratios (above 1: sharing is faster), whether the rule would share in every record, and
the share of the processors that others took. In the end a table. Where others work beside it, OMP_WAIT_POLICY=passive
keeps the time that threads spin for each other out of both.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import measured

from tetrad.data.pack import common_prefix, pack, pack_groups, prefix_pays
from tetrad.distributed.device import Device
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import ScalarModel
from tetrad.types import Packed, Tokens

CPU = Device(torch.device("cpu"), torch.float32)
SIZES = {  # hidden, layers, heads, kv heads, ff, vocabulary
    "S": (128, 4, 4, 2, 512, 4096),
    "M": (512, 8, 8, 2, 1408, 8192),
}
MICRO_TOKENS = {"S": 4096, "M": 1536}  # of a case, each document by itself; at least one record


def model_of(size: str) -> ScalarModel:
    """Qwen2 with random weights."""
    hidden, layers, heads, kv_heads, ff, vocabulary = SIZES[size]
    shape = (vocabulary, hidden, layers, heads, kv_heads, hidden // heads, ff, 4096)
    torch.manual_seed(0)
    model = ScalarModel(DecoderConfig("qwen2", *shape, eos_ids=(2,), pad_id=0))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def records_of(size: str, answers: int, prompt: int, tokens: int) -> list[list[Tokens]]:
    """Documents of each record."""
    draw = np.random.default_rng(0)
    vocabulary = SIZES[size][-1]
    found = []
    for _ in range(max(1, round(MICRO_TOKENS[size] / (answers * (prompt + tokens))))):
        start = draw.integers(3, vocabulary, prompt)
        lengths = draw.integers(tokens // 2, tokens + tokens // 2 + 1, answers)
        ids = [np.concatenate((start, draw.integers(3, vocabulary, n))).astype(np.int32) for n in lengths]
        found.append([Tokens(x, np.arange(len(x)) >= prompt) for x in ids])
    return found


def step_of(model: ScalarModel, packed: Packed, answers: int) -> Callable[[], None]:
    """Forward and backward; gradients are made anew."""
    pairs = torch.combinations(torch.arange(answers))

    def step() -> None:
        model.zero_grad()
        r = model(packed, "scores").view(-1, answers)
        (-torch.nn.functional.logsigmoid(r[:, pairs[:, 0]] - r[:, pairs[:, 1]]).sum()).backward()

    return step


def case(size: str, answers: int, prompt: int, tokens: int, pairs: int, seconds: float) -> dict[str, Any]:
    """The figures of one shape of records."""
    records = records_of(size, answers, prompt, tokens)
    prefixes = [common_prefix(documents) for documents in records]
    flat = CPU.put(pack([document for documents in records for document in documents]))
    once = CPU.put(pack_groups(records, prefixes))
    model = model_of(size).train()
    steps = [step_of(model, packed, answers) for packed in (flat, once)]
    for step in steps:
        step()
    repeats = max(1, round(seconds / measured(steps[0])[0]))
    times: tuple[list[float], list[float]] = ([], [])
    foreign = []
    for _ in range(pairs):
        for step, of in zip(steps, times, strict=True):
            took, others = measured(lambda step=step: [step() for _ in range(repeats)])  # type: ignore[misc]
            of.append(took / repeats)
            foreign.append(others)
    every, kept = len(flat.ids_T), len(once.ids_T)
    rule = all(prefix_pays(prefix, [len(d.ids) for d in r]) for prefix, r in zip(prefixes, records, strict=True))
    return {
        "size": size,
        "answers": answers,
        "prompt": prompt,
        "tokens": tokens,
        "records": len(records),
        "saved": round(1 - kept / every, 3),
        "plain_ms": round(1000 * statistics.median(times[0]), 2),
        "shared_ms": round(1000 * statistics.median(times[1]), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3),
        "rule": rule,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "foreign_cpu": round(statistics.median(foreign), 3),
    }


def table(lines: list[dict[str, Any]]) -> None:
    """Ratios by answers and prompt, down, and size and tokens, across; in brackets where the rule says plain."""
    across = sorted({(line["size"], line["tokens"]) for line in lines}, key=lambda x: (-ord(x[0]), x[1]))
    found = {(x["answers"], x["prompt"], x["size"], x["tokens"]): x for x in lines}
    print("\nanswers  prompt" + "".join(f"{f'{size} {tokens}':>9}" for size, tokens in across))
    for answers, prompt in sorted({key[:2] for key in found}):
        cells = (found.get((answers, prompt, *column)) for column in across)
        texts = ("" if x is None else f"{x['ratio']:.2f}" if x["rule"] else f"({x['ratio']:.2f})" for x in cells)
        print(f"{answers:7d} {prompt:7d}" + "".join(f"{text:>9}" for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["S", "M"], choices=SIZES)
    parser.add_argument("--answers", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--prompts", nargs="*", type=int, default=[16, 64, 256, 512])
    parser.add_argument("--tokens", nargs="*", type=int, default=[16, 64, 256], help="of an answer, about")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one turn, at least one step")
    parser.add_argument("--lines", type=Path, help="also write the lines to this file")
    given = parser.parse_args()
    lines = []
    for shape in product(given.sizes, given.answers, given.prompts, given.tokens):
        lines.append(case(*shape, given.pairs, given.seconds))
        print(json.dumps(lines[-1]), flush=True)
    if given.lines:
        given.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table(lines)


if __name__ == "__main__":
    main()
