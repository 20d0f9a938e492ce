"""A recipe's file: TOML in and out, the command line's words on top, and the checks across settings.

Paths in a recipe start at the recipe file's folder (`run.out` at the current one); `read` resolves them, so that later
code opens them as they are. Nothing is read from the data files here, and nothing that is written in a recipe is run.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tetrad import disk
from tetrad.errors import UserError
from tetrad.model.config import read_config
from tetrad.settings.base import FUNCTIONS, REWARDS, Knob, is_function, knobs, toml_name
from tetrad.settings.check import build
from tetrad.settings.names import shown
from tetrad.settings.recipe import Recipe
from tetrad.settings.words import nest, parse

__all__ = ["Recipe", "check", "read", "write"]

MAX_BYTES = 1 << 20
_NAME = re.compile(r"[^\W.][\w.+-]{0,99}")
_TABLE_LINE = re.compile(r"\s*\[\[?\s*([\w.\"'-]+)\s*\]")
_KEY_LINE = re.compile(r"\s*([\w.\"'-]+)\s*=")
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")
_TWICE = ("Cannot overwrite a value", "Cannot declare", "Cannot redefine", "Duplicate inline table key")
_DEPTH = 16
_SEARCH = 10_000
_LARGEST_WHOLE = 2**53
_LARGEST_MODEL = 10**12
_WEIGHED = {
    "pretrain.weights": "pretrain.text",
    "sft.weights": "sft.data",
    "reward.weights": "reward.data",
    "ppo.weights": "ppo.prompts",
    "ppo.reward_weights": "ppo.rewards",
}
_PATHS = ("model.from", "reward.from", "evaluate.referee", "run.out")
_KNOBS = cache(knobs)


def read(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with words such as `--ppo.actor-lr 1e-6` on top, checked as one.

    Raises UserError E-CONF-{MISSING,SIZE,SYNTAX,DUPKEY,UNKNOWN,TYPE,RANGE,SECRET,DIVIDE,CONFLICT} with `file:line`.
    """
    path = Path(path)
    text = _text(path)
    values = _toml(path, text)
    places = {name: f"{path}:{line}" for name, line in _lines(text)}
    stray, given, flags = parse(overrides, _KNOBS(Recipe))
    if stray:
        hint = "a setting is written --TABLE.KEY VALUE, as --ppo.steps 50"
        raise UserError("E-CONF-SYNTAX", f"what is {stray[0]!r} for?", hint=hint)
    for table, inner in nest(given).items():
        below = values.get(table)
        values[table] = {**below, **inner} if isinstance(below, dict) and isinstance(inner, dict) else inner
    places |= flags
    recipe = build(Recipe, values, places)
    recipe = replace(recipe, name=recipe.name or _name_of(path))
    _check_values(recipe, places)
    recipe = _resolved(recipe, path.parent)
    check(recipe, places)
    return recipe


def write(recipe: Recipe) -> str:
    """The recipe as TOML, with every setting and with absolute paths: `read` gives the same from any folder."""
    recipe = _resolved(recipe, Path.cwd())
    recipe = replace(recipe, run=replace(recipe.run, out=os.path.abspath(recipe.run.out)))
    lines: list[str] = []
    items = [(toml_name(f.name), getattr(recipe, f.name)) for f in fields(recipe)]
    lines += [f"{name} = {_literal(value)}" for name, value in items if not is_dataclass(value)]
    for name, table in items:
        if is_dataclass(table):
            lines += ["", f"[{name}]"]
            lines += [f"{toml_name(f.name)} = {_literal(getattr(table, f.name))}" for f in fields(table)]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


# Reading the file


