"""Converts a row's fields to a record of types.py.

Field names are case-insensitive. A record's format is inferred from its fields, so that one file may mix formats:
Instruction/Input/Output (and Alpaca's system and history), messages, ShareGPT's conversations, prompt/completion,
choices with ranks or votes, output with score, chosen/rejected. `input` alone is an Instruction with an empty Input, so
that a prompt has the same ids in every stage. Every format seen is counted by name, and so is what a record marks
as not to be trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tetrad.data.fields import MARKS, Fields, chat, fold, missing, number, text, turns, wrong_type
from tetrad.data.source import Counts
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

Known = tuple[str, ...]  # the fields that a format reads
_ANSWERS = ("output", "completion", "choices", "chosen", "rejected", "score", "annotator", "margin", "votes", "spread")
_PROMPTS = (  # the fields of each kind of prompt; the first kind whose first field is there is read
    ("messages",),
    ("conversations", "system"),
    ("instruction", "input", "system", "history"),
    ("prompt",),
    ("input",),
)
# Name, required and optional fields of each format; the first complete one is read. Comments and seconds of `tetrad
# rank` are for people.
_PREFERENCES = (
    ("ranked choices", ("choices",), ("annotator", "margin", "comment", "seconds")),
    ("chosen and rejected", ("chosen", "rejected"), ("annotator", "margin", "votes")),
    ("scores", ("output", "score"), ("annotator", "spread")),
)
_TURN = ("role", "content", "from", "value")
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_PAIRED = "prompt and completion"


def _seen(counts: Counts, form: str, fields: Fields, known: Known, where: str, inner: Known = _TURN) -> None:
    """Counts the format, and notes unread fields. inner: the fields that are read of the objects in a list."""
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
    content = text(fields, "text", where)
    _seen(counts, "text", fields, ("text",), where)
    return Document(content, where)


def conversation(fields: Fields, where: str, counts: Counts) -> Conversation | None:
    """An SFT record; None where its label says that the answer is bad, or where no answer is to be trained on."""
    form, answer, messages = _answered(fields, where)
    known = (*_prompt_fields(fields), answer)
    label = next((name for name in ("label", "kto_tag") if _is_label(name, fields.get(name), form)), "")
    _seen(counts, form, fields, (*known, label), where, (*_TURN, *MARKS))
    answers = [turn.train for turn in messages if turn.role == "assistant"]
    counts.masked += answers.count(False)
    if not any(answers) or (label and str(fields[label]).lower() in _FALSE):
        counts.excluded += 1
        return None
    return Conversation(messages, where)


def _is_label(name: str, value: Any, form: str) -> bool:
    """Whether a field is KTO's label: is this a good answer? A number called `label` beside an Instruction
    may be anything, for example the class of a text."""
    free = name == "kto_tag" or form == _PAIRED
    return isinstance(value, bool) or (free and str(value).lower() in (*_FALSE, *_TRUE))


def _answered(fields: Fields, where: str) -> tuple[str, str, tuple[Turn, ...]]:
    """The format's name, the field of the answer (empty where it is the last of the turns) and the turns."""
    if "messages" in fields or "conversations" in fields:
        form = "messages" if "messages" in fields else "sharegpt conversations"
        return form, "", _ending_in_answer(_chat_turns(fields, where), where)
    if "prompt" in fields and "completion" in fields:
        prompt, answer = _prompt(fields, where), _answer(fields, "completion", where)
        return _PAIRED, "completion", (*prompt.turns, *answer)
    if "instruction" in fields and "output" in fields:
        messages = _instruction(fields, where)
        form = "instruction and output" if messages[0].role == "instruction" else "alpaca with system or history"
        return form, "output", (*messages, Turn("assistant", text(fields, "output", where)))
    return missing('"Instruction" and "Output", or "messages", or "prompt" and "completion"', fields, where)


