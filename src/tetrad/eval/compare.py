"""Was it worth it? The SFT model, best-of-N and every policy trained on from it (of this recipe, and of other runs)
answer the same validation prompts, and others judge.

The reward model's score is shown, but it is what was trained on; judges are Python functions never used in
training, and they alone decide the verdict. Every mean has a 95 % bootstrap interval over prompts, gains over SFT are
paired by prompt, and signs of reward hacking are shown beside them: KL, length, shares of finished responses and of
those that are not UTF-8, distinct-2, the commonest word, likelihood under another model.
Minutes and memory stand beside them, and every response is kept.
"""

import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch

from tetrad.console import phase
from tetrad.data.loader import order
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import Device, choose
from tetrad.errors import UserError
from tetrad.inference.completions import Completion, EncodedPrompt, best, read_encoded_prompts
from tetrad.inference.model_folder import refuse_other_run
from tetrad.inference.text_metrics import response_metrics
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM, frozen
from tetrad.objectives.calibration import bootstrap_interval
from tetrad.report import outcome
from tetrad.report.verdict import SFT, Difference, SystemMetrics, Verdict, failed_guards, verdict
from tetrad.report.worth import Cost, compared
from tetrad.reward import gate
from tetrad.reward.functions import python_function
from tetrad.reward.metrics import RewardMetrics
from tetrad.reward.model import Reward, reward_model
from tetrad.reward.sources import named
from tetrad.rl.rollout import Rollout, roll_out
from tetrad.settings.common import Sampling
from tetrad.stages import ALIGNED, POLICY, STAGES
from tetrad.storage import MANIFEST, RunLock, read_manifest, remove_leftovers, write_folder
from tetrad.text.tokenizer import Tokenizer
from tetrad.training.batches import response_logprobs
from tetrad.training.context import StageContext
from tetrad.training.prepare import first_parent
from tetrad.training.stage import read_policy, recorded_metrics, template_for
from tetrad.types import Tokens


@dataclass(frozen=True)
class Responses:
    """One system's responses to the prompts. kl: nats per response against the SFT model. frontier: of best-of-N, for
    fewer responses too: how many, KL, mean reward."""

    samples: Sequence[Completion]
    kl: float
    frontier: Sequence[tuple[int, float, float]] = ()


Scores = Mapping[str, Sequence[float]]
"""Of one system's responses, by judge."""
ExternalNll = Callable[[Responses], float | None]


def run(ctx: StageContext) -> None:
    device = choose(ctx.recipe.run, ctx.folder.name)
    if collectives.is_main():  # one process answers and writes
        with RunLock(ctx.folder / "lock"):
            remove_leftovers(ctx.folder)
            _run(ctx, device.alone())
    collectives.barrier()


@dataclass(frozen=True)
class Task:
    """The prompts that every policy answers, and how. key: of their random numbers, the same for each policy."""

    prompts: Sequence[EncodedPrompt]
    tokenizer: Tokenizer
    sampling: Sampling
    key: tuple[int, str, int]
    device: Device
    micro_batch_tokens: int

    def rollout(self, model: CausalLM, copies: int = 1) -> Rollout:
        """`copies` responses per prompt, one after another."""
        repeated = [prompt for prompt in self.prompts for _ in range(copies)]
        return roll_out(model, repeated, range(len(repeated)), self.key, self.sampling, self.tokenizer, self.device)

    def logprobs(self, model: CausalLM, rollout: Rollout) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Of each response's tokens, at the temperature that sampled them."""
        heat = self.sampling.temperature or 1.0
        return response_logprobs(model, rollout.documents, self.micro_batch_tokens, self.device, heat)