def _text(path: Path) -> str:
    where, hint = str(path), "name a recipe, a .toml file"
    try:
        size, raw = disk.start_of(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("E-CONF-MISSING", "there is no such recipe", where=where, hint=hint) from None
    except OSError as error:
        what = error.strerror or str(error)
        if what.startswith("is "):
            raise UserError("E-CONF-SIZE", f"{what}, so it is no recipe", where=where, hint=hint) from None
        raise UserError("E-CONF-MISSING", f"can't be read: {what}", where=where, hint=hint) from None
    if max(size, len(raw)) > MAX_BYTES:
        raise UserError("E-CONF-SIZE", "is larger than 1 MiB, so it is no recipe", where=where, hint=hint)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is no UTF-8 text"
        raise UserError("E-CONF-SYNTAX", what, where=where, hint=hint + " saved as UTF-8") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        if found := _DOTTED.search(text):  # tomllib needs quadratic time and memory for them
            raise RecursionError(f"{found[0]:.20}... is nested more than {_DEPTH} deep")
        return _shallow(tomllib.loads(text))
    except (ValueError, RecursionError) as error:  # Python itself refuses a whole number of 5,000 digits
        found = re.search(r"\(at line (\d+), column (\d+)\)|(\(at end of document\))", str(error))
        last = max(1, text.count("\n") + (not text.endswith("\n")))
        line = int(found[1]) if found and found[1] else last
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
    """The line on which each table and key stands, as far as a look at single lines can tell."""
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
    """The recipe with its paths from `folder` on."""
    changes: dict[str, Any] = {}
    for item in fields(recipe):
        table = getattr(recipe, item.name)
        if is_dataclass(table):
            inside = {f.name: (f"{item.name}.{toml_name(f.name)}", getattr(table, f.name)) for f in fields(table)}
            new = {key: _path(_KNOBS(Recipe)[name], value, folder) for key, (name, value) in inside.items()}
            changes[item.name] = replace(table, **new)  # type: ignore[type-var]
    return replace(recipe, **changes)


def _path(knob: Knob, value: Any, folder: Path) -> Any:
    if knob.mark in (FUNCTIONS, REWARDS):
        return tuple(os.path.abspath(_from(folder, text)) if is_function(text) else text for text in value)
    if knob.mark:
        return tuple(str(_from(folder, text)) for text in value)
    if knob.name in _PATHS[:3] and value:
        beside = folder / os.path.expanduser(value)
        return str(beside if beside.exists() else Path(value))  # a run's stage is given as from the current folder
    return value


def _from(folder: Path, text: str) -> str | Path:
    if text.startswith("hf://"):  # a dataset of the hub is no path
        return text
    return folder / os.path.expanduser(text)


# Checks across settings


def check(recipe: Recipe, places: Mapping[str, str] | None = None) -> None:
    """Raises UserError for values that are each legal but not together, before anything is loaded."""
    places = places or {}
    _check_values(recipe, places)
    _check_divisors(recipe, places)
    _check_size(recipe, places)
    _check_lengths(recipe, places)
    _check_pairs(recipe, places)
    _check_adapters(recipe, places)
    for name, knob in _KNOBS(Recipe).items():
        if knob.mark in (FUNCTIONS, REWARDS):
            table, _, key = name.partition(".")
            for text in getattr(getattr(recipe, table), key):
                if knob.mark == REWARDS and not is_function(text):
                    continue
                if not re.fullmatch(r".+\.py:[^\W\d]\w*", text, re.DOTALL):
                    what = f'{name} has "{text}", which names no Python function'
                    hint = f'write {key} = ["file.py:function"]'
                    raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)


def _check_values(recipe: Recipe, places: Mapping[str, str]) -> None:
    """What the types of settings can't say: names of folders and files, and whole numbers that nothing can count."""
    if not _NAME.fullmatch(recipe.name) or len(recipe.name.encode()) > 200:
        hint = 'use letters, digits, "-" and "_": it names a folder'
        what = f"name = {shown(recipe.name)} is no name"
        raise UserError("E-CONF-RANGE", what, where=places.get("name", ""), hint=hint)
    for name, knob in _KNOBS(Recipe).items():
        table, _, key = name.rpartition(".")
        value = getattr(getattr(recipe, table) if table else recipe, "from_" if key == "from" else key)
        if knob.kind == "whole" and name != "seed" and value >= _LARGEST_WHOLE:
            what, hint = f"{name} = {shown(value)} is more than anything can count", f"the default is {knob.default}"
            raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)
        for text in (value,) if name in _PATHS else value if knob.mark else ():
            if "\0" in text or len(os.fsencode(text)) > 4000 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
                what = f"{name} has {shown(text)}, which no file can be named"
                raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint="name a file or folder")


