"""A reward model in use: its members, how completions are tokenized for it, and the rewards that it gives.

PPO, and the normalisation for PPO, score the sampled token ids themselves (`documents_from_ids`), since each of these
tokens is rewarded. All else (generate, chat, score, evaluate) scores the text, tokenized again (`documents_from_text`):
invalid UTF-8 as the U+FFFD that replaces it, so that scoring the written text gives the same number.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tetrad.console import counted
from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.data.tokens import tokenize
from tetrad.distributed.device import Device, chosen_device
from tetrad.distributed.sharding import evenly, place
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.inference.model_folder import (
    folder_template,
    model_folder,
    needed_template,
    no_reward,
    refuse_small_vocabulary,
)
from tetrad.model.config import is_reward
from tetrad.model.huggingface import read_members
from tetrad.model.transformer import ScalarModel, narrowed
from tetrad.settings.common import Run
from tetrad.stages import POLICY
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import template_for
from tetrad.types import Prompt, Tokens

SCORES_AT_ONCE = 128
"""Texts that are scored together, by every command: the batch affects the last bits of a score."""


class Reward(Protocol):
    """Samples in, one number each out."""

    def __call__(self, samples: Sequence[Completion]) -> list[float]: ...


@dataclass(frozen=True)
class RewardModel:
    """A reward model, or several as an ensemble, with its tokenizer and template."""

    members: Sequence[ScalarModel]
    tokenizer: Tokenizer
    template: Template
    device: Device
    folder: Path
    micro_batch_tokens: int = Run().micro_batch_tokens

    def scores(self, documents: Sequence[Tokens]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Every member's reward for every document, [members, documents]. Errors: E-DATA-LONG."""
        return member_scores(self.members, documents, self.device, self.micro_batch_tokens)

    def score_texts(self, samples: Sequence[Completion]) -> list[float]:
        """Mean rewards of the members for the samples' texts; what is too long is truncated on the left."""
        limit = self.members[0].config.max_positions
        documents = documents_from_text(self.template, self.tokenizer, samples)
        return self.scores([Tokens(t.ids[-limit:], t.train[-limit:]) for t in documents]).mean(0).tolist()  # type: ignore[no-any-return]


def documents_from_ids(samples: Sequence[Completion]) -> list[Tokens]:
    """The token ids of each prompt and its response as one document, without labels."""
    documents = [np.asarray(s.prompt_ids + s.response_ids, np.int32) for s in samples]
    return [Tokens(ids, np.zeros(len(ids), np.bool_)) for ids in documents]


def documents_from_text(template: Template, tokenizer: Tokenizer, samples: Sequence[Completion]) -> list[Tokens]:
    """The texts of each prompt and its response, tokenized by this tokenizer, as one document without labels; finished
    responses have their end token.

    Errors: E-DATA-*, E-MODEL-*.
    """
    heads = tokenize(template, tokenizer, [Prompt(sample.turns, sample.where) for sample in samples])
    bodies = tokenizer.encode_batch([template.said(sample.text) for sample in samples])
    end = template.end_id(tokenizer)
    documents = []
    for head, body, sample in zip(heads, bodies, samples, strict=True):
        ids = np.array([*head.ids.tolist(), *body, *([end] if sample.finished else [])], np.int32)
        documents.append(Tokens(ids, np.zeros(len(ids), np.bool_), head.where))
    return documents


def ids_meaning(tokenizer: Tokenizer, template: Template) -> str:
    """The same text where a policy and a reward model share tokenizer and template, so that ids mean the same."""
    return hashlib.sha256(f"{tokenizer.fingerprint} {template!r}".encode()).hexdigest()


@torch.no_grad()
def score_sequences(
    model: ScalarModel, documents: Sequence[Tokens], device: Device, micro_batch_tokens: int
) -> list[float]:
    """The model's reward at the last token of each document."""
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    ordered = [documents[i] for i in by_length]
    rewards = np.zeros(len(documents))
    model.eval()
    groups = evenly([model], micro_batches(ordered, micro_batch_tokens), device)
    for group in counted("scoring", groups, len(ordered), len):
        with device.compute():
            scores = model(device.put(pack([ordered[i] for i in group])), "scores")
        rewards[[by_length[i] for i in group]] = scores.double().cpu().numpy()
    return rewards.tolist()


