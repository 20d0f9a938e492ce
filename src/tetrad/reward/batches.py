"""Comparisons and scores as the reward model reads them: one document per answer, and what is known about each.

Documents are in a token store in the order of the records; a record knows its first document and how many it has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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
from tetrad.types import Comparison, Score, Tokens

Record = Comparison | Score


@dataclass(frozen=True)
class Examples:
    """Records and one document per answer: those of record i are documents first[i] to first[i + 1]."""

    records: tuple[Record, ...]
    tokens: tuple[Tokens, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, records: Sequence[Record], tokens: Sequence[Tokens]) -> "Examples":
        sizes = [_size(record) for record in records]
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
        if overlong == "drop" and long:
            counts.dropped += len(long)
            kept = sorted(set(range(len(longest))) - set(long))
            if not kept:
                raise UserError("E-DATA-EMPTY", "every record is too long", where=self.records[0].where)
            documents = [t for i in kept for t in self.documents(i)]
            return Examples.of([self.records[i] for i in kept], documents)
        counts.cut += len(long)
        short = [Tokens(t.ids[-limit:], t.train[-limit:], t.where) for t in self.tokens]
        return Examples.of(self.records, short)

    def samples(self) -> list[Completion]:
        """Every answer as a completion, for Python functions."""
        samples = []
        for record in self.records:
            texts = record.answers if isinstance(record, Comparison) else (record.answer,)
            samples += [Completion((), (), record.prompt.turns, text, record.where) for text in texts]
        return samples


@dataclass(frozen=True)
class PreferenceTargets:
    """The human judgements on the D documents of a micro-batch.

    winners_P, losers_P, weights_P, margins_P: pairs, weights that sum to 1 over a list; lists_P: the
    number of each pair's list, on the CPU; labels_P: the share of votes for the winner, 1 where there are no votes.
    ranked_N: documents of the lists, ranks_N and bounds: their ranks, list by list. scored_S: documents with a score;
    targets_S: the standardised score, weights_S: its weight relative to one that is known exactly.
    by_P, by_L, by_S: numbers of the annotators of pairs, lists and scores; 0 where none is named.
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
    by_P: Tensor
    by_L: Tensor
    by_S: Tensor


def _informative(record: Record) -> bool:
    """Whether a loss can learn from it: a list of ties carries no information."""
    return isinstance(record, Score) or len(set(record.ranks)) > 1


def judgements(
    records: Sequence[Record],
    zero: float,
    unit: float,
    place: torch.device,
    numbers: Mapping[str, int] = MappingProxyType({}),
) -> PreferenceTargets:
    """zero, unit: the score whose target is 0, and the difference for a target of 1; numbers: of the annotators."""
    lists = [record for record in records if isinstance(record, Comparison)]
    rated = [record for record in records if isinstance(record, Score)]
    ranked, scored = _documents(records)
    bounds = (0, *np.cumsum([len(record.answers) for record in lists]).tolist())
    ranks = torch.tensor([rank for record in lists for rank in record.ranks], dtype=torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    winners, losers, weights = pairs_of(ranks, bounds) if lists else (none, none, torch.empty(0))
    of_list = torch.searchsorted(torch.tensor(bounds), winners, right=True) - 1
    margins = torch.tensor([record.margin for record in lists])[of_list] if lists else torch.empty(0)
    by = [torch.tensor([numbers.get(r.annotator, 0) for r in of]).long() for of in (lists, rated)]
    return PreferenceTargets(
        winners_P=ranked[winners].to(place),
        losers_P=ranked[losers].to(place),
        weights_P=weights.float().to(place),
        lists_P=of_list,
        labels_P=_labels(lists, winners, losers).to(place),
        margins_P=margins.to(place),
        ranked_N=ranked.to(place),
        ranks_N=ranks.to(place),
        bounds=bounds,
        scored_S=scored.to(place),
        targets_S=torch.tensor([(record.score - zero) / unit for record in rated]).to(place),
        weights_S=torch.tensor([1 / (1 + (record.spread / unit) ** 2) for record in rated]).to(place),
        by_P=by[0][of_list].to(place),
        by_L=by[0].to(place),
        by_S=by[1].to(place),
    )


def _documents(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """The documents of the answers of comparisons, and those of scores; int64."""
    kinds = [np.full(_size(r), isinstance(r, Comparison)) for r in records]
    of_lists = np.concatenate([np.zeros(0, np.bool_), *kinds])
    return torch.from_numpy(np.flatnonzero(of_lists)), torch.from_numpy(np.flatnonzero(~of_lists))


def _size(record: Record) -> int:
    """Its documents."""
    return 1 if isinstance(record, Score) else len(record.answers)


def _labels(lists: Sequence[Comparison], winners: Tensor, losers: Tensor) -> Tensor:
    """The winners' shares of the votes; 1 where there are no votes."""
    votes = torch.tensor([vote for record in lists for vote in record.votes or [math.nan] * len(record.ranks)])
    return (votes[winners] / (votes[winners] + votes[losers])).nan_to_num(1.0) if lists else torch.empty(0)


def preference_micros(
    records: Sequence[Record],
    documents: Sequence[Sequence[Tokens]],
    micro_batch_tokens: int,
    zero: float,
    unit: float,
    device: Device,
    numbers: Mapping[str, int] = MappingProxyType({}),
    shared_prefix: str = "auto",
    keys: Sequence[int] = (),
) -> list[Microbatch]:
    """Micro-batches of whole records, of at most `micro_batch_tokens` computed tokens. Counts: "comparisons"
    with an order, and "scores". shared_prefix: the setting of that name. keys: each record's dropout key."""
    prefixes = [_prefix(answers, shared_prefix, device) for answers in documents]
    micros = []
    for group in groups_of([_computed(*each) for each in zip(documents, prefixes, strict=True)], micro_batch_tokens):
        chosen = [records[i] for i in group]
        own = [keys[i] for i in group] if keys else ()
        packed = device.put(pack_groups([documents[i] for i in group], [prefixes[i] for i in group], own))
        scores = sum(isinstance(record, Score) for record in chosen)
        lists = sum(isinstance(record, Comparison) and _informative(record) for record in chosen)
        counts = {"comparisons": float(lists), "scores": float(scores)}
        micros.append(Microbatch(packed, counts, judgements(chosen, zero, unit, device.torch_device, numbers)))
    return micros


def _prefix(answers: Sequence[Tokens], shared_prefix: str, device: Device) -> int:
    """Tokens of a record that are computed once for all its answers; none on a GPU, which has no such kernel."""
    if shared_prefix == "never" or device.torch_device.type != "cpu":
        return 0
    prefix = common_prefix(answers)
    pays = shared_prefix == "always" or prefix_pays(prefix, [len(tokens.ids) for tokens in answers])
    return prefix if pays else 0


def _computed(answers: Sequence[Tokens], prefix: int) -> int:
    return sum(len(tokens.ids) for tokens in answers) - (len(answers) - 1) * prefix
