"""Settings as command-line arguments: `--ppo.actor-lr 1e-6` in, help text out.

A flag is a setting's TOML name with hyphens. Words become plain values, checked afterwards with those of the file
(`settings.check`), so that both give the same errors.
"""

import re
import shutil
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from tetrad.errors import UserError
from tetrad.settings.base import ESCAPED, Option, options, tables
from tetrad.settings.names import shown, unknown

_MANY = ("strings", "range", "floats")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE = re.compile(r"\\([ntr\\])")


def parse(arguments: Sequence[str], known: Mapping[str, Option]) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Words that are neither flags nor their values, in order; values by dotted name; and the flag of each value.

    A list takes every word up to the next flag, or one word `["a", "b"]`; a repeated flag extends its list.
    Raises UserError E-CONF-UNKNOWN for an unknown flag, -MISSING without a value, -DUPKEY for a value given twice.
    """
    plain: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        flag, equals, text = word.partition("=")
        name, negated = _name(flag, known)
        given = [text] if equals else _take(known[name], rest, negated)
        if name in values and known[name].kind != "strings":
            raise UserError("E-CONF-DUPKEY", f"{flag} is given twice.", where=flag, hint="keep one of them")
        value = _value(known[name], given, flag, negated)
        joined = isinstance(value, list) and isinstance(values.get(name), list)
        values[name] = values[name] + value if joined else value
        places[name] = flag
    return plain, values, places


def split(arguments: Sequence[str], mine: Mapping[str, Option]) -> tuple[list[str], list[str]]:
    """The flags of `mine` with their values, and all other arguments in their order."""
    taken: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or name not in mine:
            others.append(word)
            continue
        taken += [word] if "=" in word.partition("=")[1] else [word, *_take(mine[name], rest, negated=False)]
    return taken, others


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"ppo.steps": 3} as {"ppo": {"steps": 3}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        (nested.setdefault(table, {}) if table else nested)[key] = value
    return nested


def _name(flag: str, known: Mapping[str, Option]) -> tuple[str, bool]:
    name = flag[2:].replace("-", "_")
    if name in known:
        return name, False
    table, dot, key = name.rpartition(".")
    positive = table + dot + key.removeprefix("no_")
    if key.startswith("no_") and positive in known and known[positive].kind == "bool":
        return positive, True
    raise unknown(name, known, flag)


def _take(option: Option, rest: list[str], negated: bool) -> list[str]:
    """Removes a flag's values from the arguments after it."""
    taken: list[str] = []
    if option.kind == "bool":
        return [rest.pop(0)] if rest and not negated and rest[0] in ("true", "false") else []
    while rest and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
        if option.kind not in _MANY or taken[0].startswith("["):
            break
    return taken


def _value(option: Option, given: Sequence[str], flag: str, negated: bool) -> Any:
    if option.kind == "bool":
        return not negated if not given else {"true": True, "false": False}.get(given[0], given[0])
    if not given and option.kind != "strings":
        raise UserError("E-CONF-MISSING", f"{flag} has no value.", where=flag, hint=f"give it {option.wanted}")
    if given and given[0].startswith("[") and option.kind in _MANY:
        try:
            return tomllib.loads("value = " + given[0])["value"]
        except (ValueError, RecursionError):
            what = f"{flag} {shown(given[0])} is no list."
            raise UserError("E-CONF-SYNTAX", what, where=flag, hint='write it as \'["a", "b"]\'') from None
    if option.mark == ESCAPED:
        given = [_ESCAPE.sub(lambda match: _ESCAPES[match[1]], word) for word in given]
    if option.kind in ("str", "choice"):
        return given[0]
    items = [_number(word) if option.kind != "strings" else word for word in given]
    return items if option.kind in _MANY else items[0]


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def help_text(cls: type[Any], only: Sequence[str] = (), first: Sequence[str] = (), *, everything: bool = False) -> str:
    """The meaning, allowed values and default of what people change first, and the names of the rest by group.

    only: these tables, if any. first: the tables that people change first; of others all settings are named only.
    everything: all settings in full, in source order.
    """
    width = min(shutil.get_terminal_size((100, 40)).columns, 110)
    loose = [option for name, option in options(cls).items() if "." not in name and name != "model"]
    lines = _entries(loose, width, everything)
    for name, table in tables(cls).items():
        if only and name not in only:
            continue
        inside = list(options(table, name + ".").values())
        lines += ["", *textwrap.wrap(f"[{name}] {' '.join((table.__doc__ or '').split())}", width)]
        lines += _entries(inside, width, everything) if everything or name in first else _names("", inside, width)
    return "\n".join(lines)


def _entries(among: Sequence[Option], width: int, everything: bool) -> list[str]:
    """Options in full; those of a group by name only, unless everything is asked for."""
    lines: list[str] = []
    for option in among:
        lines += _entry(option, width) if everything or not option.group else ()
    if not everything:
        for group in dict.fromkeys(option.group for option in among if option.group):
            lines += _names(group, [option for option in among if option.group == group], width)
    return lines


def _names(group: str, among: Sequence[Option], width: int) -> list[str]:
    head = f"  {group + ':':<27} " if group else "  "
    names = ", ".join(option.name.rpartition(".")[2].replace("_", "-") for option in among)
    indent = " " * (30 if group else 2)
    return textwrap.wrap(names, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def _entry(option: Option, width: int) -> list[str]:
    default = "none" if option.default in ("", (), None) else shown(option.default)
    text = option.help if option.kind == "bool" else f"{option.help} ({option.wanted})"
    body = textwrap.wrap(f"{text} Default: {default}.", width - 30, break_on_hyphens=False)
    flag = f"  {option.flag}"
    first = [f"{flag:<29} {body[0]}"] if len(flag) < 29 else [flag, " " * 30 + body[0]]
    return first + [" " * 30 + line for line in body[1:]]
