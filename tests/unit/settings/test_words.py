"""What is typed as --help shows it: escapes of text that a shell hands over as they stand."""

import pytest

from tetrad.settings.base import knobs
from tetrad.settings.recipe import Recipe
from tetrad.settings.use import Generate
from tetrad.settings.words import parse


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"\t\r", "\t\r"),
        ("\n", "\n"),
        (r"\\n", r"\n"),
        (r"\d+", r"\d+"),  # no escape of ours
        ("end.", "end."),
        ("\\", "\\"),
        ("结束", "结束"),
    ],
)
def test_escapes_of_texts_that_need_them(typed: str, meant: str) -> None:
    assert parse(["--stop", typed, "two"], knobs(Generate))[1] == {"stop": [meant, "two"]}
    assert parse([f"--sft.separator={typed}"], knobs(Recipe))[1] == {"sft.separator": meant}


def test_other_texts_are_as_they_are_typed() -> None:
    assert parse(["--instruction", r"C:\new"], knobs(Generate))[1] == {"instruction": r"C:\new"}
