"""Supervised fine-tuning: cross-entropy on the answers and their end tokens.

A batch is a number of records; which ones is a function of seed and step.
"""

from collections.abc import Iterable, Iterator

from tetrad.data.loader import batch_indices, steps_for
from tetrad.data.records import read_conversations, refuse_overlap
from tetrad.data.source import Counts
from tetrad.data.tokens import fit, tokenize
from tetrad.engine import mesh
from tetrad.engine.batches import language_micros
from tetrad.engine.context import StageContext
from tetrad.engine.device import choose
from tetrad.engine.optim import Optimizer, lr_factor
from tetrad.engine.stage import Weights, finish, first_parent, held_out_figures, report_counts, start, token_store
from tetrad.engine.update import language_terms, update
from tetrad.model.decoder import CausalLM, grow_vocabulary
from tetrad.model.weights import read_causal
from tetrad.text.template import Template, template
from tetrad.text.tokenizer import SEPARATOR, Tokenizer
from tetrad.types import Tokens


def run(ctx: StageContext) -> None:
    s, micro_tokens = ctx.recipe.sft, ctx.recipe.run.micro_tokens
    device = choose(ctx.recipe.run)
    folder = first_parent(ctx, "pretrain", "base")
    model, tokenizer = read_causal(folder), Tokenizer.load(folder)
    if s.add_separator:
        tokenizer = tokenizer.with_control(SEPARATOR)
        grow_vocabulary(model, tokenizer.size)
    model.to(device.place)
    form = template(s.template, s.separator)
    refuse_overlap(*(read_conversations(ctx.files(files)) for files in (s.data, s.held_out)))
    counts = Counts()
    store = token_store(ctx, _records(ctx, s.data, form, tokenizer, model, counts))
    report_counts(ctx, counts, len(store))
    held_counts = Counts()
    held_out = list(_records(ctx, s.held_out, form, tokenizer, model, held_counts))
    if held_out:
        report_counts(ctx, held_counts, len(held_out), "held-out ")
    steps = steps_for(len(store), s.batch, s.epochs)
    optimizer = Optimizer(model, s.lr, ctx.recipe.optim, muon_lr=s.muon_lr if s.optimizer == "muon" else 0.0)
    with start(ctx, device, steps, {"model": Weights(model), "optimizer": optimizer}) as stage:
        with ctx.console.progress("sft", steps, stage.step) as bar:
            for step in stage.steps():
                wanted = mesh.share(batch_indices(ctx.recipe.seed, len(store), s.batch, step).tolist())
                micros = language_micros([store[i] for i in wanted], micro_tokens, device)
                factor = lr_factor(step, steps, s.warmup, s.schedule)
                model.train()
                stats = update(
                    model, optimizer, micros, language_terms, device, factor=factor, max_norm=ctx.recipe.optim.max_norm
                )
                stage.log(step, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr)
                bar.advance(1, loss=stats.loss)
        finish(ctx, stage, model, tokenizer, form, held_out_figures(ctx, model, held_out, device))


def _records(
    ctx: StageContext, files: Iterable[str], form: Template, tokenizer: Tokenizer, model: CausalLM, counts: Counts
) -> Iterator[Tokens]:
    s = ctx.recipe.sft
    conversations = read_conversations(ctx.files(files), counts)
    stream = tokenize(form, tokenizer, conversations, train_on_prompt=s.train_on_prompt, counts=counts)
    return fit(stream, s.max_tokens or model.config.max_positions, s.on_long, counts)
