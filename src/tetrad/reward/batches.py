"""Comparisons and scores as the reward model reads them: one document per answer, and what is known about each.

Documents are in a token store in the order of the records; a record knows its first document and how many it has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrad.data.loader import groups_of
from tetrad.data.pack import common_prefix, pack_groups, prefix_pays
from tetrad.data.source import Counts
from tetrad.data.tokens import too_long
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.objectives.preference import pairs_of
from tetrad.training.step import Microbatch
from tetrad.types import IGNORE, Comparison, Packed, Score, Tokens

Record = Comparison | Score
NO_ANNOTATORS: Mapping[str, int] = MappingProxyType({})


def texts(record: Record) -> tuple[str, ...]:
    """Its answers."""
    return record.answers if isinstance(record, Comparison) else (record.answer,)


@dataclass(frozen=True)
class Examples:
    """Records and one document per answer: those of record i are documents first[i] to first[i + 1]."""

    records: tuple[Record, ...]
    tokens: tuple[Tokens, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, records: Sequence[Record], tokens: Sequence[Tokens]) -> "Examples":
        sizes = [len(texts(record)) for record in records]
        return cls(tuple(records), tuple(tokens), (0, *np.cumsum(sizes).tolist()))

    def documents(self, i: int) -> tuple[Tokens, ...]:
        return self.tokens[self.first[i] : self.first[i + 1]]

    def fitted(self, limit: int, overlong: str, counts: Counts) -> "Examples":
        """Documents of at most `limit` tokens: longer ones are refused, truncated on the left, or dropped by record.

        Errors: E-DATA-LONG, E-DATA-EMPTY.
        """
        longest = [max(len(t.ids) for t in self.documents(i)) for i in range(len(self.records))]
        long = [i for i, length in enumerate(longest) if length > limit]
        if long and overlong == "refuse":
            raise too_long(len(long), len(longest), max(longest), limit, self.records[long[0]].where)
        if overlong == "drop":
            counts.dropped += len(long)
            short = [i for i, length in enumerate(longest) if length <= limit]
            if not short:
                raise UserError("E-DATA-EMPTY", "every record is too long", where=self.records[0].where)
            return Examples.of([self.records[i] for i in short], [t for i in short for t in self.documents(i)])
        counts.cut += len(long)
        return Examples.of(self.records, [Tokens(t.ids[-limit:], t.train[-limit:], t.where) for t in self.tokens])

    def samples(self) -> list[Completion]:
        """Every answer as a completion, for Python functions."""
        return [Completion((), (), r.prompt.turns, text, r.where) for r in self.records for text in texts(r)]


@dataclass(frozen=True)
class PreferenceTargets:
    """The human judgements on the D documents of a micro-batch.

    winners_P, losers_P, weights_P, margins_P: pairs, weights that sum to 1 over a list; lists_P: the number of each
    pair's list; labels_P: the share of votes for the winner, 1 where there are no votes.
    ranked_N: documents of the lists, ranks_N and bounds: their ranks, list by list. scored_S: documents with a score;
    targets_S: the standardised score, weights_S: its weight relative to one that is known exactly.
    annotators_L, annotators_S: ids of the annotators of lists and scores; 0 where none is named.
    """

    winners_P: Tensor
    losers_P: Tensor
    weights_P: Tensor
    lists_P: Tensor
    labels_P: Tensor
    margins_P: Tensor
    ranked_N: Tensor
    ranks_N: Tensor
    bounds: tuple[int, ...]
    scored_S: Tensor
    targets_S: Tensor
    weights_S: Tensor
    annotators_L: Tensor
    annotators_S: Tensor

    def smoothed(self, probability: float) -> Tensor:
        """labels_P where a stated order is wrong with this probability."""
        return self.labels_P * (1 - probability) + (1 - self.labels_P) * probability

    def to(self, device: torch.device) -> "PreferenceTargets":
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def judgements(
    records: Sequence[Record],
    offset: float = 0.0,
    scale: float = 1.0,
    annotator_ids: Mapping[str, int] = NO_ANNOTATORS,
) -> PreferenceTargets:
    """On the CPU. offset, scale: a score's target is (score - offset) / scale; annotator_ids: by name."""
    lists = [record for record in records if isinstance(record, Comparison)]
    scores = [record for record in records if isinstance(record, Score)]
    of_list = torch.tensor(
        [isinstance(record, Comparison) for record in records for _ in texts(record)], dtype=torch.bool
    )
    ranked, bounds = of_list.nonzero()[:, 0], (0, *np.cumsum([len(record.answers) for record in lists]).tolist())
    ranks = torch.tensor([rank for record in lists for rank in record.ranks], dtype=torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    winners, losers, weights = pairs_of(ranks, bounds) if lists else (none, none, torch.empty(0))
    lists_P = torch.searchsorted(torch.tensor(bounds), winners, right=True) - 1
    votes = torch.tensor([vote for record in lists for vote in record.votes or [math.nan] * len(record.ranks)])
    margins = torch.tensor([record.margin for record in lists])
    return PreferenceTargets(
        winners_P=ranked[winners],
        losers_P=ranked[losers],
        weights_P=weights.float(),
        lists_P=lists_P,
        labels_P=(votes[winners] / (votes[winners] + votes[losers])).nan_to_num(1.0),
        margins_P=margins[lists_P],
        ranked_N=ranked,
        ranks_N=ranks,
        bounds=bounds,
        scored_S=(~of_list).nonzero()[:, 0],
        targets_S=torch.tensor([(record.score - offset) / scale for record in scores]),
        weights_S=torch.tensor([1 / (1 + (record.spread / scale) ** 2) for record in scores]),
        annotators_L=torch.tensor([annotator_ids.get(record.annotator, 0) for record in lists], dtype=torch.int64),
        annotators_S=torch.tensor([annotator_ids.get(record.annotator, 0) for record in scores], dtype=torch.int64),
    )


def answer_tokens(packed: Packed) -> tuple[Tensor, Tensor]:
    """The document of each label of a pack, [N], and the number of labels of each document, float, [D]."""
    ends = torch.tensor(packed.bounds[1:], device=packed.targets_T.device)
    documents_N = torch.searchsorted(ends, (packed.targets_T != IGNORE).nonzero()[:, 0], right=True)
    return documents_N, torch.bincount(documents_N, minlength=len(ends)).float()


def preference_micros(
    records: Sequence[Record],
    documents: Sequence[Sequence[Tokens]],
    micro_batch_tokens: int,
    offset: float,
    scale: float,
    device: Device,
    annotator_ids: Mapping[str, int] = NO_ANNOTATORS,
    shared_prefix: str = "auto",
    keys: Sequence[int] = (),
    *,
    every_label: bool = False,
) -> list[Microbatch]:
    """Micro-batches of whole records, of at most `micro_batch_tokens` computed tokens. Counts: "comparisons"
    with an order, and "scores". shared_prefix: the setting of that name. keys: each record's dropout key. every_label:
    nothing is shared that would cost an answer a label."""
    prefixes = [_prefix(answers, shared_prefix, device, every_label) for answers in documents]
    micros = []
    for group in groups_of([_computed(*each) for each in zip(documents, prefixes, strict=True)], micro_batch_tokens):
        chosen = [records[i] for i in group]
        own = [keys[i] for i in group] if keys else ()
        packed = device.put(pack_groups([documents[i] for i in group], [prefixes[i] for i in group], own))
        # A list of ties carries no information.
        lists = sum(isinstance(record, Comparison) and len(set(record.ranks)) > 1 for record in chosen)
        counts = {"comparisons": float(lists), "scores": float(sum(isinstance(record, Score) for record in chosen))}
        targets = judgements(chosen, offset, scale, annotator_ids).to(device.torch_device)
        micros.append(Microbatch(packed, counts, targets))
    return micros


def _prefix(answers: Sequence[Tokens], shared_prefix: str, device: Device, every_label: bool) -> int:
    """Tokens of a record that are computed once for all its answers; none on a GPU, which has no such kernel.

    every_label: each answer has its own last token before its first label, from which that is predicted."""
    if shared_prefix == "never" or device.torch_device.type != "cpu":
        return 0
    prefix = common_prefix(answers)
    if every_label:
        prefix = max(0, min(prefix, *(int(tokens.train.argmax()) - 1 for tokens in answers)))
    pays = shared_prefix == "always" or prefix_pays(prefix, [len(tokens.ids) for tokens in answers])
    return prefix if pays else 0


def _computed(answers: Sequence[Tokens], prefix: int) -> int:
    return sum(len(tokens.ids) for tokens in answers) - (len(answers) - 1) * prefix
