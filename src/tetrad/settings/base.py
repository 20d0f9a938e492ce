"""What all settings share: the decorator, the constrained types, the marks on a field, and a class's options.

An option's name is its TOML name (`ppo.actor_lr`, `model.from`); its flag is `--ppo.actor-lr`. Nothing here imports
torch, pydantic or a terminal library, so that `--help` is quick.
"""

import ast
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

T = TypeVar("T")
FILES = "files"
FUNCTIONS = "functions"
REWARDS = "rewards"
ESCAPED = "escaped"
FILE = "file"

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Rate = Annotated[float, Gt(0), Le(1)]
Below1 = Annotated[float, Ge(0), Lt(1)]
BelowHalf = Annotated[float, Ge(0), Lt(0.5)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Weights = tuple[NotNegative, ...]
"""One number for each file or pattern beside it; empty weights all the same."""
TemplateName = Literal["", "instruction", "chatml", "qwen2", "qwen2.5", "qwen3", "smollm2", "llama3"]
"""A row of text.chat_template's table, or empty for the model's own."""
Limits = tuple[NotNegative, NotNegative]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Files = Annotated[tuple[str, ...], FILES]
"""Paths, globs allowed, from the recipe's folder; the content of the files is part of a stage's key."""
Functions = Annotated[tuple[str, ...], FUNCTIONS]
"""`file.py:name`; the content of the file is part of a stage's key."""
File = Annotated[str, FILE]
"""The path of one file, with any bytes in its name: no recipe and no lineage has to hold it."""
Escaped = Annotated[str, ESCAPED]
"""Text in which a command line may write \\n, \\t, \\r and \\\\; a recipe has TOML's own escapes."""
Rewards = Annotated[tuple[str, ...], REWARDS]
"""Functions, "reward" for the reward model, and addresses of HTTP endpoints."""


REWARD_MODEL = "reward"


def reward_entries(rewards: tuple[str, ...]) -> tuple[str, ...]:
    """The sources of reward: none in the recipe means the reward model."""
    return rewards or (REWARD_MODEL,)


def uses_reward_model(rewards: tuple[str, ...]) -> bool:
    """Whether the reward model is one of the sources of reward."""
    return REWARD_MODEL in reward_entries(rewards)


def is_function(reward: str) -> bool:
    """Whether an entry of Rewards names a Python function."""
    return reward != REWARD_MODEL and not reward.startswith(("http://", "https://"))


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that pydantic checks strictly: unknown keys and inf/nan are refused."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def unkeyed(default: Any) -> Any:
    """A field that affects memory, speed, place or logging but no number: recorded, never part of a stage's key."""
    return field(default=default, metadata={"keyed": False})


_NOUNS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "strings": "a list of text",
    "floats": "a list of numbers, each at least 0",
    "range": "two numbers, the lowest and the highest",
}
_LISTS = {
    FILES: "a list of files",
    FUNCTIONS: "a list of file.py:name",
    REWARDS: 'a list of "reward", file.py:name, https://...',
}


@dataclass(frozen=True)
class Option:
    """One setting. kind: bool | int | float | str | choice | strings | floats | range (the lowest and the highest).
    mark: files, functions, rewards, file, escaped or empty. group: in its class's GROUPS; none for what people change
    first."""

    name: str
    default: Any
    help: str
    keyed: bool
    kind: str
    mark: str = ""
    choices: tuple[str, ...] = ()
    limits: str = ""
    group: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def wanted(self) -> str:
        """What a value must be, for an error or a help line: `a number, above 0 and at most 1`."""
        if self.kind == "choice":
            return " or ".join(f'"{choice}"' for choice in self.choices)
        if self.mark in _LISTS:
            return _LISTS[self.mark]
        noun = _NOUNS[self.kind]
        return f"{noun}, {self.limits}" if self.limits else noun


def toml_name(field_name: str) -> str:
    """`from_` is `from` in TOML and on the command line."""
    return field_name.rstrip("_")


def tables(cls: type[Any]) -> dict[str, type[Any]]:
    """The fields of a settings class that are settings classes themselves, by TOML name."""
    hints = get_type_hints(cls)
    return {toml_name(f.name): hints[f.name] for f in fields(cls) if is_dataclass(hints[f.name])}


def options(cls: type[Any], prefix: str = "") -> dict[str, Option]:
    """Every setting of a settings class and of the tables in it, by dotted TOML name, in source order."""
    hints = get_type_hints(cls, include_extras=True)
    groups = {name: group for group, names in getattr(cls, "GROUPS", {}).items() for name in names.split()}
    named: dict[str, Option] = {}
    for item in fields(cls):
        name, hint = prefix + toml_name(item.name), hints[item.name]
        if is_dataclass(hint):
            named |= options(cast(type[Any], hint), name + ".")
            continue
        hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        named[name] = Option(
            name=name,
            default=item.default,
            help=docstrings(cls).get(item.name, ""),
            keyed=item.metadata.get("keyed", True),
            kind=_kind(hint),
            mark=next((mark for mark in marks if isinstance(mark, str)), ""),
            choices=get_args(hint) if get_origin(hint) is Literal else (),
            limits=_limits(marks),
            group=groups.get(toml_name(item.name), ""),
        )
    return named


def _kind(hint: Any) -> str:
    if hint in (bool, int, float, str):
        return str(hint.__name__)
    kinds = {Literal: "choice", tuple: "strings" if hint == tuple[str, ...] else "floats"}
    kinds[UnionType] = "str" if hint == str | None else "range"
    return kinds[get_origin(hint)]


def _limits(marks: Sequence[Any]) -> str:
    words: list[str] = []
    mark: Any
    for mark in marks:
        match mark:
            case Gt(gt=low):
                words.append(f"above {low}")
            case Ge(ge=low):
                words.append(f"at least {low}")
            case Le(le=high):
                words.append(f"at most {high}")
            case Lt(lt=high):
                words.append(f"below {high if high < 10**9 else '2^63'}")
    return " and ".join(words)


@cache
def _trees(module: str) -> Mapping[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def docstrings(cls: type[Any]) -> dict[str, str]:
    """Each field's docstring (the text literal below it), on one line, by field name."""
    texts: dict[str, str] = {}
    for parent in cls.__bases__:
        texts |= docstrings(parent) if is_dataclass(parent) else {}
    body = _trees(cls.__module__)[cls.__name__].body
    for node, after in pairwise(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts
