"""Known-answer files, and how they are read; `answers` has the function of each name in them.

A file is an npz without pickles. `manifest` is JSON: a list of {name, fn, inputs, outputs, none}; the arrays are called
`<name>|in|<input>` and `<name>|out|<output>`, and an input named in `none` is None. An output `grad_x` is the gradient
of `loss` with respect to the input x.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tetrad.cli.answers import ANSWERS
from tetrad.errors import UserError


@dataclass(frozen=True)
class Case:
    """inputs: arrays, numbers, strings or None; outputs: arrays."""

    name: str
    function: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


def read_cases(path: Path) -> list[Case]:
    """Every case of a file. Errors: E-DATA-PATH, E-DATA-FORMAT."""
    if not path.is_file():
        raise UserError("E-DATA-PATH", "there is no such file", where=str(path), hint="name an npz of test vectors")
    if not zipfile.is_zipfile(path):
        raise _unreadable("not an npz file", str(path))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            cases = list(_cases(arrays))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as fault:
        raise _unreadable(f"not a file of test vectors ({fault})", str(path)) from fault
    for case in cases:
        if case.function not in ANSWERS:
            raise _unreadable(f"unknown function {case.function!r}", f"{path}:{case.name}")
    if not cases:
        raise _unreadable("the manifest lists no case", str(path))
    return cases


def _cases(arrays: Any) -> Iterator[Case]:
    for entry in json.loads(str(arrays["manifest"])):
        name, nothing = entry["name"], entry["none"]
        inputs = {key: None if key in nothing else arrays[f"{name}|in|{key}"] for key in entry["inputs"]}
        outputs = {key: arrays[f"{name}|out|{key}"] for key in entry["outputs"] if f"{name}|out|{key}" in arrays}
        if not outputs:
            raise ValueError(f"{name} has no output")
        yield Case(name, str(entry["fn"]), inputs, outputs)


def _unreadable(what: str, where: str) -> UserError:
    return UserError("E-DATA-FORMAT", what, where=where, hint="use an npz with a manifest of known functions")
