"""Are the settings of a recipe consistent? Each is valid by itself; invalid combinations are reported here, with
`file:line`, before anything is loaded.

No data file is opened; of a model's folder, only config.json.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tetrad import hub
from tetrad.errors import UserError
from tetrad.hub import is_model
from tetrad.kernels.cpu import NO_BFLOAT16, multiplies_bfloat16
from tetrad.model.config import read_config
from tetrad.settings.base import FILES, FUNCTIONS, REWARDS, Option, is_function, options, uses_reward_model
from tetrad.settings.check import is_text
from tetrad.settings.names import shown
from tetrad.stages import ON_POLICY, Recipe
from tetrad.text.chat_template import NO_SYSTEM

PATHS = ("model.from", "reward.from", "evaluate.external_lm")
"""The settings that name an existing folder."""
_NAME = re.compile(r"[^\W.][\w.+-]{0,99}")
_SEARCH = 10_000
_LARGEST_INT = 2**53
_LARGEST_MODEL = 10**12
_WEIGHED = {
    "pretrain.weights": "pretrain.text",
    "sft.weights": "sft.data",
    "reward.weights": "reward.data",
    "dpo.weights": "dpo.data",
    **{f"{name}.weights": f"{name}.prompts" for name in ON_POLICY},
    **{f"{name}.reward_weights": f"{name}.rewards" for name in ON_POLICY},
}
_OPTIONS = cache(options)


class Conflict(NamedTuple):
    """What is wrong. settings: names, of which the first that the user gave tells where."""

    settings: tuple[str, ...]
    what: str
    hint: str
    code: str = "E-CONF-RANGE"


Conflicts = Iterator[Conflict]


def check(recipe: Recipe, locations: Mapping[str, str] | None = None) -> None:
    """Raises UserError for values that are each valid but not together. locations: `file:line` by name of setting."""
    checks = [_values, _divisors, _size, _lengths, _scores, _sources, _numerics, _adapters, _dpo, _on_policy, _ppo]
    checks += [_grpo, _paths_and_functions]
    _refuse(chain.from_iterable(conflicts(recipe) for conflicts in checks), locations or {})


def check_values(recipe: Recipe, locations: Mapping[str, str]) -> None:
    """What the types of settings can't check: names of folders and files, and integers that are too large."""
    _refuse(_values(recipe), locations)


def _refuse(conflicts: Conflicts, locations: Mapping[str, str]) -> None:
    for names, what, hint, code in conflicts:
        where = next((locations[name] for name in names if name in locations), "")
        raise UserError(code, what, where=where, hint=hint)


def _values(recipe: Recipe) -> Conflicts:
    if not _NAME.fullmatch(recipe.name) or len(recipe.name.encode()) > 200:
        hint = 'use letters, digits, "-" and "_": it names a folder'
        yield Conflict(("name",), f"name = {shown(recipe.name)} can't name a run", hint)
    for name, option in _OPTIONS(Recipe).items():
        value = recipe.value(name)
        if option.kind == "int" and name != "seed" and value >= _LARGEST_INT:
            what = f"{name} = {shown(value)} is more than anything can count"
            yield Conflict((name,), what, f"the default is {option.default}")
        for text in _paths(name, option, value):
            if "\0" in text or len(os.fsencode(text)) > 4000 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
                yield Conflict(
                    (name,), f"{name} has {shown(text)}, which no file can be named", "name a file or folder"
                )


def _paths(name: str, option: Option, value: Any) -> Sequence[str]:
    """The names of files and folders that a setting holds."""
    listed = option.mark in (FILES, FUNCTIONS, REWARDS) or name == "evaluate.others"
    return (value,) if name in (*PATHS, "run.out") else value if listed else ()