def _check_divisors(recipe: Recipe, places: Mapping[str, str]) -> None:
    pairs = [("ppo.batch", "ppo.mini_batches")]
    pairs += [("pretrain.batch_tokens", "pretrain.row_tokens")] if recipe.pretrain.text else []
    model = recipe.model
    if not model.from_:
        pairs += [("model.hidden_size", "model.heads"), ("model.heads", "model.kv_heads")]
    for whole, part in pairs:
        _check_divides(whole, _get(recipe, whole), part, _get(recipe, part), places)
    if not model.from_ and model.hidden_size // model.heads % 2:
        what = f"model.hidden_size / model.heads = {model.hidden_size // model.heads} must be even (rotary positions)"
        hint = f"write hidden_size = {' or '.join(_near_multiples(model.hidden_size, 2 * model.heads))}"
        raise UserError("E-CONF-DIVIDE", what, where=places.get("model.hidden_size", ""), hint=hint)


def _check_divides(whole: str, a: int, part: str, b: int, places: Mapping[str, str]) -> None:
    if a % b:
        what = f"{whole} = {a} can't be divided by {part} = {b}"
        below = next((d for d in range(b, max(0, b - _SEARCH), -1) if a % d == 0), 1)
        above = next((d for d in range(b, min(a, b + _SEARCH)) if a % d == 0), a)
        parts = " or ".join(dict.fromkeys(map(str, (below, above))))
        key, other = whole.rpartition(".")[2], part.rpartition(".")[2]
        hint = f"write {key} = {' or '.join(_near_multiples(a, b))}, or {other} = {parts}"
        raise UserError("E-CONF-DIVIDE", what, where=places.get(whole, places.get(part, "")), hint=hint)


def _near_multiples(value: int, step: int) -> list[str]:
    low = value // step * step
    return [str(n) for n in (low, low + step) if n > 0]


def _check_lengths(recipe: Recipe, places: Mapping[str, str]) -> None:
    """Nothing may be longer than the model, a new one or that of a folder."""
    m = recipe.model
    longest, whose = _positions(m.from_) if m.from_ else (m.max_positions, "model.max_positions")
    named = [("pretrain.row_tokens", bool(recipe.pretrain.text)), ("sft.max_tokens", bool(recipe.sft.data))]
    named += [("reward.max_tokens", bool(recipe.reward.data) and not recipe.reward.from_)]
    named += [("ppo.max_prompt", bool(recipe.ppo.prompts)), ("ppo.max_new", bool(recipe.ppo.prompts))]
    named += [("evaluate.max_new", bool(recipe.evaluate.prompts))]
    for name, used in named:
        extra = recipe.ppo.max_new if name == "ppo.max_prompt" and recipe.ppo.max_prompt else 0
        if used:
            _check_length(name, _get(recipe, name), extra, longest, whose, places)
    if recipe.reward.data and recipe.reward.from_:
        _check_length("reward.max_tokens", recipe.reward.max_tokens, 0, *_positions(recipe.reward.from_), places)
    pretrain = recipe.pretrain
    if pretrain.text and 0 < pretrain.tokens < pretrain.batch_tokens:
        what = f"pretrain.tokens = {pretrain.tokens} is less than one step, batch_tokens = {pretrain.batch_tokens}"
        hint = "raise tokens or lower batch_tokens"
        raise UserError("E-CONF-RANGE", what, where=places.get("pretrain.tokens", ""), hint=hint)


def _check_length(name: str, value: int, extra: int, longest: int, whose: str, places: Mapping[str, str]) -> None:
    if longest and value + extra > longest:
        whole = f"{name} = {value}" + (f" and ppo.max_new = {extra}" if extra else "")
        what = f"{whole} tokens are more than {whose} = {longest}"
        hint = f"lower {name}" + (f", or raise {whose} before pre-training" if whose.startswith("model.") else "")
        raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)


def _positions(folder: str) -> tuple[int, str]:
    """The longest sequence of a folder's model and whose it is; 0 where there is no such model (told elsewhere)."""
    for place in (Path(folder) / "model", Path(folder)):
        with suppress(UserError):
            return read_config(place).max_positions, f"the max_position_embeddings of {folder}"
    return 0, ""


def _check_size(recipe: Recipe, places: Mapping[str, str]) -> None:
    """A new model that no machine holds is a slip of the pen."""
    m = recipe.model
    block = 4 * m.hidden_size * (m.hidden_size + (m.ff or 3 * m.hidden_size))
    if not m.from_ and m.layers * block + recipe.tokenizer.vocab_size * m.hidden_size > _LARGEST_MODEL:
        what = "a model of this hidden_size, layers, ff and vocab_size has more than 10^12 weights"
        where = places.get("model.hidden_size", places.get("model.layers", places.get("tokenizer.vocab_size", "")))
        raise UserError("E-CONF-RANGE", what, where=where, hint="lower one of them")


