"""What the reward stage measures of its model: recorded in the model's manifest, read by the gate.

None is what was not measured, or is undefined; a record leaves it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ScaleMetrics:
    """Mean and standard deviation of the rewards of the policy's responses before they are scaled (policy_*), and of
    other responses afterwards (fresh_*).

    disagreement: the mean standard deviation over the members of an ensemble. length_correlation: Spearman's, of reward
    and tokens. train_score_p999: the 99.9 % quantile of the rewards of training answers.
    """

    policy_mean: float | None = None
    policy_std: float | None = None
    fresh_mean: float | None = None
    fresh_std: float | None = None
    disagreement: float | None = None
    length_correlation: float | None = None
    train_score_p999: float | None = None


@dataclass(frozen=True)
class PairMetrics:
    """Agreement with human judgements. *_low, *_high: ends of the 95 % interval; ece, brier: at this temperature, and
    (raw_*) at 1; spearman, kendall: of rewards and scores."""

    temperature: float | None = None
    pairs: float | None = None
    pair_accuracy: float | None = None
    pair_accuracy_low: float | None = None
    pair_accuracy_high: float | None = None
    ece: float | None = None
    brier: float | None = None
    raw_ece: float | None = None
    raw_brier: float | None = None
    spearman: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    kendall: float | None = None


@dataclass(frozen=True)
class RewardMetrics(PairMetrics, ScaleMetrics):
    """All of them, on test records. length_accuracy: of the length alone. baselines: of other functions, by name.

    probe_*: how far a change of the answers raises the reward, in standard deviations of the policy's. *_sd: standard
    deviations over the members. accuracy_*: where the better answer is longer and where it is shorter.
    """

    length_accuracy: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    probe_padded: float | None = None
    probe_duplicated: float | None = None
    probe_phrase: float | None = None
    pair_accuracy_sd: float | None = None
    spearman_sd: float | None = None
    accuracy_longer: float | None = None
    accuracy_longer_high: float | None = None
    accuracy_shorter: float | None = None
    accuracy_shorter_high: float | None = None

    def record(self) -> dict[str, float]:
        """By name, as the manifest has them."""
        record: dict[str, float] = {}
        for name, value in vars(self).items():
            record |= value if name == "baselines" else {name: value} if value is not None else {}
        return record

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "RewardMetrics":
        """From a manifest, without the baselines; an older one may lack names."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record and f.name != "baselines"})
