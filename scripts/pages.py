"""Writes what docs/ says of error codes and metrics from the tables in the code; with --check it only compares.

`python scripts/pages.py [--check]` exits 1 where a page is not what the tables say. docs/errors.md is written whole; in
docs/output.md and docs/zh/output.md what stands between `<!-- metrics: SECTION -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

from tetrad.errors import CODES, FAMILIES
from tetrad.report.glossary import Language, markdown

DOCS = Path(__file__).parents[1] / "docs"
_PART = re.compile(r"(<!-- metrics: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OUTPUT: dict[Path, Language] = {DOCS / "output.md": "en", DOCS / "zh" / "output.md": "zh"}

_ERRORS = """\
# Errors

`error[CODE] WHERE: WHAT. Fix: HINT.` on stderr, once. Codes are stable; the words around them may get better. \
`--debug` adds the traceback.
"""


def error_page() -> str:
    """docs/errors.md: the codes by exit status, each with its meaning."""
    text = _ERRORS
    for exit_code, title in dict.fromkeys(FAMILIES.values()):
        text += f"\n## Exit {exit_code}: {title}\n\n| code | meaning |\n| --- | --- |\n"
        codes = [code for code in sorted(CODES) if FAMILIES[code.split("-")[1]][0] == exit_code]
        text += "".join(f"| {code} | {CODES[code]} |\n" for code in codes)
    return text


def pages() -> dict[Path, str]:
    """Each page's text as the tables have it."""
    written = {DOCS / "errors.md": error_page()}
    for path, language in _OUTPUT.items():
        text = path.read_text(encoding="utf-8")
        written[path] = _PART.sub(lambda part: f"{part[1]}{markdown(part[2], language)}\n{part[3]}", text)  # noqa: B023
    return written


def main(words: list[str]) -> int:
    """Writes the pages, or compares them."""
    old = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" not in words:
        for path in old:
            path.write_text(pages()[path], encoding="utf-8")
        return 0
    for path in old:
        print(f"{path.relative_to(DOCS.parent)} is old: python scripts/pages.py")
    if not old:
        print("the pages of docs/ are what the tables say")
    return bool(old)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
