"""Where rewards and judgements come from, behind one protocol: a trained model on ids, Python functions or an HTTP
endpoint on text.

A trained model reads the sampled ids themselves where it trains a policy (`joined`: PPO, and the scale that it is given
for PPO), as each token of them is paid for. Where replies are judged in use (generate, chat, score, evaluate) it reads
what is written (`written`): bytes that are no UTF-8 as the U+FFFD that stands there, the text tokenised anew, so that
whoever scores the text gets the same number.
"""

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
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tetrad.data.loader import micro_batches
from tetrad.data.pack import pack
from tetrad.data.tokens import tokenize
from tetrad.engine import streams
from tetrad.engine.console import counted
from tetrad.engine.device import Device
from tetrad.errors import Stopped, UserError
from tetrad.model.decoder import ScalarModel
from tetrad.text.template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Tokens, Turn, lines

_PATIENCE = 300.0  # seconds for one answer of an endpoint
_WAITS = (1.0, 5.0)  # before it is asked again
_MOST_ANSWER = 64 << 20
_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_rng_state, torch.set_rng_state),
    (lambda: None, torch.set_default_device),  # ours sets none
    (os.getcwd, os.chdir),
)
"""What our numbers depend on and foreign code may set for the whole process: how it is read, and how it is set back."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply as it was sampled: its ids, the text they stand for, what was asked, and whether it ended by itself.

    valid_utf8: false where sampled bytes make no characters, and U+FFFD stands in the text for them.
    """

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    text: str
    where: str = ""
    ended: bool = True
    valid_utf8: bool = True

    @property
    def asked(self) -> str:
        """The Input or the last user turn; empty where an Instruction stands alone."""
        return next((turn.text for turn in reversed(self.turns) if turn.role in ("input", "user")), "")

    @property
    def prompt(self) -> str:
        """All that was asked, a line a turn."""
        return lines(self.turns)


class Reward(Protocol):
    """Samples in, one number each out."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]: ...


def joined(samples: Sequence[Sample]) -> list[Tokens]:
    """Prompt and reply as one document each, without labels."""
    return [
        Tokens(np.asarray(s.prompt_ids + s.reply_ids, np.int32), np.zeros(len(s.prompt_ids + s.reply_ids), np.bool_))
        for s in samples
    ]


def written(form: Template, tokenizer: Tokenizer, samples: Sequence[Sample]) -> list[Tokens]:
    """The same from their texts, as any tokenizer reads them; those that ended have their end token.

    Errors: E-DATA-*, E-MODEL-*.
    """
    heads = tokenize(form, tokenizer, [Prompt(sample.turns, sample.where) for sample in samples])
    bodies = tokenizer.encode_batch([form.said(sample.text) for sample in samples])
    end = form.end_id(tokenizer)
    documents = []
    for head, body, sample in zip(heads, bodies, samples, strict=True):
        ids = np.array([*head.ids.tolist(), *body, *([end] if sample.ended else [])], np.int32)
        documents.append(Tokens(ids, np.zeros(len(ids), np.bool_), head.where))
    return documents


def best(samples: Sequence[Sample], scores: Sequence[float]) -> int:
    """The index of the first sample with the highest score; one that is not valid UTF-8 only where none is."""
    return max(range(len(samples)), key=lambda i: (samples[i].valid_utf8, scores[i]))


@torch.no_grad()
def score_tokens(model: ScalarModel, documents: Sequence[Tokens], device: Device, micro_tokens: int) -> list[float]:
    """The model's number at the last token of each document."""
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    ordered = [documents[i] for i in by_length]
    found = np.zeros(len(documents))
    model.eval()
    for group in counted("scoring", micro_batches(ordered, micro_tokens), len(ordered), len):
        with device.compute():
            scores = model(device.put(pack([ordered[i] for i in group])), "scores")
        found[[by_length[i] for i in group]] = scores.double().cpu().numpy()
    return found.tolist()


