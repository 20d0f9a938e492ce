"""Rows of files to the records of types.py: documents, conversations, prompts, comparisons and scores.

Field names count in any letter case. A record's form is seen from its fields, so that one file may mix forms:
Instruction/Input/Output (and Alpaca's system and history), messages, ShareGPT's conversations, prompt/completion,
choices with ranks, output with score, chosen/rejected. `input` alone is an Instruction with an empty Input, so that a
prompt has the same ids in every stage. Every form seen is counted by its name.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tetrad.data.fields import Fields, chat, fold, missing, null, number, refuse_two_ranks, text, turns, wrong_type
from tetrad.data.rows import paragraphs, rows
from tetrad.data.source import Counts, Sources, Span, kind, sources
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

Paths = Sources | Iterable[str | Path]
Record = Document | Conversation | Prompt | Comparison | Score
Refuse = Callable[[UserError, str], None]
"""Told of each bad row, with the row's text; the reading goes on. Without it the first bad row is raised."""
R = TypeVar("R", bound=Record)
Known = tuple[str, ...]  # the fields that a form reads
_ANSWERS = ("output", "completion", "choices", "chosen", "rejected", "score", "annotator", "margin")
_PREFERENCES = (  # the fields that make a form, and those that it may have; the first form that is whole is read
    (("choices",), ("annotator", "margin")),
    (("chosen", "rejected"), ("annotator", "margin")),
    (("output", "score"), ("annotator",)),
)
_FORMS = {"choices": "ranked choices", "chosen": "chosen and rejected", "output": "scores"}


# --- reading ---


def read_documents(paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None) -> Iterator[Document]:
    """Paragraphs of txt files and `text` of records, blank texts refused. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, Sources) else sources(paths)
    for path in given.paths:
        yield from documents_of(path, given, counts, refuse)


def documents_of(part: Path | Span, given: Sources, counts: Counts, refuse: Refuse | None = None) -> Iterator[Document]:
    """The documents of one file, or of a part of one."""
    path = part.path if isinstance(part, Span) else part
    if kind(path) != ".txt":
        yield from _records(part, _document, given, counts, refuse)
        return
    for where, found in paragraphs(part, counts):
        counts.kept += 1
        counts.forms["paragraphs"] += 1
        yield Document(found, where)


def read_conversations(
    paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None
) -> Iterator[Conversation]:
    """Records of SFT; the last turn is the assistant's. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, Sources) else sources(paths)
    for path in given.paths:
        yield from conversations_of(path, given, counts, refuse)


def conversations_of(
    part: Path | Span, given: Sources, counts: Counts, refuse: Refuse | None = None
) -> Iterator[Conversation]:
    """The conversations of one file, or of a part of one."""
    return _records(part, _conversation, given, counts, refuse)


def read_prompts(paths: Paths, counts: Counts | None = None, refuse: Refuse | None = None) -> list[Prompt]:
    """The prompts of any record file; answers, ranks and scores are ignored. Errors: E-DATA-*."""
    counts = counts or Counts()
    given = paths if isinstance(paths, Sources) else sources(paths)
    return [p for path in given.paths for p in prompts_of(path, given, counts, refuse)]


def prompts_of(part: Path | Span, given: Sources, counts: Counts, refuse: Refuse | None = None) -> Iterator[Prompt]:
    """The prompts of one file, or of a part of one."""
    return _records(part, _asked, given, counts, refuse)


def read_preferences(
    paths: Paths, score_scale: Sequence[float] = (), counts: Counts | None = None, refuse: Refuse | None = None
) -> list[Comparison | Score]:
    """Comparisons and scores in the order of the files; comparisons without an order are kept and counted as `tied`.

    score_scale: the lowest and highest possible score; needed as soon as a record has one.
    Errors: E-DATA-SCALE (no scale; says the range seen), E-DATA-NUMBER (outside it), E-DATA-RANK, other E-DATA-*.
    """
    counts = counts or Counts()
    given = paths if isinstance(paths, Sources) else sources(paths)
    records = [r for path in given.paths for r in preferences_of(path, given, counts, refuse, score_scale)]
    refuse_no_scale(records, score_scale)
    return records


