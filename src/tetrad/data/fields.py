"""A record's fields by lower-case name, and the one error for each way in which a field can be wrong.

A null is a missing field, at every depth and from every kind of file. Errors name the location, the field and what
was seen, and suggest a fix.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from tetrad.errors import UserError
from tetrad.types import Turn

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
MARKS = ("weight", "loss", "trainable", "train")  # on an assistant turn: whether it is trained on
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython", "tool_calls")
_USUAL = {  # common aliases of fields, for a hint
    "instruction": ("question", "query", "ask", "problem", "prompt", "q", "input", "问题", "提问", "指令", "题目"),
    "output": ("answer", "response", "reply", "completion", "target", "solution", "a", "答案", "回答", "回复", "输出"),
    "text": ("content", "body", "document", "passage", "paragraph", "article", "正文", "内容", "文本"),
    "chosen": ("preferred", "better", "accepted", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
    "score": ("rating", "label", "stars", "value", "评分", "分数", "得分"),
}


class Fields(dict[str, Any]):
    """Values by lower-case name. nulls: the names of fields that were null, which are left out."""

    nulls: tuple[str, ...] = ()


def fold(value: Any, where: str, name: str = "", rename: Mapping[str, str] | None = None) -> Fields:
    """The fields of an object. rename: aliases of fields, in lower case. Errors: E-DATA-TYPE, E-DATA-DUPKEY."""
    if not isinstance(value, dict):
        wrong_type(name, "an object with named fields", value, where)
    rename = rename or {}
    pairs = [(rename.get(folded := str(key).lower(), folded), item) for key, item in value.items()]
    names = [key for key, item in pairs if item is not None]
    fields = Fields((key, item) for key, item in pairs if item is not None)
    if len(fields) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        detail = "under two names" if rename else "in different letter case"
        raise UserError("E-DATA-DUPKEY", f'the key "{twice}" stands twice in one object, {detail}', where=where)
    if len(names) < len(pairs):
        fields.nulls = tuple(key for key, item in pairs if item is None)
    return fields


def text(fields: Mapping[str, Any], name: str, where: str, *, blank: bool = False) -> str:
    """A string; blank: it may be empty. Errors: E-DATA-NULL, E-DATA-TYPE, E-DATA-BLANK."""
    value = fields[name]
    if value is None:
        null(name, where)
    if not isinstance(value, str):
        wrong_type(name, "text", value, where)
    if not blank and not value.strip():
        hint = "write the text or delete the record"
        raise UserError("E-DATA-BLANK", f'"{name}" is empty', where=where, hint=hint)
    return value


def number(fields: Mapping[str, Any], name: str, where: str) -> float:
    """A finite number. Errors: E-DATA-NULL, E-DATA-TYPE, E-DATA-NUMBER."""
    value = fields[name]
    if value is None:
        null(name, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong_type(name, "a number", value, where)
    if abs(value) >= 2**63 or not math.isfinite(value):
        raise UserError("E-DATA-NUMBER", f'"{name}" is too large', where=where)
    return float(value)


def turns(value: Any, name: str, where: str, *, answer: bool = False) -> tuple[Turn, ...]:
    """An optional system turn, then alternating user and assistant turns. answer: the turns continue a prompt's.

    A turn is {"role", "content"}, or {"from", "value"} as in ShareGPT; an assistant turn may be marked as not
    trained on. Errors: E-DATA-CHAT with the turn's number.
    """
    if not isinstance(value, list):
        wrong_type(name, "a list of turns", value, where)
    parsed: list[Turn] = []
    for place, item in enumerate(value, 1):
        turn = fold(item, where, f"{name}[{place}]")
        share = "from" in turn and "role" not in turn
        who, what, known = ("from", "value", SHAREGPT_ROLES) if share else ("role", "content", ROLES)
        if who not in turn or what not in turn:
            _refuse_tools(turn, place, where)
            missing(f'"{who}" and "{what}" in turn {place}', turn, where)
        spelt = text(turn, who, where)
        role = known.get(spelt)
        if role is None:
            _refuse_tools([spelt], place, where)
            chat(f'"{spelt}" is no role ({", ".join(known)})', place, where)
        _check_order(role, parsed[-1].role if parsed else "user" if answer else "", place, where)
        marks = [_mark(turn, mark, place, where) for mark in MARKS if mark in turn and role == "assistant"]
        parsed.append(Turn(role, text(turn, what, where, blank=role == "system"), all(marks)))
    if not parsed:
        chat("there is no turn", 0, where)
    return tuple(parsed)


def _mark(turn: Fields, mark: str, place: int, where: str) -> bool:
    """Whether a mark says that its turn is trained on: a Boolean, or 1 and 0."""
    if turn[mark] not in (0, 1):  # True and 1.0 are equal to 1
        what = f'turn {place}: "{mark}" must be true or false, or 1 or 0: an answer is learned as a whole or not at all'
        raise UserError("E-DATA-TYPE", what, where=where, hint="write 0 where the answer is not to be learned, else 1")
    return bool(turn[mark])


def _refuse_tools(words: Iterable[str], place: int, where: str) -> None:
    """Errors: E-DATA-CHAT where a turn is a tool call or a tool's result."""
    if tool := next((word for word in words if word in _TOOLS), ""):
        hint = "write call and result as text into the assistant's and the user's turns, or delete the record"
        what = f'turn {place}: "{tool}": calls of tools and their results have no template here'
        raise UserError("E-DATA-CHAT", what, where=where, hint=hint)


