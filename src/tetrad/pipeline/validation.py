"""Are the settings of a recipe consistent? Each is valid by itself; invalid combinations are reported here, with
`file:line`, before anything is loaded.

No data file is opened; of a model's folder, only config.json.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tetrad.errors import UserError
from tetrad.model.config import read_config
from tetrad.registry import Recipe
from tetrad.settings.base import FILES, FUNCTIONS, REWARDS, Knob, is_function, knobs, model_pays
from tetrad.settings.check import is_text
from tetrad.settings.names import shown

PATHS = ("model.from", "reward.from", "evaluate.external_lm")
"""The settings that name an existing folder."""
_NAME = re.compile(r"[^\W.][\w.+-]{0,99}")
_SEARCH = 10_000
_LARGEST_WHOLE = 2**53
_LARGEST_MODEL = 10**12
_WEIGHED = {
    "pretrain.weights": "pretrain.text",
    "sft.weights": "sft.data",
    "reward.weights": "reward.data",
    "ppo.weights": "ppo.prompts",
    "ppo.reward_weights": "ppo.rewards",
}
_KNOBS = cache(knobs)


def check(recipe: Recipe, places: Mapping[str, str] | None = None) -> None:
    """Raises UserError for values that are each valid but not together, before anything is loaded."""
    places = places or {}
    check_values(recipe, places)
    _check_divisors(recipe, places)
    _check_size(recipe, places)
    _check_lengths(recipe, places)
    _check_pairs(recipe, places)
    _check_adapters(recipe, places)
    _check_ppo(recipe, places)
    for name, knob in _KNOBS(Recipe).items():
        for path in map(os.path.abspath, filter(None, _paths(name, knob, _value(recipe, name)))):
            if not is_text(path):  # its recipe and its lineage could not be written
                what = f"{name} lies in {path!a:.200}, and that name is not UTF-8 text"
                raise UserError("E-CONF-TYPE", what, where=places.get(name, ""), hint="rename the folder")
        if knob.mark in (FUNCTIONS, REWARDS):
            table, _, key = name.partition(".")
            for text in getattr(getattr(recipe, table), key):
                if knob.mark == REWARDS and not is_function(text):
                    continue
                if not re.fullmatch(r".+\.py:[^\W\d]\w*", text, re.DOTALL):
                    what = f'{name} has "{text}", which names no Python function'
                    hint = f'write {key} = ["file.py:function"]'
                    raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)


def _value(recipe: Recipe, name: str) -> Any:
    table, _, key = name.rpartition(".")
    return getattr(getattr(recipe, table) if table else recipe, "from_" if key == "from" else key)


def _paths(name: str, knob: Knob, value: Any) -> Sequence[str]:
    """The names of files and folders that a setting holds."""
    return (value,) if name in (*PATHS, "run.out") else value if knob.mark in (FILES, FUNCTIONS, REWARDS) else ()


def check_values(recipe: Recipe, places: Mapping[str, str]) -> None:
    """What the types of settings can't check: names of folders and files, and integers that are too large."""
    if not _NAME.fullmatch(recipe.name) or len(recipe.name.encode()) > 200:
        hint = 'use letters, digits, "-" and "_": it names a folder'
        what = f"name = {shown(recipe.name)} can't name a run"
        raise UserError("E-CONF-RANGE", what, where=places.get("name", ""), hint=hint)
    for name, knob in _KNOBS(Recipe).items():
        value = _value(recipe, name)
        if knob.kind == "whole" and name != "seed" and value >= _LARGEST_WHOLE:
            what, hint = f"{name} = {shown(value)} is more than anything can count", f"the default is {knob.default}"
            raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)
        for text in _paths(name, knob, value):
            if "\0" in text or len(os.fsencode(text)) > 4000 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
                what = f"{name} has {shown(text)}, which no file can be named"
                raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint="name a file or folder")


def _check_divisors(recipe: Recipe, places: Mapping[str, str]) -> None:
    pairs = [("ppo.batch_size", "ppo.num_minibatches")]
    pairs += [("pretrain.batch_tokens", "pretrain.sequence_length")] if recipe.pretrain.text else []
    pairs += [("ptx.batch_tokens", "ptx.sequence_length")] if recipe.ptx.text else []
    model = recipe.model
    if not model.from_:
        pairs += [("model.hidden_size", "model.heads"), ("model.heads", "model.kv_heads")]
    for whole, part in pairs:
        _check_divides(whole, _get(recipe, whole), part, _get(recipe, part), places)
    if not model.from_ and model.hidden_size // model.heads % 2:
        what = f"model.hidden_size / model.heads = {model.hidden_size // model.heads} must be even (rotary positions)"
        hint = f"write hidden_size = {' or '.join(_near_multiples(model.hidden_size, 2 * model.heads))}"
        raise UserError("E-CONF-DIVIDE", what, where=places.get("model.hidden_size", ""), hint=hint)