def preferences_of(
    part: Path | Span, given: Sources, counts: Counts, refuse: Refuse | None = None, score_scale: Sequence[float] = ()
) -> Iterator[Comparison | Score]:
    """The comparisons and scores of one file, or of a part of one."""

    def make(fields: Fields, where: str, counts: Counts) -> Comparison | Score:
        record = _preference(fields, where, counts, score_scale)
        counts.tied += isinstance(record, Comparison) and len(set(record.ranks)) < 2
        return record

    return _records(part, make, given, counts, refuse)


def refuse_no_scale(records: Iterable[Record], score_scale: Sequence[float]) -> None:
    """Errors: E-DATA-SCALE where scores have no declared scale; says the range seen."""
    scores = [(r.score, r.where) for r in records if isinstance(r, Score) and not score_scale]
    if scores:
        low, high = min(scores)[0], max(scores)[0]
        what = f"{len(scores)} records have a score (seen: {low:g} to {high:g}) and no scale is declared"
        hint = f"add to [reward]: score_scale = [{low:g}, {high:g}] (the lowest and highest possible score)"
        raise UserError("E-DATA-SCALE", what, where=scores[0][1], hint=hint)


def _records(
    part: Path | Span,
    make: Callable[[Fields, str, Counts], R],
    given: Sources,
    counts: Counts,
    refuse: Refuse | None,
) -> Iterator[R]:
    for row in rows(part, counts):
        try:
            record = make(fold(row.read(), row.where, rename=given.rename), row.where, counts)
        except UserError as error:
            if refuse is None:
                raise
            counts.refused += 1
            refuse(error, row.text())
            continue
        counts.kept += 1
        yield record


# --- what records say ---


def answers(record: Comparison | Score) -> list[Conversation]:
    """Each answer of a record as a conversation of its prompt, in the record's order."""
    texts = record.answers if isinstance(record, Comparison) else (record.answer,)
    return [Conversation((*record.prompt.turns, Turn("assistant", found)), record.where) for found in texts]


def content_key(record: Record) -> bytes:
    """8 bytes of a hash of what the record says, wherever it stands."""
    content = [getattr(record, name) for name in record.__dataclass_fields__ if name not in ("where", "prompt")]
    prompt = getattr(record, "prompt", None)
    return hashlib.sha256(repr((type(record).__name__, prompt and prompt.turns, content)).encode()).digest()[:8]


def refuse_overlap(train: Iterable[Record], held_out: Iterable[Record]) -> None:
    """Errors: E-DATA-OVERLAP where a held-out record is also trained on. Memory: 8 bytes a training record."""
    held = [(int.from_bytes(content_key(record), "little"), record.where) for record in held_out]
    if not held:
        return
    seen = np.fromiter((int.from_bytes(content_key(record), "little") for record in train), np.uint64)
    found = np.isin(np.array([key for key, _ in held], np.uint64), seen)
    if found.any():
        what = f"{int(found.sum())} of {len(held)} held-out records are also trained on"
        where = held[int(found.argmax())][1]
        raise UserError("E-DATA-OVERLAP", what, where=where, hint="split by a hash of the text")


# --- forms ---


def _seen(counts: Counts, form: str, fields: Fields, known: Known, where: str) -> None:
    counts.forms[form] += 1
    for name in fields:
        if name not in known:
            counts.unknown.setdefault(name, where)


def _document(fields: Fields, where: str, counts: Counts) -> Document:
    if "text" not in fields:
        missing('"text"', fields, where)
    found = text(fields, "text", where)
    _seen(counts, "text", fields, ("text",), where)
    return Document(found, where)


def _conversation(fields: Fields, where: str, counts: Counts) -> Conversation:
    form, known, found = _answered(fields, where)
    _seen(counts, form, fields, known, where)
    return Conversation(found, where)


def _answered(fields: Fields, where: str) -> tuple[str, Known, tuple[Turn, ...]]:
    """The form's name, the fields read and the turns of a record of SFT."""
    if "messages" in fields or "conversations" in fields:
        form, known, found = _chat_turns(fields, where)
        if found[-1].role != "assistant":
            chat("the last turn must be the assistant's", len(found), where)
        return form, known, found
    if "prompt" in fields and "completion" in fields:
        prompt, answer = _prompt(fields, where), _answer(fields, "completion", where)
        return "prompt and completion", ("prompt", "completion"), (*prompt.turns, *answer)
    if "instruction" in fields and "output" in fields:
        form, known, asked = _instruction(fields, where)
        return form, (*known, "output"), (*asked, Turn("assistant", text(fields, "output", where)))
    return missing('"Instruction" and "Output", or "messages", or "prompt" and "completion"', fields, where)


