"""`tetrad generate`: records in, the same records with responses out.

A record keeps all its fields; if it has one that is written here (response, tokens, finished, logprobs, score), its own
is kept as given_<name>. With `out` the file appears when complete, without it each line is printed when ready.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tetrad.console import Console
from tetrad.data.fields import fold
from tetrad.data.parquet import plain
from tetrad.data.rows import Row, rows
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.inference import policy
from tetrad.inference.completions import Completion, EncodedPrompt, best, read_encoded_prompts
from tetrad.reward.model import SCORES_AT_ONCE, RewardModel, load_reward, score_samples
from tetrad.settings.use import Generate
from tetrad.storage import write_file
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed

Fields = dict[str, Any]
MOST_LINES = 50  # of progress
GENERATED = ("response", "reply")  # written by generate, now and before, beside the answer that a record had
ANSWERS = (*GENERATED, "output", "completion")


def generate_file(settings: Generate, console: Console) -> None:
    """Answers one prompt or a file of prompts, with the best of N responses if a reward model is named.

    Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*.
    """
    check_out(settings.out, settings.prompts)
    given = sources([settings.prompts] if settings.prompts else [], rename=renamed(settings.rename))
    records = json_records(given.paths)
    model = policy.load(settings.model, settings.template)
    reward_model = load_reward(settings.reward, settings.template) if settings.reward else None
    if settings.prompts:
        counts, limit = Counts(), model.model.config.max_positions
        prompts = read_encoded_prompts(given, model.form, model.tokenizer, counts, limit, settings.max_new_tokens)
    else:
        prompt = policy.instruction_prompt(settings.instruction, settings.input, where="--instruction")
        prompts = [policy.encode_prompt(model, prompt)]
        records = [{"Instruction": settings.instruction, **({"Input": settings.input} if settings.input else {})}]
        if not settings.out:
            ((completion, _),) = _best(model, reward_model, prompts, settings)
            console.say(completion.text)
            return
    if settings.out:
        shape = policy.cache_shape(prompts, settings, settings.best_of)
        console.say(f"cache of keys and values: {policy.cache_need(model, *shape)}")
    invalid: list[str] = []
    deliver(_with_responses(model, reward_model, prompts, records, settings, console, invalid), settings.out, console)
    if settings.out:
        console.say(f"{_counted(len(prompts))}: {settings.out}")
        if invalid:
            is_not = f"{_counted(len(invalid))} {'are' if len(invalid) > 1 else 'is'} not valid UTF-8"
            console.say(f"note: {is_not}, wrong bytes are written as U+FFFD; the first answers {invalid[0]}")


def _best(
    model: policy.Policy, reward_model: RewardModel | None, prompts: list[EncodedPrompt], settings: Generate
) -> Iterator[tuple[Completion, float | None]]:
    """One completion per prompt and its score; of several, the best."""
    groups = policy.completions(model, prompts, settings, settings.best_of, settings.top_logprobs)
    if reward_model is None:
        yield from ((group[0], None) for group in groups)
        return
    chosen = _chosen(reward_model, groups, settings.best_of)
    # Scored again in the batches that `tetrad score` uses: the batch affects the last bits of a score.
    while part := list(islice(chosen, SCORES_AT_ONCE)):
        yield from zip(part, score_samples(reward_model, part), strict=True)


def _chosen(reward_model: RewardModel, groups: Iterator[list[Completion]], size: int) -> Iterator[Completion]:
    """The best of each group of this size."""
    while held := list(islice(groups, max(1, SCORES_AT_ONCE // size))):
        scores = iter(score_samples(reward_model, [sample for group in held for sample in group]))
        yield from (group[best(group, list(islice(scores, size)))] for group in held)


def _with_responses(
    model: policy.Policy,
    reward_model: RewardModel | None,
    prompts: list[EncodedPrompt],
    records: list[Fields],
    settings: Generate,
    console: Console,
    invalid: list[str],
) -> Iterator[Fields]:
    """invalid: receives the places of prompts whose response is not valid UTF-8."""
    reported, tokens, began = 0, 0, time.monotonic()
    with console.progress("generate", len(prompts)) as bar:
        scored = zip(_best(model, reward_model, prompts, settings), records, strict=True)
        for number, ((sample, score), record) in enumerate(scored, start=1):
            count = len(sample.response_ids)
            tokens += count
            new: Fields = {"response": sample.text, "tokens": count, "finished": sample.finished}
            if settings.top_logprobs:
                new["logprobs"] = _logprobs(model.tokenizer, sample)
            invalid += [sample.where] * (not sample.valid_utf8)
            yield extended(record, new if score is None else {**new, "score": score})
            if number - reported >= len(prompts) / MOST_LINES or number == len(prompts):
                pace = {"tokens/s": tokens / (time.monotonic() - began)}
                bar.advance(number - reported, **pace, **({"not UTF-8": len(invalid)} if invalid else {}))
                reported = number


def _counted(answers: int) -> str:
    return f"{answers} answer{'s' * (answers > 1)}"


def _logprobs(tokenizer: Tokenizer, sample: Completion) -> list[Fields]:
    """Each token with its log-probability and the most likely ones in its place."""

    def entry(token: int, logprob: float) -> Fields:
        return {"id": token, "token": tokenizer.decode([token], keep_control=True), "logprob": round(logprob, 6)}

    tokens = zip(sample.response_ids, sample.logprobs, sample.top, strict=True)
    return [entry(token, logprob) | {"top": [entry(*one) for one in top]} for token, logprob, top in tokens]


def json_records(paths: Iterable[Path]) -> list[Fields]:
    """The records of files, with their fields as they are and as JSON can hold them. Errors: E-DATA-*."""
    return [json_record(row) for path in paths for row in rows(path, Counts())]


def json_record(row: Row) -> Fields:
    value = row.read()
    fold(value, row.where)  # refuses what is not an object
    try:
        return dict(plain(value))
    except RecursionError:
        raise UserError("E-DATA-SYNTAX", "brackets nest too deeply", where=row.where) from None


def extended(record: Fields, new: Fields) -> Fields:
    """The record with new fields; its own of the same name, in any letter case, are called given_<name>."""
    own: Fields = {}
    for name, value in record.items():
        free = name
        while free.lower() in new or (free != name and free in record):
            free = f"given_{free}"
        own[free] = value
    return {**own, **new}


def deliver(records: Iterable[Fields], out: str, console: Console) -> None:
    """Each record as a line: into the file, which appears when all are done, or printed."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    if out:
        write_file(Path(out), ((line + "\n").encode() for line in lines))
        return
    for line in lines:
        console.say(line)


def check_out(out: str, source: str) -> None:
    """Before any work is done: the results need a separate file."""
    if out and os.path.isdir(out):
        raise UserError("E-IO-WRITE", "this is a folder", where=out, hint="name a file for the results")
    if out and source and os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        hint = "name another file for the results"
        raise UserError("E-CONF-CONFLICT", "--out is the file that is read", where=out, hint=hint)
