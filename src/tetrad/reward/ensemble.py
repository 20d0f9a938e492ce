"""The reward models that a stage trains, one per seed: how they are built and saved."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tetrad.distributed.device import release_memory
from tetrad.distributed.sharding import collected, place
from tetrad.model.huggingface import members_content, read_causal, read_scalar
from tetrad.model.lora import merged, stacked
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.model.transformer import CausalLM, ScalarModel, frozen, grow_vocabulary
from tetrad.reward.annotators import LR as ANNOTATORS_LR
from tetrad.reward.annotators import Annotators, annotator_report
from tetrad.reward.data import RewardData
from tetrad.reward.metrics import RewardMetrics
from tetrad.reward.model import RewardModel, score_sequences
from tetrad.seeds import seed_for
from tetrad.storage import Content, json_bytes
from tetrad.training import adapters
from tetrad.training.context import StageContext
from tetrad.training.optimizer import Optimizer, OptimizerGroup
from tetrad.training.run_folder import StageRun, Stateful
from tetrad.training.stage import Weights, finish


class Latent(nn.Module):
    """The reward model, rho and the parameters of annotators, in one optimizer and one checkpoint."""

    def __init__(self, reward: ScalarModel, learn_rho: bool, annotators: Annotators | None = None) -> None:
        super().__init__()
        self.reward, self.annotators = reward, annotators
        self.log_rho = nn.Parameter(torch.zeros(()), requires_grad=learn_rho)


@dataclass(frozen=True)
class Member:
    """One member of the ensemble. Its head, dropout and order of records follow from its seed."""

    latent: Latent
    optimizer: Optimizer
    seed: int


class Ensemble:
    """One member per seed. Errors: E-MODEL-*, E-CKPT-*."""

    def __init__(self, ctx: StageContext, data: RewardData) -> None:
        """The first seed is the recipe's own. Adapters share one frozen copy of the model that they adapt."""
        s, own = ctx.recipe.reward, ctx.recipe.seed
        base = frozen(read_causal(data.folder)) if s.adapters else None
        seeds = [own, *(seed_for(own, "member", k) for k in range(1, s.ensemble_size))]
        models = [_model(ctx, data, base, seed) for seed in seeds]
        if base:
            place(base, data.device)
        for model in models:
            place(model, data.device, base)
        self.members = [_member(ctx, data, model, seed) for model, seed in zip(models, seeds, strict=True)]
        self.latents = nn.ModuleList(member.latent for member in self.members)

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint must hold to resume exactly, besides the best weights so far."""
        optimizers = OptimizerGroup([member.optimizer for member in self.members])
        return {"model": Weights(self.latents), "optimizer": optimizers}

    def trained(self) -> None:
        """Frees what only training needs: what follows reads and samples."""
        for member in self.members:
            member.optimizer.release()
        release_memory()

    def report_annotators(self, ctx: StageContext, data: RewardData) -> dict[str, Any]:
        """How reliable each annotator is, by the rewards of the first member: shown, and as annotators.json has it."""
        if not data.annotator_ids:
            return {}
        latent, micro_batch_tokens = self.members[0].latent, ctx.recipe.run.micro_batch_tokens
        rewards = torch.tensor(score_sequences(latent.reward, data.train.tokens, data.device, micro_batch_tokens))
        rewards = rewards * latent.log_rho.detach().exp().cpu()
        report = annotator_report(data.train.records, rewards, data.annotator_ids)
        report.show(ctx.console)
        return asdict(report)

    def model(self, data: RewardData) -> RewardModel:
        """The members' rewards, as others use them."""
        models = [member.latent.reward for member in self.members]
        micro_batch_tokens = data.ctx.recipe.run.micro_batch_tokens
        return RewardModel(models, data.tokenizer, data.template, data.device, data.folder, micro_batch_tokens)


def _model(ctx: StageContext, data: RewardData, base: CausalLM | None, seed: int) -> ScalarModel:
    """The folder's model, or adapters on `base`, with a fresh head."""
    s, head = ctx.recipe.reward, seed_for(seed, "head")
    model = adapters.adapted_scalar_model(ctx, base, head) if base else read_scalar(data.folder, head)
    model.model.dropout, model.model.token_dropout = s.dropout, s.token_dropout
    return model


def _member(ctx: StageContext, data: RewardData, model: ScalarModel, seed: int) -> Member:
    s, records = ctx.recipe.reward, data.train.records
    annotators = Annotators(records, data.annotator_ids) if data.annotator_ids else None
    both_kinds = len({type(record) for record in records}) > 1
    latent = Latent(model, both_kinds, annotators).to(data.device.torch_device)
    muon_lr = s.muon_lr if s.optimizer == "muon" else 0.0
    optimizer = Optimizer(latent, s.lr, ctx.recipe.optim, muon_lr=muon_lr, lr_overrides={"annotators.": ANNOTATORS_LR})
    return Member(latent, optimizer, seed)


def save(ctx: StageContext, stage: StageRun, model: RewardModel, metrics: RewardMetrics, **reports: Any) -> None:
    """Leaves a model that others load. reports: by the name of their JSON file; none for an empty one."""
    files: dict[str, Content] = {f"{name}.json": json_bytes(report) for name, report in reports.items() if report}
    tokenizer = model.tokenizer.with_pad()  # transformers reads scores at the last non-padding token
    first, *others = map(collected, model.members)
    if adapters.keeps(ctx, first, model.folder):
        before = adapters.earlier(first, model.folder)
        tensors = [{**stacked(member, before), "bias": member.bias} for member in others]
        files |= {f"member-{number}.safetensors": tensor_chunks(own) for number, own in enumerate(tensors, start=2)}
    else:
        whole = [merged(member) for member in (first, *others)]
        for member in whole:
            grow_vocabulary(member, tokenizer.size)
        files |= members_content(whole)
    finish(ctx, stage, first, tokenizer, model.template, metrics.record(), files, model.folder)
