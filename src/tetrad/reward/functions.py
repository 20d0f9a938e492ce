"""External rewards on text: Python functions in a file of the user's, and HTTP endpoints."""

import importlib.util
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from tetrad import streams
from tetrad.errors import Stopped, UserError
from tetrad.inference.completions import Completion
from tetrad.reward.model import Reward

_PATIENCE = 300.0  # seconds for one response of an endpoint
_WAITS = (1.0, 5.0)  # before a retry
_MOST_ANSWER = 64 << 20
KEY = "TETRAD_REWARD_KEY"
_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_rng_state, torch.set_rng_state),
    (lambda: None, torch.set_default_device),  # ours is never set
    (os.getcwd, os.chdir),
)
"""Process-wide state that our numbers depend on and user code may change: how it is read, and how it is restored."""


def python_function(spec: str) -> Reward:
    """`file.py:name`: a list of dicts in, one finite number each out.

    A dict has "text" (the response), "input" (the Input or last user turn), "prompt" (all of the prompt), "messages"
    (its turns), "prompt_ids", "ids" (the response's tokens as they were sampled) and "finished" (false where it was
    truncated).

    Errors: E-CONF-FUNCTION where it can't be loaded, E-NUM-REWARD where it returns anything else.
    """
    function = _load(spec)

    def reward(samples: Sequence[Completion]) -> list[float]:
        try:
            with _undisturbed():
                scores = [float(x) for x in function(_told(samples))]
        except (Stopped, KeyboardInterrupt):  # a stop was requested meanwhile
            raise
        except BaseException as error:
            what = f"the function failed on {len(samples)} samples: {type(error).__name__}: {error}"
            raise UserError("E-NUM-REWARD", what, where=spec) from error
        return _finite(scores, samples, spec)

    return reward


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Process-wide state that user code changes is restored, and what it prints can't end the run."""
    before = [(restore, read()) for read, restore in _STATE]
    out, err = (streams.guarded(stream, outlives=True) for stream in (sys.stdout, sys.stderr))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for restore, value in before:
            restore(value)


def endpoint(url: str, meaning: str = "") -> Reward:
    """An HTTP endpoint: {"samples": [...], "tokenizer": ...}, with dicts as `python_function` has them, is posted as
    JSON and answered by {"scores": [...]}. It is tried three times before an error ends the stage, which can then be
    resumed. A key in the environment, TETRAD_REWARD_KEY, is sent along.

    meaning: `ids_meaning` of the policy: another Tetrad that has the same scores the ids. Errors: E-NUM-REWARD.
    """

    def reward(samples: Sequence[Completion]) -> list[float]:
        body = json.dumps({"samples": _told(samples), "tokenizer": meaning}).encode()
        key = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **key})
        for wait in (*_WAITS, None):
            try:
                with _NO_REDIRECT.open(request, timeout=_PATIENCE) as answer:
                    scores = [float(x) for x in json.loads(answer.read(_MOST_ANSWER))["scores"]]
                break
            except (OSError, HTTPException, ValueError, TypeError, KeyError) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if wait is None:
                    what = f"the endpoint failed on {len(samples)} samples: {type(error).__name__}: {error}"
                    hint = 'it must answer a POST with {"scores": [one number a sample]}'
                    raise UserError("E-NUM-REWARD", what, where=url, hint=hint) from error
                time.sleep(wait)
        return _finite(scores, samples, url)

    return reward


class _Stay(urllib.request.HTTPRedirectHandler):
    """The recipe names one address: redirects are not followed."""

    def redirect_request(self, *_: Any) -> None:
        return None


_NO_REDIRECT = urllib.request.build_opener(_Stay)


def _told(samples: Sequence[Completion]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": s.prompt,
            "messages": [{"role": turn.role, "content": turn.text} for turn in s.turns],
            "input": s.input,
            "text": s.text,
            "prompt_ids": list(s.prompt_ids),
            "ids": list(s.response_ids),
            "finished": s.finished,
        }
        for s in samples
    ]


def _finite(scores: list[float], samples: Sequence[Completion], where: str) -> list[float]:
    """Errors: E-NUM-REWARD."""
    if len(scores) != len(samples):
        what = f"{len(samples)} samples went in, {len(scores)} numbers came out"
        raise UserError("E-NUM-REWARD", what, where=where)
    for sample, score in zip(samples, scores, strict=True):
        if not math.isfinite(score):
            what = f"the score is {score} for the response {sample.text[:80]!r} ({sample.where or 'no place'})"
            raise UserError("E-NUM-REWARD", what, where=where, hint="return finite numbers")
    return scores


def _load(spec: str) -> Callable[[list[dict[str, Any]]], Sequence[float]]:
    name, _, attribute = spec.rpartition(":")
    path = Path(name)
    hint = 'write "file.py:function", relative to the recipe'
    if not attribute or not path.is_file():
        raise UserError("E-CONF-FUNCTION", "there is no such Python file", where=spec, hint=hint)
    module_spec = importlib.util.spec_from_file_location(f"tetrad_user_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError("E-CONF-FUNCTION", "the file isn't Python", where=spec, hint=hint)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by name
    try:
        with _undisturbed():
            module_spec.loader.exec_module(module)
        function: Callable[[list[dict[str, Any]]], Sequence[float]] = getattr(module, attribute)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError("E-CONF-FUNCTION", f"{type(error).__name__}: {error}", where=spec, hint=hint) from error
    return function
