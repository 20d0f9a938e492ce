"""What is served: the models by id, and the reward model, each loaded once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tetrad.errors import UserError
from tetrad.inference.policy import Frontend, load_frontend
from tetrad.reward.model import RewardModel, load_reward
from tetrad.server.worker import Worker
from tetrad.settings.use import Serve


@dataclass(frozen=True)
class Served:
    """A model, and the process that generates with it."""

    name: str
    frontend: Frontend
    worker: Worker


@dataclass(frozen=True)
class Service:
    """models: by id. scorer: the one thread in which the reward model computes."""

    models: Mapping[str, Served]
    reward: RewardModel | None
    settings: Serve
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "scorer"))

    @property
    def reward_name(self) -> str:
        """The reward model's id; empty without one."""
        return next(iter(model_ids([self.settings.reward])), "") if self.reward else ""


def load_service(models: Sequence[str], settings: Serve) -> Service:
    """Loads everything. Errors: E-CONF-DUPKEY, E-MODEL-*, E-CKPT-*."""
    served = {}
    for name, folder in model_ids(models).items():
        model = load_frontend(folder, settings.template)
        served[name] = Served(name, model, Worker(model, settings.max_num_seqs, settings.max_model_len))
    reward = load_reward(settings.reward, settings.template) if settings.reward else None
    for one in served.values():  # they have loaded beside each other
        one.worker.wait()
    return Service(served, reward, settings)


def model_ids(models: Sequence[str]) -> dict[str, str]:
    """The models by the last part of their paths, or by as many as make them differ ("a-ppo", "b-ppo").

    Errors: E-CONF-DUPKEY for one that is given twice.
    """
    parts = [[part for part in Path(model).parts if part != "/"] or [model] for model in models]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(models):
            return dict(zip(names, models, strict=True))
    twice = next((model for model, times in Counter(models).items() if times > 1), models[-1])
    raise UserError("E-CONF-DUPKEY", f"{twice} is given twice", where="serve", hint="name each model once")
