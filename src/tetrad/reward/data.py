"""What a reward model is trained and evaluated on: records, a document per answer, and the batch of each step."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from tetrad.data.loader import batch_indices, epoch_size, order, steps_for
from tetrad.data.records import answers, read_preferences
from tetrad.data.source import Counts, DataFiles
from tetrad.data.tokens import tokenize
from tetrad.distributed import collectives
from tetrad.distributed.device import choose
from tetrad.model.config import read_config
from tetrad.reward.annotators import ids_of_annotators
from tetrad.reward.batches import Examples, Record, preference_micros
from tetrad.reward.functions import python_function
from tetrad.seeds import seed_for
from tetrad.settings.reward import Reward
from tetrad.stages import POLICY
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import report_counts, template_for
from tetrad.training.step import Microbatch, timed
from tetrad.types import Score

MOST_VALIDATION = 1000  # records of a validation loss


class RewardData:
    """Examples, read with the tokenizer and template of the model in `folder`; None without such files. test is
    `validation` where the recipe has no other; baselines: functions to compare with, by name.

    offset, scale: a score's target is (score - offset) / scale; annotator_ids: by name, empty where all count alike;
    mixture: how often an epoch reads each record; steps: of the whole training.
    """

    def __init__(self, ctx: StageContext) -> None:
        """Errors: E-DATA-*, E-CONF-FUNCTION, E-MODEL-*."""
        s, counts = ctx.recipe.reward, Counts()
        self.ctx, self.device = ctx, choose(ctx.recipe.run, ctx.folder.name)
        self.folder = first_parent(ctx, "from", *POLICY)
        self.tokenizer, self.template = Tokenizer.load(self.folder), template_for(ctx, self.folder)
        read = partial(
            read_examples, s, self.template, self.tokenizer, s.max_tokens or read_config(self.folder).max_positions
        )
        self.train = read(ctx.files(s.data), counts)
        report_counts(ctx, counts, len(self.train.records))
        self.validation = read(ctx.files(s.validation), Counts()) if s.validation else None
        self.test = read(ctx.files(s.test), Counts()) if s.test else self.validation
        self.baselines = {spec.rpartition(":")[2]: python_function(spec) for spec in s.baselines}
        self.offset, self.scale = score_scale(s, self.train.records)
        self.annotator_ids = ids_of_annotators(self.train.records) if s.annotators else {}
        self.mixture = ctx.files(s.data, s.weights).mixture(record.where for record in self.train.records)
        self.steps = steps_for(epoch_size(self.mixture), s.batch_size, s.epochs)

    def batch(self, seed: int, step: int) -> list[Microbatch]:
        """This rank's micro-batches of a step, of the member of the ensemble with this seed."""
        size = self.ctx.recipe.reward.batch_size
        indices = collectives.shard(batch_indices(seed, self.mixture, size, step).tolist())
        keys = [seed_for(seed, "dropout", step, i) for i in collectives.shard(range(size))]
        return self._micros(self.train, indices, keys)

    def validation_batch(self) -> list[Microbatch]:
        """The same records each time."""
        if not self.validation:
            return []
        indices = order(self.ctx.recipe.seed, 0, len(self.validation.records))[:MOST_VALIDATION].tolist()
        return self._micros(self.validation, indices)

    @timed("data")
    def _micros(self, examples: Examples, indices: Sequence[int], keys: Sequence[int] = ()) -> list[Microbatch]:
        s, micro_batch_tokens = self.ctx.recipe.reward, self.ctx.recipe.run.micro_batch_tokens
        records, documents = [examples.records[i] for i in indices], [examples.documents(i) for i in indices]
        # A shared prefix has no label after it but in the first answer, and with token_weight every label counts.
        shared = "never" if s.token_weight else s.shared_prefix
        scale = (self.offset, self.scale)
        return preference_micros(
            records, documents, micro_batch_tokens, *scale, self.device, self.annotator_ids, shared, keys
        )


def read_examples(
    s: Reward, template: Template, tokenizer: Tokenizer, limit: int, files: DataFiles, counts: Counts
) -> Examples:
    """The records of these files and their documents; too long ones as `overlong` says, whole records at a time."""
    return tokenized(read_preferences(files, s.score_scale, counts), template, tokenizer, limit, s.overlong, counts)


def tokenized(
    records: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    limit: int,
    overlong: str,
    counts: Counts,
    *,
    last_only: bool = False,
) -> Examples:
    """The records and their documents, which end with the answer's end token. last_only: labels are in it alone."""
    conversations = (conversation for record in records for conversation in answers(record))
    documents = list(tokenize(template, tokenizer, conversations, last_only=last_only, closed=False, counts=counts))
    return Examples.of(records, documents).fitted(limit, overlong, counts)


def score_scale(s: Reward, records: Sequence[Record]) -> tuple[float, float]:
    """The score whose target is 0, and the difference for a target of 1: mean and standard deviation of the training
    scores (0 and 1 without any), or the declared scale's lowest score and width."""
    if s.score_loss != "gaussian" and s.score_scale:
        low, high = s.score_scale
        return low, high - low
    scores = np.array([record.score for record in records if isinstance(record, Score)])
    return (float(scores.mean()), float(scores.std()) or 1.0) if len(scores) else (0.0, 1.0)
