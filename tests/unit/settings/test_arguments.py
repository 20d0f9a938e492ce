"""What is printed can be typed: escapes of texts, and every setting that an error or a hint names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tetrad
from tetrad.settings import use
from tetrad.settings.arguments import help_text, nest, parse
from tetrad.settings.base import options, tables
from tetrad.settings.check import build
from tetrad.stages import Recipe

SOURCE = Path(tetrad.__file__).parent
COMMANDS = (use.Check, use.Init, use.Generate, use.Chat, use.ScoreFile, use.Serve, use.Rank)
COMMANDS += (use.Export, use.Explain, use.Doctor)
WITHOUT_SETTINGS = {"help", "help_all", "debug", "version", "nproc"}
WITHOUT_SETTINGS |= {"repo_type", "revision", "dataset", "local_dir"}  # of `hf` and `modelscope`


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\n", "\n"),
        ("\n", "\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),  # a backslash and an n
        (r"\\\n", "\\\n"),
        (r"\d+ \x", r"\d+ \x"),  # no escape: as it stands
        ("\\", "\\"),
        ("第\\n行", "第\n行"),
    ],
)
def test_escapes_of_texts(typed: str, text: str) -> None:
    for cls, flag, name in ((use.Generate, "--stop", "stop"), (Recipe, "--sft.separator", "sft.separator")):
        for words in ([flag, typed], [f"{flag}={typed}"]):
            _, values, _ = parse(words, options(cls))
            assert values == {name: [text] if name == "stop" else text}
    _, values, places = parse(["--stop", "a", typed, "--stop", typed], options(use.Chat))
    assert build(use.Chat, nest(values), places).stop == ("a", text, text)


def test_a_list_as_toml_has_toml_s_escapes() -> None:
    _, values, _ = parse(["--stop", r'["\n", "\\n"]'], options(use.Chat))
    assert values == {"stop": ["\n", r"\n"]}


def test_other_texts_have_no_escapes() -> None:
    _, values, _ = parse(["--instruction", r"a\nb", "--out", r"c\new"], options(use.Generate))
    assert values == {"instruction": r"a\nb", "out": r"c\new"}


def test_the_help_shows_what_can_be_typed() -> None:
    shown = " ".join(help_text(use.Generate).split())
    (typed,) = re.findall(r'end a response before them, for example "([^"]+)"', shown)
    assert parse(["--stop", typed], options(use.Generate))[1] == {"stop": ["\n"]}


def said(path: Path) -> Iterator[str]:
    """Texts that may be shown: all but docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def flags(text: str) -> set[str]:
    """The settings that a text names as flags, by their names in TOML."""
    return {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9._-]*[a-z0-9])", text)}


def test_every_flag_that_a_text_names_exists() -> None:
    known = set(options(Recipe)) | WITHOUT_SETTINGS | {name for cls in COMMANDS for name in options(cls)}
    pages = {SOURCE / "report/page.py", SOURCE / "report/charts.py"}  # their variables of CSS begin so too
    texts = {path: set.union(set(), *map(flags, said(path))) for path in {*SOURCE.rglob("*.py")} - pages}
    assert {path: names - known for path, names in texts.items() if names - known} == {}
    assert len(set.union(*texts.values())) > 20


def test_every_setting_that_a_text_names_exists() -> None:
    known = set(options(Recipe))
    files = "safetensors|json|embed_tokens|norm|layers"
    pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(tables(Recipe))})\.(?!(?:{files})\b)[a-z][a-z0-9_]*\b(?![.(])")
    texts = {path: set(pattern.findall("\n".join(said(path)))) for path in SOURCE.rglob("*.py")}
    wrong = {path.name: names - known for path, names in texts.items() if names - known}
    assert wrong == {}
    assert len(set.union(*texts.values())) > 50


@pytest.mark.parametrize("path", ["cli/generate.py", "cli/chat.py", "inference/policy.py"])
def test_commands_without_a_recipe_name_their_own_settings(path: str) -> None:
    own: set[Any] = {name for cls in (use.Generate, use.Chat, use.ScoreFile) for name in options(cls)}
    named = set.union(set(), *map(flags, said(SOURCE / path)))
    assert named <= own
