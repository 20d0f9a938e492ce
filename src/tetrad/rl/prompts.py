"""What an iteration reads: its prompts, split over the ranks, and the pre-training text besides."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tetrad.data.loader import Mixture, Rows, batch_indices
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference.completions import EncodedPrompt, read_encoded_prompts
from tetrad.rl.models import PolicyModels
from tetrad.rl.rollout import response_indices
from tetrad.settings.common import OnPolicy
from tetrad.stages import POLICY
from tetrad.training.batches import language_micros
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent, ptx
from tetrad.training.stage import prepared, report_counts, template_for
from tetrad.training.step import Microbatch


@dataclass(frozen=True)
class Prompts:
    """All prompts, how often each is read per epoch, and how many an iteration takes, each several times."""

    prompts: Sequence[EncodedPrompt]
    mixture: Mixture
    seed: int
    size: int
    samples_per_prompt: int

    def batch(self, step: int) -> tuple[list[EncodedPrompt], list[int]]:
        """This rank's prompts of an iteration, a prompt for each response, and their indices in the whole batch."""
        chosen = collectives.shard(batch_indices(self.seed, self.mixture, self.size, step).tolist())
        return [self.prompts[i] for i in chosen for _ in range(self.samples_per_prompt)], response_indices(
            self.size, self.samples_per_prompt
        )


def read_policy_prompts(ctx: StageContext, s: OnPolicy, models: PolicyModels) -> Prompts:
    """Errors: E-DATA-*; E-CONF-DIVIDE where processes can't have equal shares of a batch."""
    counts = Counts()
    if s.batch_size % collectives.size():
        what = f"batch = {s.batch_size} can't be shared by {collectives.size()} processes"
        where, hint = f"{ctx.folder.name}.batch_size", f"use a multiple of {collectives.size()}"
        raise UserError("E-CONF-DIVIDE", what, where=where, hint=hint)
    template = template_for(ctx, first_parent(ctx, *POLICY))
    limit = min(s.max_prompt + s.max_new_tokens if s.max_prompt else math.inf, models.actor.config.max_positions)
    files = ctx.files(s.prompts, s.weights)
    prompts = read_encoded_prompts(files, template, models.tokenizer, counts, int(limit), s.max_new_tokens, s.overlong)
    report_counts(ctx, counts, len(prompts))
    mixture = files.mixture(each.prompt.where for each in prompts)
    return Prompts(prompts, mixture, ctx.recipe.seed, s.batch_size, s.samples_per_prompt)


PtxBatches = Callable[[int], list[Microbatch]]
"""The micro-batches of the n-th update of the actor."""


@dataclass(frozen=True)
class PtxBatch:
    """Marks a micro-batch of text; its loss has this weight."""

    coefficient: float


def ptx_batches(ctx: StageContext, device: Device) -> PtxBatches:
    """The text that the actor reads besides its responses (PPO-ptx, Ouyang et al. 2022): rows in the order of
    pre-training, one batch per update; none where the recipe has no such text."""
    s = ctx.recipe.ptx
    if not s.text:
        return lambda _: []
    tokens = prepared(ctx, ptx)
    rows = Rows(tokens.store, s.sequence_length, ctx.recipe.seed, tokens.mixture)
    size = s.batch_tokens // s.sequence_length

    def batch(update: int) -> list[Microbatch]:
        own = collectives.shard(range(update * size, (update + 1) * size))
        pieces = [piece for row in own for piece in rows.row(row)]
        micros = language_micros(pieces, ctx.recipe.run.micro_batch_tokens, device)
        return [Microbatch(m.packed, {"ptx_tokens": m.counts["tokens"]}, PtxBatch(s.coef)) for m in micros]

    return batch
