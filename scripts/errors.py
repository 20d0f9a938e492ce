"""Writes docs/errors.md from the table of codes in tetrad.errors; with --check it only compares.

`python scripts/errors.py [--check]` exits 1 where the page is not what the table says.
"""

import sys
from pathlib import Path

from tetrad.errors import page

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


def main(words: list[str]) -> int:
    """Writes the page, or compares it."""
    if "--check" not in words:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
    print("docs/errors.md is what the table says" if same else "docs/errors.md is old: python scripts/errors.py")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
