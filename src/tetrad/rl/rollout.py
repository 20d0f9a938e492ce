"""Responses as PPO sees them: sampled, laid out [B, T], and scored again by actor, reference and critic.

T is the longest response; position t of a row is response token t. Models read prompt and response packed, so what they
return is flat, in the order of rows and tokens, and `unpack` makes it [B, T] again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tetrad.console import counted
from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.distributed.sharding import evenly
from tetrad.inference.completions import Completion, EncodedPrompt, complete
from tetrad.model.transformer import CausalLM
from tetrad.settings.common import Sampling
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.step import timed
from tetrad.types import Packed, Tokens


@dataclass(frozen=True)
class Rollout:
    """samples: prompt and response of each row. documents: the same as one document; labels are the response tokens.

    mask_BT: response tokens; finished_B: it ends with an end token; sampler_logprobs_BT: what the sampler
    computed.
    """

    samples: tuple[Completion, ...]
    documents: tuple[Tokens, ...]
    mask_BT: Tensor
    finished_B: Tensor
    sampler_logprobs_BT: Tensor


@timed("rollout")
def roll_out(
    actor: CausalLM,
    prompts: Sequence[EncodedPrompt],
    indices: Sequence[int],
    key: tuple[int, str, int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    device: Device,
) -> Rollout:
    """One response per prompt; see `complete`."""
    samples = complete(actor, prompts, indices, key, sampling, tokenizer, device, keep=True)
    documents = []
    for sample in samples:
        ids = np.asarray(sample.prompt_ids + sample.response_ids, np.int32)
        documents.append(Tokens(ids, np.arange(len(ids)) >= len(sample.prompt_ids), sample.where))
    lengths = torch.tensor([len(sample.response_ids) for sample in samples])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled = torch.tensor([p for sample in samples for p in sample.logprobs])
    finished = torch.tensor([sample.finished for sample in samples])
    return Rollout(tuple(samples), tuple(documents), mask, finished, unpack(sampled, mask))


def response_indices(prompts: int, samples_per_prompt: int) -> list[int]:
    """The indices of this rank's responses in the whole batch: those to one prompt are adjacent."""
    own = collectives.shard(range(prompts))
    return [n * samples_per_prompt + k for n in own for k in range(samples_per_prompt)]


def unpack(flat_N: Tensor, mask_BT: Tensor) -> Tensor:
    """[N] values of the masked positions, row by row, as [B, T] with 0 elsewhere."""
    return torch.zeros(mask_BT.shape, dtype=flat_N.dtype).masked_scatter_(mask_BT, flat_N.cpu())


def packs(documents: Sequence[Tokens], micro_batch_tokens: int, device: Device) -> list[tuple[list[int], Packed]]:
    """Row numbers and micro-batch, for rows in order: the same packing for every model that reads them."""
    groups = micro_batches(documents, micro_batch_tokens)
    return [(group, device.put(pack([documents[i] for i in group]))) for group in groups]


@torch.no_grad()
def read_logprobs(
    model: nn.Module, rollout: Rollout, micro_batch_tokens: int, device: Device, temperature: float
) -> Tensor:
    """Log-probabilities of the response tokens, [B, T]."""
    model.eval()
    outputs = []
    microbatches = packs(rollout.documents, micro_batch_tokens, device)
    for _, packed in counted("reading", evenly([model], microbatches, device), len(microbatches)):
        with device.compute():
            outputs.append(model(packed, "logprobs", temperature)[0])
    return unpack(torch.cat(outputs), rollout.mask_BT)


@torch.no_grad()
def read_values(critic: nn.Module, rollout: Rollout, micro_batch_tokens: int, device: Device) -> tuple[Tensor, Tensor]:
    """The critic's value before each response token, [B, T], and after the last one, [B]."""
    critic.eval()
    before, after = [], []
    microbatches = packs(rollout.documents, micro_batch_tokens, device)
    for group, packed in counted("reading", evenly([critic], microbatches, device), len(microbatches)):
        with device.compute():
            both = critic(packed, "both")
        after.append(both[: len(group)])
        before.append(both[len(group) :])
    return unpack(torch.cat(before), rollout.mask_BT), torch.cat(after).cpu()