def _ending_in_answer(messages: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    if messages[-1].role != "assistant":
        chat("the last turn must be the assistant's", len(messages), where)
    return messages


def _chat_turns(fields: Fields, where: str) -> tuple[Turn, ...]:
    """`messages`, or ShareGPT's `conversations` with an optional `system`."""
    if "messages" in fields:
        return turns(fields["messages"], "messages", where)
    messages = turns(fields["conversations"], "conversations", where)
    if fields.get("system") and messages[0].role != "system":
        messages = (Turn("system", text(fields, "system", where)), *messages)
    return messages


def _instruction(fields: Fields, where: str) -> tuple[Turn, ...]:
    """Instruction and Input; with Alpaca's system or history a multi-turn conversation."""
    extra = text(fields, "input", where, blank=True) if fields.get("input") is not None else ""
    first = text(fields, "instruction", where, blank=True)
    if not (first + extra).strip():
        hint = "give the model something to answer"
        raise UserError("E-DATA-BLANK", '"instruction" is empty', where=where, hint=hint)
    if not fields.get("system") and not fields.get("history"):
        return Turn("instruction", first), Turn("input", extra)
    before = _history(fields, where)
    system = (Turn("system", text(fields, "system", where)),) if fields.get("system") else ()
    user = Turn("user", first + (f"\n{extra}" if extra else ""))
    return (*system, *before, user)


def _history(fields: Fields, where: str) -> tuple[Turn, ...]:
    """Alpaca's `history`: pairs of earlier questions and answers."""
    messages: list[Turn] = []
    given = fields.get("history") or []
    if not isinstance(given, list):
        wrong_type("history", "a list of pairs", given, where)
    for place, pair in enumerate(given, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            wrong_type(f"history[{place}]", "a pair of question and answer", pair, where)
        texts = {"question": pair[0], "answer": pair[1]}
        messages += [Turn("user", text(texts, "question", where)), Turn("assistant", text(texts, "answer", where))]
    return tuple(messages)


def _answer(fields: Fields, name: str, where: str) -> tuple[Turn, ...]:
    """What follows a prompt: a string, a turn, or a list of turns that ends with the assistant's."""
    value = [fields[name]] if isinstance(fields[name], dict) and fields[name] else fields[name]
    if not _is_talk(value):
        return (Turn("assistant", text(fields, name, where)),)
    return _ending_in_answer(turns(value, name, where, answer=True), where)


def _is_talk(value: Any) -> bool:
    """Whether this is a list of turns rather than a string."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def asked(fields: Fields, where: str, counts: Counts) -> Prompt:
    prompt = _prompt(fields, where, answered=True)
    known = _prompt_fields(fields)
    rest = Fields({name: value for name, value in fields.items() if name in known or name not in _ANSWERS})
    _seen(counts, "prompts", rest, known, where)
    return prompt


def _prompt(fields: Fields, where: str, *, answered: bool = False) -> Prompt:
    """The prompt of any format. answered: messages may end with an assistant turn, which is left out."""
    names = _prompt_fields(fields)
    if not names:
        missing('"Instruction" (and "Input"), or "input", or "prompt", or "messages"', fields, where)
    first = names[0]
    if first == "instruction":
        return Prompt(_instruction(fields, where), where)
    talk = first == "prompt" and _is_talk(fields["prompt"])
    if talk or first in ("messages", "conversations"):
        messages = turns(fields["prompt"], "prompt", where) if talk else _chat_turns(fields, where)
        messages = messages[:-1] if answered and messages[-1].role == "assistant" else messages
        if not messages or messages[-1].role != "user":
            chat("the last turn before the answer must be the user's", len(messages), where)
        return Prompt(messages, where)
    prompt = text(fields, first, where, blank=True)
    if not prompt.strip():
        raise UserError("E-DATA-BLANK", f'"{first}" is empty', where=where, hint="give the model something to answer")
    return Prompt((Turn("instruction", prompt), Turn("input", "")), where)


def _prompt_fields(fields: Fields) -> Known:
    """The fields that the prompt is read from; empty where the record has none."""
    return next((names for names in _PROMPTS if names[0] in fields), ())


def preference(fields: Fields, where: str, counts: Counts, scale: Sequence[float]) -> Comparison | Score:
    form, needed, optional = next((row for row in _PREFERENCES if fields.keys() >= set(row[1])), ("", (), ()))
    if not form:
        missing('"choices", or "output" and "score", or "chosen" and "rejected"', fields, where)
    annotator = fields.get("annotator")
    if isinstance(annotator, bool) or not isinstance(annotator, str | int | None):
        wrong_type("annotator", "text", annotator, where)
    name = "" if annotator is None else str(annotator)
    record: Comparison | Score
    record = _score(fields, name, where, scale) if form == "scores" else comparison(fields, where, name)
    counts.tied += isinstance(record, Comparison) and len(set(record.ranks)) < 2
    inner = (*_TURN, "text", "votes" if isinstance(record, Comparison) and record.votes else "rank")
    _seen(counts, form, fields, (*_prompt_fields(fields), *needed, *optional), where, inner)
    return record


def _score(fields: Fields, annotator: str, where: str, scale: Sequence[float]) -> Score:
    prompt, score = _prompt(fields, where), number(fields, "score", where)
    if scale and not scale[0] <= score <= scale[1]:
        what = f'"score" is {score:g}, outside the scale {scale[0]:g} to {scale[1]:g}'
        raise UserError("E-DATA-NUMBER", what, where=where, hint="mend the record or reward.score_scale")
    spread = _not_negative(fields, "spread", where, "a standard error is 0 or more")
    return Score(prompt, text(fields, "output", where), score, annotator, where, spread)


def is_comparison(fields: Fields) -> bool:
    """Whether a record has several answers in an order of preference."""
    return any(fields.keys() >= set(needed) for _, needed, _ in _PREFERENCES if "score" not in needed)


def comparison(fields: Fields, where: str, annotator: str = "") -> Comparison:
    ranks: tuple[float, ...] = (1.0, 2.0)
    votes: tuple[float, ...] = ()
    if "choices" in fields:
        prompt = _prompt(fields, where)
        texts, ranks, votes = _choices(fields, where)
    elif all(_is_texts(fields[name]) for name in ("chosen", "rejected")):
        prompt = _prompt(fields, where)
        texts, ranks = _good_and_bad(fields, where)
    else:
        prompt, texts = _pair(fields, where)
        if fields.get("votes") is not None:
            votes = _votes(fields["votes"], where)
            ranks = _ranks_of(votes)
    if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
        hint = "give it one rank, or delete one of the two"
        raise UserError("E-DATA-RANK", "the same answer stands twice with different ranks", where=where, hint=hint)
    margin = _not_negative(fields, "margin", where, "the better answer is the first: swap them, or drop the margin")
    return Comparison(prompt, texts, ranks, annotator, margin, where, votes)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _good_and_bad(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The texts of lists of chosen and of rejected answers, as benchmarks have them, and their ranks, 1 and 2."""
    if fields.get("votes") is not None:
        hint = 'write "choices" with votes each'
        raise UserError("E-DATA-RANK", '"votes" are for one chosen and one rejected answer', where=where, hint=hint)
    answers = [
        (f"{name}[{place}]", item) for name in ("chosen", "rejected") for place, item in enumerate(fields[name], 1)
    ]
    texts = tuple(text({name: item}, name, where) for name, item in answers)
    return texts, (*(1.0 for _ in fields["chosen"]), *(2.0 for _ in fields["rejected"]))


def _not_negative(fields: Mapping[str, Any], name: str, where: str, hint: str) -> float:
    """A number of at least 0; 0 where the field is missing."""
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
    """The most votes get rank 1; equal counts tie."""
    return tuple(1.0 + sum(other > vote for other in votes) for vote in votes)


def _pair(fields: Fields, where: str) -> tuple[Prompt, tuple[str, str]]:
    """The prompt and the two answers; as lists of turns they may hold the whole conversation, the prompt included."""
    whole = [fields[name] for name in ("chosen", "rejected")]
    if all(_is_talk(value) and len(value) > 1 for value in whole):
        better, worse = (turns(value, name, where) for value, name in zip(whole, ("chosen", "rejected"), strict=True))
        if better[:-1] != worse[:-1]:
            chat('"chosen" and "rejected" answer different conversations', len(better), where)
        for messages in (better, worse):
            _ending_in_answer(messages, where)
        return Prompt(better[:-1], where), (better[-1].text, worse[-1].text)
    if not _prompt_fields(fields) and all(isinstance(value, str) for value in whole):
        what = '"chosen" and "rejected" are texts, and there is no prompt beside them'
        hint = 'put what both begin with into "prompt", or write both as lists of turns, {"role": ..., "content": ...}'
        raise UserError("E-DATA-MISSING", what, where=where, hint=hint)
    prompt = _prompt(fields, where)
    pair = [_answer(fields, name, where) for name in ("chosen", "rejected")]
    for messages in pair:
        if len(messages) > 1:
            chat("an answer is one turn", len(messages), where)
    return prompt, (pair[0][0].text, pair[1][0].text)


def _choices(fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """Texts, ranks and votes; votes are empty unless given instead of ranks."""
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
