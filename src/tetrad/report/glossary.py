"""What every printed metric means: one table, glossary.toml, for `tetrad explain METRIC` and the pages of docs/.

No torch. A name is in a section (tokenizer, training, reward, dpo, ppo, evaluation), or follows a pattern of the
section `names`, whose part in capitals stands for any name: `NAME_low`, `JUDGE_gain`.
"""

import difflib
import re
import tomllib
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

from tetrad.errors import UserError

Language = Literal["en", "zh"]
_CAPITALS = re.compile("[A-Z]{3,}")
_COLUMNS = {"en": ("metric", "meaning", "look for"), "zh": ("指标", "含义", "怎么看")}
_ANY = "JUDGE"
"""A pattern that any name fits: for those of the evaluation alone, never for an unknown metric."""


class Meaning(NamedTuple):
    """What a metric is, and what to look for; the latter may be empty."""

    meaning: str
    look: str


@cache
def sections(language: Language = "en") -> dict[str, dict[str, Meaning]]:
    """Every metric by section and name, in the order of the file."""
    table = tomllib.loads(resources.files("tetrad.report").joinpath("glossary.toml").read_text("utf-8"))
    return {
        section: {name: Meaning(*texts[language]) for name, texts in names.items()} for section, names in table.items()
    }


def find(name: str, language: Language = "en") -> Meaning | None:
    """The meaning of a metric by its own name or by the pattern that it follows; None for a name that is none."""
    for names in sections(language).values():
        if name in names:
            return names[name]
    for pattern, (meaning, look) in sections(language)["names"].items():
        if pattern != _ANY and (match := re.fullmatch(_CAPITALS.sub("(.+)", pattern), name)):
            return Meaning(_CAPITALS.sub(match[1], meaning), look)
    return None


def explain_metric(name: str) -> str:
    """`name: meaning. Look for: ...`. Raises UserError E-CONF-UNKNOWN for a name that is no metric."""
    if entry := find(name):
        return f"{name}: {entry.meaning}" + (f"\n  look for: {entry.look}" if entry.look else "")
    known = [metric for names in sections().values() for metric in names]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/output.md lists all metrics"
    raise UserError("E-CONF-UNKNOWN", f"{name} is neither a run nor a metric", where="explain", hint=hint)


def markdown(section: str, language: Language) -> str:
    """The table of a section in docs/output.md."""
    rows = [(f"`{name}`", meaning, look) for name, (meaning, look) in sections(language)[section].items()]
    lines = [_COLUMNS[language], ("---",) * 3, *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)
