"""A stage's text as tokens, without torch: bad data is found before a model is loaded, and in little memory.

The pipeline prepares a stage before it imports it; the stage opens what was prepared.
"""

from dataclasses import dataclass
from pathlib import Path

from tetrad.console import phase
from tetrad.data.loader import Mixture
from tetrad.data.source import Counts
from tetrad.data.store import Encoding, TokenStore, build
from tetrad.model.config import read_config
from tetrad.stages import POLICY
from tetrad.text.chat_template import Template, choose
from tetrad.text.tokenizer import SEPARATOR, Tokenizer
from tetrad.training.context import StageContext


@dataclass(frozen=True)
class Prepared:
    """A stage's tokens, how often each record is read, what became of the rows, and what encoded them."""

    store: TokenStore
    mixture: Mixture
    counts: Counts
    tokenizer: Tokenizer
    template: Template | None


def first_parent(ctx: StageContext, *roles: str) -> Path:
    """The folder of the first of these roles that the recipe has."""
    return next(ctx.parents[role] for role in roles if role in ctx.parents)


def documents(ctx: StageContext) -> Prepared:
    """The documents of pre-training. Errors: E-DATA-*, E-MODEL-*, E-IO-*."""
    s = ctx.recipe.pretrain
    tokenizer = Tokenizer.load(first_parent(ctx, "tokenizer", "base"))
    return _tokens(ctx, "pretrain.text", s.weights, Encoding(tokenizer.text, tokenizer.eos_ids), tokenizer)


def conversations(ctx: StageContext) -> Prepared:
    """The conversations of fine-tuning. Errors: E-DATA-*, E-MODEL-*, E-IO-*."""
    s, folder = ctx.recipe.sft, first_parent(ctx, "pretrain", "base")
    tokenizer = Tokenizer.load(folder)
    if s.add_separator:
        tokenizer = tokenizer.with_control(SEPARATOR)
    limit = s.max_tokens or read_config(folder).max_positions
    template = choose(folder, s.template, s.separator, s.system, own=False)
    last_only = s.train_turns == "last"
    encoding = Encoding(tokenizer.text, tokenizer.eos_ids, template, s.train_on_prompt, last_only, limit, s.overlong)
    return _tokens(ctx, "sft.data", s.weights, encoding, tokenizer)


def ptx(ctx: StageContext) -> Prepared:
    """The pre-training text of PPO, in the actor's tokens. Errors: E-DATA-*, E-MODEL-*, E-IO-*."""
    tokenizer = Tokenizer.load(first_parent(ctx, *POLICY))
    return _tokens(ctx, "ptx.text", (), Encoding(tokenizer.text, tokenizer.eos_ids), tokenizer)


def _tokens(
    ctx: StageContext, setting: str, weights: tuple[float, ...], encoding: Encoding, tokenizer: Tokenizer
) -> Prepared:
    table = setting.partition(".")[0]
    given = ctx.files(ctx.recipe.value(setting), weights)
    seen: list[int] = []

    def progress(done: int, parts: int) -> None:
        if parts > 1 and not seen and done < parts:
            ctx.console.say(f"{table:<10} tokenising {parts} parts, {done} of them there already")
        seen.append(done)
        bar.total = parts
        bar.advance(done - bar.done)

    with phase("tokenising") as bar:
        store, counts = build(ctx.cache(table), encoding, given, ctx.digests(setting), ctx.workers, progress)
    return Prepared(store, given.mixture(store.places()), counts, tokenizer, encoding.template)


def check_ptx(ctx: StageContext) -> None:
    """Tokenises the pre-training text of PPO, where there is any."""
    if ctx.recipe.ptx.text:
        ptx(ctx)
