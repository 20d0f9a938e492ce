"""The stages, one row each in the order they run; with the tables beside them they form a recipe. No torch.

A new algorithm is a settings class, a module with `run(context)` and a row here: the pipeline, the command line, the
checks before a run and checkpoints read these rows. Recipe files are read and written by `tetrad.pipeline.recipe`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from tetrad.settings.base import Seed, settings, uses_reward_model
from tetrad.settings.common import Data, Lora, Optim, Run, Sampling
from tetrad.settings.dpo import Dpo
from tetrad.settings.evaluate import Evaluate
from tetrad.settings.grpo import Grpo
from tetrad.settings.model import Model, Tokenizer
from tetrad.settings.ppo import Alarms, Ppo, Ptx
from tetrad.settings.pretrain import Pretrain
from tetrad.settings.reward import Gate, Reward
from tetrad.settings.sft import Sft

FOLDERS = {"base": "model.from", "from": "reward.from", "reward": "reward.from", "referee": "evaluate.external_lm"}
"""Roles of models that come from elsewhere, with the setting that names their folder."""
POLICY = ("sft", "pretrain", "base")
"""Roles of the policy model, the latest first."""
ON_POLICY = ("grpo", "ppo")
"""Stages whose policy learns from its own responses and their rewards; the settings of each are an `OnPolicy`."""
ALIGNED = ("dpo", "grpo", "ppo")
"""Roles of what is trained on from the policy model towards a preference; an evaluation compares those there are."""


@dataclass(frozen=True)
class Parent:
    """What a stage starts from: the first of these roles that the recipe has. noun, add: for the error if it has none;
    without a noun it is optional. when: whether it is needed."""

    roles: tuple[str, ...]
    noun: str = ""
    add: str = ""
    when: Callable[["Recipe"], bool] = lambda _: True


@dataclass(frozen=True)
class Stage:
    """One stage. switch: the setting that turns it on. version: raised when its arithmetic changes, so that its results
    are recomputed. tables: the recipe's tables that it reads, its own first. module: its `run(context)`. prepare: what
    runs before torch is imported, MODULE:FUNCTION. parts, values: what its checkpoints hold. seeded:
    whether random numbers and the compute type matter. template: whether it reads the template of the policy.
    folders: further models from elsewhere, their folders by role."""

    summary: str
    switch: str
    version: int
    tables: tuple[str, ...]
    parents: tuple[Parent, ...] = ()
    prepare: str = ""
    parts: Callable[["Recipe"], tuple[str, ...]] = lambda _: ()
    values: tuple[str, ...] = ()
    seeded: bool = True
    template: bool = False
    folders: Callable[["Recipe"], Mapping[str, str]] = lambda _: {}
    module: str = ""
    name: str = ""

    def keyed(self, recipe: "Recipe") -> list[str]:
        """The tables that change its numbers; adapter settings only if it has adapters, and so on."""
        own = getattr(recipe, self.name)
        counts = {
            "optim": True,
            "sampling": True,
            "model": not recipe.model.from_,
            "lora": bool(getattr(own, "adapters", False)),
            "ptx": bool(recipe.ptx.text),
        }
        return [table for table in self.tables if table == self.name or counts.get(table)]


def names_of(folders: Sequence[str]) -> dict[str, str]:
    """Folders of stages by the end of their path: `other/ppo`, longer where several end alike; never a role's name."""
    parts = [[part for part in folder.split("/") if part not in ("", ".")] for folder in folders]
    parts = [names[:-1] if names[-1:] == ["model"] else names for names in parts]
    parts = [names if len(names) > 1 else [".", *names] for names in parts]
    for length in range(2, max([len(names) for names in parts], default=0) + 1):
        named = {"/".join(names[-length:]): folder for names, folder in zip(parts, folders, strict=True)}
        if len(named) == len(folders):
            return named
    return {folder: folder for folder in folders}


def stage(default: Any, **row: Any) -> Any:
    """A field of Recipe that is a stage."""
    return field(default=default, metadata={"stage": Stage(**row)})


_START = "a model to start from"
_BASE = Parent(("pretrain", "base"), _START, '[pretrain] text = ["FILE"], or [model] from = "FOLDER"')
_POLICY = Parent(POLICY, _START, '[sft] data = ["FILE"], or [model] from = "FOLDER"')
_TOKENS = Parent(("base", "tokenizer"), "a tokenizer", '[tokenizer] text = ["FILE"], or [model] from = "FOLDER"')
_GIVE_REWARD = '[reward] data = ["FILE"], or [{}] rewards = ["FILE.py:NAME"]'


def _grpo_parts(recipe: "Recipe") -> tuple[str, ...]:
    return ("actor", "actor_optimizer", *(("average",) if recipe.grpo.ema_decay else ()))


