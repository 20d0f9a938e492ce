"""The sources of reward in PPO and GRPO: reward model, Python functions, HTTP endpoints, or a weighted sum of them."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tetrad.distributed.device import Device
from tetrad.inference.completions import Completion
from tetrad.reward.functions import endpoint, python_function
from tetrad.reward.model import Reward, ids_meaning, reward_model
from tetrad.settings.base import REWARD_MODEL, is_function, reward_entries
from tetrad.settings.common import OnPolicy
from tetrad.stages import POLICY
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import template_for
from tetrad.training.step import timed


@dataclass(frozen=True)
class RewardSource:
    """One term of the score. clip: to this many standard deviations, before the weight; 0 is off."""

    reward: Reward
    weight: float = 1.0
    clip: float = 0.0


class RewardSources:
    """The sources by name, and their weighted sum."""

    def __init__(self, sources: Mapping[str, RewardSource]) -> None:
        self.sources = dict(sources)

    @timed("reward")
    def by_source(self, samples: Sequence[Completion]) -> dict[str, list[float]]:
        """The raw scores of each source."""
        return {name: list(source.reward(samples)) for name, source in self.sources.items()}

    def total(self, source_scores: Mapping[str, Sequence[float]]) -> list[float]:
        """A score for each sample."""
        weighed = [[one.weight * _cut(x, one.clip) for x in source_scores[name]] for name, one in self.sources.items()]
        return [sum(row) for row in zip(*weighed, strict=True)]


def _cut(x: float, clip: float) -> float:
    return min(max(x, -clip), clip) if clip else x


def named(given: Sequence[str], reserved: Collection[str] = (REWARD_MODEL, "std")) -> list[str]:
    """A unique name for each entry, none of them reserved (score_std is the standard deviation of the total): `reward`
    for the reward model, a function's own name, an address's host and port; the second of a name is NAME_2."""
    names, taken = list[str](), set(reserved)
    for entry in given:
        if is_function(entry):
            plain = entry.rpartition(":")[2]
        else:
            address = urlsplit(entry)  # without user and query, which may be secret
            plain = re.sub(r"\W", "_", f"{address.hostname}:{address.port}" if address.port else f"{address.hostname}")
        tries = (f"{plain}_{n}" if n > 1 else plain for n in itertools.count(1))
        names.append(REWARD_MODEL if entry == REWARD_MODEL else next(name for name in tries if name not in taken))
        taken.add(names[-1])
    return names


def reward_sources(
    ctx: StageContext, s: OnPolicy, tokenizer: Tokenizer, device: Device, model: Reward | None = None
) -> RewardSources:
    """The stage's sources. model: the reward model if loaded. Errors: E-CONF-FUNCTION, E-MODEL-*, E-CKPT-*."""
    specs = reward_entries(s.rewards)
    weights = s.reward_weights or (1.0,) * len(specs)
    meaning, sources = ids_meaning(tokenizer, template_for(ctx, first_parent(ctx, *POLICY))), {}
    for name, entry, weight in zip(named(specs), specs, weights, strict=True):
        if entry == REWARD_MODEL:
            reward = model or reward_model(ctx, ctx.parents["reward"], device, tokenizer, s.uncertainty_penalty)
        else:
            reward = python_function(entry) if is_function(entry) else endpoint(entry, meaning)
        sources[name] = RewardSource(reward, weight, 0.0 if s.clips_sum or entry != REWARD_MODEL else s.reward_clip)
    return RewardSources(sources)
