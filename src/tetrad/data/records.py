"""Rows of files to the records of types.py: documents, conversations, prompts, comparisons and scores.

Field names count in any letter case. A record's form is seen from its fields, so that one file may mix forms:
Instruction/Input/Output, messages, prompt/completion, choices with ranks, output with score, prompt/chosen/rejected.
`input` alone is an Instruction with an empty Input, so that a prompt has the same ids in every stage.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tetrad.data.source import Counts, files, paragraphs, rows
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

Fields = dict[str, Any]
Paths = Iterable[str | Path]
Record = Document | Conversation | Prompt | Comparison | Score
ROLES = ("system", "user", "assistant")
_ANSWERS = ("output", "completion", "choices", "chosen", "rejected", "score", "annotator", "margin")
_PREFERENCES = (  # the fields that make a form, and those that it may have; the first form that is whole is read
    (("choices",), ("annotator", "margin")),
    (("chosen", "rejected"), ("annotator", "margin")),
    (("output", "score"), ("annotator",)),
)


def read_documents(paths: Paths, counts: Counts | None = None) -> Iterator[Document]:
    """Paragraphs of txt files and `text` of json records, blank texts refused. Errors: E-DATA-*."""
    counts, unknown = counts or Counts(), _Unknown()
    for path in files(paths):
        if path.suffix.lower() == ".txt":
            for where, text in paragraphs(path, counts):
                counts.kept += 1
                yield Document(text, where)
            continue
        for where, value in rows(path, counts):
            fields = _fold(value, where)
            unknown.see(fields, ("text",), where)
            if "text" not in fields:
                _missing('"text"', fields, where)
            counts.kept += 1
            yield Document(_text(fields, "text", where), where)
    unknown.note(counts)


def read_conversations(paths: Paths, counts: Counts | None = None) -> Iterator[Conversation]:
    """Records of SFT; the last turn is the assistant's. Errors: E-DATA-*."""
    counts, unknown = counts or Counts(), _Unknown()
    for path in files(paths):
        for where, value in rows(path, counts):
            fields = _fold(value, where)
            known: tuple[str, ...] = ("messages",)
            if "messages" in fields:
                turns = _messages(fields, where)
                if turns[-1].role != "assistant":
                    _chat("the last turn must be the assistant's", len(turns), where)
            else:
                known, turns = _answered(fields, where)
            unknown.see(fields, known, where)
            counts.kept += 1
            yield Conversation(turns, where)
    unknown.note(counts)


def read_prompts(paths: Paths, counts: Counts | None = None) -> list[Prompt]:
    """The prompts of any record file; answers, ranks and scores are ignored. Errors: E-DATA-*."""
    counts, unknown = counts or Counts(), _Unknown()
    prompts = []
    for path in files(paths):
        for where, value in rows(path, counts):
            fields = _fold(value, where)
            unknown.see(fields, (*_prompt_fields(fields), *_ANSWERS), where)
            counts.kept += 1
            prompts.append(_prompt(fields, where, answered=True))
    unknown.note(counts)
    return prompts


def read_preferences(
    paths: Paths, score_scale: Sequence[float] = (), counts: Counts | None = None
) -> list[Comparison | Score]:
    """Comparisons and scores in the order of the files; comparisons without an order are kept and counted as `tied`.

    score_scale: the lowest and highest possible score; needed as soon as a record has one.
    Errors: E-DATA-SCALE (no scale; says the range seen), E-DATA-NUMBER (outside it), E-DATA-RANK, other E-DATA-*.
    """
    counts, unknown = counts or Counts(), _Unknown()
    records: list[Comparison | Score] = []
    for path in files(paths):
        for where, value in rows(path, counts):
            fields = _fold(value, where)
            form = next((form for form in _PREFERENCES if fields.keys() >= set(form[0])), None)
            if form is None:
                _missing('"choices", or "output" and "score", or "chosen" and "rejected"', fields, where)
            unknown.see(fields, (*_prompt_fields(fields), *form[0], *form[1]), where)
            records.append(_preference(fields, form[0][0], where, score_scale))
            counts.kept += 1
    counts.tied += sum(isinstance(r, Comparison) and len(set(r.ranks)) < 2 for r in records)
    scores = [r for r in records if isinstance(r, Score)]
    if scores and not score_scale:
        low, high = min(r.score for r in scores), max(r.score for r in scores)
        what = f"{len(scores)} records have a score (seen: {low:g} to {high:g}) and no scale is declared"
        hint = f"add to [reward]: score_scale = [{low:g}, {high:g}] (the lowest and highest possible score)"
        raise UserError("E-DATA-SCALE", what, where=scores[0].where, hint=hint)
    unknown.note(counts)
    return records