def _chat_turns(fields: Fields, where: str) -> tuple[str, Known, tuple[Turn, ...]]:
    """`messages`, or ShareGPT's `conversations` with a `system` beside it."""
    if "messages" in fields:
        return "messages", ("messages",), turns(fields["messages"], "messages", where)
    found = turns(fields["conversations"], "conversations", where)
    if fields.get("system") and found[0].role != "system":
        found = (Turn("system", text(fields, "system", where)), *found)
    return "sharegpt conversations", ("conversations", "system"), found


def _instruction(fields: Fields, where: str) -> tuple[str, Known, tuple[Turn, ...]]:
    """Instruction and Input; with Alpaca's system or history it is a conversation of several turns."""
    extra = text(fields, "input", where, blank=True) if fields.get("input") is not None else ""
    first = text(fields, "instruction", where, blank=True)
    if not (first + extra).strip():
        hint = "give the model something to answer"
        raise UserError("E-DATA-BLANK", '"instruction" is empty', where=where, hint=hint)
    known = ("instruction", "input", "system", "history")
    if not fields.get("system") and not fields.get("history"):
        return "instruction and output", known, (Turn("instruction", first), Turn("input", extra))
    before = _history(fields, where)
    system = (Turn("system", text(fields, "system", where)),) if fields.get("system") else ()
    asked = Turn("user", first + (f"\n{extra}" if extra else ""))
    return "alpaca with system or history", known, (*system, *before, asked)