def _run(ctx: StageContext, device: Device) -> None:
    s, seed = ctx.recipe.evaluate, ctx.recipe.seed
    sft, task = _task(ctx, device)
    names = named(s.judges, ["reward", "kl", "external_nll", *response_metrics(()), *vars(Cost())])
    judges: dict[str, Reward] = {name: python_function(spec) for name, spec in zip(names, s.judges, strict=True)}
    if "reward" in ctx.parents:
        judges = {"reward": reward_model(ctx, ctx.parents["reward"], device), **judges}
    nll = _external_nll(ctx, device)
    one = replace(task, prompts=task.prompts[:1]).rollout(sft).samples
    for judge in judges.values():
        judge(one)  # whatever is wrong with it is said before the minutes of sampling
    systems = responses_of_all(ctx, sft, task, judges.get("reward"))
    scores = {name: _judged(name, responses, judges) for name, responses in systems.items()}
    table = {name: metrics_of(responses, scores[name], scores["sft"], nll, seed) for name, responses in systems.items()}
    costs = {name: cost_of(ctx, name) for name in systems}
    report = {
        "prompts": len(task.prompts),
        "systems": table,
        "frontier": [point for responses in systems.values() for point in responses.frontier],
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "stages": {x: recorded_metrics(ctx.parents[x]) for x in ("pretrain", "sft", "reward") if x in ctx.parents},
        "samples": side_by_side(systems, s.side_by_side),
    }
    show(ctx, report)
    independent = [name for name, spec in zip(names, s.judges, strict=True) if spec in unpaid_judges(ctx)]
    result = verdict_of(ctx, table, scores, independent, costs)
    report["verdict"] = asdict(result) if result else None
    files = {"report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False).encode()}
    files["replies.jsonl.gz"] = gzip.compress(replies(systems, scores), mtime=0)
    write_folder(ctx.folder / "report", files, {"key": ctx.key, "lineage": dict(ctx.lineage)})


def _task(ctx: StageContext, device: Device) -> tuple[CausalLM, Task]:
    """The SFT model, which the others are compared with, and what all are asked. Errors: E-DATA-*, E-MODEL-*."""
    s, seed, folder = ctx.recipe.evaluate, ctx.recipe.seed, first_parent(ctx, *POLICY)
    tokenizer, template = Tokenizer.load(folder), template_for(ctx, folder)
    sft = frozen(read_policy(folder, tokenizer, template)).to(device.torch_device)
    limit = sft.config.max_positions
    prompts = read_encoded_prompts(ctx.files(s.prompts), template, tokenizer, Counts(), limit, s.max_new_tokens)
    chosen = [prompts[i] for i in order(seed, 0, len(prompts))[: s.samples]]
    sampling = replace(ctx.recipe.sampling, max_new_tokens=s.max_new_tokens)
    return sft, Task(chosen, tokenizer, sampling, (seed, "evaluate", 0), device, ctx.recipe.run.micro_batch_tokens)


def responses_of_all(ctx: StageContext, sft: CausalLM, task: Task, reward: Reward | None) -> dict[str, Responses]:
    """One answer per prompt from the SFT model, from best-of-N if there is a reward, and from each policy trained on
    from it."""
    systems = _responses_of_sft(sft, task, reward, max(1, ctx.recipe.evaluate.best_of if reward else 1))
    for role in trained_roles(ctx):
        folder = ctx.parents[role]
        if role not in ALIGNED:
            refuse_other_words(ctx, role, task.tokenizer)
        policy = frozen(read_policy(folder, task.tokenizer, template_for(ctx, folder))).to(task.device.torch_device)
        with phase(f"answers of {role}"):
            rollout = task.rollout(policy)
        new, old = (task.logprobs(model, rollout) for model in (policy, sft))
        kl = float(np.mean([float((a - b).sum()) for a, b in zip(new, old, strict=True)]))
        systems[role] = Responses(rollout.samples, kl)
    return systems


def trained_roles(ctx: StageContext) -> list[str]:
    """Of the policies that are compared with SFT's: this recipe's, then those of other runs."""
    return [role for role in (*ALIGNED, *STAGES["evaluate"].folders(ctx.recipe)) if role in ctx.parents]


def refuse_other_words(ctx: StageContext, role: str, tokenizer: Tokenizer) -> None:
    """A policy of another run must read this run's prompts as they are encoded. Errors: E-MODEL-TOKENIZER,
    E-MODEL-TEMPLATE."""
    folder = ctx.parents[role]
    refuse_other_run(folder, Tokenizer.load(folder), tokenizer)
    if template_for(ctx, folder) != template_for(ctx, first_parent(ctx, *POLICY)):
        what = f"evaluate.others has {role}, which was trained with another template"
        raise UserError("E-MODEL-TEMPLATE", what, where=str(folder), hint="name a run that has this run's template")


def _responses_of_sft(sft: CausalLM, task: Task, reward: Reward | None, copies: int) -> dict[str, Responses]:
    """Its first answer to each prompt, and the best of all that it gives."""
    with phase("answers of sft"):
        many = task.rollout(sft, copies)
    systems = {"sft": Responses(many.samples[::copies], 0.0)}
    if reward and copies > 1:
        with phase(f"best of {copies}"):
            scores = reward(many.samples)
        rows = [slice(at, at + copies) for at in range(0, len(many.samples), copies)]
        chosen = [many.samples[row][best(many.samples[row], scores[row])] for row in rows]
        points = best_of_frontier([sorted(scores[row]) for row in rows])
        systems[f"best of {copies}"] = Responses(chosen, points[-1][1], points)
    return systems


def best_of_frontier(sorted_scores: Sequence[Sequence[float]]) -> list[tuple[int, float, float]]:
    """Of best-of-n for n = 1, 2, 4 and so on up to all: n, KL, and the expected reward of the best of n drawn from a
    prompt's scores, which are in ascending order.

    The KL is an upper bound that is close for continuous rewards (Stiennon et al. 2020).
    """
    copies = len(sorted_scores[0])
    points = []
    for n in [*(2**k for k in range(copies.bit_length()) if 2**k < copies), copies]:
        weights = [math.comb(i, n - 1) / math.comb(copies, n) for i in range(copies)]  # the i-th is the best of them
        means = [math.fsum(w * s for w, s in zip(weights, scores, strict=True)) for scores in sorted_scores]
        points.append((n, math.log(n) - (n - 1) / n, math.fsum(means) / len(means)))
    return points


def _judged(system: str, responses: Responses, judges: Mapping[str, Reward]) -> Scores:
    scores: dict[str, list[float]] = {}
    for name, judge in judges.items():
        with phase(f"judge {name}, {system}"):
            scores[name] = judge(responses.samples)
    return scores


def metrics_of(responses: Responses, scores: Scores, sft: Scores, nll: ExternalNll | None, seed: int) -> dict[str, Any]:
    """Means with intervals; "gain" is the paired difference to the SFT model's responses. scores: of the responses."""
    metrics: dict[str, Any] = {"kl": responses.kl, **response_metrics(responses.samples)}
    for name in scores:
        own, before = (torch.tensor(s[name], dtype=torch.float64) for s in (scores, sft))
        metrics[name] = _interval(own, seed)
        metrics[f"{name}_gain"] = _interval(own - before, seed)
    if nll:
        metrics["external_nll"] = nll(responses)
    return metrics


def verdict_of(
    ctx: StageContext,
    table: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Scores],
    judges: Sequence[str],
    costs: Mapping[str, Cost],
) -> Verdict | None:
    """Of the recipe's last policy against SFT and best-of-N, and of all methods. table: the metrics of each system;
    scores: those of each by judge; judges: names of those that may decide."""
    systems = {name: SystemMetrics.read(metrics) for name, metrics in table.items()}
    guards = {name: failed_guards(system, systems[SFT], ctx.recipe.evaluate) for name, system in systems.items()}
    pairs = permutations(table, 2)
    gains = {(a, b): {j: Difference.of(scores[a][j], scores[b][j]) for j in judges} for a, b in pairs}
    trained = trained_roles(ctx)
    subject = next((role for role in reversed(ALIGNED) if role in trained), "")
    main = {name: guards[name] for name in table if name not in trained or name == subject}
    result = verdict(_notes(ctx, subject).faults(), main, gains)
    every = {name: [*(_notes(ctx, name).faults() if name in trained else ()), *guards[name]] for name in table}
    methods = compared(every, gains, costs)
    return (
        replace(result, methods=methods) if result else Verdict("not evaluated", "", (), methods) if methods else None
    )


