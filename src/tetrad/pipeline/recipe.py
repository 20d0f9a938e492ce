"""A recipe's file: TOML in and out, with the command line's overrides; `validation` checks it as a whole.

Paths in a recipe are relative to the recipe file's folder (`run.out` to the current one); `read` resolves them, so that
later code opens them as they are. No data file is read here, and no code that a recipe names is run.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tetrad import disk
from tetrad.errors import UserError
from tetrad.hub import SCHEMES, full_name, is_model
from tetrad.pipeline.validation import PATHS, check, check_values
from tetrad.settings.arguments import nest, parse
from tetrad.settings.base import FILES, FUNCTIONS, REWARDS, Option, is_function, options, toml_name
from tetrad.settings.check import build
from tetrad.stages import Recipe

__all__ = ["Recipe", "read", "write"]

MAX_BYTES = 1 << 20
_TABLE_LINE = re.compile(r"\s*\[\[?\s*([\w.\"'-]+)\s*\]")
_KEY_LINE = re.compile(r"\s*([\w.\"'-]+)\s*=")
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")
_TWICE = ("Cannot overwrite a value", "Cannot declare", "Cannot redefine", "Duplicate inline table key")
_DEPTH = 16
_OPTIONS = cache(options)


def read(source: Path | str | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """The recipe of a file, or of its tables as a dict, with overrides as `--ppo.actor-lr 1e-6` or {"ppo.actor_lr":
    1e-6}, checked as one. A dict is read as a file `recipe.toml` in the current folder would be.

    Raises UserError E-CONF-{MISSING,SIZE,SYNTAX,DUPKEY,UNKNOWN,TYPE,RANGE,SECRET,DIVIDE,CONFLICT} with `file:line`.
    """
    if isinstance(source, Mapping):
        path, places, values = Path("recipe.toml"), dict[str, str](), nest(_dotted(source))
    else:
        path = Path(source)
        text = _text(path)
        values = _toml(path, text)
        places = {name: f"{path}:{line}" for name, line in _lines(text)}
    if isinstance(overrides, Mapping):
        stray, given = list[str](), _dotted(overrides)
        flags = dict.fromkeys(given, "overrides")
    else:
        words = [f"--run.nproc{word[7:]}" if word.partition("=")[0] == "--nproc" else word for word in overrides]
        stray, given, flags = parse(words, _OPTIONS(Recipe))
    if stray:
        hint = "a setting is written --TABLE.KEY VALUE, as --ppo.steps 50"
        raise UserError("E-CONF-SYNTAX", f"unexpected argument {stray[0]!r}", hint=hint)
    for table, inner in nest(given).items():
        below = values.get(table)
        values[table] = {**below, **inner} if isinstance(below, dict) and isinstance(inner, dict) else inner
    places |= flags
    recipe = build(Recipe, values, places)
    recipe = replace(recipe, name=recipe.name or _name_of(path))
    check_values(recipe, places)
    recipe = _resolved(recipe, path.parent)
    check(recipe, places)
    return recipe


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"ppo": {"steps": 3}} as {"ppo.steps": 3}."""
    dotted: dict[str, Any] = {}
    for name, value in values.items():
        inside = value if isinstance(value, Mapping) else {}
        dotted |= {f"{name}.{key}": inner for key, inner in inside.items()} if inside else {str(name): value}
    return dotted


