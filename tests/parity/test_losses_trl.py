"""The losses of TRL's trainers for the same records: each side reads the text with its own code and one folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from tetrad.data.records import answers
from tetrad.data.tokens import tokenize
from tetrad.model.huggingface import model_files
from tetrad.model.transformer import CausalLM, ScalarModel, frozen
from tetrad.reward.batches import Examples, preference_micros
from tetrad.reward.ensemble import Latent
from tetrad.settings.common import Optim
from tetrad.settings.dpo import Dpo
from tetrad.settings.reward import Reward
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES
from tetrad.train.dpo import dpo_micros, dpo_terms
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


def assert_gradients(ours: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6, msg=name)


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


def moved(folder: Path, seed: int) -> tuple[CausalLM, CausalLM, str, str]:
    """A reference, a policy that has left it, and the folders of both."""
    reference, policy = toys.causal(seed=seed, **SHAPE), toys.causal(seed=seed, **SHAPE)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return frozen(reference), policy, exported(folder / "ref", reference), exported(folder / "policy", policy)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers, of TRL
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo(tmp_path: Path, loss: Any) -> None:
    """TRL divides IPO's log-ratios by the number of tokens: of answers with two each, and with twice our beta, its loss
    is a fourth of ours, the paper's. Its `sigmoid` knows no label_smoothing."""
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
    found, gradients, _ = their_loss(trainer)
    records = [Comparison(Prompt(p), (b, a), (2, 1)) for p, a, b in zip(PROMPTS, good, bad, strict=True)]
    documents = [d for record in records for d in tokenize(FORM, TOKENIZER, answers(record), closed=False)]
    micros = dpo_micros(Examples.of(records, documents), range(len(records)), 60, toys.CPU)
    assert len(micros) > 1
    s = Dpo(loss=loss)
    stats = update(policy, Optimizer(policy, 0.0, Optim()), micros, dpo_terms(s, reference), toys.CPU)
    factor = 4.0 if ipo else 1.0
    assert abs(found - 0.6931) > 1e-2
    assert stats.loss == pytest.approx(factor * found, rel=1e-5)
    assert_gradients(policy, {name: factor * gradient for name, gradient in gradients.items()})
