"""A row's fields to a record of types.py.

Field names count in any letter case. A record's form is seen from its fields, so that one file may mix forms:
Instruction/Input/Output (and Alpaca's system and history), messages, ShareGPT's conversations, prompt/completion,
choices with ranks or votes, output with score, chosen/rejected. `input` alone is an Instruction with an empty Input, so
that a prompt has the same ids in every stage. Every form seen is counted by its name, and so is what a record says is
not to be learned from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tetrad.data.fields import MARKS, Fields, chat, fold, missing, number, refuse_two_ranks, text, turns, wrong_type
from tetrad.data.source import Counts
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

Known = tuple[str, ...]  # the fields that a form reads
_ANSWERS = ("output", "completion", "choices", "chosen", "rejected", "score", "annotator", "margin", "votes", "spread")
_PREFERENCES = (  # the fields that make a form, and those that it may have; the first form that is whole is read
    (("choices",), ("annotator", "margin")),
    (("chosen", "rejected"), ("annotator", "margin", "votes")),
    (("output", "score"), ("annotator", "spread")),
)
_FORMS = {"choices": "ranked choices", "chosen": "chosen and rejected", "output": "scores"}
_TURN = ("role", "content", "from", "value")
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_PAIRED = "prompt and completion"


def _seen(counts: Counts, form: str, fields: Fields, known: Known, where: str, inner: Known = _TURN) -> None:
    """Counts the form, and notes the fields that are not read. inner: those that are, of the objects in a list."""
    counts.forms[form] += 1
    for name, value in fields.items():
        if name not in known:
            counts.unknown.setdefault(name, where)
            continue
        for item in value if isinstance(value, list) else (value,):
            for key in item if isinstance(item, dict) else ():
                if key.lower() not in inner and item[key] is not None:
                    counts.unknown.setdefault(f"{name}.{key.lower()}", where)


def document(fields: Fields, where: str, counts: Counts) -> Document:
    if "text" not in fields:
        missing('"text"', fields, where)
    found = text(fields, "text", where)
    _seen(counts, "text", fields, ("text",), where)
    return Document(found, where)


def conversation(fields: Fields, where: str, counts: Counts) -> Conversation | None:
    """A record of SFT; nothing where it says itself that its answer is a bad one, or that none is to be learned."""
    form, known, found = _answered(fields, where)
    label = next((name for name in ("label", "kto_tag") if _is_label(name, fields.get(name), form)), "")
    _seen(counts, form, fields, (*known, label), where, (*_TURN, *MARKS))
    answers = [turn.train for turn in found if turn.role == "assistant"]
    counts.masked += answers.count(False)
    if not any(answers) or (label and str(fields[label]).lower() in _FALSE):
        counts.excluded += 1
        return None
    return Conversation(found, where)


def _is_label(name: str, value: Any, form: str) -> bool:
    """Whether a field is the label of KTO's form: is this a good answer? A number called `label` beside an Instruction
    may be anything, the class of a text for example."""
    free = name == "kto_tag" or form == _PAIRED
    return isinstance(value, bool) or (free and str(value).lower() in (*_FALSE, *_TRUE))


def _answered(fields: Fields, where: str) -> tuple[str, Known, tuple[Turn, ...]]:
    """The form's name, the fields read and the turns of a record of SFT."""
    if "messages" in fields or "conversations" in fields:
        form, known, found = _chat_turns(fields, where)
        if found[-1].role != "assistant":
            chat("the last turn must be the assistant's", len(found), where)
        return form, known, found
    if "prompt" in fields and "completion" in fields:
        prompt, answer = _prompt(fields, where), _answer(fields, "completion", where)
        return _PAIRED, ("prompt", "completion"), (*prompt.turns, *answer)
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


def asked(fields: Fields, where: str, counts: Counts) -> Prompt:
    prompt = _prompt(fields, where, answered=True)
    known = _prompt_fields(fields)
    rest = Fields({name: value for name, value in fields.items() if name in known or name not in _ANSWERS})
    _seen(counts, "prompts", rest, known, where)
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