def write(recipe: Recipe) -> str:
    """The recipe as TOML, with all that has a value and with absolute paths: `read` gives the same from any folder."""
    recipe = _resolved(recipe, Path.cwd())
    recipe = replace(recipe, run=replace(recipe.run, out=os.path.abspath(recipe.run.out)))
    lines: list[str] = []
    items = [(toml_name(f.name), getattr(recipe, f.name)) for f in fields(recipe)]
    lines += [f"{name} = {_literal(value)}" for name, value in items if not is_dataclass(value)]
    for name, table in items:
        if is_dataclass(table):
            lines += ["", f"[{name}]"]
            values = {toml_name(f.name): getattr(table, f.name) for f in fields(table)}
            lines += [f"{name} = {_literal(value)}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


# Reading the file


def _text(path: Path) -> str:
    where, hint = str(path), "give the path of a recipe (a .toml file)"
    try:
        size, raw = disk.start_of(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("E-CONF-MISSING", "no such file", where=where, hint=hint) from None
    except OSError as error:
        what = error.strerror or str(error)
        if what.startswith("is "):
            raise UserError("E-CONF-SIZE", f"{what}, so it is not a recipe", where=where, hint=hint) from None
        raise UserError("E-CONF-MISSING", f"can't be read: {what}", where=where, hint=hint) from None
    if max(size, len(raw)) > MAX_BYTES:
        raise UserError("E-CONF-SIZE", "is larger than 1 MiB, so it is not a recipe", where=where, hint=hint)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 text"
        raise UserError("E-CONF-SYNTAX", what, where=where, hint=hint + " saved as UTF-8") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        if match := _DOTTED.search(text):  # tomllib needs quadratic time and memory for them
            raise RecursionError(f"{match[0]:.20}... is nested more than {_DEPTH} deep")
        return _shallow(tomllib.loads(text))
    except (ValueError, RecursionError) as error:  # Python itself refuses a whole number of 5,000 digits
        match = re.search(r"\(at line (\d+), column (\d+)\)|(\(at end of document\))", str(error))
        last = max(1, text.count("\n") + (not text.endswith("\n")))
        line = int(match[1]) if match and match[1] else last
        message = str(error).partition(" (at ")[0].partition(";")[0]
        where = f"{path}:{line}"
    if message.startswith(_TWICE):
        key = text.split("\n")[line - 1].partition("=")[0].strip()
        raise UserError("E-CONF-DUPKEY", f"{key} is given twice", where=where, hint="keep one of them")
    hint = 'a recipe is TOML: [table] on a line of its own, then key = value; text in "quotes", lists in [brackets]'
    raise UserError("E-CONF-SYNTAX", f"can't be read as TOML: {message}", where=where, hint=hint)


def _shallow(values: dict[str, Any]) -> dict[str, Any]:
    """The values. Raises RecursionError where they are nested deeper than any recipe; dotted keys can do that."""
    level: list[Any] = [values]
    for _ in range(_DEPTH):
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise RecursionError(f"it is nested more than {_DEPTH} deep")
    return values


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """The line of each table and key, as far as single lines can tell."""
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if match := _TABLE_LINE.match(line):
            table = re.sub(r"[\"']", "", match[1]) + "."
            yield table[:-1], number
        elif match := _KEY_LINE.match(line):
            yield table + re.sub(r"[\"']", "", match[1]), number


def _name_of(path: Path) -> str:
    path = path.absolute()
    return path.parent.name if path.stem == "recipe" else path.stem


# Paths


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its paths resolved from `folder`."""
    changes: dict[str, Any] = {}
    for item in fields(recipe):
        table = getattr(recipe, item.name)
        if is_dataclass(table):
            inside = {f.name: (f"{item.name}.{toml_name(f.name)}", getattr(table, f.name)) for f in fields(table)}
            new = {key: _path(_OPTIONS(Recipe)[name], value, folder) for key, (name, value) in inside.items()}
            changes[item.name] = replace(table, **new)  # type: ignore[type-var]
    return replace(recipe, **changes)


def _path(option: Option, value: Any, folder: Path) -> Any:
    if option.mark in (FUNCTIONS, REWARDS):
        return tuple(os.path.abspath(_from(folder, text)) if is_function(text) else text for text in value)
    if option.mark == FILES:
        return tuple(str(_from(folder, text)) for text in value)
    if option.name in PATHS and value:
        if is_model(value, folder):
            return full_name(value)
        beside = folder / os.path.expanduser(value)
        return str(beside if beside.exists() else Path(value))  # a run's stage is relative to the current folder
    return value


def _from(folder: Path, text: str) -> str | Path:
    if text.startswith(SCHEMES):  # a dataset of the hub is not a path
        return text
    return folder / os.path.expanduser(text)