def _notes(ctx: StageContext, role: str) -> outcome.Notes:
    """What counts against a policy's training; without one, against the reward model that picks."""
    if role:
        return outcome.Notes.read(recorded_metrics(ctx.parents[role]))
    metrics = gate.recorded(ctx.parents["reward"]) if "reward" in ctx.parents else RewardMetrics()
    return outcome.Notes(gate.apply(metrics, ctx.recipe.gate).failures)


def unpaid_judges(ctx: StageContext) -> set[str]:
    """The judges that no policy was paid by, here or in its own run, as the recipe names them: they alone decide.

    A function is known by its name and its file's content.
    """
    rewards = {spec for role in ALIGNED for spec in getattr(getattr(ctx.recipe, role, None), "rewards", ())}
    for role in trained_roles(ctx):
        folder = ctx.parents[role]
        lineage: Any = read_manifest(folder).get("lineage", {}) if (folder / MANIFEST).is_file() else {}
        for setting, items in lineage.get("data", {}).items():
            rewards |= {_identity(item) for item in items} if setting.endswith(".rewards") else set()
    own: Any = ctx.lineage.get("data", {})
    same = {item["function"] for item in own.get("evaluate.judges", ()) if _identity(item) in rewards}
    return set(ctx.recipe.evaluate.judges) - same - rewards


