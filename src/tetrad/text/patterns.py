"""Regular expressions of foreign tokenizers: those that may need exponential time are refused before they run.

The rule: no group with an unbounded repeat may contain another unbounded repeat, as in `(a+)+`. No tokenizer in use has
such a group. The rule looks at the pattern's text: possessive repeats (`a++`) pass, atomic groups count as any other.
"""

import re
from collections.abc import Iterator
from typing import Any

LONGEST = 10_000
_PARTS = re.compile(r"\\.|(?P<endless>[*+]|\{\d+,\})(?P<possessive>\+?)|\{[^{}()\[\]\\*+]*\}|.", re.DOTALL)


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
    groups = [False]  # for each open group: whether it holds an unbounded repeat
    inner = False  # whether the last atom does
    depth = 0  # of character classes, which may be nested
    for part in _PARTS.finditer(pattern):
        text = part[0]
        if depth or text == "[":
            depth += (text == "[") - (text == "]")
            inner = False
        elif text == "(":
            groups.append(False)
        elif text == ")":
            inner = groups.pop() if len(groups) > 1 else False
            groups[-1] |= inner
        elif part["endless"]:
            if inner:
                return True
            groups[-1] |= not part["possessive"]
        elif text[0] != "{" or len(text) == 1:
            inner = inner and text == "?"
    return len(pattern) > LONGEST
