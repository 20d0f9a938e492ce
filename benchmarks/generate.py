"""How fast replies are sampled: Tetrad's engine beside `generate` of transformers, on the same work.

    python benchmarks/generate.py pairs S32 S8 S1 M32 M1
    python benchmarks/generate.py growth --plot growth.svg

`pairs`: size and batch. Models have random weights; prompts have 8 to 200 tokens (median 60); a bias on the end token
ends a reply with a chance of about 1/40 a token, at 128 tokens at the latest; temperature 1, no filters. The peer gets
batches padded on the left, as it wants them, Tetrad all requests and that many slots. Peer and Tetrad take turns; one
JSON line a case has the useful tokens a second of each turn, the median of the pairs' ratios, and the share of the
processors that others took. `bandwidth` is what a step reads of weights and cache, by the machine's own reading speed.
`growth`: tokens a second of Tetrad alone against batch, context and size.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import measured

from tetrad.distributed.device import Device
from tetrad.inference.engine import Engine, Request, generate
from tetrad.inference.fused_model import Fused
from tetrad.inference.kv_cache import cache_bytes
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import CausalLM, initialise
from tetrad.settings.common import Sampling

CPU = Device(torch.device("cpu"), torch.float32)
END, NEW, POSITIONS = 2, 128, 4096
SIZES = {  # hidden, layers, heads, kv heads, ff, vocabulary
    "XS": (64, 2, 2, 1, 256, 2048),
    "S": (128, 4, 4, 2, 512, 4096),
    "M": (512, 8, 8, 2, 1408, 8192),
    "L": (896, 24, 14, 2, 4864, 32768),
}


def model_of(size: str) -> CausalLM:
    """Qwen2 with random weights."""
    hidden, layers, heads, kv_heads, ff, vocabulary = SIZES[size]
    shape = (vocabulary, hidden, layers, heads, kv_heads, hidden // heads, ff, POSITIONS)
    model = CausalLM(DecoderConfig("qwen2", *shape, eos_ids=(END,), pad_id=0))
    initialise(model, 0)
    return model.eval()


def prompts_of(count: int, vocabulary: int) -> list[list[int]]:
    """Log-normal lengths."""
    draw = np.random.default_rng(3)
    lengths = np.exp(draw.normal(math.log(60), 0.6, count)).clip(8, 200).astype(int)
    return [draw.integers(3, vocabulary, n).tolist() for n in lengths]


def theirs_of(model: CausalLM, prompts: list[list[int]], batch: int, bias: float) -> Callable[[int], int]:
    """The peer: one call samples all prompts and returns the number of useful tokens."""
    import transformers

    c = model.config
    peer = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.ff,
            max_position_embeddings=c.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=0,
        )
    ).eval()
    peer.load_state_dict(model.state_dict(), strict=False)

    class Biased(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, END] += bias
            return scores

    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        useful = 0
        for start in range(0, len(prompts), batch):
            rows = prompts[start : start + batch]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            out = peer.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW,
                logits_processor=transformers.LogitsProcessorList([Biased()]),
            )
            for reply in out[:, longest:].tolist():
                useful += reply.index(END) + 1 if END in reply else len(reply)
        return useful

    return sample


def ours_of(model: CausalLM, prompts: list[list[int]], batch: int, bias: float) -> Callable[[int], int]:
    """Tetrad, with the model in use: its weights were laid out before, as chat and server do once."""
    fused = Fused(model, torch.float32)

    def sample(seed: int) -> int:
        requests = [
            Request(tuple(prompt), Sampling(max_new_tokens=NEW), ((seed, "benchmark", 0, i),), (END,), bias={END: bias})
            for i, prompt in enumerate(prompts)
        ]
        return sum(len(reply.ids) for reply in generate(fused, requests, CPU, batch))

    return sample


def rate(sample: Callable[[int], int], seed: int, seconds: float) -> tuple[float, float]:
    """Useful tokens a second over at least so many seconds, and the share that others took."""
    tokens = 0

    def work() -> None:
        nonlocal tokens
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            tokens += sample(seed)

    took, others = measured(work)
    return tokens / took, others


def reading_speed() -> float:
    """Bytes a second of a sum over 512 MiB: what the machine's memory gives."""
    block = torch.ones(128 << 20)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def pair(case: str, pairs: int, seconds: float) -> dict[str, Any]:
    """The figures of one size and batch."""
    size = case.rstrip("0123456789")
    batch = int(case[len(size) :])
    model = model_of(size)
    prompts = prompts_of(64 if batch > 1 else 8, model.config.vocab_size)
    bias = math.log(model.config.vocab_size / 40)
    peer, own = theirs_of(model, prompts, batch, bias), ours_of(model, prompts, batch, bias)
    peer(0), own(0)
    theirs, ours, foreign = [], [], []
    for number in range(pairs):
        for sample, rates in ((peer, theirs), (own, ours)):
            speed, others = rate(sample, number, seconds)
            rates.append(speed)
            foreign.append(others)
    read = 4 * sum(p.numel() for p in model.parameters()) + cache_bytes(model.config, batch, 120, torch.float32)
    return {
        "size": size,
        "batch": batch,
        "transformers_tokens_per_second": [round(x) for x in theirs],
        "tetrad_tokens_per_second": [round(x) for x in ours],
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "bandwidth": round(statistics.median(ours) / batch * read / reading_speed(), 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "foreign_cpu": round(max(foreign), 3),
    }


def steady(fused: Fused, batch: int, context: int, seconds: float) -> float:
    """Tokens a second of `batch` replies of 32 tokens that begin at this context, prompts not counted: the median."""
    draw, times = np.random.default_rng(0), []
    engine = Engine(fused, CPU, batch, context + 64)
    prompts = [draw.integers(3, fused.config.vocab_size, context).tolist() for _ in range(batch)]
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        request_ids = []
        for number, prompt in enumerate(prompts):
            request_ids.append(
                engine.add(Request(tuple(prompt), Sampling(max_new_tokens=64), ((0, "growth", 0, number),), ()))
            )
        while len(engine.advance()) < batch:  # long prompts come one after another
            pass
        start = time.perf_counter()
        for _ in range(32):
            engine.advance()
        times.append(time.perf_counter() - start)
        for request_id in request_ids:
            engine.cancel(request_id)
    return 32 * batch / statistics.median(times)


def growth(seconds: float) -> list[dict[str, Any]]:
    """Against batch at 64 tokens, against context at batches of 1 and 8, each size."""
    found = []
    for size in ("XS", "S", "M"):
        fused = Fused(model_of(size), torch.float32)
        for batch in (1, 2, 4, 8, 16, 32, 64):
            found.append({"size": size, "batch": batch, "context": 64})
        for context in (128, 256, 512, 1024, 2048):
            found += [{"size": size, "batch": batch, "context": context} for batch in (1, 8)]
        for point in found:
            if point["size"] == size:
                point["tokens_per_second"] = round(steady(fused, point["batch"], point["context"], seconds))
                print(json.dumps(point), flush=True)
    return found


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Two charts: against batch, against context."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for size in dict.fromkeys(point["size"] for point in points):
        mine = [point for point in points if point["size"] == size]
        for axis, key, fixed, value in ((left, "batch", "context", 64), (right, "context", "batch", 8)):
            line = sorted((p[key], p["tokens_per_second"]) for p in mine if p[fixed] == value)
            axis.plot(*zip(*line, strict=True), marker="o", label=size)
    for axis, name in ((left, "batch (context 64)"), (right, "context (batch 8)")):
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="tokens a second")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs", "growth"])
    parser.add_argument("cases", nargs="*", help="size and batch: S32")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--plot", type=Path, help="growth: an image file")
    parser.add_argument("--points", type=Path, help="growth: draw these lines instead of measuring")
    given = parser.parse_args()
    if given.what == "pairs":
        for case in given.cases:
            print(json.dumps(pair(case, given.pairs, given.seconds)), flush=True)
        return
    if given.points:
        points = [json.loads(line) for line in given.points.read_text().splitlines()]
    else:
        points = growth(given.seconds / 10)
    if given.plot:
        plot(points, given.plot)


if __name__ == "__main__":
    main()
