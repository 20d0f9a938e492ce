"""The losses of TRL's trainers for the same records: each side reads the text with its own code and one folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_toys
import ppo_toys
import toys
from tetrad.data.records import answers
from tetrad.data.tokens import tokenize
from tetrad.model.huggingface import model_files
from tetrad.model.transformer import CausalLM, ScalarModel, frozen
from tetrad.reward.batches import Examples, preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.rl.minibatches import PolicyBatch, minibatches
from tetrad.settings.common import Optim
from tetrad.settings.dpo import Dpo
from tetrad.settings.grpo import Grpo
from tetrad.settings.reward import Reward
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES
from tetrad.train.dpo import dpo_micros, dpo_terms
from tetrad.train.grpo import make_batch, terms
from tetrad.train.reward import preference_terms
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update
from tetrad.types import Comparison, Conversation, Prompt, Turn

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

PLOTS = ["the plot is long", "剧情很长，但是好看", "", "it has no story in it and nobody minds"]
GOOD = ["a good film", "很好的电影！", "fine", "I would watch it again and again"]
BAD = ["bad", "不好", "a long dull film that never ends", "no"]
INSTRUCTION, FORM = "Continue this review.", TEMPLATES["instruction"]
TOKENIZER = bpe.learn([INSTRUCTION, *PLOTS, *GOOD, *BAD] * 3, 360)
PROMPTS = [(Turn("instruction", INSTRUCTION), Turn("input", plot)) for plot in PLOTS]
TEXTS = [f"{INSTRUCTION}<|sep|>{plot}<|sep|>" for plot in PLOTS]
SHAPE: dict[str, Any] = {
    "vocab_size": TOKENIZER.size,
    "eos_ids": TOKENIZER.eos_ids,
    "pad_id": TOKENIZER.pad_id,
}


def exported(folder: Path, model: CausalLM | ScalarModel) -> str:
    return str(toys.write(folder, {**model_files(model), **TOKENIZER.files(FORM)}))


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": len(PLOTS),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "model_init_kwargs": {"dtype": torch.float32},
    }


def their_loss(trainer: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, gradients by name, and the one batch."""
    (batch,) = trainer.get_train_dataloader()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, batch


