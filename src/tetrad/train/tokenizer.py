"""The tokenizer's stage: a byte-level BPE learned from text."""

from itertools import islice

from tetrad.data.records import read_documents
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import choose
from tetrad.text.bpe import learn, report
from tetrad.training.context import StageContext
from tetrad.training.stage import report_counts, start

REPORTED = 20_000  # documents on which the tokenizer's fit is measured


def run(ctx: StageContext) -> None:
    s = ctx.recipe.tokenizer
    with start(ctx, choose(ctx.recipe.run, ctx.folder.name), 0, {}) as stage:
        counts = Counts()
        given = ctx.files(s.text)
        texts = (document.text for document in read_documents(given, counts))
        tokenizer = learn(texts, s.vocab_size, s.min_frequency, s.max_bytes)
        report_counts(ctx, counts, counts.kept)
        fit = report(tokenizer, islice((document.text for document in read_documents(given)), REPORTED))
        metrics = {"characters_per_token": fit.characters_per_token, "single_token_han_share": fit.single_han}
        ctx.console.say(f"tokenizer  {tokenizer.size} tokens, {fit.characters_per_token:.2f} characters a token")
        if tokenizer.size < s.vocab_size:
            many = f"the text gave {tokenizer.size} of the {s.vocab_size} tokens that tokenizer.vocab_size asks for"
            ctx.console.say(f"note: {many}; more text, or a lower tokenizer.min_frequency, gives more")
        stage.finish(tokenizer.files(), {"key": ctx.key, "metrics": metrics, "lineage": dict(ctx.lineage)})
        collectives.barrier()