def _check_divides(whole: str, a: int, part: str, b: int, places: Mapping[str, str]) -> None:
    if a % b:
        what = f"{whole} = {a} can't be divided by {part} = {b}"
        below = next((d for d in range(b, max(0, b - _SEARCH), -1) if a % d == 0), 1)
        above = next((d for d in range(b, min(a, b + _SEARCH)) if a % d == 0), a)
        parts = " or ".join(dict.fromkeys(map(str, (below, above))))
        key, other = whole.rpartition(".")[2], part.rpartition(".")[2]
        hint = f"write {key} = {' or '.join(_near_multiples(a, b))}, or {other} = {parts}"
        raise UserError("E-CONF-DIVIDE", what, where=places.get(whole, places.get(part, "")), hint=hint)


def _near_multiples(value: int, step: int) -> list[str]:
    low = value // step * step
    return [str(n) for n in (low, low + step) if n > 0]


def _check_lengths(recipe: Recipe, places: Mapping[str, str]) -> None:
    """No length may exceed the model's, a new one or that of a folder."""
    m = recipe.model
    longest, whose = _positions(m.from_) if m.from_ else (m.max_positions, "model.max_positions")
    named = [("pretrain.sequence_length", bool(recipe.pretrain.text)), ("sft.max_tokens", bool(recipe.sft.data))]
    named += [("reward.max_tokens", bool(recipe.reward.data) and not recipe.reward.from_)]
    named += [("ptx.sequence_length", bool(recipe.ptx.text))]
    named += [("ppo.max_prompt", bool(recipe.ppo.prompts)), ("ppo.max_new_tokens", bool(recipe.ppo.prompts))]
    named += [("evaluate.max_new_tokens", bool(recipe.evaluate.prompts))]
    for name, used in named:
        extra = recipe.ppo.max_new_tokens if name == "ppo.max_prompt" and recipe.ppo.max_prompt else 0
        if used:
            _check_length(name, _get(recipe, name), extra, longest, whose, places)
    if recipe.reward.data and recipe.reward.from_:
        _check_length("reward.max_tokens", recipe.reward.max_tokens, 0, *_positions(recipe.reward.from_), places)
    pretrain = recipe.pretrain
    if pretrain.text and 0 < pretrain.tokens < pretrain.batch_tokens:
        what = f"pretrain.tokens = {pretrain.tokens} is less than one step, batch_tokens = {pretrain.batch_tokens}"
        hint = "raise tokens or lower batch_tokens"
        raise UserError("E-CONF-RANGE", what, where=places.get("pretrain.tokens", ""), hint=hint)


def _check_length(name: str, value: int, extra: int, longest: int, whose: str, places: Mapping[str, str]) -> None:
    if longest and value + extra > longest:
        whole = f"{name} = {value}" + (f" and ppo.max_new_tokens = {extra}" if extra else "")
        what = f"{whole} tokens are more than {whose} = {longest}"
        hint = f"lower {name}" + (f", or raise {whose} before pre-training" if whose.startswith("model.") else "")
        raise UserError("E-CONF-RANGE", what, where=places.get(name, ""), hint=hint)


def _positions(folder: str) -> tuple[int, str]:
    """The longest sequence of a folder's model and whose it is; 0 where there is no such model (reported elsewhere)."""
    for place in (Path(folder) / "model", Path(folder)):
        with suppress(UserError):
            return read_config(place).max_positions, f"the max_position_embeddings of {folder}"
    return 0, ""


def _check_size(recipe: Recipe, places: Mapping[str, str]) -> None:
    """A new model that fits no machine is a typo."""
    m = recipe.model
    block = 4 * m.hidden_size * (m.hidden_size + (m.ff or 3 * m.hidden_size))
    if not m.from_ and m.layers * block + recipe.tokenizer.vocab_size * m.hidden_size > _LARGEST_MODEL:
        what = "a model of this hidden_size, layers, ff and vocab_size has more than 10^12 weights"
        where = places.get("model.hidden_size", places.get("model.layers", places.get("tokenizer.vocab_size", "")))
        raise UserError("E-CONF-RANGE", what, where=where, hint="lower one of them")