def answers(record: Comparison | Score) -> list[Conversation]:
    """Each answer of a record as a conversation of its prompt, in the record's order."""
    texts = record.answers if isinstance(record, Comparison) else (record.answer,)
    return [Conversation((*record.prompt.turns, Turn("assistant", text)), record.where) for text in texts]


def content_key(record: Record) -> bytes:
    """8 bytes of a hash of what the record says, wherever it stands."""
    content = [getattr(record, name) for name in record.__dataclass_fields__ if name not in ("where", "prompt")]
    prompt = getattr(record, "prompt", None)
    return hashlib.sha256(repr((type(record).__name__, prompt and prompt.turns, content)).encode()).digest()[:8]


def refuse_overlap(train: Iterable[Record], held_out: Iterable[Record]) -> None:
    """Errors: E-DATA-OVERLAP where a held-out record is also trained on."""
    seen = {content_key(record) for record in train}
    held = [(content_key(record) in seen, record.where) for record in held_out]
    both = [where for found, where in held if found]
    if both:
        what = f"{len(both)} of {len(held)} held-out records are also trained on"
        raise UserError("E-DATA-OVERLAP", what, where=both[0], hint="split by a hash of the text")


class _Unknown:
    """Fields that no form of record reads, with the first place of each."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}

    def see(self, fields: Fields, known: tuple[str, ...], where: str) -> None:
        for name in fields.keys() - set(known):
            self.first.setdefault(name, where)

    def note(self, counts: Counts) -> None:
        if self.first:
            listed = ", ".join(f'"{name}" (first at {where})' for name, where in sorted(self.first.items()))
            counts.notes.append(f"fields that are not read: {listed}")


def _answered(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """The fields read and the turns of an Instruction or prompt/completion record."""
    known: tuple[str, ...]
    if "prompt" in fields and "completion" in fields:
        known, answer = ("prompt", "completion"), "completion"
    elif "instruction" in fields and "output" in fields:
        known, answer = ("instruction", "input", "output"), "output"
    else:
        _missing('"Instruction" and "Output", or "messages", or "prompt" and "completion"', fields, where)
    prompt = _prompt({name: fields[name] for name in known if name in fields}, where)
    return known, (*prompt.turns, Turn("assistant", _text(fields, answer, where)))


def _prompt(fields: Fields, where: str, *, answered: bool = False) -> Prompt:
    """The prompt of any form. answered: messages may end with the assistant's turn, which is left out."""
    if "messages" in fields:
        turns = _messages(fields, where)
        turns = turns[:-1] if answered and turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            _chat("the last turn before the answer must be the user's", len(turns), where)
        return Prompt(turns, where)
    if not (names := _prompt_fields(fields)):
        _missing('"Instruction" (and "Input"), or "input", or "prompt", or "messages"', fields, where)
    first = names[0]
    instruction = _text(fields, first, where, blank=True)
    given = first == "instruction" and fields.get("input") is not None
    extra = _text(fields, "input", where, blank=True) if given else ""
    if not (instruction + extra).strip():
        raise UserError("E-DATA-BLANK", f'"{first}" is empty', where=where, hint="give the model something to answer")
    return Prompt((Turn("instruction", instruction), Turn("input", extra)), where)


def _prompt_fields(fields: Fields) -> tuple[str, ...]:
    """The fields that the prompt is read from; none where the record has none."""
    forms = ("messages",), ("instruction", "input"), ("prompt",), ("input",)
    return next((form for form in forms if form[0] in fields), ())


def _messages(fields: Fields, where: str) -> tuple[Turn, ...]:
    """An optional system turn, then user and assistant in turn. Errors: E-DATA-CHAT with the turn's number."""
    value = fields["messages"]
    if value is None:
        _null("messages", where)
    if not isinstance(value, list):
        _type("messages", "a list of turns", value, where)
    turns: list[Turn] = []
    for number, item in enumerate(value, 1):
        turn = _fold(item, where, f"messages[{number}]")
        if "role" not in turn or "content" not in turn:
            _missing(f'"role" and "content" in turn {number}', turn, where)
        role, last = _text(turn, "role", where), turns[-1].role if turns else "system"
        if role not in ROLES:
            _chat(f'"{role}" is no role (system, user, assistant)', number, where)
        if role == "system" and turns:
            _chat("a system turn stands first or nowhere", number, where)
        if role == last != "system" or (role == "assistant" and last == "system"):
            _chat(f"{role} after {last if turns else 'nothing'}: user and assistant take turns", number, where)
        turns.append(Turn(role, _text(turn, "content", where, blank=role == "system")))
    if not turns:
        _chat("there is no turn", 0, where)
    return tuple(turns)