def member_scores(
    members: Sequence[ScalarModel], documents: Sequence[Tokens], device: Device, micro_tokens: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every member's number for every document, [members, documents]. Errors: E-DATA-LONG."""
    limit = members[0].config.max_positions
    for document in documents:
        if len(document.ids) > limit:
            what = f"prompt and answer have {len(document.ids)} tokens, the reward model reads {limit}"
            raise UserError("E-DATA-LONG", what, where=document.where, hint="shorten the answer")
    return np.array([score_tokens(member, documents, device, micro_tokens) for member in members])


def trained(
    members: Sequence[ScalarModel],
    device: Device,
    micro_tokens: int,
    read: Callable[[Sequence[Sample]], list[Tokens]] = joined,
    doubt: float = 0.0,
) -> Reward:
    """A reward model: the mean of its members, less `doubt` times their standard deviation (Coste et al. 2024).

    read: how samples become documents; by the sampled ids themselves, or by `written`.
    """

    def reward(samples: Sequence[Sample]) -> list[float]:
        scores = member_scores(members, read(samples), device, micro_tokens)
        found: list[float] = (scores.mean(0) - doubt * scores.std(0)).tolist()
        return found

    return reward


def python_function(spec: str) -> Reward:
    """`file.py:name`: a list of dicts in, one finite number each out.

    A dict has "text" (the reply), "input" (the Input or last user turn), "prompt" (all that was asked), "ids" (the
    reply's tokens as they were sampled) and "ended" (false where it was cut).

    Errors: E-CONF-FUNCTION where it can't be loaded, E-NUM-REWARD where what it returns isn't that.
    """
    function = _load(spec)

    def reward(samples: Sequence[Sample]) -> list[float]:
        try:
            with _undisturbed():
                scores = [float(x) for x in function(_told(samples))]
        except (Stopped, KeyboardInterrupt):  # the stage was asked to stop meanwhile
            raise
        except BaseException as error:
            what = f"the function failed on {len(samples)} samples: {type(error).__name__}: {error}"
            raise UserError("E-NUM-REWARD", what, where=spec) from error
        return _finite(scores, samples, spec)

    return reward


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What foreign code sets for the whole process ends with it, and what it prints can't end the run."""
    before = [(restore, read()) for read, restore in _STATE]
    out, err = (streams.guarded(stream, outlives=True) for stream in (sys.stdout, sys.stderr))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for restore, value in before:
            restore(value)


def endpoint(url: str) -> Reward:
    """An HTTP endpoint: {"samples": [...]}, with dicts as `python_function` has them, is posted as JSON and answered
    by {"scores": [...]}. It is asked three times before an error ends the stage, which can then go on.

    Errors: E-NUM-REWARD.
    """

    def reward(samples: Sequence[Sample]) -> list[float]:
        body = json.dumps({"samples": _told(samples)}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
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
    """The recipe named one address: no other is opened."""

    def redirect_request(self, *_: Any) -> None:
        return None


_NO_REDIRECT = urllib.request.build_opener(_Stay)


def _told(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [
        {"prompt": s.prompt, "input": s.asked, "text": s.text, "ids": list(s.reply_ids), "ended": s.ended}
        for s in samples
    ]


def _finite(scores: list[float], samples: Sequence[Sample], where: str) -> list[float]:
    """Errors: E-NUM-REWARD."""
    if len(scores) != len(samples):
        what = f"{len(samples)} samples went in, {len(scores)} numbers came out"
        raise UserError("E-NUM-REWARD", what, where=where)
    for sample, score in zip(samples, scores, strict=True):
        if not math.isfinite(score):
            what = f"the score is {score} for the reply {sample.text[:80]!r} ({sample.where or 'no place'})"
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
        found: Callable[[list[dict[str, Any]]], Sequence[float]] = getattr(module, attribute)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError("E-CONF-FUNCTION", f"{type(error).__name__}: {error}", where=spec, hint=hint) from error
    return found