def _check_adapters(recipe: Recipe, places: Mapping[str, str]) -> None:
    """PPO's adapters build on the SFT model, and so must the reward model's."""
    ppo, reward = recipe.ppo, recipe.reward
    read = bool(ppo.prompts and ppo.adapters and reward.data)
    read = read and (model_pays(ppo.rewards) or ppo.critic == "reward")
    if read and not reward.adapters:
        what = "ppo.adapters = true needs a reward model that is an adapter, and reward.adapters is false"
        where, hint = places.get("ppo.adapters", ""), "write adapters = true in [reward] too"
        raise UserError("E-CONF-CONFLICT", what, where=where, hint=hint)
    if (ppo.adapters and ppo.uncertainty_penalty) or (read and reward.ensemble_size > 1):
        asks = "reward.ensemble_size or ppo.uncertainty_penalty asks for an ensemble"
        what = f"ppo.adapters = true reads one reward model, and {asks}"
        where = places.get("ppo.adapters", places.get("ppo.uncertainty_penalty", ""))
        raise UserError(
            "E-CONF-CONFLICT",
            what,
            where=where,
            hint="write ensemble_size = 1 and uncertainty_penalty = 0, or adapters = false",
        )
    if reward.data and reward.adapters and reward.from_:
        what = "reward.adapters = true trains on the SFT model, and reward.from names another"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("reward.from", ""), hint="remove one of them")
    if recipe.sft.data and recipe.sft.adapters and recipe.sft.add_separator:
        what = "sft.adapters = true freezes the embedding, so that the token of sft.add_separator is never learned"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("sft.adapters", ""), hint="set one of them off")


def _check_ppo(recipe: Recipe, places: Mapping[str, str]) -> None:
    ppo = recipe.ppo
    if twice := next((entry for entry in ppo.rewards if ppo.rewards.count(entry) > 1), ""):
        what = f'ppo.rewards has "{twice}" twice'
        raise UserError("E-CONF-CONFLICT", what, where=places.get("ppo.rewards", ""), hint="give it one larger weight")
    responses = ppo.batch_size * ppo.samples_per_prompt
    if ppo.kl_target and responses >= 5 * ppo.kl_horizon:
        what = (
            f"ppo.kl_horizon = {ppo.kl_horizon:g} is too short for {responses} replies an iteration: beta could reach 0"
        )
        hint = f"write kl_horizon = {responses // 5 + 1} or more"
        raise UserError("E-CONF-RANGE", what, where=places.get("ppo.kl_horizon", ""), hint=hint)
    if 0 < ppo.dual_clip <= 1:
        what = f"ppo.dual_clip = {ppo.dual_clip:g} would cut every loss"
        raise UserError("E-CONF-RANGE", what, where=places.get("ppo.dual_clip", ""), hint="write 0, or 3 for one")


def _check_pairs(recipe: Recipe, places: Mapping[str, str]) -> None:
    scale = recipe.reward.score_scale
    if scale and not scale[0] < scale[1]:
        what = f"reward.score_scale = [{scale[0]:g}, {scale[1]:g}] must go from the lowest to the highest score"
        hint = f"write score_scale = [{min(scale):g}, {max(scale):g}]" if scale[0] > scale[1] else "give two numbers"
        raise UserError("E-CONF-RANGE", what, where=places.get("reward.score_scale", ""), hint=hint)
    if recipe.reward.test and not recipe.reward.validation:
        what = "reward.test has no held-out records beside it, on which the temperature is fitted"
        where = places.get("reward.test", "")
        raise UserError("E-CONF-MISSING", what, where=where, hint='add validation = ["FILE"] to [reward]')
    if recipe.model.from_ and recipe.tokenizer.text:
        what = "model.from brings its own tokenizer, and [tokenizer] learns another"
        hint = "remove [tokenizer] text, or model.from"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("tokenizer.text", ""), hint=hint)
    for name, of in _WEIGHED.items():
        table, _, key = name.partition(".")
        weights: tuple[float, ...] = getattr(getattr(recipe, table), key)
        entries = len(getattr(getattr(recipe, table), of.partition(".")[2]))
        if weights and (len(weights) != entries or not any(weights)):
            what = f"{name} has {len(weights)} numbers for {entries} entries of {of}"
            what = what if any(weights) else f"{name} leaves nothing to read"
            hint = "write one number, at least 0, for each"
            raise UserError("E-CONF-CONFLICT", what, where=places.get(name, ""), hint=hint)
    for pair in recipe.data.rename:
        if not re.fullmatch(r"\s*[^\s=][^=]*=\s*[^\s=][^=]*", pair):
            what = f'data.rename has "{pair}", which is not of the form OLD=NEW'
            hint = 'write rename = ["question=Instruction"]'
            raise UserError("E-CONF-RANGE", what, where=places.get("data.rename", ""), hint=hint)
    if recipe.run.dtype == "bfloat16" and recipe.run.device == "cpu":
        what = "bfloat16 on a CPU is several times slower than float32 and not offered"
        raise UserError("E-CONF-DTYPE", what, where=places.get("run.dtype", ""), hint='set dtype = "float32"')
    if recipe.ppo.kl_target and not recipe.ppo.kl_coef:
        what = "ppo.kl_target adapts kl_coef, which starts at 0 and would stay there"
        hint = "write kl_coef = 0.05, or kl_target = 0"
        raise UserError("E-CONF-CONFLICT", what, where=places.get("ppo.kl_target", ""), hint=hint)


def _get(recipe: Recipe, name: str) -> int:
    return int(_value(recipe, name))