def _history(fields: Fields, where: str) -> tuple[Turn, ...]:
    """Alpaca's `history`: pairs of what was asked and answered before."""
    found: list[Turn] = []
    given = fields.get("history") or []
    if not isinstance(given, list):
        wrong_type("history", "a list of pairs", given, where)
    for place, pair in enumerate(given, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            wrong_type(f"history[{place}]", "a pair of question and answer", pair, where)
        said = {"question": pair[0], "answer": pair[1]}
        found += [Turn("user", text(said, "question", where)), Turn("assistant", text(said, "answer", where))]
    return tuple(found)


def _answer(fields: Fields, name: str, where: str) -> tuple[Turn, ...]:
    """What follows a prompt: a text, a turn, or a list of turns that ends with the assistant's."""
    value = [fields[name]] if isinstance(fields[name], dict) and fields[name] else fields[name]
    if not _is_talk(value):
        return (Turn("assistant", text(fields, name, where)),)
    found = turns(value, name, where, answer=True)
    if found[-1].role != "assistant":
        chat("the last turn must be the assistant's", len(found), where)
    return found


def _is_talk(value: Any) -> bool:
    """Whether this is a list of turns rather than a text."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _asked(fields: Fields, where: str, counts: Counts) -> Prompt:
    prompt = _prompt(fields, where, answered=True)
    _seen(counts, "prompts", fields, (*_prompt_fields(fields), *_ANSWERS), where)
    return prompt


def _prompt(fields: Fields, where: str, *, answered: bool = False) -> Prompt:
    """The prompt of any form. answered: messages may end with the assistant's turn, which is left out."""
    names = _prompt_fields(fields)
    if not names:
        missing('"Instruction" (and "Input"), or "input", or "prompt", or "messages"', fields, where)
    first = names[0]
    if first == "instruction":
        return Prompt(_instruction(fields, where)[2], where)
    talk = first == "prompt" and _is_talk(fields["prompt"])
    if talk or first in ("messages", "conversations"):
        found = turns(fields["prompt"], "prompt", where) if talk else _chat_turns(fields, where)[2]
        found = found[:-1] if answered and found[-1].role == "assistant" else found
        if not found or found[-1].role != "user":
            chat("the last turn before the answer must be the user's", len(found), where)
        return Prompt(found, where)
    asked = text(fields, first, where, blank=True)
    if not asked.strip():
        raise UserError("E-DATA-BLANK", f'"{first}" is empty', where=where, hint="give the model something to answer")
    return Prompt((Turn("instruction", asked), Turn("input", "")), where)


def _prompt_fields(fields: Fields) -> Known:
    """The fields that the prompt is read from; none where the record has none."""
    forms = (
        ("messages",),
        ("conversations", "system"),
        ("instruction", "input", "system", "history"),
        ("prompt",),
        ("input",),
    )
    return next((form for form in forms if form[0] in fields), ())


def _preference(fields: Fields, where: str, counts: Counts, scale: Sequence[float]) -> Comparison | Score:
    form = next((form for form in _PREFERENCES if fields.keys() >= set(form[0])), None)
    if form is None:
        missing('"choices", or "output" and "score", or "chosen" and "rejected"', fields, where)
    annotator = fields.get("annotator")
    if isinstance(annotator, bool) or not isinstance(annotator, str | int | None):
        wrong_type("annotator", "text", annotator, where)
    name = "" if annotator is None else str(annotator)
    record: Comparison | Score
    if form[0][0] == "output":
        record = _score(fields, name, where, scale)
    else:
        record = _comparison(fields, form[0][0], name, where)
    _seen(counts, _FORMS[form[0][0]], fields, (*_prompt_fields(fields), *form[0], *form[1]), where)
    return record


def _score(fields: Fields, annotator: str, where: str, scale: Sequence[float]) -> Score:
    prompt, score = _prompt(fields, where), number(fields, "score", where)
    if scale and not scale[0] <= score <= scale[1]:
        what = f'"score" is {score:g}, outside the scale {scale[0]:g} to {scale[1]:g}'
        raise UserError("E-DATA-NUMBER", what, where=where, hint="mend the record or reward.score_scale")
    return Score(prompt, text(fields, "output", where), score, annotator, where)


def _comparison(fields: Fields, form: str, annotator: str, where: str) -> Comparison:
    if form == "choices":
        prompt = _prompt(fields, where)
        texts, ranks = _choices(fields, where)
    else:
        prompt, texts = _pair(fields, where)
        ranks = (1.0, 2.0)
    refuse_two_ranks(texts, ranks, where)
    margin = 0.0 if fields.get("margin") is None else number(fields, "margin", where)
    if margin < 0:
        hint = "the better answer is the first: swap them, or drop the margin"
        raise UserError("E-DATA-NUMBER", '"margin" must not be negative', where=where, hint=hint)
    return Comparison(prompt, texts, ranks, annotator, margin, where)


def _pair(fields: Fields, where: str) -> tuple[Prompt, tuple[str, str]]:
    """The prompt and the two answers; as lists of turns they may hold the whole conversation, the prompt included."""
    whole = [fields[name] for name in ("chosen", "rejected")]
    if all(_is_talk(value) and len(value) > 1 for value in whole):
        better, worse = (turns(value, name, where) for value, name in zip(whole, ("chosen", "rejected"), strict=True))
        if better[:-1] != worse[:-1]:
            chat('"chosen" and "rejected" answer different conversations', len(better), where)
        for found in (better, worse):
            if found[-1].role != "assistant":
                chat("the last turn must be the assistant's", len(found), where)
        return Prompt(better[:-1], where), (better[-1].text, worse[-1].text)
    prompt = _prompt(fields, where)
    pair = [_answer(fields, name, where) for name in ("chosen", "rejected")]
    for found in pair:
        if len(found) > 1:
            chat("an answer is one turn", len(found), where)
    return prompt, (pair[0][0].text, pair[1][0].text)


def _choices(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    value: Any = fields["choices"]
    if value is None:
        null("choices", where)
    if not isinstance(value, list):
        wrong_type("choices", "a list of answers", value, where)
    if len(value) < 2:
        hint = "write every answer of the prompt in one record"
        raise UserError("E-DATA-RANK", f"{len(value)} answers: a comparison needs two or more", where=where, hint=hint)
    texts, ranks = [], []
    for place, item in enumerate(value, 1):
        choice = fold(item, where, f"choices[{place}]")
        if "text" not in choice or "rank" not in choice:
            missing(f'"text" and "rank" in answer {place}', choice, where)
        texts.append(text(choice, "text", where))
        ranks.append(number(choice, "rank", where))
    return tuple(texts), tuple(ranks)
