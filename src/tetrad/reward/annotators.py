"""Fallible annotators, learned jointly with the reward: how often each is right, and how each uses the score scale.

A comparison by annotator a is P(i over j) = c_a sigmoid(d) + (1 - c_a) sigmoid(-d), d = r_i - r_j (Chen et al. 2013): a
competence c_a of 1 is always right, 0.5 is a coin toss, below 0.5 means the opposite. A score is b_a + k_a r. Logits of
competences are normal around a common one, offsets around 0 and gains around 1, so that an annotator with few records
is treated as an average one. Records without a name share the common competence.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tetrad.console import Console
from tetrad.objectives.preference import crowd_pair_losses
from tetrad.reward.batches import Record, judgements
from tetrad.types import Comparison, Score

START = 2.2  # logit of the initial competence, 0.9
LOGIT_STD, OFFSET_STD, GAIN_STD = 1.5, 0.5, 0.3  # of the priors; offsets and log gains in standard deviations of scores
_LOGITS = torch.linspace(-5, 5, 201, dtype=torch.float64)  # of competence
LR = 0.2  # these few parameters must move far in few steps


def ids_of_annotators(records: Sequence[Record]) -> dict[str, int]:
    """By name, from 1 on; 0 is for records without one."""
    return {name: i for i, name in enumerate(sorted({record.annotator for record in records} - {""}), start=1)}


class Annotators(nn.Module):
    """common: logit of the common competence, minus START. own, offset, log_gain [A]: of each annotator; the first are
    not learned, they stand for records without a name."""

    comparisons: Tensor
    scores: Tensor

    def __init__(self, records: Sequence[Record], annotator_ids: Mapping[str, int]) -> None:
        super().__init__()
        size = len(annotator_ids) + 1
        counts = torch.zeros(2, size)
        for record in records:
            counts[int(isinstance(record, Score)), annotator_ids.get(record.annotator, 0)] += 1
        compares, scores = (bool(row[1:].any()) for row in counts)
        self.register_buffer("comparisons", counts[0], persistent=False)
        self.register_buffer("scores", counts[1], persistent=False)
        self.common = nn.Parameter(torch.zeros(()), requires_grad=compares)
        self.own = nn.Parameter(torch.zeros(size), requires_grad=compares)
        self.offset = nn.Parameter(torch.zeros(size), requires_grad=scores)
        self.log_gain = nn.Parameter(torch.zeros(size), requires_grad=scores)

    def competence(self, annotators: Tensor) -> Tensor:
        """Logits of the competence of these annotators."""
        return START + self.common + self.own[annotators] * (annotators > 0)

    def predicted_rating(self, rewards_S: Tensor, annotators_S: Tensor) -> Tensor:
        """The scores that these annotators would give."""
        named = annotators_S > 0
        return self.offset[annotators_S] * named + rewards_S * (self.log_gain[annotators_S] * named).exp()

    def comparison_prior(self, annotators: Tensor) -> Tensor:
        """Summed over all records: the negative log prior."""
        return self._prior((self.own / LOGIT_STD).square(), self.comparisons, annotators)

    def score_prior(self, annotators: Tensor) -> Tensor:
        """The same for offsets and gains."""
        squares_A = (self.offset / OFFSET_STD).square() + (self.log_gain / GAIN_STD).square()
        return self._prior(squares_A, self.scores, annotators)

    @staticmethod
    def _prior(squares_A: Tensor, counts_A: Tensor, annotators: Tensor) -> Tensor:
        """Each record carries its share of its annotator's prior."""
        share = squares_A / (2 * counts_A.clamp(min=1))
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


@dataclass(frozen=True)
class AnnotatorReport:
    """annotators: the least reliable first; suspects: the most likely to be flipped first. What annotators.json has."""

    annotators: Sequence[Reliability] = ()
    suspects: Sequence[Suspect] = ()

    def show(self, console: Console) -> None:
        """The least reliable annotators, and how many comparisons look flipped."""
        if self.annotators:
            columns = ("annotator", "comparisons", "right", "from", "to")
            rows = [astuple(r) for r in self.annotators[:20]]
            console.table("Annotators, the least reliable first", columns, rows)
            console.say(f"reward     {len(self.suspects)} comparisons look given the wrong way round: annotators.json")


def annotator_report(records: Sequence[Record], rewards_D: Tensor, annotator_ids: Mapping[str, int]) -> AnnotatorReport:
    """rewards_D: of the records' answers, on the trained scale."""
    lists = [record for record in records if isinstance(record, Comparison)]
    targets = judgements(records)
    gaps, weights = rewards_D[targets.winners_P] - rewards_D[targets.losers_P], targets.weights_P
    pairs_of: dict[str, list[int]] = defaultdict(list)
    for pair, number in enumerate(targets.lists_P.tolist()):
        pairs_of[lists[number].annotator].append(pair)
    loglikelihoods = {
        name: -(crowd_pair_losses(gaps[pairs, None].double(), _LOGITS) * weights[pairs, None].double()).sum(0)
        for name, pairs in pairs_of.items()
        if name in annotator_ids
    }
    if not loglikelihoods:
        return AnnotatorReport()
    comparisons = {name: len(targets.lists_P[pairs_of[name]].unique()) for name in loglikelihoods}
    reliabilities = _reliabilities(loglikelihoods, comparisons)
    flips: dict[int, float] = defaultdict(float)
    for reliability in reliabilities:
        pairs = pairs_of[reliability.annotator]
        chances = _flipped(gaps[pairs], reliability.right) * weights[pairs]
        for number, chance in zip(targets.lists_P[pairs].tolist(), chances.tolist(), strict=True):
            flips[number] += chance
    suspects = (Suspect(lists[i].where, lists[i].annotator, chance) for i, chance in flips.items() if chance > 0.5)
    by_reliability, by_chance = attrgetter("right"), attrgetter("chance")
    return AnnotatorReport(sorted(reliabilities, key=by_reliability), sorted(suspects, key=by_chance, reverse=True))


def _flipped(gaps_P: Tensor, right: float) -> Tensor:
    """The probability that an annotator who is right this often was wrong about each pair."""
    c = torch.tensor(right).logit()
    odds = logsigmoid(-c) + logsigmoid(-gaps_P) - logsigmoid(c) - logsigmoid(gaps_P)
    return odds.sigmoid()


def _reliabilities(loglikelihoods: Mapping[str, Tensor], comparisons: Mapping[str, int]) -> list[Reliability]:
    """loglikelihoods: of each annotator, at each of _LOGITS."""
    common = _LOGITS[torch.stack(list(loglikelihoods.values())).sum(0).argmax()]
    right, reliabilities = _LOGITS.sigmoid(), []
    for name, loglikelihood in loglikelihoods.items():
        chance = (loglikelihood - 0.5 * ((_LOGITS - common) / LOGIT_STD) ** 2).softmax(0)
        low, high = (float(right[(chance.cumsum(0) < q).sum()]) for q in (0.025, 0.975))
        reliabilities.append(Reliability(name, comparisons[name], float(chance @ right), low, high))
    return reliabilities
