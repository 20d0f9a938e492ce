"""Supervised fine-tuning: cross-entropy on the answers and their end tokens.

A batch is a number of records; which ones is a function of seed and step.
"""

from tetrad.data.loader import batch_indices, epoch_size, steps_for
from tetrad.data.records import read_conversations
from tetrad.data.source import Counts
from tetrad.data.tokens import fit, refuse_long, tokenize
from tetrad.distributed import collectives
from tetrad.distributed.device import choose
from tetrad.model.huggingface import read_causal
from tetrad.model.lora import merged
from tetrad.model.transformer import CausalLM, grow_vocabulary
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.batches import language_micros
from tetrad.training.context import StageContext
from tetrad.training.optimizer import Optimizer, lr_factor
from tetrad.training.prepare import conversations, first_parent
from tetrad.training.stage import Weights, finish, prepared, report_counts, start, validation_metrics
from tetrad.training.step import language_terms, timed, update
from tetrad.types import Tokens


def run(ctx: StageContext) -> None:
    s, micro_batch_tokens = ctx.recipe.sft, ctx.recipe.run.micro_batch_tokens
    device = choose(ctx.recipe.run)
    folder = first_parent(ctx, "pretrain", "base")
    data = prepared(ctx, conversations)
    store, tokenizer, template = data.store, data.tokenizer, data.template
    assert template
    ctx.console.say(f"sft        template {template.name}")
    model = read_causal(folder)
    if s.add_separator:
        grow_vocabulary(model, tokenizer.size)
    model.to(device.torch_device)
    if s.adapters:
        adapters.adapt(ctx, model, ctx.recipe.seed)
    validation = _held_out(ctx, template, tokenizer, model)
    steps = steps_for(epoch_size(data.mixture), s.batch_size, s.epochs)
    optimizer = Optimizer(model, s.lr, ctx.recipe.optim, muon_lr=s.muon_lr if s.optimizer == "muon" else 0.0)
    with start(ctx, device, steps, {"model": Weights(model), "optimizer": optimizer}) as stage:
        with ctx.console.progress("sft", steps, stage.step) as bar:
            for step in stage.steps():
                with timed("data"):
                    wanted = batch_indices(ctx.recipe.seed, data.mixture, s.batch_size, step).tolist()
                    documents = [store[i] for i in collectives.shard(wanted)]
                    micros = language_micros(documents, micro_batch_tokens, device)
                factor = lr_factor(step, steps, s.warmup, s.schedule)
                model.train()
                stats = update(
                    model,
                    optimizer,
                    micros,
                    language_terms,
                    device,
                    factor=factor,
                    max_norm=ctx.recipe.optim.max_grad_norm,
                )
                stage.log(step, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr)
                bar.advance(1, loss=stats.loss, **stage.timing(stats.tokens))
        metrics = validation_metrics(ctx, model, validation, device)
        adapters.keep(ctx, model, folder)
        finish(ctx, stage, merged(model), tokenizer, template, metrics)


def _held_out(ctx: StageContext, template: Template, tokenizer: Tokenizer, model: CausalLM) -> list[Tokens]:
    s, counts = ctx.recipe.sft, Counts()
    limit = s.max_tokens or model.config.max_positions
    read = read_conversations(ctx.files(s.validation), counts)
    stream = tokenize(
        template, tokenizer, read, train_on_prompt=s.train_on_prompt, last_only=s.train_turns == "last", counts=counts
    )
    documents = list(fit(stream, limit, s.overlong, counts))
    refuse_long(counts, limit, s.overlong)
    if documents:
        report_counts(ctx, counts, len(documents), "held-out ")
    return documents
