"""One step of PPO or GRPO with its real numbers, token by token: `tetrad explain RUN --step N`.

Everything is read from what the stage wrote (metrics.jsonl, samples.jsonl, recipe.toml); no model is run.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.report.records import lines_of
from tetrad.settings.common import OnPolicy
from tetrad.settings.grpo import Grpo
from tetrad.settings.ppo import Ppo
from tetrad.settings.use import Explain
from tetrad.stages import ON_POLICY, Recipe

_HEADS = {"ids": "token", "pieces": "text", "logprob": "log pi", "reference": "log pi_ref", "kl": "KL"}
_HEADS |= {name: name for name in ("reward", "value", "return", "advantage")}


def explain(s: Explain, console: Console, read: Callable[[Path], Recipe]) -> None:
    """Prints the requested step, or the last that was recorded. read: reads a recipe's file.

    Errors: E-CKPT-MISSING, E-CONF-RANGE.
    """
    folder = _folder(Path(s.model))
    records = [record for record in lines_of(folder / "samples.jsonl") if "tokens" in record or "greedy" in record]
    steps = sorted({record["step"] for record in records if "tokens" in record})
    if not steps:
        what = "samples.jsonl has no sampled response with its tokens"
        raise UserError("E-CKPT-MISSING", what, where=str(folder), hint="set ppo.eval_every, and run the stage")
    step = steps[-1] if s.step < 0 else s.step
    if step not in steps:
        near = ", ".join(map(str, steps[:12])) + (" ..." if len(steps) > 12 else "")
        what = f"step {step} was not recorded; these were: {near}"
        raise UserError("E-CONF-RANGE", what, where="--step", hint="ppo.eval_every sets how often")
    metrics = next(line for line in lines_of(folder / "metrics.jsonl") if line["step"] == step)
    stage = folder.name if folder.name in ON_POLICY else "ppo"
    settings: OnPolicy = getattr(read(folder / "recipe.toml"), stage)
    for text in _opening(step, metrics, settings):
        console.say(text)
    for record in [r for r in records if r["step"] == step and "tokens" in r][: s.responses]:
        _response(record, metrics, settings, console)
    for text in _learning(metrics, settings):
        console.say(text)
    for record in [r for r in records if r["step"] == step and "greedy" in r][: s.responses]:
        console.say(f"\ngreedy response to {record['prompt']!r}\n  before      {record['before']}")
        console.say(f"  now         {record['greedy']}")


def _folder(given: Path) -> Path:
    """The stage's folder, given that of the run or of the stage. Errors: E-CKPT-MISSING."""
    for place in (*(given / name for name in reversed(ON_POLICY)), given, given.parent):
        if (place / "samples.jsonl").is_file() and (place / "metrics.jsonl").is_file():
            return place
    raise UserError(
        "E-CKPT-MISSING", "no PPO or GRPO was run here", where=str(given), hint="name runs/NAME or runs/NAME/ppo"
    )


def _opening(step: int, metrics: Mapping[str, float], s: OnPolicy) -> list[str]:
    f, truncated = metrics, (1 - metrics["finished"]) * 100
    parts = {name: value for name, value in f.items() if name.startswith(("score_", "judge_")) and name != "score_std"}
    details = "".join(f"; {name} {value:+.3f}" for name, value in parts.items())
    readers = "Actor, reference and critic" if isinstance(s, Ppo) else "Actor and reference"
    known = (
        f"; the critic explains {f['explained_variance']:.0%} of the variance of the returns"
        if "explained_variance" in f
        else ""
    )
    return [
        f"step {step} of {s.steps}",
        f"1. The actor answered {s.batch_size} prompts"
        f"{f' {s.samples_per_prompt} times each' if s.samples_per_prompt > 1 else ''}, at temperature "
        f"{s.temperature:g}: {f['length']:.1f} tokens per response, {truncated:.0f} % truncated at {s.max_new_tokens}.",
        f"2. The reward gave {f['score']:+.3f} on average (standard deviation {f['score_std']:.3f}){details}.",
        f"3. {readers} read them: KL {f['kl']:.3f} nats per response (k3 {f['kl_k3']:.3f}){known}.",
        _priced(f["beta"], s),
    ]


def _priced(beta: float, s: OnPolicy) -> str:
    """What KL costs, and where."""
    if isinstance(s, Grpo) and s.kl_in == "loss":
        return (
            f"4. The score is the reward of the whole response; {s.kl_estimator} * {beta:.4g} is a loss at each token."
        )
    return f"4. At each token reward = -beta KL with beta = {beta:.4g}; {_added(s)} at the last one."


def _added(s: OnPolicy) -> str:
    """How the score becomes a reward."""
    scaling = s.reward_scaling if isinstance(s, Ppo) else "none"
    running = scaling == "running"
    changes = ", divided by the standard deviation of all so far" if running else ""
    changes += f", clipped to ±{s.reward_clip:g}" if s.reward_clip and (running or not s.rewards) else ""
    whole = "then all rewards of the batch are scaled to standard deviation 1 about their mean, the score included"
    return whole if scaling == "whiten" else f"the score{changes}{',' if changes else ''} is added"


