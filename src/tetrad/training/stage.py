"""What every stage does around its loop: open its folder, resume where it stopped, save a model that others load."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tetrad import storage
from tetrad.data.source import Counts
from tetrad.distributed import collectives
from tetrad.distributed.device import Device
from tetrad.distributed.sharding import collected, local, part_of
from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig
from tetrad.model.huggingface import config_files, model_files, read_causal
from tetrad.model.lora import has_adapters, merged
from tetrad.model.safetensors_io import file_bytes
from tetrad.model.transformer import CausalLM, ScalarModel, grow_vocabulary
from tetrad.report import outcome
from tetrad.stages import STAGES
from tetrad.storage import Content, Json, metrics_of
from tetrad.text.chat_template import Template, choose
from tetrad.text.tokenizer import Tokenizer
from tetrad.training import adapters
from tetrad.training.batches import mean_nll
from tetrad.training.context import StageContext
from tetrad.training.prepare import Prepared
from tetrad.training.run_folder import StageRun, Stateful
from tetrad.types import Tokens


class Weights:
    """A model as a part of a checkpoint: its trained parameters by name; frozen ones are read from their source."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def full_bytes(self) -> int:
        return file_bytes(self.tensors())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS, E-CKPT-SHAPE."""
        own = self.check(tensors)
        for name, tensor in tensors.items():
            local(own[name]).copy_(local(part_of(tensor, own[name])))

    def check(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's own tensors, if these have their names and shapes. Errors: E-CKPT-KEYS, E-CKPT-SHAPE."""
        own = self.tensors()
        if own.keys() != tensors.keys():
            names = sorted(own.keys() ^ tensors.keys())
            raise UserError("E-CKPT-KEYS", f"tensors are missing or not the model's: {names[:4]}")
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                what = f"{name} is {list(tensor.shape)}, the model's is {list(own[name].shape)}"
                raise UserError("E-CKPT-SHAPE", what)
        return own


@contextmanager
def start(
    ctx: StageContext,
    device: Device,
    total_steps: int,
    parts: Mapping[str, Stateful],
    state: Callable[[], Mapping[str, Json]] = dict,
    restore: Callable[[Mapping[str, Any]], None] | None = None,
    grace: float | None = None,
) -> Iterator[StageRun]:
    """The stage's run, resumed where it stopped. state: further values of a checkpoint; restore takes them back."""
    settings = ctx.recipe.run
    _refuse_unlisted(ctx, parts, state())
    environment: dict[str, Json] = {  # numbers may differ in their last digits where one of these does
        "device": device.torch_device.type,
        "dtype": str(device.dtype),
        "processes": collectives.size(),
        "micro_batch_tokens": settings.micro_batch_tokens,
        **({"shard": device.shard} if device.shard != "none" else {}),
    }
    with StageRun(
        ctx.folder,
        seed=ctx.recipe.seed,
        total_steps=total_steps,
        save_every=settings.save_every,
        keep=settings.keep,
        environment=environment,
        grace=grace,
        warn=ctx.console.warn,
    ) as run:
        saved = run.resume(parts, state)
        if saved is not None and restore:
            restore(saved)
        for part in (part for part in parts.values() if isinstance(part, Weights)):
            collectives.same_weights(part.model)
        for note in run.notes:
            ctx.console.say(f"note: {note}")
        if run.step:
            ctx.console.say(f"resumes after step {run.step} of {total_steps}")
        with ctx.trackers.following(ctx.folder, ctx.key, asdict(getattr(ctx.recipe, ctx.folder.name)), run.step):
            yield run


def _refuse_unlisted(ctx: StageContext, parts: Mapping[str, Stateful], values: Mapping[str, Json]) -> None:
    """The table by which checkpoints are checked before a stage starts must match what the stage keeps."""
    row = STAGES[ctx.folder.name]
    listed = row.parts(ctx.recipe), row.values
    if listed != (tuple(parts), tuple(values)):
        raise RuntimeError(f"stages.py lists {listed}, the stage keeps {tuple(parts)}, {tuple(values)}")


def finish(
    ctx: StageContext,
    run: StageRun,
    model: CausalLM | ScalarModel,
    tokenizer: Tokenizer,
    template: Template | None,
    metrics: Mapping[str, Json],
    extra: Mapping[str, Content] | None = None,
    parent: Path | None = None,
) -> None:
    """Writes <stage>/model: what transformers loads, with the metrics and the lineage in its manifest. parent: of
    adapters, the folder of the model that they were trained on."""
    model = collected(model)
    own = adapters.result_files(ctx, model, parent) if parent and has_adapters(model) else {}
    if parent and own and not adapters.keeps(ctx, model, parent):
        if collectives.is_main():
            storage.write_folder(ctx.folder / "adapter", own, {"key": ctx.key})
        model, own = merged(cast(CausalLM, model)), {}
    model.config = _ending_at(model.config, template.end_id(tokenizer) if template else tokenizer.document_end)
    model.config = replace(model.config, pad_id=tokenizer.pad_id)
    if own:  # whoever reads them grows the base's vocabulary
        model.config = replace(model.config, vocab_size=max(model.config.vocab_size, tokenizer.size))
    else:
        grow_vocabulary(model, tokenizer.size)
    weights = {**config_files(model), **own} if own else model_files(model)
    files = {**weights, **tokenizer.files(template), **(extra or {})}
    card = _card(ctx, model, metrics)
    if "alarms" in metrics:  # of a policy that was trained on a reward
        card = outcome.with_verdict(card, outcome.before_evaluation(ctx.recipe, outcome.Notes.read(metrics)))
    meta: dict[str, Json] = {"key": ctx.key, "metrics": dict(metrics), "lineage": dict(ctx.lineage)}
    run.finish(files, meta, {outcome.CARD: card.encode(errors="backslashreplace")})
    collectives.barrier()


