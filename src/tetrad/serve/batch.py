"""`tetrad generate` and `tetrad score`: records in, the same records with replies or scores out.

A record keeps all its fields; where it has one that is written here (reply, tokens, ended, score), its own is kept as
given_<name>. With `out` the file appears when it is whole, without it every line is printed when it is known.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tetrad.data.records import read_prompts
from tetrad.data.rows import rows
from tetrad.data.source import Counts, files
from tetrad.engine.console import Console
from tetrad.engine.rollout import Question, read_questions
from tetrad.errors import UserError
from tetrad.serve.models import (
    Answer,
    Model,
    RewardModel,
    answers,
    asked,
    load,
    load_reward,
    question,
    rate,
    rate_answers,
    written,
)
from tetrad.settings.use import Generate, ScoreFile
from tetrad.storage import write_file

Fields = dict[str, Any]
REPLIES_AT_ONCE = 256
SCORES_AT_ONCE = 512
_ANSWERS = ("reply", "output", "completion")  # `reply` is what generate writes, beside the answer that a record had


def generate_file(settings: Generate, console: Console) -> None:
    """Answers one prompt or a file of prompts, with the best of N replies where a reward model is named.

    Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*.
    """
    _check_out(settings.out, settings.prompts)
    model = load(settings.model, settings.template)
    judge = load_reward(settings.reward, settings.template) if settings.reward else None
    if settings.prompts:
        counts, limit = Counts(), model.model.config.max_positions
        paths = files([settings.prompts])
        questions = read_questions(paths, model.form, model.tokenizer, counts, limit, settings.max_new)
        records = _records(paths)
    else:
        questions = [question(model, asked(settings.instruction, settings.input, where="--instruction"))]
        records = [{"Instruction": settings.instruction, **({"Input": settings.input} if settings.input else {})}]
        if not settings.out:
            ((answer, _),) = _answered(model, judge, questions, settings)
            console.say(answer.sample.text)
            return
    _deliver(_with_replies(model, judge, questions, records, settings, console), settings.out, console)
    if settings.out:
        console.say(f"{len(questions)} answer{'s' * (len(questions) > 1)}: {settings.out}")


def score_file(settings: ScoreFile, console: Console) -> None:
    """Scores the answer of each record of a file. Errors: E-CONF-CONFLICT, E-DATA-*, E-MODEL-*, E-CKPT-*, E-IO-*."""
    _check_out(settings.out, settings.data)
    judge = load_reward(settings.model, settings.template)
    paths = files([settings.data])
    prompts, records = read_prompts(paths, Counts()), _records(paths)
    texts, ended = zip(*(_answer(r, p.where) for r, p in zip(records, prompts, strict=True)), strict=True)
    documents = written(judge, prompts, texts, ended)
    scores: list[float] = []

    def scored() -> Iterator[Fields]:
        with console.progress("score", len(documents)) as bar:
            for start in range(0, len(documents), SCORES_AT_ONCE):
                part = documents[start : start + SCORES_AT_ONCE]
                new = rate(judge, part)
                scores.extend(new)
                for record, score in zip(records[start : start + SCORES_AT_ONCE], new, strict=True):
                    yield _extended(record, {"score": score})
                bar.advance(len(part), mean=float(np.mean(scores)))

    _deliver(scored(), settings.out, console)
    if settings.out:
        low, mean, high = min(scores), float(np.mean(scores)), max(scores)
        console.say(f"{len(scores)} scores, mean {mean:+.3f}, from {low:+.3f} to {high:+.3f}: {settings.out}")


def _answered(
    model: Model, judge: RewardModel | None, questions: list[Question], settings: Generate, first: int = 0
) -> list[tuple[Answer, float | None]]:
    """One answer a question and its score; of several, the first with the highest."""
    copies = settings.best_of
    found = answers(model, questions, first, settings, copies)
    if judge is None:
        return [(answer, None) for answer in found]
    scores = np.array(rate_answers(judge, model, found)).reshape(-1, copies)
    best = [row * copies + int(column) for row, column in enumerate(scores.argmax(1))]
    return [(found[i], float(scores.flat[i])) for i in best]


def _with_replies(
    model: Model,
    judge: RewardModel | None,
    questions: list[Question],
    records: list[Fields],
    settings: Generate,
    console: Console,
) -> Iterator[Fields]:
    at_once = max(1, REPLIES_AT_ONCE // settings.best_of)
    with console.progress("generate", len(questions)) as bar:
        for start in range(0, len(questions), at_once):
            part = questions[start : start + at_once]
            found = _answered(model, judge, part, settings, start)
            for (answer, score), record in zip(found, records[start : start + at_once], strict=True):
                tokens = len(answer.sample.reply_ids)
                new = {"reply": answer.sample.text, "tokens": tokens, "ended": answer.ended}
                yield _extended(record, new if score is None else {**new, "score": score})
            bar.advance(len(part))


def _records(paths: Iterable[Path]) -> list[Fields]:
    """The records of files that were read once, field by field as they stand there."""
    return [row.read() for path in paths for row in rows(path, Counts())]


def _extended(record: Fields, new: Fields) -> Fields:
    """The record with new fields; its own of the same name, in any letter case, are called given_<name>."""
    kept: Fields = {}
    for name, value in record.items():
        free = name
        while free.lower() in new or (free != name and free in record):
            free = f"given_{free}"
        kept[free] = value
    return {**kept, **new}


def _answer(record: Fields, where: str) -> tuple[str, bool]:
    """The text to score, and whether it ends: only a reply that `generate` marked as cut does not."""
    fields = {name.lower(): value for name, value in record.items()}
    for name in _ANSWERS:
        if name in fields:
            if not isinstance(fields[name], str):
                code = "E-DATA-NULL" if fields[name] is None else "E-DATA-TYPE"
                raise UserError(code, f'"{name}" must be text', where=where, hint="write the answer as text")
            return fields[name], name != "reply" or fields.get("ended") is not False
    last = {name.lower(): value for name, value in fields.get("messages", [{}])[-1].items()}
    if last.get("role") == "assistant":
        return last["content"], True
    what = f"there is no answer to score; fields seen: {', '.join(record)}"
    raise UserError("E-DATA-MISSING", what, where=where, hint=f"name it one of {', '.join(_ANSWERS)}")


def _deliver(records: Iterable[Fields], out: str, console: Console) -> None:
    """Each record as a line: into the file, which appears when all are known, or printed."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    if out:
        write_file(Path(out), ((line + "\n").encode() for line in lines))
        return
    for line in lines:
        console.say(line)


def _check_out(out: str, source: str) -> None:
    """Before any work is done: the results must have a place of their own."""
    if out and os.path.isdir(out):
        raise UserError("E-IO-WRITE", "this is a folder", where=out, hint="name a file for the results")
    if out and source and os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        hint = "name another file for the results"
        raise UserError("E-CONF-CONFLICT", "--out is the file that is read", where=out, hint=hint)
