"""HTML of foreign text and of tables, in two languages: everything is escaped here, and nowhere else.

What stands in both languages is there twice, as `.en` and `.zh`; the page shows one. No torch.
"""

import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from tetrad.report.glossary import Language, find


class Html(str):
    """Text that is HTML already; any other text is foreign and is escaped."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as text that no browser interprets as anything else; numbers to four digits."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("-")
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return Html(escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)))


def foreign(value: Any) -> Html:
    """Text of data and models, apart from the direction of the text around it."""
    return Html(f"<bdi>{text(value)}</bdi>")


@cache
def _words() -> dict[str, tuple[str, str]]:
    table = tomllib.loads(resources.files("tetrad.report").joinpath("words.toml").read_text("utf-8"))
    return {name: (row["en"], row["zh"]) for name, row in table.items()}


def both(english: str, chinese: str) -> Html:
    """The same in both languages."""
    return Html(f'<span class="en">{text(english)}</span><span class="zh" lang="zh">{text(chinese)}</span>')


def word(name: str, *values: Any) -> Html:
    """A text of words.toml, with these values at its places."""
    return both(*(one.format(*values) if values else one for one in _words()[name]))


def term(name: str, shown: str = "") -> Html:
    """A metric's name that opens to its meaning and to why it may rise or fall."""
    if not (meaning := meaning_of(name)):
        return foreign(shown or name)
    return Html(f"<details class=term><summary>{text(shown or name)}</summary><p>{meaning}</p></details>")


def meaning_of(name: str) -> Html:
    """What a metric is and what to look for, in both languages; empty for a name that is no metric."""
    signs: dict[Language, str] = {"en": "— look for: ", "zh": "怎么看："}
    entries = [(entry, sign) for language, sign in signs.items() if (entry := find(name, language))]
    whole = [entry.meaning + (f" {sign}{entry.look}" if entry.look else "") for entry, sign in entries]
    return both(*whole) if whole else Html("")


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], title: Any = "") -> Html:
    """Columns and cells are values or Html. Empty without rows. A wide one scrolls by itself, by the keyboard too."""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    if not body:
        return Html("")
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    caption = f"<h3>{text(title)}</h3>" if title else ""
    return Html(
        f'{caption}<div class="wide" tabindex="0" role="group" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    number = ' class="number"' if isinstance(value, int | float) else ""
    return f"<td{number}>{foreign(value)}</td>"