def _card(ctx: StageContext, model: CausalLM | ScalarModel, metrics: Mapping[str, Json]) -> str:
    """The folder's README: what this is, how to load it, how good it was, and what it was made from, without paths."""
    auto = "AutoModelForCausalLM"
    lines = [f"# {ctx.recipe.name}: {ctx.folder.name}", ""]
    if isinstance(model, ScalarModel):
        auto = "AutoModelForSequenceClassification"
        lines += [
            f"Reward = logit + {float(model.bias):.6g} (`tetrad.reward_bias` in config.json), read at the last token."
        ]
    if has_adapters(model):  # `tetrad export` looks for this line
        auto, given = auto.replace("Auto", "AutoPeft"), ", num_labels=1" if isinstance(model, ScalarModel) else ""
        about = "on the base that adapter_config.json names; `tetrad export MODEL --to FOLDER` writes whole weights"
        lines += [f"Loads in PEFT with `{auto}.from_pretrained(folder{given})` and `AutoTokenizer`, {about}.", ""]
    else:
        lines += [f"Loads in transformers with `{auto}.from_pretrained(folder)` and `AutoTokenizer`.", ""]
    lines += [f"- {name}: {value}" for name, value in metrics.items() if isinstance(value, int | float)]
    lines += ["", "Made from (all of it in manifest.json):", ""]
    parents = cast(Mapping[str, Mapping[str, str]], ctx.lineage.get("parents", {}))
    lines += [f"- {role}: key {parent['key'][:8]}" for role, parent in parents.items()]
    data = cast(Mapping[str, list[Mapping[str, str]]], ctx.lineage.get("data", {}))
    lines += [f"- {Path(item['path']).name}: sha256 {item['sha256'][:8]}" for items in data.values() for item in items]
    return "\n".join(lines) + "\n"


def recorded_metrics(folder: Path) -> dict[str, Any]:
    """The metrics that a stage recorded about its model."""
    manifest = folder / "manifest.json"
    return metrics_of(json.loads(manifest.read_bytes())) if manifest.is_file() else {}


def read_policy(folder: Path, tokenizer: Tokenizer, template: Template) -> CausalLM:
    """The model that responds; its responses end at the template's end token too."""
    model = read_causal(folder)
    model.config = _ending_at(model.config, template.end_id(tokenizer))
    return model


def _ending_at(config: DecoderConfig, end: int) -> DecoderConfig:
    """With this end token before the others."""
    return replace(config, eos_ids=(end, *(i for i in config.eos_ids if i != end)))


def prepared(ctx: StageContext, make: Callable[[StageContext], Prepared]) -> Prepared:
    """The stage's tokens: built by one rank, opened by all."""
    if collectives.is_main():
        make(ctx)
    collectives.barrier()
    data = make(ctx)
    report_counts(ctx, data.counts, len(data.store))
    return data


def template_for(ctx: StageContext, folder: Path) -> Template:
    """The template that the folder's model was trained with, else the recipe's. Errors: E-MODEL-TEMPLATE."""
    s = ctx.recipe.sft
    return choose(folder, s.template, s.separator, s.system, own=True)


def validation_metrics(
    ctx: StageContext, model: CausalLM, documents: Sequence[Tokens], device: Device
) -> dict[str, float]:
    """Loss and perplexity of a language model on documents that it never trained on; empty without any."""
    if not documents:
        return {}
    loss, tokens = mean_nll(model, documents, ctx.recipe.run.micro_batch_tokens, device)
    text = f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}, {tokens} tokens"
    ctx.console.say(f"{ctx.folder.name:<10} {text}")
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_tokens": float(tokens)}


def report_counts(ctx: StageContext, counts: Counts, kept: int, which: str = "") -> None:
    """Reports what was read and what became of it; nothing is silently dropped or truncated."""
    parts = [f"{counts.read} {which}records read", f"{kept} kept"]
    parts += [f"{n} {name}" for name in ("blank", "cut", "dropped", "tied") if (n := getattr(counts, name))]
    ctx.console.say(f"{ctx.folder.name:<10} {', '.join(parts)}")
    for note in counts.notes:
        ctx.console.say(f"note: {note}")