def _ppo_parts(recipe: "Recipe") -> tuple[str, ...]:
    own = () if recipe.ppo.critic == "shared" else ("critic_optimizer",)
    return ("actor", "actor_optimizer", "critic", *own, *(("average",) if recipe.ppo.ema_decay else ()))


@settings
class Recipe:
    """All stages of a model, from text to PPO. Every table is optional; a stage runs when its files are given."""

    name: str = ""
    """Name of the run: its folder is runs/<name>. Empty takes the recipe file's name."""
    seed: Seed = 0
    """Seed of all random numbers; the same seed, files and settings give the same models."""
    model: Model = Model()
    tokenizer: Tokenizer = stage(
        Tokenizer(),
        summary="learn a tokenizer",
        switch="text",
        version=1,
        tables=("tokenizer",),
        seeded=False,
    )
    pretrain: Pretrain = stage(
        Pretrain(),
        summary="pre-train on documents",
        switch="text",
        version=2,
        tables=("pretrain", "model", "optim", "run"),
        parents=(_TOKENS,),
        prepare="tetrad.training.prepare:documents",
        parts=lambda _: ("model", "optimizer"),
    )
    sft: Sft = stage(
        Sft(),
        summary="fine-tune on instructions and answers",
        switch="data",
        version=3,
        tables=("sft", "lora", "optim", "run"),
        parents=(_BASE,),
        prepare="tetrad.training.prepare:conversations",
        parts=lambda _: ("model", "optimizer"),
    )
    reward: Reward = stage(
        Reward(),
        summary="train the reward model on comparisons and scores",
        switch="data",
        version=4,
        tables=("reward", "lora", "gate", "optim", "run"),
        parents=(Parent(("from",)), _POLICY),  # even with a model of its own, the policy's responses set its scale
        parts=lambda _: ("model", "optimizer", "best"),
        template=True,
    )
    dpo: Dpo = stage(
        Dpo(),
        summary="DPO: preferences without a reward model",
        switch="data",
        version=1,
        tables=("dpo", "lora", "optim", "run"),
        parents=(_POLICY,),
        parts=lambda _: ("model", "optimizer"),
        template=True,
    )
    grpo: Grpo = stage(
        Grpo(),
        summary="GRPO or RLOO: PPO without a critic, each response compared with others to its prompt",
        switch="prompts",
        version=1,
        tables=("grpo", "lora", "gate", "alarms", "optim", "run"),
        parents=(
            _POLICY,
            Parent(("reward",), "a reward", _GIVE_REWARD.format("grpo"), lambda r: uses_reward_model(r.grpo.rewards)),
        ),
        parts=_grpo_parts,
        values=("alarms",),
        template=True,
    )
    ppo: Ppo = stage(
        Ppo(),
        summary="PPO against the reward model",
        switch="prompts",
        version=3,
        tables=("ppo", "ptx", "lora", "gate", "alarms", "optim", "run"),
        parents=(
            _POLICY,
            Parent(("reward",), "a reward", _GIVE_REWARD.format("ppo"), lambda r: uses_reward_model(r.ppo.rewards)),
            Parent(
                ("reward",),
                "a reward model for its critic",
                '[ppo] critic = "actor", or [reward] data = ["FILE"]',
                lambda recipe: recipe.ppo.critic == "reward" and not uses_reward_model(recipe.ppo.rewards),
            ),
        ),
        prepare="tetrad.training.prepare:check_ptx",
        parts=_ppo_parts,
        values=("beta", "alarms", "scores"),
        template=True,
    )
    ptx: Ptx = Ptx()
    gate: Gate = Gate()
    alarms: Alarms = Alarms()
    evaluate: Evaluate = stage(
        Evaluate(),
        summary="compare SFT, best-of-N and PPO on held-out prompts",
        switch="prompts",
        version=2,
        tables=("evaluate", "sampling", "run"),
        parents=(_POLICY, *(Parent((role,)) for role in ("reward", "pretrain", *ALIGNED, "referee"))),
        template=True,
        folders=lambda recipe: names_of(recipe.evaluate.others),
        module="tetrad.eval.compare",
    )
    data: Data = Data()
    run: Run = Run()
    lora: Lora = Lora()
    optim: Optim = Optim()
    sampling: Sampling = Sampling()

    def value(self, name: str) -> Any:
        """The value of a setting by its dotted TOML name, as "ppo.steps"."""
        return attrgetter(name.replace(".from", ".from_"))(self)


STAGES: Mapping[str, Stage] = {
    item.name: replace(row, name=item.name, module=row.module or f"tetrad.train.{item.name}")
    for item in fields(Recipe)
    if (row := item.metadata.get("stage"))
}
"""By name, in order."""
