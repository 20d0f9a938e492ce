"""Documents to micro-batches on the device, and losses for evaluation only."""

from collections.abc import Sequence

import numpy as np
import torch

from tetrad.console import counted
from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.distributed.device import Device
from tetrad.model.transformer import CausalLM
from tetrad.training.step import Microbatch
from tetrad.types import IGNORE, Tokens


def language_micros(documents: Sequence[Tokens], micro_batch_tokens: int, device: Device) -> list[Microbatch]:
    """Micro-batches of at most `micro_batch_tokens` tokens; their count "tokens" is the number of targets."""
    micros = []
    for group in micro_batches(documents, micro_batch_tokens):
        packed = pack([documents[i] for i in group])
        micros.append(Microbatch(device.put(packed), {"tokens": float((packed.targets_T != IGNORE).sum())}))
    return micros


@torch.no_grad()
def mean_nll(
    model: CausalLM, documents: Sequence[Tokens], micro_batch_tokens: int, device: Device
) -> tuple[float, int]:
    """Nats per target token, and the number of targets."""
    model.eval()
    nats = tokens = 0.0
    micros = language_micros(documents, micro_batch_tokens, device)
    for micro in counted("held-out documents", micros, len(documents), lambda m: len(m.packed.bounds) - 1):
        with device.compute():
            nats += float(model(micro.packed, "nll"))
        tokens += micro.counts["tokens"]
    return nats / max(tokens, 1.0), int(tokens)


@torch.no_grad()
def response_logprobs(
    model: CausalLM, documents: Sequence[Tokens], micro_batch_tokens: int, device: Device, temperature: float = 1.0
) -> list[np.ndarray]:
    """Log-probabilities of each document's labels, one float32 array per document."""
    model.eval()
    arrays: list[np.ndarray] = []
    for group in counted("reading", micro_batches(documents, micro_batch_tokens), len(documents), len):
        packed = device.put(pack([documents[i] for i in group]))
        with device.compute():
            logprobs, _ = model(packed, "logprobs", temperature)
        sizes = [int(documents[i].train[1:].sum()) for i in group]
        arrays += [part.cpu().numpy() for part in logprobs.float().split(sizes)]
    return arrays
