"""`tetrad doctor`: what the machine offers, and whether Tetrad's functions reproduce known answers on it.

Returns data; printing is the command line's.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrad import __version__
from tetrad.cli.answers import ANSWERS, AnswerFunction
from tetrad.cli.known_answers import Case, read_cases
from tetrad.errors import UserError

TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4)}  # of outputs, of gradients
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # as model/attention.py chooses
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "pydantic", "rich")


@dataclass(frozen=True)
class Row:
    """One function: its cases, and the largest error of its outputs and of its gradients (None: not in the file)."""

    function: str
    cases: int
    error64: float
    error32: float
    grad64: float | None
    grad32: float | None
    ok: bool


def check_vectors(path: str | Path) -> list[Row]:
    """Every case of a file of known answers against Tetrad's functions, a row for each function.

    The error of a number is |ours - theirs| / max(1, |theirs|); NaN agrees with NaN only. Errors: E-DATA-PATH,
    E-DATA-FORMAT.
    """
    groups: dict[str, list[Case]] = {}
    for case in read_cases(Path(path)):
        groups.setdefault(case.function, []).append(case)
    return [_row(function, cases, str(path)) for function, cases in groups.items()]


def environment() -> list[tuple[str, str]]:
    """Versions, device, memory, threads and attention kernel, as (what, value)."""
    rows = [("tetrad", __version__), ("python", platform.python_version())]
    rows += [(package, _version(package)) for package in PACKAGES]
    rows += [("system", platform.platform()), ("processor", _processor())]
    rows += [("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"), ("memory", _memory())]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        rows.append((f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {_gib(free)} free of {_gib(total)}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device"))
    kernel = "one causal call for documents of like length"
    if torch.cuda.is_available() and HAS_VARLEN:
        kernel = f"variable length in 16 bits, else {kernel}"
    return [*rows, ("attention", kernel)]


def _row(function: str, cases: list[Case], path: str) -> Row:
    worst: dict[torch.dtype, list[float]] = {dtype: [0.0, 0.0] for dtype in TOLERANCES}
    for dtype, errors in worst.items():
        for case in cases:
            try:
                measured = _errors(ANSWERS[function], case, dtype)
            except (KeyError, TypeError, RuntimeError, IndexError, ValueError) as fault:
                what = f"the case does not fit {function}: {fault}"
                raise UserError("E-DATA-FORMAT", what, where=f"{path}:{case.name}") from fault
            errors[:] = map(max, errors, measured)
    ok = all(
        error <= limit
        for dtype, errors in worst.items()
        for error, limit in zip(errors, TOLERANCES[dtype], strict=True)
    )
    (error64, grad64), (error32, grad32) = worst[torch.float64], worst[torch.float32]
    sloped = any(name.startswith("grad_") for case in cases for name in case.outputs)
    return Row(function, len(cases), error64, error32, grad64 if sloped else None, grad32 if sloped else None, ok)


def _errors(answer: AnswerFunction, case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """The largest error of the outputs, and that of the gradients."""
    inputs = {name: _input(value, dtype) for name, value in case.inputs.items()}
    sloped = [name for name in case.outputs if name.startswith("grad_")]
    leaves = [inputs[name.removeprefix("grad_")].requires_grad_() for name in sloped]
    outputs = answer(inputs)
    error = max(_error(outputs[name], case.outputs[name]) for name in case.outputs if name not in sloped)
    grads: Mapping[str, Tensor] = {}
    if sloped:
        grads = dict(zip(sloped, torch.autograd.grad(outputs["loss"], leaves), strict=True))
    return error, max((_error(grads[name], case.outputs[name]) for name in sloped), default=0.0)


def _input(value: Any, dtype: torch.dtype) -> Any:
    if value is None:
        return None
    if value.ndim == 0:
        return value.item()
    tensor = torch.from_numpy(value)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _error(ours: Tensor, theirs: Any) -> float:
    actual, expected = ours.detach().double().numpy(), np.asarray(theirs, dtype=np.float64)
    if actual.shape != expected.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        gaps = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    gaps = np.where((actual == expected) | (np.isnan(actual) & np.isnan(expected)), 0, gaps)
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{_gib(free)} free of {_gib(total)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
