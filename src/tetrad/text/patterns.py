"""Regular expressions of foreign tokenizers: those that may need exponential time are refused before they run.

The rule: no group with an unbounded repeat may contain another unbounded repeat, as in `(a+)+`. No tokenizer in use has
such a group. The rule looks at the pattern's text: possessive repeats (`a++`) pass, atomic groups count as any other.
"""

from collections.abc import Iterator
from typing import Any

LONGEST = 10_000
_ENDLESS = ("*", "+")


def patterns(value: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer.json, in any of its parts but the model."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("Regex"), str):
                yield item["Regex"]
            stack += [inner for name, inner in item.items() if name not in ("model", "added_tokens")]
        elif isinstance(item, list):
            stack += item


def may_explode(pattern: str) -> bool:
    """Whether an unbounded repeat occurs inside another one (or the pattern is longer than any in use)."""
    groups, at, length = [False], 0, len(pattern)  # for each open group: whether it holds an unbounded repeat
    inner = False  # whether the last atom does
    while at < length:
        char = pattern[at]
        if char == "\\":
            at, inner = at + 2, False
        elif char == "[":
            at, inner = _after_class(pattern, at), False
        elif char == "(":
            groups.append(False)
            at += 1
        elif char == ")":
            inner = groups.pop() if len(groups) > 1 else False
            groups[-1] |= inner
            at += 1
        elif (end := _endless(pattern, at)) > at:
            if inner:
                return True
            possessive = pattern[end : end + 1] == "+"
            groups[-1] |= not possessive
            at = end + possessive
        elif char == "{" and (close := pattern.find("}", at)) > 0:
            at = close + 1
        else:
            at, inner = at + 1, inner and char == "?"
    return length > LONGEST


def _endless(pattern: str, at: int) -> int:
    """The position after an unbounded repeat that begins at `at`; `at` itself where there is none."""
    if pattern[at] in _ENDLESS:
        return at + 1
    if pattern[at] == "{":
        close = pattern.find("}", at)
        inside = pattern[at + 1 : close] if close > 0 else ""
        if inside.endswith(",") and inside[:-1].isdigit():
            return close + 1
    return at


def _after_class(pattern: str, at: int) -> int:
    """The position after a character class; classes may be nested."""
    depth = 0
    while at < len(pattern):
        char = pattern[at]
        at += 2 if char == "\\" else 1
        depth += (char == "[") - (char == "]")
        if not depth:
            break
    return at
