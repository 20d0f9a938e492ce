"""Fallible annotators, learned jointly with the reward: how often each is right, and how each uses the score scale.

A comparison by annotator a is P(i over j) = c_a sigmoid(d) + (1 - c_a) sigmoid(-d), d = r_i - r_j (Chen et al. 2013): a
competence c_a of 1 is always right, 0.5 is a coin toss, below 0.5 means the opposite. A score is b_a + k_a r. Logits of
competences are normal around a common one, offsets around 0 and gains around 1, so that an annotator with few records
is treated as an average one. Records without a name share the common competence.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tetrad.objectives.preference import crowd_pair_losses
from tetrad.reward.batches import PreferenceTargets, Record
from tetrad.types import Comparison, Score

START = 2.2  # logit of the initial competence, 0.9
SPREAD, OFFSET_SPREAD, GAIN_SPREAD = 1.5, 0.5, 0.3  # of logits; of offsets and log gains, in standard deviations
_LOGITS = torch.linspace(-5, 5, 201, dtype=torch.float64)  # of competence
LR = 0.2  # these few parameters must move far in few steps


def numbers_of(records: Sequence[Record]) -> dict[str, int]:
    """Each annotator's number from 1 on, by name; 0 is for records without one."""
    return {name: i for i, name in enumerate(sorted({record.annotator for record in records} - {""}), start=1)}


class Annotators(nn.Module):
    """common: logit of the common competence, minus START. own, offset, log_gain [A]: of each annotator."""

    comparisons: Tensor
    scores: Tensor

    def __init__(self, records: Sequence[Record], numbers: Mapping[str, int]) -> None:
        super().__init__()
        size = len(numbers) + 1
        counts = torch.zeros(2, size)
        for record in records:
            counts[int(isinstance(record, Score)), numbers.get(record.annotator, 0)] += 1
        judged, rated = (bool(row[1:].any()) for row in counts)
        self.register_buffer("comparisons", counts[0], persistent=False)
        self.register_buffer("scores", counts[1], persistent=False)
        self.common = nn.Parameter(torch.zeros(()), requires_grad=judged)
        self.own = nn.Parameter(torch.zeros(size), requires_grad=judged)
        self.offset = nn.Parameter(torch.zeros(size), requires_grad=rated)
        self.log_gain = nn.Parameter(torch.zeros(size), requires_grad=rated)

    def competence(self, annotators: Tensor) -> Tensor:
        """Logits of the competence of these annotators."""
        return START + self.common + self.own[annotators] * (annotators > 0)

    def rated(self, rewards_S: Tensor, annotators_S: Tensor) -> Tensor:
        """The scores that these annotators would give."""
        named = annotators_S > 0
        return self.offset[annotators_S] * named + rewards_S * (self.log_gain[annotators_S] * named).exp()

    def comparison_prior(self, annotators: Tensor) -> Tensor:
        """Summed over all records: the negative log prior."""
        return self._prior((self.own / SPREAD).square(), self.comparisons, annotators)

    def score_prior(self, annotators: Tensor) -> Tensor:
        """The same for offsets and gains."""
        far = (self.offset / OFFSET_SPREAD).square() + (self.log_gain / GAIN_SPREAD).square()
        return self._prior(far, self.scores, annotators)

    @staticmethod
    def _prior(square_A: Tensor, counts_A: Tensor, annotators: Tensor) -> Tensor:
        """Each record carries its share of its annotator's prior."""
        share = square_A / (2 * counts_A.clamp(min=1))
        return (share[annotators] * (annotators > 0)).sum()


@dataclass(frozen=True)
class Reliability:
    """How often an annotator is right, with a 95 % interval, and the number of comparisons."""

    annotator: str
    comparisons: int
    right: float
    low: float
    high: float


@dataclass(frozen=True)
class Suspect:
    """A comparison that may be flipped, and how likely that is."""

    where: str
    annotator: str
    chance: float


def judged(
    records: Sequence[Record], targets: PreferenceTargets, rewards_D: Tensor, numbers: Mapping[str, int]
) -> tuple[list[Reliability], list[Suspect]]:
    """Each annotator's reliability, worst first, and the records that look flipped, most likely first.

    targets: the judgements of all records; rewards_D: rewards of their answers, on the trained scale.
    """
    lists = [record for record in records if isinstance(record, Comparison)]
    of_list = targets.lists_P
    gaps, weights = rewards_D[targets.winners_P] - rewards_D[targets.losers_P], targets.weights_P
    rows: dict[str, list[int]] = defaultdict(list)
    for pair, number in enumerate(of_list.tolist()):
        rows[lists[number].annotator].append(pair)
    logs = {
        name: -(crowd_pair_losses(gaps[pairs, None].double(), _LOGITS) * weights[pairs, None].double()).sum(0)
        for name, pairs in rows.items()
        if name in numbers
    }
    if not logs:
        return [], []
    reliabilities = _reliabilities(logs, {name: len(of_list[rows[name]].unique()) for name in logs})
    flips: dict[int, float] = defaultdict(float)
    for name, c in ((r.annotator, torch.tensor(r.right).logit()) for r in reliabilities):
        own = rows[name]
        odds = logsigmoid(-c) + logsigmoid(-gaps[own]) - logsigmoid(c) - logsigmoid(gaps[own])
        for number, chance in zip(of_list[own].tolist(), (odds.sigmoid() * weights[own]).tolist(), strict=True):
            flips[number] += chance
    suspects = (Suspect(lists[i].where, lists[i].annotator, chance) for i, chance in flips.items() if chance > 0.5)
    return sorted(reliabilities, key=lambda r: r.right), sorted(suspects, key=lambda s: -s.chance)


def _reliabilities(logs: Mapping[str, Tensor], comparisons: Mapping[str, int]) -> list[Reliability]:
    """logs: of each annotator, the log-likelihood of each of _LOGITS."""
    common = _LOGITS[torch.stack(list(logs.values())).sum(0).argmax()]
    right, reliabilities = _LOGITS.sigmoid(), []
    for name, log in logs.items():
        chance = (log - 0.5 * ((_LOGITS - common) / SPREAD) ** 2).softmax(0)
        low, high = (float(right[(chance.cumsum(0) < q).sum()]) for q in (0.025, 0.975))
        reliabilities.append(Reliability(name, comparisons[name], float(chance @ right), low, high))
    return reliabilities


def written(reliabilities: Sequence[Reliability], suspects: Sequence[Suspect]) -> dict[str, Any]:
    """For annotators.json."""
    return {"annotators": [asdict(r) for r in reliabilities], "suspects": [asdict(s) for s in suspects]}
