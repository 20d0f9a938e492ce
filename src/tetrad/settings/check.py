"""From plain values to settings, strictly: every error names its place, its key, what is allowed and what to do.

Values are checked as JSON in pydantic's strict mode: "5" is not a number and 2.0 not a whole number, from a file or
from the command line alike. Whatever looks like a password is refused and never printed.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from tetrad.errors import UserError
from tetrad.settings.base import FILE, Option, options, tables
from tetrad.settings.names import SECRET_VALUE, secret, shown, unknown

T = TypeVar("T")
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "choice": (str,),
}


def build(cls: type[T], values: Mapping[str, Any], places: Mapping[str, str]) -> T:
    """An instance of a settings class from nested plain values by TOML name.

    places: where each dotted name was given (`recipe.toml:12`, `--ppo.steps`). Raises UserError E-CONF-UNKNOWN, -TYPE,
    -RANGE or -SECRET for the first mistake.
    """
    kind: Any = cls
    known, groups = _known(kind)
    for name, value in _flat(values, groups):
        where = places.get(name, "")
        if name not in known and name not in groups:
            raise unknown(name, known, where)
        if SECRET_VALUE.search(str(value)):
            raise secret(name, where)
        if name in known and known[name].mark == FILE:
            continue
        if not is_text(json.dumps(value, ensure_ascii=False, default=str)):
            what, hint = f"{name} = {value!a:.60} is not UTF-8 text.", "rename the file, or write it in UTF-8"
            raise UserError("E-CONF-TYPE", what, where=where, hint=hint)
    try:
        odd = {name: v for name, v in values.items() if isinstance(v, str) and not is_text(v)}  # of files, see above
        plain = _by_field(cls, {**values, **dict.fromkeys(odd, "file")})
        text = json.dumps(plain, default=lambda value: {"not JSON": str(value)})
        built: Any = _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise _explained(error, values, known, places) from None
    return cast(T, replace(built, **odd))


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@cache
def _known(cls: type[Any]) -> tuple[dict[str, Option], dict[str, type[Any]]]:
    return options(cls), tables(cls)


def is_text(value: str) -> bool:
    """False for halves of surrogate pairs, which is how Python shows bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flat(values: Mapping[str, Any], groups: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
            if name in groups and value:
                continue
        yield name, value


def _by_field(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML names become field names: `from` is a keyword of Python."""
    groups = tables(cls)
    return {
        "from_" if name == "from" else name: _by_field(groups[name], value)
        if name in groups and isinstance(value, Mapping)
        else value
        for name, value in values.items()
    }


def _explained(
    error: ValidationError, values: Mapping[str, Any], known: Mapping[str, Option], places: Mapping[str, str]
) -> UserError:
    """pydantic's first error, in our words."""
    path = [str(part).rstrip("_") for part in error.errors(include_url=False)[0]["loc"]]
    name = next((".".join(path[:n]) for n in (2, 1) if ".".join(path[:n]) in known), path[0])
    value: Any = values
    for part in name.split("."):
        value = value[part]
    where = places.get(name, "")
    if name not in known:
        what = f"{name} = {shown(value)} must be a table, [{name}]."
        return UserError("E-CONF-TYPE", what, where=where, hint=f"write [{name}] on a line of its own")
    option = known[name]
    what = f"{name} = {shown(value)} must be {option.wanted}."
    fits = isinstance(value, _TYPES.get(option.kind, ())) and (option.kind == "bool" or not isinstance(value, bool))
    return UserError("E-CONF-RANGE" if fits else "E-CONF-TYPE", what, where=where, hint=_hint(option, value))


def _hint(option: Option, value: Any) -> str:
    key = option.name.rpartition(".")[2]
    if option.kind == "strings" and isinstance(value, str):
        return f"write {key} = [{shown(value)}]"
    if option.kind == "choice" and isinstance(value, str):
        for match in difflib.get_close_matches(value, option.choices, n=1):
            return f'did you mean "{match}"?'
    if option.kind in ("int", "float") and isinstance(value, str) and re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?", value):
        return f"write {key} = {value}, without quotes"
    default = [] if isinstance(option.default, tuple) else option.default
    return f"or leave {key} out" if default is None else f"the default is {shown(default)}"