def _check_adapters(recipe: Recipe, places: Mapping[str, str]) -> None:
    """PPO's adapters stand on the SFT model, and so must the reward model's."""
    ppo, reward = recipe.ppo, recipe.reward
    if ppo.prompts and ppo.adapters and reward.data and not reward.adapters:
        what = "ppo.adapters = true needs a reward model that is an adapter, and reward.adapters is false"
        where, hint = places.get("ppo.adapters", ""), "write adapters = true in [reward] too"
        raise UserError("E-CONF-CONFLICT", what, where=where, hint=hint)
    if ppo.adapters and ppo.doubt:
        what = "ppo.doubt needs an ensemble, and with ppo.adapters the reward model's first member alone is read"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("ppo.doubt", ""), hint="set one of them off")
    if reward.data and reward.adapters and reward.from_:
        what = "reward.adapters = true trains on the SFT model, and reward.from names another"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("reward.from", ""), hint="remove one of them")
    if 0 < ppo.dual_clip <= 1:
        what = f"ppo.dual_clip = {ppo.dual_clip:g} would cut every loss"
        raise UserError("E-CONF-RANGE", what, where=places.get("ppo.dual_clip", ""), hint="write 0, or 3 for one")


def _check_pairs(recipe: Recipe, places: Mapping[str, str]) -> None:
    scale = recipe.reward.score_scale
    if scale and not scale[0] < scale[1]:
        what = f"reward.score_scale = [{scale[0]:g}, {scale[1]:g}] must go from the lowest to the highest score"
        hint = f"write score_scale = [{min(scale):g}, {max(scale):g}]" if scale[0] > scale[1] else "give two numbers"
        raise UserError("E-CONF-RANGE", what, where=places.get("reward.score_scale", ""), hint=hint)
    if recipe.reward.test and not recipe.reward.held_out:
        what = "reward.test has no held-out records beside it, on which the temperature is fitted"
        where = places.get("reward.test", "")
        raise UserError("E-CONF-MISSING", what, where=where, hint='add held_out = ["FILE"] to [reward]')
    if recipe.model.from_ and recipe.tokenizer.text:
        what = "model.from brings its own tokenizer, and [tokenizer] learns another"
        hint = "remove [tokenizer] text, or model.from"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("tokenizer.text", ""), hint=hint)
    for name, of in _WEIGHED.items():
        table, _, key = name.partition(".")
        weights: tuple[float, ...] = getattr(getattr(recipe, table), key)
        entries = len(getattr(getattr(recipe, table), of.partition(".")[2]))
        if weights and (len(weights) != entries or not any(weights)):
            what = f"{name} has {len(weights)} numbers for {entries} entries of {of}"
            what = what if any(weights) else f"{name} leaves nothing to read"
            hint = "write one number, at least 0, for each"
            raise UserError("E-CONF-CONFLICT", what, where=places.get(name, ""), hint=hint)
    for pair in recipe.data.rename:
        if not re.fullmatch(r"\s*[^\s=][^=]*=\s*[^\s=][^=]*", pair):
            what = f'data.rename has "{pair}", which is no pair of names'
            hint = 'write rename = ["question=Instruction"]'
            raise UserError("E-CONF-RANGE", what, where=places.get("data.rename", ""), hint=hint)
    if recipe.run.dtype == "bfloat16" and recipe.run.device == "cpu":
        what = "bfloat16 on a CPU is several times slower than float32 and not offered"
        raise UserError("E-CONF-DTYPE", what, where=places.get("run.dtype", ""), hint='set dtype = "float32"')
    if recipe.ppo.kl_target and not recipe.ppo.kl_coefficient:
        what = "ppo.kl_target adapts kl_coefficient, which starts at 0 and would stay there"
        hint = "write kl_coefficient = 0.05, or kl_target = 0"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("ppo.kl_target", ""), hint=hint)


def _get(recipe: Recipe, name: str) -> int:
    table, _, key = name.partition(".")
    return int(getattr(getattr(recipe, table), key))