def _preference(fields: Fields, form: str, where: str, scale: Sequence[float]) -> Comparison | Score:
    prompt = _prompt(fields, where)
    annotator = fields.get("annotator")
    if isinstance(annotator, bool) or not isinstance(annotator, str | int | None):
        _type("annotator", "text", annotator, where)
    name = "" if annotator is None else str(annotator)
    if form == "output":
        score = _number(fields, "score", where)
        if scale and not scale[0] <= score <= scale[1]:
            what = f'"score" is {score:g}, outside the scale {scale[0]:g} to {scale[1]:g}'
            raise UserError("E-DATA-NUMBER", what, where=where, hint="mend the record or reward.score_scale")
        return Score(prompt, _text(fields, "output", where), score, name, where)
    if form == "choices":
        texts, ranks = _choices(fields, where)
    else:
        texts, ranks = (_text(fields, "chosen", where), _text(fields, "rejected", where)), (1.0, 2.0)
    _refuse_two_ranks(texts, ranks, where)
    margin = 0.0 if fields.get("margin") is None else _number(fields, "margin", where)
    if margin < 0:
        raise UserError("E-DATA-NUMBER", '"margin" must not be negative', where=where)
    return Comparison(prompt, texts, ranks, name, margin, where)


def _choices(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    value = fields["choices"]
    if value is None:
        _null("choices", where)
    if not isinstance(value, list):
        _type("choices", "a list of answers", value, where)
    if len(value) < 2:
        raise UserError("E-DATA-RANK", f"{len(value)} answers: a comparison needs two or more", where=where)
    texts, ranks = [], []
    for number, item in enumerate(value, 1):
        choice = _fold(item, where, f"choices[{number}]")
        if "text" not in choice or "rank" not in choice:
            _missing(f'"text" and "rank" in answer {number}', choice, where)
        texts.append(_text(choice, "text", where))
        ranks.append(_number(choice, "rank", where))
    return tuple(texts), tuple(ranks)


def _refuse_two_ranks(texts: Sequence[str], ranks: Sequence[float], where: str) -> None:
    rank_of = dict(zip(texts, ranks, strict=True))
    if any(rank_of[text] != rank for text, rank in zip(texts, ranks, strict=True)):
        hint = "give it one rank, or delete one of the two"
        raise UserError("E-DATA-RANK", "the same answer stands twice with different ranks", where=where, hint=hint)


def _fold(value: Any, where: str, name: str = "") -> Fields:
    """A record's fields by lower-case name."""
    if not isinstance(value, dict):
        _type(name, "an object with named fields", value, where)
    fields = {key.lower(): item for key, item in value.items()}
    if len(fields) < len(value):
        twice = Counter(key.lower() for key in value).most_common(1)[0][0]
        what = f'the key "{twice}" stands twice in one object, in different letter case'
        raise UserError("E-DATA-DUPKEY", what, where=where)
    return fields


def _text(fields: Fields, name: str, where: str, *, blank: bool = False) -> str:
    value = fields[name]
    if value is None:
        _null(name, where)
    if not isinstance(value, str):
        _type(name, "text", value, where)
    if not blank and not value.strip():
        hint = "write the text or delete the record"
        raise UserError("E-DATA-BLANK", f'"{name}" is empty', where=where, hint=hint)
    return value


def _number(fields: Fields, name: str, where: str) -> float:
    value = fields[name]
    if value is None:
        _null(name, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _type(name, "a number", value, where)
    if abs(value) >= 2**63 or not math.isfinite(value):
        raise UserError("E-DATA-NUMBER", f'"{name}" is too large', where=where)
    return float(value)


def _missing(needed: str, fields: Fields, where: str) -> NoReturn:
    seen = ", ".join(f'"{name}"' for name in fields) or "none"
    hint = "rename the fields (letter case does not matter)"
    raise UserError("E-DATA-MISSING", f"needs {needed}; fields seen: {seen}", where=where, hint=hint)


def _null(name: str, where: str) -> NoReturn:
    raise UserError("E-DATA-NULL", f'"{name}" is null', where=where, hint="write the value or delete the record")


def _type(name: str, wanted: str, value: Any, where: str) -> NoReturn:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    got = kinds.get(type(value), "null")
    what = f'"{name}" must be {wanted}, got {got}' if name else f"a record must be {wanted}, got {got}"
    raise UserError("E-DATA-TYPE", what, where=where)


def _chat(what: str, turn: int, where: str) -> NoReturn:
    raise UserError("E-DATA-CHAT", f"turn {turn}: {what}", where=where)
