"""The tokenizer that a recipe will train, tried on its text: does the text fill the vocabulary, and with what?

A token that is a whole clause is a sign of repeated text: it takes the place of words.
"""

import re
from collections.abc import Iterator

from tetrad.data.records import read_documents
from tetrad.data.source import sources
from tetrad.errors import UserError
from tetrad.report.sections import Section, Table
from tetrad.stages import Recipe
from tetrad.text.bpe import CONTROLS, SMALLEST, learn
from tetrad.training.context import renamed

MOST_BYTES = 4 << 20  # of text that is tried
SHOWN = 3
_CLAUSE = re.compile(  # letters of scripts that put no spaces between words, or a word longer than any
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]{8,}|[^\W\d_]{25,}|\w+(?:\s+\w+){2,}"
)


def section(recipe: Recipe) -> Section:
    """Empty where the recipe trains no tokenizer, or where there is no readable text (reported with the files)."""
    s = recipe.tokenizer
    if not s.text or s.vocab_size < SMALLEST:
        return Section("", "")
    used = [0]
    most = min(s.max_bytes or MOST_BYTES, MOST_BYTES)
    try:
        tokenizer = learn(_texts(recipe, used), s.vocab_size, s.min_frequency, most)
    except UserError:
        return Section("", "")
    section = Section("vocabulary", "The tokenizer, tried on its text")
    texts = (tokenizer.decode([i]).strip() for i in range(tokenizer.size - len(CONTROLS)))
    clauses = sorted((text for text in texts if _CLAUSE.fullmatch(text)), key=len, reverse=True)
    if tokenizer.size < s.vocab_size and used[0] < MOST_BYTES:
        text = f"the text of tokenizer.text gives {tokenizer.size} of the {s.vocab_size} tokens asked for"
        fix = f"tokenizer.vocab_size = {tokenizer.size}, or more text"
        section.add("note", "vocabulary", text, fix=fix)
    if clauses:
        text = f"{len(clauses)} of {tokenizer.size} tokens are whole clauses, as " + ", ".join(clauses[:SHOWN])
        level = "warning" if len(clauses) > 0.005 * tokenizer.size else "note"
        section.add(level, "long tokens", text)
    section.metrics |= {"size": tokenizer.size, "asked": s.vocab_size, "bytes": used[0], "long_tokens": len(clauses)}
    rows = [(clause, len(clause)) for clause in clauses[:20]]
    section.tables.append(Table("longest clauses that are one token", ("token", "characters"), rows))
    return section


def _texts(recipe: Recipe, used: list[int]) -> Iterator[str]:
    """The documents that can be read. used: counts the bytes read so far."""
    given = sources(recipe.tokenizer.text, rename=renamed(recipe.data.rename))
    for document in read_documents(given, refuse=lambda error, row: None):
        used[0] += len(document.text.encode(errors="replace"))
        yield document.text
