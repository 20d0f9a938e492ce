"""Names of settings: the nearest to a misspelt one, and names and values that look like secrets.

A secret is refused and never printed: recipes are copied into run folders and shown.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from tetrad.errors import UserError
from tetrad.settings.base import Option

_SECRET_KEY = re.compile(r"api_?key|(^|_)token$|passw|secret|credential|private_?key", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(sk-[\w-]{16,}|hf_\w{20,}|gh[pousr]_\w{20,}|AKIA[A-Z0-9]{16})")
_OTHER_NAMES = {
    "learningrate": "lr", "numepochs": "epochs", "numsteps": "steps", "maxsteps": "steps",
    "maxlength": "max_tokens", "maxseqlen": "max_tokens", "maxlen": "max_new_tokens",
    "beta": "kl_coef", "numlayers": "layers", "numheads": "heads", "lambda": "gae_lambda",
    "warmupratio": "warmup", "outputdir": "out", "files": "data",
}  # fmt: skip
_RENAMED = {
    "held_out": "validation", "row_tokens": "sequence_length", "on_long": "overlong", "batch": "batch_size",
    "seeds": "ensemble_size", "smoothing": "label_smoothing", "normalise_max_new": "normalise_max_new_tokens",
    "replies": "samples_per_prompt", "max_new": "max_new_tokens", "epochs": "ppo_epochs",
    "mini_batches": "num_minibatches", "clip": "clip_range", "value_clip": "value_clip_range",
    "score_clip": "reward_clip", "lam": "gae_lambda", "max_norm": "max_grad_norm", "doubt": "uncertainty_penalty",
    "stop_kl": "early_stop_kl", "cut_value": "bootstrap_truncated", "kl_coefficient": "kl_coef",
    "value_coefficient": "value_coef", "entropy_bonus": "entropy_coef", "ema": "ema_decay", "coefficient": "coef",
    "referee": "external_lm", "ended": "finished", "micro_tokens": "micro_batch_tokens", "slots": "max_num_seqs",
    "nats": "expected_kl", "falls": "judge_drops", "unseen_scores": "ood_scores",
}  # fmt: skip
"""Names of an earlier version."""


def unknown(name: str, known: Mapping[str, Option], where: str) -> UserError:
    """The error for an unknown setting, with the nearest known one."""
    if _SECRET_KEY.search(name.rpartition(".")[2].replace("-", "_")):
        return secret(name, where)
    near = nearest(name, known)
    table, dot, key = name.rpartition(".")
    now = _RENAMED.get(key.replace("-", "_"), "")
    if table + dot + now in known:
        return UserError("E-CONF-UNKNOWN", f"unknown setting {name}.", where=where, hint=f"{key} is now {now}")
    siblings = [option.rpartition(".")[2] for option in known if option.rpartition(".")[0] == table]
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    hint = hint or (f"[{table}] has {', '.join(siblings)}" if table and siblings else "")
    hint = hint or "the settings are: " + ", ".join(dict.fromkeys(option.partition(".")[0] for option in known))
    short = name if len(name) <= 100 else name[:97] + "..."
    return UserError("E-CONF-UNKNOWN", f"unknown setting {short}.", where=where, hint=hint)


def nearest(name: str, known: Mapping[str, Option]) -> list[str]:
    """The settings that a misspelt one may mean: in its table, else in another, hyphens and case aside."""
    table, _, key = name[:100].rpartition(".")
    here = {_plain(option.rpartition(".")[2]): option for option in known if option.rpartition(".")[0] == table}
    aliases = {alias: here[_plain(real)] for alias, real in _OTHER_NAMES.items() if _plain(real) in here}
    for match in difflib.get_close_matches(_plain(key), [*here, *aliases], n=1, cutoff=0.7):
        return [here.get(match) or aliases[match]]
    elsewhere = [option for option in known if _plain(option.rpartition(".")[2]) == _plain(key)]
    if elsewhere:
        return elsewhere[:4]
    groups = list(dict.fromkeys(option.partition(".")[0] for option in known if "." in option))
    other = [t for t in difflib.get_close_matches(table or key, groups, n=1) if t != table]
    moved = [f"{t}.{key}" for t in other if table and f"{t}.{key}" in known]
    if moved or (other and not table):
        return moved or [f"[{other[0]}]"]
    everywhere = {_plain(option): option for option in known}
    return [everywhere[match] for match in difflib.get_close_matches(_plain(name), [*everywhere], n=1, cutoff=0.7)]


def shown(value: Any) -> str:
    """A value as a recipe would write it, shortened to one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(name: str) -> str:
    return re.sub(r"[-_.]", "", name).lower()


def secret(name: str, where: str) -> UserError:
    what = f"{name} looks like a secret; recipes are copied into run folders and shown."
    return UserError("E-CONF-SECRET", what, where=where, hint="remove it and use an environment variable")