def _paths_and_functions(recipe: Recipe) -> Conflicts:
    for name, option in _OPTIONS(Recipe).items():
        value, key = recipe.value(name), name.rpartition(".")[2]
        for path in map(os.path.abspath, filter(None, _paths(name, option, value))):
            if not is_text(path):  # its recipe and its lineage could not be written
                what = f"{name} lies in {path!a:.200}, and that name is not UTF-8 text"
                yield Conflict((name,), what, "rename the folder", "E-CONF-TYPE")
        for text in value if option.mark in (FUNCTIONS, REWARDS) else ():
            function = option.mark == FUNCTIONS or is_function(text)
            if function and not re.fullmatch(r".+\.py:[^\W\d]\w*", text, re.DOTALL):
                what = f'{name} has "{text}", which names no Python function'
                yield Conflict((name,), what, f'write {key} = ["file.py:function"]')


def _divisors(recipe: Recipe) -> Conflicts:
    model = recipe.model
    pairs = [(f"{name}.batch_size", f"{name}.num_minibatches") for name in ON_POLICY]
    pairs += [("pretrain.batch_tokens", "pretrain.sequence_length")] if recipe.pretrain.text else []
    pairs += [("ptx.batch_tokens", "ptx.sequence_length")] if recipe.ptx.text else []
    if not model.from_:
        pairs += [("model.hidden_size", "model.heads"), ("model.heads", "model.kv_heads")]
    for whole, part in pairs:
        a, b = recipe.value(whole), recipe.value(part)
        if a % b:
            below = next((d for d in range(b, max(0, b - _SEARCH), -1) if a % d == 0), 1)
            above = next((d for d in range(b, min(a, b + _SEARCH)) if a % d == 0), a)
            parts = " or ".join(dict.fromkeys(map(str, (below, above))))
            key, other = whole.rpartition(".")[2], part.rpartition(".")[2]
            hint = f"write {key} = {' or '.join(_near_multiples(a, b))}, or {other} = {parts}"
            what = f"{whole} = {a} can't be divided by {part} = {b}"
            yield Conflict((whole, part), what, hint, "E-CONF-DIVIDE")
    if not model.from_ and model.hidden_size // model.heads % 2:
        what = f"model.hidden_size / model.heads = {model.hidden_size // model.heads} must be even (rotary positions)"
        hint = f"write hidden_size = {' or '.join(_near_multiples(model.hidden_size, 2 * model.heads))}"
        yield Conflict(("model.hidden_size",), what, hint, "E-CONF-DIVIDE")


def _near_multiples(value: int, step: int) -> list[str]:
    low = value // step * step
    return [str(n) for n in (low, low + step) if n > 0]


def _lengths(recipe: Recipe) -> Conflicts:
    """No length may exceed the model's, a new one or that of a folder."""
    model, reward, pretrain = recipe.model, recipe.reward, recipe.pretrain
    limit = _positions(model.from_) if model.from_ else (model.max_positions, "model.max_positions")
    lengths = {
        "pretrain.sequence_length": (pretrain.text, limit),
        "sft.max_tokens": (recipe.sft.data, limit),
        "reward.max_tokens": (reward.data, _positions(reward.from_) if reward.from_ else limit),
        "ptx.sequence_length": (recipe.ptx.text, limit),
        **{f"{name}.max_new_tokens": (recipe.value(f"{name}.prompts"), limit) for name in (*ON_POLICY, "evaluate")},
        **{f"{name}.max_prompt": (recipe.value(f"{name}.prompts"), limit) for name in ON_POLICY},
    }
    for name, (used, (longest, whose)) in lengths.items():
        value, new = recipe.value(name), name.replace("max_prompt", "max_new_tokens")
        extra = recipe.value(new) if value and new != name else 0
        if used and longest and value + extra > longest:
            whole = f"{name} = {value}" + (f" and {new} = {extra}" if extra else "")
            hint = f"lower {name}" + (f", or raise {whose} before pre-training" if whose.startswith("model.") else "")
            yield Conflict((name,), f"{whole} tokens are more than {whose} = {longest}", hint)
    if pretrain.text and 0 < pretrain.tokens < pretrain.batch_tokens:
        what = f"pretrain.tokens = {pretrain.tokens} is less than one step, batch_tokens = {pretrain.batch_tokens}"
        yield Conflict(("pretrain.tokens",), what, "raise tokens or lower batch_tokens")