def _identity(item: Mapping[str, str]) -> str:
    return f"{item['sha256']}:{item['function'].rpartition(':')[2]}"


def cost_of(ctx: StageContext, system: str) -> Cost:
    """SFT has its own training; best-of-N that of the reward model alone."""
    if system in ctx.parents:
        return Cost.of(ctx.parents[system])
    if system == SFT:
        return Cost.of(first_parent(ctx, *POLICY))
    return Cost(0.0, Cost.of(ctx.parents["reward"]).minutes)


def _interval(values: torch.Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed=seed)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _external_nll(ctx: StageContext, device: Device) -> ExternalNll | None:
    """Nats per token of all responses, given the prompt, under a separately trained language model and its tokenizer.

    A response that ended by itself counts its end token; a cut one does not.
    """
    if "referee" not in ctx.parents:
        return None
    folder = ctx.parents["referee"]
    model, tokenizer = frozen(read_causal(folder)).to(device.torch_device), Tokenizer.load(folder)

    def measured(responses: Responses) -> float | None:
        documents, end = [], tokenizer.document_end
        for sample in responses.samples:
            prompt = [end, *tokenizer.encode(sample.input)]
            ids = np.asarray(prompt + tokenizer.encode(sample.text) + [end] * sample.finished, np.int32)
            documents.append(Tokens(ids, np.arange(len(ids)) >= len(prompt)))
        logprobs = np.concatenate(response_logprobs(model, documents, ctx.recipe.run.micro_batch_tokens, device))
        return float(-logprobs.mean()) if len(logprobs) else None

    return measured


def side_by_side(systems: Mapping[str, Responses], count: int) -> list[dict[str, str]]:
    rows = list(zip(*(responses.samples for responses in systems.values()), strict=True))[:count]
    return [{"prompt": row[0].prompt, **{name: s.text for name, s in zip(systems, row, strict=True)}} for row in rows]


def replies(systems: Mapping[str, Responses], scores: Mapping[str, Scores]) -> bytes:
    """Every response, a line of JSON a prompt: {prompt, replies: {SYSTEM: {text, finished, JUDGE: score}}}."""
    rows = []
    for i, first in enumerate(next(iter(systems.values())).samples):
        texts = {
            name: {"text": (sample := responses.samples[i]).text, "finished": sample.finished}
            | {judge: values[i] for judge, values in scores[name].items()}
            for name, responses in systems.items()
        }
        rows.append(json.dumps({"prompt": first.prompt, "replies": texts}, ensure_ascii=False))
    return "".join(f"{row}\n" for row in rows).encode()


def show(ctx: StageContext, report: Mapping[str, Any]) -> None:
    """The tables of the report, and the answers side by side."""
    stages = [(stage, name, value) for stage, metrics in report["stages"].items() for name, value in metrics.items()]
    ctx.console.table("Stages, on held-out data", ("stage", "metric", "value"), stages)
    systems: Mapping[str, Mapping[str, Any]] = report["systems"]
    names = list(next(iter(systems.values())))
    rows = [[name, *(_shown(metrics.get(name)) for metrics in systems.values())] for name in names]
    for name in next(iter(report["costs"].values())):
        rows.append([name, *(_shown(cost[name]) for cost in report["costs"].values())])
    ctx.console.table(f"Responses to {report['prompts']} held-out prompts", ("metric", *systems), rows)
    ctx.console.say("`tetrad explain METRIC` says what a row means")
    for texts in report["samples"]:
        ctx.console.say("\n".join(f"  {name}: {text}" for name, text in texts.items()))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
    return "" if value is None else f"{value:.3g}"