def _check_order(role: str, last: str, place: int, where: str) -> None:
    if role == "system" and last:
        chat("a system turn stands first or nowhere", place, where)
    wanted = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[last]
    if role not in wanted:
        chat(f"{role} after {last or 'nothing'}: user and assistant take turns", place, where)


def usual_names(names: Collection[str]) -> dict[str, str]:
    """Fields of Tetrad's formats that are not among the names, and which of the names usually means each."""
    pairs = ((name, next((other for other in others if other in names), "")) for name, others in _USUAL.items())
    return {name: other for name, other in pairs if other and name not in names}


def missing(needed: str, fields: Fields, where: str) -> NoReturn:
    """Errors: E-DATA-MISSING, with the setting that would rename the fields where it can be guessed; E-DATA-NULL where
    a required field is present but null."""
    if nulls := [name for name in fields.nulls if f'"{name}"' in needed.lower()]:
        null(min(nulls, key=needed.lower().index), where)
    seen = ", ".join(f'"{name}"' for name in fields) or "none"
    wanted = [name for name in _USUAL if f'"{name}"' in needed.lower() and name not in fields]
    pairs = [f"{other}={name}" for name, other in usual_names(fields).items() if name in wanted]
    hint = "rename the fields (letter case does not matter)"
    if pairs:
        listed = ", ".join(f'"{pair}"' for pair in pairs)
        hint += f", or write [data] rename = [{listed}] (--data.rename {' '.join(pairs)} on the command line)"
    raise UserError("E-DATA-MISSING", f"needs {needed}; fields seen: {seen}", where=where, hint=hint)


def null(name: str, where: str) -> NoReturn:
    """Errors: E-DATA-NULL."""
    raise UserError("E-DATA-NULL", f'"{name}" is null', where=where, hint="write the value or delete the record")


def wrong_type(name: str, wanted: str, value: Any, where: str) -> NoReturn:
    """Errors: E-DATA-TYPE."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    got = "null" if value is None else kinds.get(type(value), type(value).__name__)
    what = f'"{name}" must be {wanted}, got {got}' if name else f"a record must be {wanted}, got {got}"
    raise UserError("E-DATA-TYPE", what, where=where, hint="write it so, or delete the record")


def chat(what: str, turn: int, where: str) -> NoReturn:
    """Errors: E-DATA-CHAT."""
    hint = "mend the order of the turns, or delete the record"
    raise UserError("E-DATA-CHAT", f"turn {turn}: {what}", where=where, hint=hint)
