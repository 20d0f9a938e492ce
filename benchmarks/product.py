"""Whether oneDNN multiplies faster than torch's own products in training, on this processor.

    OMP_NUM_THREADS=1 python benchmarks/product.py >> benchmarks/results/product.jsonl

One model is trained with both, step by step in turn on the same batch, of documents of 8 to 512 tokens or of one
length. A line has microseconds of processor time a token with either, and the median of the pairs' ratios (above 1:
oneDNN is faster). Which one trains is decided in `kernels/onednn.py`, by the processor's vector units.
"""

import json
import statistics
import time

import numpy as np
import torch
from torch import nn

from tetrad.distributed.device import Device
from tetrad.kernels import onednn
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import CausalLM, initialise
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update
from tetrad.types import Tokens

CPU = Device(torch.device("cpu"), torch.float32)
SIZES = {  # hidden, layers, heads, kv heads, ff, vocabulary; steps
    "S": ((128, 4, 4, 2, 512, 4096), 40),
    "M": ((512, 8, 8, 2, 1408, 8192), 12),
}
UNCOUNTED = 4  # steps
BATCHES = ((4, 0), (4, 256), (16, 0))  # documents, and the length of each; 0 is any


def model_of(hidden: int, layers: int, heads: int, kv_heads: int, ff: int, vocabulary: int) -> CausalLM:
    shape = (vocabulary, hidden, layers, heads, kv_heads, hidden // heads, ff, 512)
    model = CausalLM(DecoderConfig("qwen2", *shape, eos_ids=(2,), pad_id=0))
    initialise(model, seed=0)
    return model


def seconds_of(model: nn.Module, optimizer: Optimizer, documents: list[Tokens], by_onednn: bool) -> float:
    onednn._IN_TRAINING = by_onednn
    began = time.process_time()
    update(model, optimizer, language_micros(documents, 4096, CPU), language_terms, CPU)
    return time.process_time() - began


def compared(size: str, count: int, length: int) -> dict[str, object]:
    shape, steps = SIZES[size]
    model, draw = model_of(*shape), np.random.default_rng(0)
    optimizer = Optimizer(model, 1e-4, Optim())
    spent: dict[bool, list[float]] = {True: [], False: []}
    for step in range(UNCOUNTED + steps):
        lengths = [length or int(draw.integers(8, 513)) for _ in range(count)]
        ids = [draw.integers(3, shape[-1], n).astype(np.int32) for n in lengths]
        documents = [Tokens(x, np.ones(len(x), dtype=bool), "") for x in ids]
        for by_onednn in (True, False) if step % 2 else (False, True):
            spent[by_onednn].append(seconds_of(model, optimizer, documents, by_onednn) / sum(lengths))
    fast, plain = (spent[onednn][UNCOUNTED:] for onednn in (True, False))
    return {
        "size": size,
        "documents": count,
        "length": length or "8 to 512",
        "onednn_us": round(1e6 * statistics.median(fast)),
        "plain_us": round(1e6 * statistics.median(plain)),
        "plain_to_onednn": round(statistics.median(b / a for a, b in zip(fast, plain, strict=True)), 3),
    }


def main() -> None:
    where = {"vectors": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    for size in SIZES:
        for count, length in BATCHES:
            print(json.dumps(compared(size, count, length) | where), flush=True)


if __name__ == "__main__":
    main()
