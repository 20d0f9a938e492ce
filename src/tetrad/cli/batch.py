"""`tetrad generate` and `tetrad score`: records in, the same records with responses or scores out.

A record keeps all its fields; if it has one that is written here (response, tokens, finished, logprobs, score), its own
is kept as given_<name>. With `out` the file appears when complete, without it each line is printed when ready.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tetrad.console import Console
from tetrad.data.fields import fold, null
from tetrad.data.parquet import plain
from tetrad.data.records import read_prompts
from tetrad.data.rows import Row, rows
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.inference import policy
from tetrad.inference.completions import Completion, EncodedPrompt, best, read_encoded_prompts
from tetrad.reward.model import RewardModel, documents_from_text, load_reward, score_documents, score_samples
from tetrad.settings.use import Generate, ScoreFile
from tetrad.storage import write_file
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.context import renamed
from tetrad.types import Prompt

Fields = dict[str, Any]
SCORES_AT_ONCE = 128
MOST_LINES = 50  # of progress
_GENERATED = ("response", "reply")  # written by generate, now and before, beside the answer that a record had
_ANSWERS = (*_GENERATED, "output", "completion")


def generate_file(settings: Generate, console: Console) -> None:
    """Answers one prompt or a file of prompts, with the best of N responses if a reward model is named.

    Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*.
    """
    _check_out(settings.out, settings.prompts)
    given = sources([settings.prompts] if settings.prompts else [], rename=renamed(settings.rename))
    records = _records(given.paths)
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
    _deliver(_with_responses(model, reward_model, prompts, records, settings, console, invalid), settings.out, console)
    if settings.out:
        console.say(f"{_counted(len(prompts))}: {settings.out}")
        if invalid:
            is_not = f"{_counted(len(invalid))} {'are' if len(invalid) > 1 else 'is'} not valid UTF-8"
            console.say(f"note: {is_not}, wrong bytes are written as U+FFFD; the first answers {invalid[0]}")


def score_file(settings: ScoreFile, console: Console) -> None:
    """Scores the answer of each record of a file. Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*."""
    _check_out(settings.out, settings.data)
    given = sources([settings.data], rename=renamed(settings.rename))
    prompts, records = read_prompts(given, Counts()), _records(given.paths)
    reward_model = load_reward(settings.model, settings.template)
    samples = [_answered(record, prompt, given.rename) for record, prompt in zip(records, prompts, strict=True)]
    documents = documents_from_text(reward_model.template, reward_model.tokenizer, samples)
    scores: list[float] = []

    def scored() -> Iterator[Fields]:
        with console.progress("score", len(documents)) as bar:
            for start in range(0, len(documents), SCORES_AT_ONCE):
                part = documents[start : start + SCORES_AT_ONCE]
                rewards = score_documents(reward_model, part)
                means, stds = rewards.mean(0).tolist(), rewards.std(0).tolist()
                scores.extend(means)
                for record, score, std in zip(records[start : start + len(part)], means, stds, strict=True):
                    yield _extended(record, {"score": score} | ({"score_std": std} if len(rewards) > 1 else {}))
                bar.advance(len(part), mean=float(np.mean(scores)))

    _deliver(scored(), settings.out, console)
    if settings.out:
        low, mean, high = min(scores), float(np.mean(scores)), max(scores)
        console.say(f"{len(scores)} scores, mean {mean:+.3f}, from {low:+.3f} to {high:+.3f}: {settings.out}")


def _best(
    model: policy.Policy, reward_model: RewardModel | None, prompts: list[EncodedPrompt], settings: Generate
) -> Iterator[tuple[Completion, float | None]]:
    """One completion per prompt and its score; of several, the best."""
    groups = policy.completions(model, prompts, settings, settings.best_of)
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
            yield _extended(record, new if score is None else {**new, "score": score})
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


def _records(paths: Iterable[Path]) -> list[Fields]:
    """The records of files, with their fields as they are and as JSON can hold them. Errors: E-DATA-*."""
    return [_writable(row) for path in paths for row in rows(path, Counts())]


def _writable(row: Row) -> Fields:
    value = row.read()
    fold(value, row.where)  # refuses what is not an object
    try:
        return dict(plain(value))
    except RecursionError:
        raise UserError("E-DATA-SYNTAX", "brackets nest too deeply", where=row.where) from None


def _extended(record: Fields, new: Fields) -> Fields:
    """The record with new fields; its own of the same name, in any letter case, are called given_<name>."""
    own: Fields = {}
    for name, value in record.items():
        free = name
        while free.lower() in new or (free != name and free in record):
            free = f"given_{free}"
        own[free] = value
    return {**own, **new}


def _answered(record: Fields, prompt: Prompt, rename: Mapping[str, str]) -> Completion:
    """The prompt and the text to score, which ends unless it is a response that `generate` marked as cut."""
    fields = {rename.get(name.lower(), name.lower()): value for name, value in record.items()}
    for name in _ANSWERS:
        if fields.get(name) is not None:
            if not isinstance(fields[name], str):
                raise UserError(
                    "E-DATA-TYPE", f'"{name}" must be text', where=prompt.where, hint="write the answer as text"
                )
            finished = name not in _GENERATED or fields.get("finished", fields.get("ended")) is not False
            return Completion((), (), prompt.turns, fields[name], prompt.where, finished)
    last = {name.lower(): value for name, value in (fields.get("messages") or [{}])[-1].items()}
    if last.get("role") == "assistant":
        return Completion((), (), prompt.turns, last["content"], prompt.where)
    if name := next((name for name in _ANSWERS if name in fields), ""):
        null(name, prompt.where)
    what = f"there is no answer to score; fields seen: {', '.join(record)}"
    raise UserError("E-DATA-MISSING", what, where=prompt.where, hint=f"name it one of {', '.join(_ANSWERS)}")


def _deliver(records: Iterable[Fields], out: str, console: Console) -> None:
    """Each record as a line: into the file, which appears when all are done, or printed."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    if out:
        write_file(Path(out), ((line + "\n").encode() for line in lines))
        return
    for line in lines:
        console.say(line)


def _check_out(out: str, source: str) -> None:
    """Before any work is done: the results need a separate file."""
    if out and os.path.isdir(out):
        raise UserError("E-IO-WRITE", "this is a folder", where=out, hint="name a file for the results")
    if out and source and os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        hint = "name another file for the results"
        raise UserError("E-CONF-CONFLICT", "--out is the file that is read", where=out, hint=hint)
