"""Supervised fine-tuning: cross-entropy on the answers and their end tokens.

A batch is a number of records; which ones is a function of seed and step.
"""

from tetrad.data.loader import batch_indices, epoch_size, steps_for
from tetrad.data.records import read_conversations
from tetrad.data.source import Counts
from tetrad.data.tokens import limit_length, refuse_long, tokenize
from tetrad.distributed import collectives
from tetrad.distributed.device import choose
from tetrad.distributed.sharding import place
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM, grow_vocabulary
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.context import StageContext
from tetrad.training.language import train_language_model
from tetrad.training.optimizer import Optimizer
from tetrad.training.prepare import conversations, first_parent
from tetrad.training.stage import Weights, finish, prepared, report_counts, start, validation_metrics
from tetrad.types import Tokens


def run(ctx: StageContext) -> None:
    s, device = ctx.recipe.sft, choose(ctx.recipe.run, ctx.folder.name)
    base_folder = first_parent(ctx, "pretrain", "base")
    data = prepared(ctx, conversations)
    tokenizer, template = data.tokenizer, data.template
    assert template
    ctx.console.say(f"sft        template {template.name}")
    model = read_causal(base_folder)
    if s.add_separator:
        grow_vocabulary(model, tokenizer.size)
    if s.adapters:
        adapters.adapt(ctx, model, ctx.recipe.seed)
    place(model, device)
    validation = _validation(ctx, template, tokenizer, model)
    steps = steps_for(epoch_size(data.mixture), s.batch_size, s.epochs)
    optimizer = Optimizer(model, s.lr, ctx.recipe.optim, muon_lr=s.muon_lr if s.optimizer == "muon" else 0.0)

    def batch(step: int) -> list[Tokens]:
        indices = batch_indices(ctx.recipe.seed, data.mixture, s.batch_size, step).tolist()
        return [data.store[i] for i in collectives.shard(indices)]

    with start(ctx, device, steps, {"model": Weights(model), "optimizer": optimizer}) as stage:
        train_language_model(ctx, stage, s, model, optimizer, device, batch)
        metrics = validation_metrics(ctx, model, validation, device)
        finish(ctx, stage, model, tokenizer, template, metrics, parent=base_folder)


def _validation(ctx: StageContext, template: Template, tokenizer: Tokenizer, model: CausalLM) -> list[Tokens]:
    s, counts = ctx.recipe.sft, Counts()
    limit = s.max_tokens or model.config.max_positions
    read = read_conversations(ctx.files(s.validation), counts)
    stream = tokenize(
        template, tokenizer, read, train_on_prompt=s.train_on_prompt, last_only=s.train_turns == "last", counts=counts
    )
    documents = list(limit_length(stream, limit, s.overlong, counts))
    refuse_long(counts, limit, s.overlong)
    if documents:
        report_counts(ctx, counts, len(documents), "held-out ")
    return documents