def preference(fields: Fields, where: str, counts: Counts, scale: Sequence[float]) -> Comparison | Score:
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
    inner = (*_TURN, "text", "votes" if isinstance(record, Comparison) and record.votes else "rank")
    _seen(counts, _FORMS[form[0][0]], fields, (*_prompt_fields(fields), *form[0], *form[1]), where, inner)
    return record


def _score(fields: Fields, annotator: str, where: str, scale: Sequence[float]) -> Score:
    prompt, score = _prompt(fields, where), number(fields, "score", where)
    if scale and not scale[0] <= score <= scale[1]:
        what = f'"score" is {score:g}, outside the scale {scale[0]:g} to {scale[1]:g}'
        raise UserError("E-DATA-NUMBER", what, where=where, hint="mend the record or reward.score_scale")
    spread = _not_negative(fields, "spread", where, "a standard error is 0 or more")
    return Score(prompt, text(fields, "output", where), score, annotator, where, spread)


def _comparison(fields: Fields, form: str, annotator: str, where: str) -> Comparison:
    votes: tuple[float, ...] = ()
    if form == "choices":
        prompt = _prompt(fields, where)
        texts, ranks, votes = _choices(fields, where)
    else:
        prompt, texts = _pair(fields, where)
        ranks = (1.0, 2.0)
        if fields.get("votes") is not None:
            votes = _votes(fields["votes"], where)
            ranks = _ranks_of(votes)
    refuse_two_ranks(texts, ranks, where)
    margin = _not_negative(fields, "margin", where, "the better answer is the first: swap them, or drop the margin")
    return Comparison(prompt, texts, ranks, annotator, margin, where, votes)


def _not_negative(fields: Mapping[str, Any], name: str, where: str, hint: str) -> float:
    """0 where the field is missing."""
    value = 0.0 if fields.get(name) is None else number(fields, name, where)
    if value < 0:
        raise UserError("E-DATA-NUMBER", f'"{name}" must not be negative', where=where, hint=hint)
    return value


def _votes(value: Any, where: str) -> tuple[float, float]:
    """How many preferred `chosen`, and how many `rejected`."""
    if not isinstance(value, list) or len(value) != 2:
        wrong_type("votes", 'two numbers, for "chosen" and for "rejected"', value, where)
    hint = "count the people who preferred each answer"
    first, second = (_not_negative({"votes": vote}, "votes", where, hint) for vote in value)
    return first, second


def _ranks_of(votes: Sequence[float]) -> tuple[float, ...]:
    """The most votes have rank 1; equal ones tie."""
    return tuple(1.0 + sum(other > vote for other in votes) for vote in votes)


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
    if not _prompt_fields(fields) and all(isinstance(value, str) for value in whole):
        what = '"chosen" and "rejected" are texts, and there is no prompt beside them'
        hint = 'put what both begin with into "prompt", or write both as lists of turns, {"role": ..., "content": ...}'
        raise UserError("E-DATA-MISSING", what, where=where, hint=hint)
    prompt = _prompt(fields, where)
    pair = [_answer(fields, name, where) for name in ("chosen", "rejected")]
    for found in pair:
        if len(found) > 1:
            chat("an answer is one turn", len(found), where)
    return prompt, (pair[0][0].text, pair[1][0].text)


def _choices(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """Texts, ranks and, where they have any instead of ranks, votes."""
    value: Any = fields["choices"]
    if not isinstance(value, list):
        wrong_type("choices", "a list of answers", value, where)
    if len(value) < 2:
        hint = "write every answer of the prompt in one record"
        raise UserError("E-DATA-RANK", f"{len(value)} answers: a comparison needs two or more", where=where, hint=hint)
    choices = [fold(item, where, f"choices[{place}]") for place, item in enumerate(value, 1)]
    voted = all("votes" in choice and "rank" not in choice for choice in choices)
    for place, choice in enumerate(choices, 1):
        if "text" not in choice or ("rank" not in choice and not voted):
            missing(f'"text" and "rank" in answer {place} (or "votes" in every answer)', choice, where)
    texts = tuple(text(choice, "text", where) for choice in choices)
    if not voted:
        return texts, tuple(number(choice, "rank", where) for choice in choices), ()
    hint = "count the people who preferred each answer"
    votes = tuple(_not_negative(choice, "votes", where, hint) for choice in choices)
    return texts, _ranks_of(votes), votes