def _positions(folder: str) -> tuple[int, str]:
    """The longest sequence of a folder's model and whose it is; 0 where there is no such model (reported elsewhere)."""
    there = hub.model(folder).cached(("config.json",), ()) if is_model(folder) else Path(folder)
    for place in (there / "model", there) if there else ():
        with suppress(UserError):
            return read_config(place).max_positions, f"the max_position_embeddings of {folder}"
    return 0, ""


def _size(recipe: Recipe) -> Conflicts:
    """A new model that fits no machine is a typo."""
    m = recipe.model
    block = 4 * m.hidden_size * (m.hidden_size + (m.ff or 3 * m.hidden_size))
    if not m.from_ and m.layers * block + recipe.tokenizer.vocab_size * m.hidden_size > _LARGEST_MODEL:
        what = "a model of this hidden_size, layers, ff and vocab_size has more than 10^12 weights"
        yield Conflict(("model.hidden_size", "model.layers", "tokenizer.vocab_size"), what, "lower one of them")


def _scores(recipe: Recipe) -> Conflicts:
    scale = recipe.reward.score_scale
    if scale and not scale[0] < scale[1]:
        what = f"reward.score_scale = [{scale[0]:g}, {scale[1]:g}] must go from the lowest to the highest score"
        hint = f"write score_scale = [{min(scale):g}, {max(scale):g}]" if scale[0] > scale[1] else "give two numbers"
        yield Conflict(("reward.score_scale",), what, hint)
    if recipe.reward.test and not recipe.reward.validation:
        what = "reward.test has no held-out records beside it, on which the temperature is fitted"
        yield Conflict(("reward.test",), what, 'add validation = ["FILE"] to [reward]', "E-CONF-MISSING")


def _sources(recipe: Recipe) -> Conflicts:
    if recipe.model.from_ and recipe.tokenizer.text:
        what = "model.from brings its own tokenizer, and [tokenizer] learns another"
        yield Conflict(("tokenizer.text",), what, "remove [tokenizer] text, or model.from", "E-CONF-CONFLICT")
    for name, of in _WEIGHED.items():
        weights, entries = recipe.value(name), len(recipe.value(of))
        if weights and (len(weights) != entries or not any(weights)):
            what = f"{name} has {len(weights)} numbers for {entries} entries of {of}"
            what = what if any(weights) else f"{name} leaves nothing to read"
            yield Conflict((name,), what, "write one number, at least 0, for each", "E-CONF-CONFLICT")
    if twice := next((folder for folder in recipe.evaluate.others if recipe.evaluate.others.count(folder) > 1), ""):
        yield Conflict(("evaluate.others",), f'evaluate.others has "{twice}" twice', "name it once", "E-CONF-CONFLICT")
    sft = recipe.sft
    if sft.system and (sft.template == "instruction" or not (sft.template or recipe.model.from_)):
        yield Conflict(("sft.system",), *NO_SYSTEM, "E-CONF-CONFLICT")
    for pair in recipe.data.rename:
        if not re.fullmatch(r"\s*[^\s=][^=]*=\s*[^\s=][^=]*", pair):
            what = f'data.rename has "{pair}", which is not of the form OLD=NEW'
            yield Conflict(("data.rename",), what, 'write rename = ["question=Instruction"]')


def _numerics(recipe: Recipe) -> Conflicts:
    if recipe.run.dtype == "bfloat16" and recipe.run.device == "cpu" and not multiplies_bfloat16():
        yield Conflict(("run.dtype",), NO_BFLOAT16, 'set dtype = "float32"', "E-CONF-DTYPE")
    if recipe.ppo.kl_target and not recipe.ppo.kl_coef:
        what = "ppo.kl_target adapts kl_coef, which starts at 0 and would stay there"
        yield Conflict(("ppo.kl_target",), what, "write kl_coef = 0.05, or kl_target = 0", "E-CONF-CONFLICT")


