"""Replies as PPO sees them: sampled, laid out [B, T], and read by the models that were not sampling.

T is the longest reply; position t of a row is reply token t. Models read prompt and reply packed, so what they return
is flat, in the order of rows and tokens, and `spread` puts it in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.data.records import Paths, read_prompts
from tetrad.data.source import Counts
from tetrad.data.tokens import OnLong, tokenize
from tetrad.engine.console import counted
from tetrad.engine.device import Device
from tetrad.engine.generate import Request, generate
from tetrad.engine.scoring import Sample
from tetrad.errors import UserError
from tetrad.model.decoder import CausalLM, ScalarModel
from tetrad.settings.common import Sampling
from tetrad.text.template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Packed, Prompt, Tokens


@dataclass(frozen=True)
class Question:
    """A prompt as ids, and what it says."""

    ids: tuple[int, ...]
    prompt: Prompt


@dataclass(frozen=True)
class Rollout:
    """samples: prompt and reply of each row. documents: the same as one document whose labels are the reply's tokens.

    mask_BT: reply tokens; ended_B: the reply ends with an end token; sampled_BT: the sampler's own log-probabilities.
    """

    samples: tuple[Sample, ...]
    documents: tuple[Tokens, ...]
    mask_BT: Tensor
    ended_B: Tensor
    sampled_BT: Tensor


def roll_out(
    actor: CausalLM,
    questions: Sequence[Question],
    numbers: Sequence[int],
    key: tuple[int, str, int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    device: Device,
) -> Rollout:
    """One reply a question. numbers: each question's place in the whole batch, which with key = (seed, purpose, step)
    decides its random numbers; a question that stands several times in a row is computed once."""
    actor.eval()
    requests = []
    for question, group in groupby(zip(questions, numbers, strict=True), itemgetter(0)):
        keys = tuple((*key, number) for _, number in group)
        requests.append(Request(question.ids, sampling, keys, actor.config.eos_ids))
    replies = generate(actor, requests, device, sampling.slots)
    samples, documents = [], []
    for question, reply in zip(questions, replies, strict=True):
        turns, where = question.prompt.turns, question.prompt.where
        text = tokenizer.decode(reply.ids)
        valid = tokenizer.is_utf8(reply.ids, text)
        samples.append(Sample(question.ids, reply.ids, turns, text, where, reply.ended, valid))
        ids = np.asarray(question.ids + reply.ids, np.int32)
        documents.append(Tokens(ids, np.arange(len(ids)) >= len(question.ids), where))
    lengths = torch.tensor([len(reply.ids) for reply in replies])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    sampled = torch.tensor([p for reply in replies for p in reply.logprobs])
    ended = torch.tensor([reply.ended for reply in replies])
    return Rollout(tuple(samples), tuple(documents), mask, ended, spread(sampled, mask))


def spread(flat_N: Tensor, mask_BT: Tensor) -> Tensor:
    """[N] values of the masked positions, row by row, as [B, T] with 0 elsewhere."""
    return torch.zeros(mask_BT.shape, dtype=flat_N.dtype).masked_scatter_(mask_BT, flat_N.cpu())


def packs(documents: Sequence[Tokens], micro_tokens: int, device: Device) -> list[tuple[list[int], Packed]]:
    """Row numbers and micro-batch, for rows in order: the same packing for every model that reads them."""
    groups = micro_batches(documents, micro_tokens)
    return [(group, device.put(pack([documents[i] for i in group]))) for group in groups]


@torch.no_grad()
def read_logprobs(model: CausalLM, rollout: Rollout, micro_tokens: int, device: Device, temperature: float) -> Tensor:
    """Log-probabilities of the reply tokens, [B, T]."""
    model.eval()
    parts = []
    parts_of = packs(rollout.documents, micro_tokens, device)
    for _, packed in counted("reading", parts_of, len(parts_of)):
        with device.compute():
            parts.append(model(packed, "logprobs", temperature)[0])
    return spread(torch.cat(parts), rollout.mask_BT)


@torch.no_grad()
def read_values(critic: ScalarModel, rollout: Rollout, micro_tokens: int, device: Device) -> tuple[Tensor, Tensor]:
    """The critic's value before each reply token, [B, T], and after the last one, [B]."""
    critic.eval()
    before, after = [], []
    parts_of = packs(rollout.documents, micro_tokens, device)
    for group, packed in counted("reading", parts_of, len(parts_of)):
        with device.compute():
            both = critic(packed, "both")
        after.append(both[: len(group)])
        before.append(both[len(group) :])
    return spread(torch.cat(before), rollout.mask_BT), torch.cat(after).cpu()


def read_questions(
    paths: Paths,
    form: Template,
    tokenizer: Tokenizer,
    counts: Counts,
    limit: int,
    room: int,
    on_long: OnLong = "refuse",
) -> list[Question]:
    """The prompts of record files. limit: the model's positions; room: tokens that the reply needs; on_long: what to
    do with a prompt that leaves too little, where cut takes tokens of its beginning.

    Errors: E-DATA-*; E-DATA-LONG names the first prompt that leaves too little room; E-DATA-EMPTY.
    """
    prompts, most = read_prompts(paths, counts), limit - room
    found = []
    for prompt, tokens in zip(prompts, tokenize(form, tokenizer, prompts, counts=counts), strict=True):
        long = len(tokens.ids) > most
        if long and (on_long == "refuse" or most < 1):
            what = f"the prompt has {len(tokens.ids)} tokens; {most} fit beside a reply of {room}"
            raise UserError("E-DATA-LONG", what, where=prompt.where, hint="shorten it, or lower max_new")
        counts.cut += long and on_long == "cut"
        counts.dropped += long and on_long == "drop"
        if not (long and on_long == "drop"):
            found.append(Question(tuple(tokens.ids[-most:].tolist()), prompt))
    if not found:
        what = f"no prompt leaves room for a reply of {room} tokens"
        raise UserError("E-DATA-EMPTY", what, hint="shorten the prompts, or lower max_new")
    return found
