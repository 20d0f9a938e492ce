"""What the commands share: their settings, the console around them, and a look at a model before it is loaded.

Imports are local, as in `main`.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from tetrad import streams
from tetrad.errors import UserError

T = TypeVar("T")
_LENGTH = "the number and length of the records"
LOWER = {"generate": "--max-num-seqs, then --max-new-tokens", "chat": "--max-new-tokens", "serve": "--max-num-seqs"}
"""What reduces memory, for commands without a recipe."""


def flags(words: list[str]) -> list[str]:
    """For commands without a recipe: they accept the recipe's name `data.rename` as well as their own."""
    return ["--" + word.removeprefix("--data.") if word.startswith("--data.rename") else word for word in words]


def settings_of(cls: type[T], verb: str, words: list[str]) -> tuple[T, set[str]]:
    """The settings of a command that uses a model, whose folder is the only argument without a flag."""
    from tetrad.hub import is_model
    from tetrad.inference.model_folder import model_folder, own_sampling
    from tetrad.settings.arguments import nest, parse
    from tetrad.settings.base import options
    from tetrad.settings.check import build
    from tetrad.settings.use import Sample

    known = options(cls)
    plain, values, places = parse(flags(words), known)
    if "model" in known and plain and "model" not in values:
        values["model"] = plain.pop(0)
    if plain:
        hint = f"`tetrad {verb} --help` shows the settings"
        raise UserError("E-CONF-SYNTAX", f"unexpected argument {plain[0]!r}", where=verb, hint=hint)
    for name in ("model", "data"):
        if name in known and not values.get(name):
            flag = "MODEL" if name == "model" else "--data FILE.jsonl"
            hint = f"tetrad {verb} MODEL" + (" --data FILE.jsonl" if "data" in known else "")
            raise UserError("E-CONF-MISSING", f"{flag} is missing", where=verb, hint=hint)
    if verb in ("generate", "chat", "score", "export"):
        given: Any = build(cls, nest(values), places)  # a wrong flag is reported before anything is downloaded
        if names := [name for name in (given.model, getattr(given, "reward", "")) if is_model(name)]:
            with_console(lambda names, _: [*map(model_folder, names)], names, verb)
    own = own_sampling(values["model"]) if issubclass(cls, Sample) else {}
    return build(cls, own | nest(values), places), set(values)


def with_words(cls: type[T], verb: str, words: list[str]) -> tuple[T, list[str]]:
    """The settings of a command that takes several words without a flag, and these words."""
    from tetrad.settings.arguments import nest, parse, split
    from tetrad.settings.base import options
    from tetrad.settings.check import build

    mine, plain = split(words, options(cls))
    _, values, places = parse(mine, options(cls))
    settings = build(cls, nest(values), places)
    if unexpected := next((word for word in plain if word.startswith("--")), ""):
        raise UserError("E-CONF-UNKNOWN", f"unexpected argument {unexpected}", where=verb, hint=f"tetrad {verb} --help")
    return settings, plain


def needs_extra(extra: str, *modules: str) -> None:
    """Errors: E-CONF-MISSING where packages of an extra are missing, with the line that installs them."""
    from importlib.util import find_spec

    if missing := [module for module in modules if find_spec(module) is None]:
        what, hint = f"{', '.join(missing)} is not installed", f'pip install -c constraints.txt -e ".[{extra}]"'
        raise UserError("E-CONF-MISSING", what, where=extra, hint=hint)


def with_console(function: Callable[[Any, Any], object], settings: object, verb: str) -> int:
    """Runs a command that one signal ends, with its progress shown; errors of memory and disk name the command."""
    from tetrad.console import Console, phase
    from tetrad.pipeline.runner import explained, stoppable

    console = Console()
    stops = stoppable(console, lambda doing: KeyboardInterrupt(f"in {doing}; no file was written"))
    with explained(verb, LOWER.get(verb, _LENGTH)), stops, phase(verb):
        function(settings, console)
    return 0


def look_at(model: str, template: str, *, reward: bool = False) -> None:
    """Refuses a folder that can't be used, before anything is loaded."""
    from tetrad.inference import model_folder

    if remark := model_folder.usable(model, template=template, reward=reward).note:
        note(f"note: {remark}")


def note(text: str) -> None:
    """A line on stderr, if that can be written to."""
    streams.guarded(sys.stderr, outlives=True).write(text + "\n")