def _response(record: Mapping[str, Any], metrics: Mapping[str, float], s: OnPolicy, console: Console) -> None:
    tokens = record["tokens"]
    end = "finished" if record["finished"] else f"truncated, so {s.missing_eos_penalty:g} is subtracted"
    console.say(f"\nprompt: {record['prompt']}\nresponse: {record['text']}  (score {record['score']:+.3f}, {end})")
    keys = [key for key in _HEADS if key in tokens]
    rows = [_row(*cells) for cells in zip(*(tokens[key] for key in keys), strict=True)]
    console.table("token by token", [_HEADS[key] for key in keys], rows)
    lines = _compared(record["group"], sum(tokens["reward"]), s) if isinstance(s, Grpo) else []
    if isinstance(s, Ppo):
        after = record["after"] if s.bootstrap_truncated and not record["finished"] else None
        lines = _worked(tokens, metrics, s, warming=record["step"] < s.critic_warmup, after=after)
    for text in lines:
        console.say(text)


def _compared(group: Sequence[float], own: float, s: Grpo) -> list[str]:
    """The arithmetic of a response's advantage: own is its reward."""
    mean, others = fmean(group), (sum(group) - own) / (len(group) - 1)
    gap, std = own - mean, stdev(group)
    works = {
        "leave_one_out": f"reward - mean of the others = {own:+.3f} - {others:+.3f} = {own - others:+.3f}",
        "centred": f"reward - mean = {own:+.3f} - {mean:+.3f} = {gap:+.3f}",
        "normalised": f"(reward - mean) / std = {gap:+.3f} / {std:.3f} = {gap / std if std else 0:+.3f}",
    }
    rewards = ", ".join(f"{reward:+.3f}" for reward in group)
    return [f"rewards of its group: {rewards}", f"advantage of all its tokens = {works[s.advantage]}"]


def _row(token: int, piece: str, *numbers: float) -> list[str]:
    return [str(token), repr(piece)[1:-1], *(f"{x:+.3f}" for x in numbers)]


def _worked(
    tokens: Mapping[str, Sequence[float]], f: Mapping[str, float], s: Ppo, *, warming: bool, after: float | None
) -> list[str]:
    """The arithmetic of the first and the last token, written out. Whitened rewards have no such line. after: the value
    after a truncated response, which is bootstrapped with it."""
    lam, v, r, g = 1.0 if warming else s.gae_lambda, tokens["value"], tokens["reward"], tokens["return"]
    kl = tokens["kl"][0]
    lines = []
    if s.reward_scaling != "whiten" and len(r) > 1:
        lines.append(f"first token: reward = -{f['beta']:.4g} * ({kl:+.3f}) = {-f['beta'] * kl:+.4f}")
    if len(r) > 1:
        delta, later = r[0] + s.gamma * v[1] - v[0], g[1] - v[1]
        lines.append(
            f"  delta = r + gamma V_next - V = {r[0]:+.3f} + {s.gamma:g} * {v[1]:+.3f} - {v[0]:+.3f} = {delta:+.3f}"
        )
        lines.append(
            f"  A = delta + gamma lambda A_next = {delta:+.3f} + {s.gamma * lam:g} * {later:+.3f} = "
            f"{delta + s.gamma * lam * later:+.3f}; return = A + V = {g[0]:+.3f}"
        )
    last = g[-1] - v[-1]
    if after is not None:
        lines.append(
            f"last token: A = r + gamma V_after - V = {r[-1]:+.3f} + {s.gamma:g} * {after:+.3f} - {v[-1]:+.3f} "
            f"= {last:+.3f}"
        )
        lines.append("  the response was truncated: it is bootstrapped with the critic's value")
    else:
        lines.append(f"last token: A = r - V = {r[-1]:+.3f} - {v[-1]:+.3f} = {last:+.3f}: nothing comes after it")
    return [*lines, "the advantage of the table is (A - mean of the batch) / standard deviation of the batch"]


def _learning(f: Mapping[str, float], s: OnPolicy) -> list[str]:
    lines = [f"\n5. {s.epochs} epochs of {s.num_minibatches} mini-batches:"]
    high = s.clip_high or s.clip_range if isinstance(s, Grpo) else s.clip_range
    clip = f"+- {s.clip_range:g}" if high == s.clip_range else f"- {s.clip_range:g}, 1 + {high:g}"
    if "policy_loss" in f:
        lines.append(
            f"   the actor made {f['actor_updates']:.0f} steps at {f['actor_lr']:.3g}: loss {f['policy_loss']:+.4f}, "
            f"ratio {f['ratio']:.4f} (largest {f['ratio_max']:.3f}), {f['clip_fraction']:.1%} of tokens clipped at "
            f"1 {clip}, KL from the old policy {f['approx_kl']:.5f} nats per token, "
            f"entropy {f['entropy']:.3f}"
        )
    else:
        lines.append("   the actor is frozen while the critic warms up")
    lines += [f"   the critic's loss {f['value_loss']:.4f}"] if "value_loss" in f else []
    lines += [f"   the loss of KL to the reference {f['kl_loss']:.4f}"] if "kl_loss" in f else []
    return lines + ([f"   [ptx] text: {f['ptx_loss']:.3f} nats per token"] if "ptx_loss" in f else [])
