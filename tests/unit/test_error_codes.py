"""The table of codes: each is raised somewhere, no other one is, and docs/errors.md is made from it."""

import re
import runpy
from pathlib import Path

import pytest

from tetrad.errors import CODES, UserError

ROOT = Path(__file__).parents[2]
CODE = r"E-[A-Z]+-[A-Z0-9]+"
TABLE = ROOT / "src" / "tetrad" / "errors.py"
EXITS = {"CONF": 2, "DATA": 3, "CKPT": 4, "MODEL": 4, "NUM": 5, "IO": 6, "MEM": 6, "RUN": 7, "RANK": 8}


def raised() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py") if path != TABLE)
    return {code for source in sources for code in re.findall(rf'"({CODE})"', source)}


def test_every_code_is_raised_and_in_the_table() -> None:
    assert set(CODES) == raised()


def test_codes_have_a_form_and_a_meaning() -> None:
    for code, meaning in CODES.items():
        assert re.fullmatch(CODE, code)
        assert meaning == meaning.strip()
        assert len(meaning) >= 8
        assert "|" not in meaning
        assert not meaning.endswith(".")


def test_another_code_is_a_bug() -> None:
    with pytest.raises(ValueError, match="E-DATA-NONE"):
        UserError("E-DATA-NONE", "no")


def test_exit_statuses() -> None:
    assert {code: UserError(code, "").exit_code for code in CODES} == {c: EXITS[c.split("-")[1]] for c in CODES}


def test_the_page_is_made_from_the_table() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "pages.py"))["error_page"]()
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page, "python scripts/pages.py"
    for code, meaning in CODES.items():
        assert page.count(f"| {code} | {meaning} |") == 1
