"""Pre-training: next-token prediction on documents packed into rows without padding.

Row k of an epoch is tokens [kT, (k+1)T) of that epoch's permuted stream, so seed and step alone determine what is
read. Documents in one row never attend to each other.
"""

import math

from tetrad.data.loader import Rows
from tetrad.data.records import read_documents
from tetrad.data.tokens import tokenize_documents
from tetrad.distributed import collectives
from tetrad.distributed.device import choose
from tetrad.distributed.sharding import place
from tetrad.model.config import DecoderConfig
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM, initialise
from tetrad.seeds import seed_for
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.language import train_language_model
from tetrad.training.optimizer import Optimizer
from tetrad.training.prepare import documents
from tetrad.training.stage import Weights, finish, prepared, start, validation_metrics
from tetrad.types import Tokens


def run(ctx: StageContext) -> None:
    s, device = ctx.recipe.pretrain, choose(ctx.recipe.run, ctx.folder.name)
    data = prepared(ctx, documents)
    tokenizer = data.tokenizer
    rows = Rows(data.store, s.sequence_length, ctx.recipe.seed, data.mixture)
    batch_rows = s.batch_tokens // s.sequence_length
    steps = max(1, math.ceil((s.tokens or rows.per_epoch * s.sequence_length) / s.batch_tokens))
    model = _new_model(ctx, tokenizer) if "tokenizer" in ctx.parents else read_causal(ctx.parents["base"])
    place(model, device)
    optimizer = Optimizer(model, s.lr, ctx.recipe.optim, muon_lr=s.muon_lr if s.optimizer == "muon" else 0.0)
    validation = _validation(ctx, tokenizer)

    def batch(step: int) -> list[Tokens]:
        indices = collectives.shard(range(step * batch_rows, (step + 1) * batch_rows))
        return [piece for i in indices for piece in rows.row(i)]

    with start(ctx, device, steps, {"model": Weights(model), "optimizer": optimizer}) as stage:
        train_language_model(ctx, stage, s, model, optimizer, device, batch)
        finish(ctx, stage, model, tokenizer, None, validation_metrics(ctx, model, validation, device))


def _new_model(ctx: StageContext, tokenizer: Tokenizer) -> CausalLM:
    m = ctx.recipe.model
    config = DecoderConfig(
        family="qwen2",
        vocab_size=tokenizer.size,
        hidden_size=m.hidden_size,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_dim=m.hidden_size // m.heads,
        ff=m.ff or 3 * m.hidden_size,
        max_positions=m.max_positions,
        rope_theta=m.rope_theta,
        tied=m.tied,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    model = CausalLM(config)
    initialise(model, seed_for(ctx.recipe.seed, "weights"))
    return model


def _validation(ctx: StageContext, tokenizer: Tokenizer) -> list[Tokens]:
    """The validation documents in pieces of at most one row: longer contexts were never trained."""
    s = ctx.recipe.pretrain
    validation = tokenize_documents(tokenizer, read_documents(ctx.files(s.validation)))
    return [
        Tokens(tokens.ids[at : at + s.sequence_length], tokens.train[at : at + s.sequence_length], tokens.where)
        for tokens in validation
        for at in range(0, len(tokens.ids), s.sequence_length)
    ]
