"""docs/errors.md lists every code that the sources raise, no other, and each under its exit status."""

import re
from pathlib import Path

from tetrad.errors import UserError

ROOT = Path(__file__).parents[2]
CODE = r"E-[A-Z]+-[A-Z0-9]+"


def documented() -> dict[str, int]:
    codes, status = {}, 0
    for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## Exit (\d+)", line):
            status = int(heading[1])
        elif row := re.match(rf"\| ({CODE}) \|", line):
            assert row[1] not in codes
            codes[row[1]] = status
    return codes


def raised() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    return {code for source in sources for code in re.findall(rf'"({CODE})"', source)}


def test_every_code_is_documented() -> None:
    assert set(documented()) == raised()


def test_exit_statuses() -> None:
    assert documented() == {code: UserError(code, "").exit_code for code in documented()}