def assert_gradients(ours: torch.nn.Module, theirs: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    """Equal to 1e-5 of the norm, in float64 to 1e-12. factor: ours are so many times theirs."""
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == theirs.keys()
    mine, other = (torch.cat([each[name].flatten() for name in found]) for each in (found, theirs))
    assert (mine - factor * other).norm() <= (1e-12 if mine.dtype == torch.float64 else 1e-5) * mine.norm()


def test_sft(tmp_path: Path) -> None:
    model = toys.causal(seed=1, **SHAPE)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(TEXTS, GOOD, strict=True)]
    trainer = trl.SFTTrainer(
        exported(tmp_path, model),
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    loss, gradients, batch = their_loss(trainer)
    conversations = [Conversation((*p, Turn("assistant", answer))) for p, answer in zip(PROMPTS, GOOD, strict=True)]
    documents = list(tokenize(FORM, TOKENIZER, conversations))
    theirs = sorted(
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert theirs == sorted(d.ids.tolist() for d in documents)
    assert int((batch["labels"] >= 0).sum()) == sum(int(d.train.sum()) for d in documents)
    micros = language_micros(documents, 40, toys.CPU)
    stats = update(model, Optimizer(model, 0.0, Optim()), micros, language_terms, toys.CPU)
    assert stats.loss == pytest.approx(loss, abs=1e-5)
    assert_gradients(model, gradients)


@pytest.mark.parametrize("center", [0.0, 0.05])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_reward(tmp_path: Path, center: float, margin: float) -> None:
    model = toys.scalar(seed=2, **SHAPE)
    margins = [margin * i for i in range(len(PLOTS))]
    rows = [
        {"prompt": prompt, "chosen": good, "rejected": bad, **({"margin": m} if margin else {})}
        for prompt, good, bad, m in zip(TEXTS, GOOD, BAD, margins, strict=True)
    ]
    trainer = trl.RewardTrainer(
        exported(tmp_path, model),
        args=trl.RewardConfig(**settings(tmp_path), center_rewards_coefficient=center or None),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    loss, gradients, batch = their_loss(trainer)
    records = [
        Comparison(Prompt(p), (bad, good), (2, 1), margin=m)
        for p, good, bad, m in zip(PROMPTS, GOOD, BAD, margins, strict=True)
    ]
    documents = [list(tokenize(FORM, TOKENIZER, answers(record))) for record in records]
    theirs = sorted(
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert theirs == sorted(d.ids.tolist() for both in documents for d in both)
    latent = Latent(model, learn_rho=False)
    micros = preference_micros(records, documents, 60, 0.0, 1.0, toys.CPU)
    assert len(micros) > 1
    stats = update(latent, Optimizer(latent, 0.0, Optim()), micros, preference_terms(Reward(center=center)), toys.CPU)
    assert stats.loss == pytest.approx(loss, abs=1e-5)
    assert_gradients(model, gradients)


def stir(model: CausalLM, by: float, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=noise)


def moved(folder: Path, seed: int) -> tuple[CausalLM, CausalLM, str, str]:
    """A reference, a policy that has left it, and the folders of both."""
    reference, policy = toys.causal(seed=seed, **SHAPE), toys.causal(seed=seed, **SHAPE)
    stir(policy, 0.02, seed)
    return frozen(reference), policy, exported(folder / "ref", reference), exported(folder / "policy", policy)


class PlainLogProbs:
    """TRL's head without chunks, in the dtype of its input; its own is float32 always."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, _: None, labels: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
        logprobs = torch.log_softmax(hidden @ weight.t(), 1).gather(1, labels[:, None])[:, 0]
        nothing = torch.zeros_like(logprobs)
        return logprobs, nothing, nothing, nothing, nothing.bool()


def plain_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """transformers' own is float32 always."""
    scaled: torch.Tensor = norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return scaled


def in_float64(monkeypatch: pytest.MonkeyPatch, *ours: CausalLM, theirs: Any) -> None:
    """Both sides; the angles of positions stay float32 in both."""
    from transformers.models.qwen2 import modeling_qwen2

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainLogProbs)
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", plain_norm)
    for model in (*ours, theirs.model, theirs.ref_model):
        model.double()
    for model in ours:
        model.model.inv_freq = model.model.inv_freq.float()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers, of TRL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo(tmp_path: Path, loss: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL divides IPO's log-ratios by the number of tokens: of answers with two each, and with twice our beta, its loss
    is a fourth of ours, the paper's. Its `sigmoid` knows no label_smoothing. What is left between the two in float32,
    7e-7 of the gradient's norm, is rounding: in float64 it is 1e-15."""
    ipo = loss == "ipo"
    good, bad = ("abcd", "wxyz") if ipo else (GOOD, BAD)
    reference, policy, ref_folder, folder = moved(tmp_path, 3)
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(TEXTS, good, bad, strict=True)]
    theirs = {"beta": 0.2 if ipo else 0.1, "loss_type": loss}
    trainer = trl.DPOTrainer(
        folder,
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(ref_folder, dtype=torch.float32),
        args=trl.DPOConfig(**settings(tmp_path), **theirs),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    if dtype == torch.float64:
        in_float64(monkeypatch, reference, policy, theirs=trainer)
    found, gradients, _ = their_loss(trainer)
    records = [Comparison(Prompt(p), (b, a), (2, 1)) for p, a, b in zip(PROMPTS, good, bad, strict=True)]
    documents = [d for record in records for d in tokenize(FORM, TOKENIZER, answers(record), closed=False)]
    micros = dpo_micros(Examples.of(records, documents), range(len(records)), 60, toys.CPU)
    assert len(micros) > 1
    s = Dpo(loss=loss)
    stats = update(policy, Optimizer(policy, 0.0, Optim()), micros, dpo_terms(s, reference), toys.CPU)
    factor = 4.0 if ipo else 1.0
    assert abs(found - 0.6931) > 1e-2
    assert stats.loss == pytest.approx(factor * found, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert_gradients(policy, gradients, factor)


GROUPS = Grpo(
    batch_size=4,
    samples_per_prompt=4,
    max_new_tokens=10,
    temperature=0.8,
    clip_high=0.28,
    missing_eos_penalty=0.0,
    kl_coef=0.3,
)
SCORE = ppo_toys.by_ids(lambda ids: (sum(ids) % 7) / 2 - 1)
METHODS = {
    "grpo": (GROUPS, {"loss_type": "grpo"}),
    "bnpo": (replace(GROUPS, loss_mean="token"), {"loss_type": "bnpo"}),
    "dapo": (replace(GROUPS, loss_mean="token", kl_coef=0.0), {"loss_type": "dapo", "beta": 0.0}),
    "dr_grpo": (
        replace(GROUPS, loss_mean="constant", advantage="centred"),
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
}


def experience(folder: Path, s: Grpo) -> tuple[PolicyBatch, CausalLM, str, str]:
    """Responses of unequal length from a policy that has left the reference and then moved on, and their folders."""
    shape = {"vocab_size": 12, "eos_ids": (toys.EOS,), "pad_id": toys.PAD}
    reference, actor = toys.causal(seed=4, **shape), toys.causal(seed=4, **shape)
    files = toys.tokenizer(12).files(FORM)
    toys.write(folder / "ref", {**model_files(reference), **files})
    stir(actor, 0.03, 1)
    models = grpo_toys.two_models(s, actor, SCORE, reference)
    batch = make_batch(models, grpo_toys.sampled(models, ppo_toys.questions(4, 12), s, (0, 0)), s)
    assert len(set(batch.rollout.mask_BT.sum(1).tolist())) > 3
    stir(actor, 0.03, 2)
    toys.write(folder / "policy", {**model_files(actor), **files})
    return batch, actor, str(folder / "ref"), str(folder / "policy")


def their_groups(folder: Path, policy: str, ref: str, batch: PolicyBatch, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer, and the batch that its own code makes of our responses: masks, advantages, reference."""
    rows = batch.rollout.samples

    def ours(prompts: Any, trainer: Any) -> dict[str, Any]:
        sides = {"prompt_ids": "prompt_ids", "completion_ids": "response_ids", "logprobs": "logprobs"}
        return {name: [list(getattr(row, field)) for row in rows] for name, field in sides.items()}

    args = {**settings(folder), "per_device_train_batch_size": len(rows), "temperature": 0.8, **how}
    limits = {"use_bias_correction_kl": False, "max_completion_length": 10, "num_generations": 4, "epsilon_high": 0.28}
    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=lambda completion_ids, **_: [SCORE([row])[0] for row in rows],
        args=trl.GRPOConfig(**{"beta": 0.3, **limits, **args}),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w3"}] * len(rows)),
        rollout_func=ours,
    )
    if trainer.ref_model is not None:
        reference = transformers.AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32)
        trainer.ref_model.load_state_dict(reference.state_dict())
    trainer.model.eval()
    trainer.model.get_input_embeddings().padding_idx = None  # else pad has no gradient, and these responses hold it
    inputs = trainer._generate_and_score_completions([{"prompt": "w3"} for _ in rows])
    return trainer, {**inputs, "old_per_token_logps": batch.old_logprobs}


def accumulated(trainer: Any, inputs: dict[str, Any]) -> float:
    """Their loss of one step over two micro-batches of half the rows."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    half = len(inputs["advantages"]) // 2
    parts = [
        {name: x[rows] if x.dim() else x for name, x in inputs.items()} for rows in (slice(half), slice(half, None))
    ]
    return sum(float(trainer.compute_loss(trainer.model, part).detach()) for part in parts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers, of TRL
@pytest.mark.parametrize("method", METHODS)
def test_grpo(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages, loss and gradient: their standard deviation is unbiased too, and 1e-4 beside it. `bnpo` is the mean
    over the tokens of each micro-batch, averaged: ours only where there is one; `dapo` divides by all tokens. Its KL is
    multiplied by the ratio (DeepSeek-V3.2) unless `use_bias_correction_kl` is off; the definition (Shao et al.) isn't.
    """
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func
    s, how = METHODS[method]
    batch, actor, ref, policy = experience(tmp_path, s)
    trainer, inputs = their_groups(tmp_path, policy, ref, batch, **how)
    mask = batch.rollout.mask_BT
    assert torch.equal(inputs["completion_mask"].bool(), mask)
    torch.testing.assert_close(inputs["advantages"][:, None] * mask, batch.advantages, rtol=1e-5, atol=1e-6)
    if s.kl_coef:
        torch.testing.assert_close(inputs["ref_per_token_logps"][mask], batch.ref_logprobs[mask], rtol=1e-5, atol=1e-5)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    (micros,) = minibatches(batch, s, (0, 0), 40, toys.CPU)
    assert len(micros) > 3
    stats = update(actor, Optimizer(actor, 0.0, Optim()), micros, terms(s), toys.CPU)
    assert 0.1 < stats.terms["clip_fraction"] < 0.9
    assert stats.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert_gradients(actor, theirs)
    assert (accumulated(trainer, inputs) == pytest.approx(stats.loss, rel=1e-5)) == (method != "bnpo")
