"""The loop of pre-training and fine-tuning: cross-entropy of the labels, one optimizer step per batch of documents."""

from collections.abc import Callable, Sequence

from tetrad.distributed.device import Device
from tetrad.model.transformer import CausalLM
from tetrad.settings.pretrain import Pretrain
from tetrad.settings.sft import Sft
from tetrad.training.batches import language_micros
from tetrad.training.context import StageContext
from tetrad.training.optimizer import Optimizer, lr_factor
from tetrad.training.run_folder import StageRun
from tetrad.training.step import language_terms, timed, update
from tetrad.types import Tokens


def train_language_model(
    ctx: StageContext,
    stage: StageRun,
    s: Pretrain | Sft,
    model: CausalLM,
    optimizer: Optimizer,
    device: Device,
    batch: Callable[[int], Sequence[Tokens]],
) -> None:
    """The stage's remaining steps. batch: this rank's documents of a step."""
    micro_batch_tokens, max_norm = ctx.recipe.run.micro_batch_tokens, ctx.recipe.optim.max_grad_norm
    with ctx.console.progress(ctx.folder.name, stage.total_steps, stage.step) as bar:
        for step in stage.steps():
            with timed("data"):
                micros = language_micros(batch(step), micro_batch_tokens, device)
            factor = lr_factor(step, stage.total_steps, s.warmup, s.schedule)
            model.train()
            stats = update(model, optimizer, micros, language_terms, device, factor=factor, max_norm=max_norm)
            stage.log(step, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr)
            bar.advance(1, loss=stats.loss, **stage.timing(stats.tokens))