def member_scores(
    members: Sequence[ScalarModel], documents: Sequence[Tokens], device: Device, micro_batch_tokens: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every member's reward for every document, [members, documents]. Errors: E-DATA-LONG."""
    limit = members[0].config.max_positions
    for document in documents:
        if len(document.ids) > limit:
            what = f"prompt and answer have {len(document.ids)} tokens, the reward model reads {limit}"
            raise UserError("E-DATA-LONG", what, where=document.where, hint="shorten the answer")
    return np.array([score_sequences(member, documents, device, micro_batch_tokens) for member in members])


def reward_function(
    members: Sequence[ScalarModel],
    device: Device,
    micro_batch_tokens: int,
    tokenize_samples: Callable[[Sequence[Completion]], list[Tokens]] = documents_from_ids,
    uncertainty_penalty: float = 0.0,
) -> Reward:
    """A function from samples to rewards: the mean of the members, minus `uncertainty_penalty` times their standard
    deviation (Coste et al. 2024).

    tokenize_samples: makes the documents of samples; see `sample_tokenizer`.
    """

    def reward(samples: Sequence[Completion]) -> list[float]:
        scores = member_scores(members, tokenize_samples(samples), device, micro_batch_tokens)
        rewards: list[float] = (scores.mean(0) - uncertainty_penalty * scores.std(0)).tolist()
        return rewards

    return reward


def load_reward(folder: str | Path, template: str = "", *, device: str = "auto", dtype: str = "auto") -> RewardModel:
    """The reward model of a run's stage ("runs/NAME/reward") or of a folder, with all members of an ensemble; template,
    device and dtype as in `tetrad.load`. Errors: E-MODEL-*, E-CKPT-*, E-CONF-{DEVICE,DTYPE,RANGE}."""
    path = model_folder(folder)
    if not is_reward(path):
        raise no_reward(path)
    chosen = chosen_device(device, dtype)
    members, tokenizer = read_members(path), Tokenizer.load(path)
    for member in members:
        narrowed(member.requires_grad_(False).eval().to(chosen.torch_device), chosen.frozen_dtype)
    refuse_small_vocabulary(members[0].config.vocab_size, tokenizer, path)
    return RewardModel(members, tokenizer, needed_template(folder_template(path, template), path), chosen, path)


def score_samples(reward_model: RewardModel, samples: Sequence[Completion]) -> list[float]:
    """The reward of each sample's text. Errors: E-DATA-LONG, E-NUM-NONFINITE."""
    documents = documents_from_text(reward_model.template, reward_model.tokenizer, samples)
    return score_documents(reward_model, documents).mean(0).tolist()  # type: ignore[no-any-return]


def score_documents(reward_model: RewardModel, documents: Sequence[Tokens]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each member's reward at each document's last token, [members, documents]. Errors: E-DATA-LONG,
    E-NUM-NONFINITE."""
    rewards = reward_model.scores(documents)
    for score, document in zip(rewards.sum(0).tolist(), documents, strict=True):
        if not math.isfinite(score):
            what = f"the reward model gives {score}"
            raise UserError("E-NUM-NONFINITE", what, where=document.where, hint="it is damaged: train it again")
    return rewards


def reward_model(
    ctx: StageContext,
    folder: Path,
    device: Device,
    tokenizer: Tokenizer | None = None,
    uncertainty_penalty: float = 0.0,
) -> Reward:
    """The rewards of the reward model in this folder; see `reward_function`. tokenizer: the policy's where it is being
    trained; see `sample_tokenizer`."""
    members = [member.requires_grad_(False) for member in read_members(folder)]
    members = [place(narrowed(member, device.frozen_dtype), device) for member in members]
    tokenize_samples = sample_tokenizer(ctx, folder, tokenizer)
    return reward_function(members, device, ctx.recipe.run.micro_batch_tokens, tokenize_samples, uncertainty_penalty)


def sample_tokenizer(
    ctx: StageContext, folder: Path, policy: Tokenizer | None = None
) -> Callable[[Sequence[Completion]], list[Tokens]]:
    """A function that makes documents for the reward model of this folder: of the samples' texts, or of their sampled
    ids if a policy is being trained and shares tokenizer and template with the reward model.

    policy: the tokenizer of the policy in training; None scores texts.
    """
    tokenizer, template = Tokenizer.load(folder), template_for(ctx, folder)
    if (
        policy
        and policy.fingerprint == tokenizer.fingerprint
        and template == template_for(ctx, first_parent(ctx, *POLICY))
    ):
        return documents_from_ids
    return partial(documents_from_text, template, tokenizer)