def _adapters(recipe: Recipe) -> Conflicts:
    """A policy's adapters build on the SFT model, and so must the reward model's."""
    reward = recipe.reward
    for name in ON_POLICY:
        s, setting = getattr(recipe, name), f"{name}.adapters"
        read = bool(s.prompts and s.adapters and reward.data)
        read = read and (uses_reward_model(s.rewards) or (name == "ppo" and recipe.ppo.critic == "reward"))
        if read and not reward.adapters:
            what = f"{setting} = true needs a reward model that is an adapter, and reward.adapters is false"
            yield Conflict((setting,), what, "write adapters = true in [reward] too", "E-CONF-CONFLICT")
        if (s.adapters and s.uncertainty_penalty) or (read and reward.ensemble_size > 1):
            asks = f"reward.ensemble_size or {name}.uncertainty_penalty asks for an ensemble"
            what = f"{setting} = true reads one reward model, and {asks}"
            hint = "write ensemble_size = 1 and uncertainty_penalty = 0, or adapters = false"
            yield Conflict((setting, f"{name}.uncertainty_penalty"), what, hint, "E-CONF-CONFLICT")
    if reward.data and reward.adapters and reward.from_:
        what = "reward.adapters = true trains on the SFT model, and reward.from names another"
        yield Conflict(("reward.from",), what, "remove one of them", "E-CONF-CONFLICT")
    if recipe.sft.data and recipe.sft.adapters and recipe.sft.add_separator:
        what = "sft.adapters = true freezes the embedding, so that the token of sft.add_separator is never learned"
        yield Conflict(("sft.adapters",), what, "set one of them off", "E-CONF-CONFLICT")


def _dpo(recipe: Recipe) -> Conflicts:
    if recipe.dpo.loss == "plackett-luce" and recipe.dpo.label_smoothing:
        what = "dpo.label_smoothing is of pairs, and the loss of a whole order has none"
        hint = 'write label_smoothing = 0, or loss = "sigmoid"'
        yield Conflict(("dpo.label_smoothing", "dpo.loss"), what, hint, "E-CONF-CONFLICT")


def _on_policy(recipe: Recipe) -> Conflicts:
    for name in ON_POLICY:
        rewards = recipe.value(f"{name}.rewards")
        if twice := next((entry for entry in rewards if rewards.count(entry) > 1), ""):
            what = f'{name}.rewards has "{twice}" twice'
            yield Conflict((f"{name}.rewards",), what, "give it one larger weight", "E-CONF-CONFLICT")


def _grpo(recipe: Recipe) -> Conflicts:
    s = recipe.grpo
    if s.kl_estimator == "k1" and s.kl_in == "loss":
        what = 'grpo.kl_estimator = "k1" as a loss has no gradient on average: nothing would hold the policy'
        hint = 'write kl_estimator = "k3" or "k2", or kl_in = "reward", where KL is k1'
        yield Conflict(("grpo.kl_estimator", "grpo.kl_in"), what, hint, "E-CONF-CONFLICT")


def _ppo(recipe: Recipe) -> Conflicts:
    ppo = recipe.ppo
    responses = ppo.batch_size * ppo.samples_per_prompt
    if ppo.kl_target and responses >= 5 * ppo.kl_horizon:
        horizon = f"ppo.kl_horizon = {ppo.kl_horizon:g} is too short for {responses} responses an iteration"
        hint = f"write kl_horizon = {responses // 5 + 1} or more"
        yield Conflict(("ppo.kl_horizon",), f"{horizon}: beta could reach 0", hint)
    if 0 < ppo.dual_clip <= 1:
        what = f"ppo.dual_clip = {ppo.dual_clip:g} would cut every loss"
        yield Conflict(("ppo.dual_clip",), what, "write 0, or 3 for one")
