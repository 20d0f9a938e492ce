"""Every page: links lead somewhere, settings that are named exist, both languages have the same pages."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from tetrad.settings import use
from tetrad.stages import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README*.md")),
]
ENGLISH_ONLY = {"errors.md"}
TABLES = {
    table.name: {field.name.rstrip("_") for field in fields(table.default)}
    for table in fields(Recipe)
    if is_dataclass(table.default)
}
OWN = {field.name.rstrip("_") for each in vars(use).values() if is_dataclass(each) for field in fields(each)}
SETTINGS = {"name", "seed"}.union(OWN, *TABLES.values())


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: small letters, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links to files and headings that are not there."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def unknown(text: str) -> list[str]:
    """Settings in code spans that no table has: `key = value` (with `[table]` or `table.` before it), `--table.key`."""
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", text):
        if stated := re.match(r"(?:\[(\w+)\] )?(?:([a-z_]+)\.)?([a-z_0-9]+) = ", span):
            table = stated[1] or stated[2]
            if stated[3] not in TABLES.get(table or "", SETTINGS):
                wrong.append(span)
        for table, key in re.findall(r"--([a-z]+)\.([a-z-]+)", span):
            if key.replace("-", "_") not in TABLES.get(table, ()):
                wrong.append(span)
    return wrong


def gone(text: str) -> list[str]:
    """Modules that are named with their folder, `training/step` or `src/tetrad/training/step.py`, and are not there."""
    source = ROOT / "src/tetrad"
    named = re.findall(r"(?<![\w/])(?:src/tetrad/)?([a-z]+)/([a-z_]+)(?:\.py)?\b(?![/.])", text)
    return [
        f"{folder}/{name}"
        for folder, name in named
        if (source / folder).is_dir() and not (source / folder / f"{name}.py").is_file()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page(page: Path) -> None:
    assert not broken(page)
    assert not unknown(prose(page))


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#b) [c](none.md) [d](https://x.y)\n```\n[e](none)\n```\n")
    assert broken(page) == ["#b", "none.md"]
    assert unknown(
        "`[ppo] steps = 1` `ppo.stepz = 1` `smoothing = 0.1` `--ppo.actor-lr 1` `--ppo.actor 1` `seed = 1`"
    ) == [
        "ppo.stepz = 1",
        "smoothing = 0.1",
        "--ppo.actor 1",
    ]


def test_modules_that_are_named_exist() -> None:
    for page in PAGES[:4]:
        assert not gone(page.read_text(encoding="utf-8")), page
    assert gone("`training/step` `src/tetrad/rl/rollout.py` `rl/nothing`, runs/x/ppo/model, `train/none.py`") == [
        "rl/nothing",
        "train/none",
    ]


def test_both_languages_have_every_page() -> None:
    english = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert english - ENGLISH_ONLY == {page.name for page in (ROOT / "docs/zh").glob("*.md")}
