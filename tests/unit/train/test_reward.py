"""The reward model through the chain: early stopping, an ensemble, a model with a tokenizer of its own; and the losses
that a record can choose."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import toys
from mean_losses import bt_loss
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.inference.completions import Completion
from tetrad.model.huggingface import read_members
from tetrad.model.safetensors_io import read_tensors
from tetrad.pipeline import recipe, runner
from tetrad.reward.batches import preference_micros
from tetrad.reward.data import score_scale
from tetrad.reward.ensemble import Latent
from tetrad.reward.model import load_reward, member_scores, reward_function
from tetrad.settings.common import Optim
from tetrad.settings.reward import Reward
from tetrad.train import reward as reward_stage
from tetrad.train.reward import preference_terms
from tetrad.training.early_stopping import EarlyStopping
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import update
from tetrad.types import Comparison, Prompt, Score, Turn
from tiny import Chain

PROMPT = Prompt((Turn("instruction", "w5"),))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.run()
    return chain


# --- losses ---


def loss_of(records: list[Comparison | Score], **settings: object) -> tuple[float, torch.Tensor]:
    """The stage's loss on records whose answers are fixed documents, and the rewards it saw."""
    s = Reward(**{"score_scale": (1.0, 5.0), "center": 0.0, **settings})  # type: ignore[arg-type]
    sizes = [len(r.answers) if isinstance(r, Comparison) else 1 for r in records]
    documents = iter([toys.document(toys.ids(6, i)) for i in range(sum(sizes))])
    answers = [[next(documents) for _ in range(n)] for n in sizes]
    latent = Latent(toys.scalar(seed=1), False)
    micros = preference_micros(records, answers, 4096, *score_scale(s, records), toys.CPU)
    rewards = latent.reward(micros[0].packed, "scores").detach()
    return update(latent, Optimizer(latent, 0.0, Optim()), micros, preference_terms(s), toys.CPU).loss, rewards


def test_smoothing_and_votes_are_the_label() -> None:
    pair = [Comparison(PROMPT, ("a", "b"), (1.0, 2.0))]
    voted = [Comparison(PROMPT, ("a", "b"), (1.0, 2.0), votes=(7.0, 3.0))]
    for records, settings, label in (
        (pair, {}, 1.0),
        (pair, {"label_smoothing": 0.1}, 0.9),
        (voted, {}, 0.7),
        (voted, {"label_smoothing": 0.1}, 0.66),
    ):
        found, r = loss_of(records, **settings)
        wanted = bt_loss(r[:1], r[1:], label=torch.tensor([label]))
        assert found == pytest.approx(float(wanted), abs=1e-6)


def test_scores_on_their_scale() -> None:
    records = [Score(PROMPT, "a", 2.0), Score(PROMPT, "b", 5.0), Score(PROMPT, "c", 3.0)]
    target = torch.tensor([2.0, 5.0, 3.0])
    for kind in ("mse", "bce"):
        found, r = loss_of(records, score_loss=kind, score_weight=1.0)
        share = (target - 1) / 4
        error = (r - share).square() if kind == "mse" else binary_cross_entropy_with_logits(r, share)
        assert found == pytest.approx(float(error.mean()), abs=1e-6)
    found, r = loss_of(records, score_weight=1.0)
    standard = (target - target.mean()) / target.std(correction=0)
    assert found == pytest.approx(float((r - standard).square().mean()), abs=1e-6)


def test_an_uncertain_score_counts_less() -> None:
    records = [Score(PROMPT, "a", 2.0, spread=1.5), Score(PROMPT, "b", 5.0)]
    found, r = loss_of(records, score_weight=1.0)  # the scores' standard deviation is 1.5: half the weight
    assert found == pytest.approx(float((0.5 * (r[0] + 1) ** 2 + (r[1] - 1) ** 2) / 2), abs=1e-6)


def test_every_token_of_an_answer_can_learn() -> None:
    """Of a score the mean loss over its answer's tokens, of a pair the loss between the means."""
    records: list[Comparison | Score] = [
        Score(PROMPT, "a", 2.0),
        Comparison(PROMPT, ("b", "c"), (2.0, 1.0)),
        Score(PROMPT, "d", 5.0),
    ]
    documents = [[toys.document(toys.ids(n, n), prompt=2) for n in of] for of in ((5,), (7, 4), (9,))]
    s = Reward(score_scale=(1.0, 5.0), token_weight=0.5, score_weight=2.0, comparison_weight=3.0)
    latent = Latent(toys.scalar(seed=1), False)
    micros = preference_micros(records, documents, 4096, 3.5, 1.5, toys.CPU)
    stats = update(latent, Optimizer(latent, 0.0, Optim()), micros, preference_terms(s), toys.CPU)
    values = latent.reward(micros[0].packed, "values").detach().split([3, 5, 2, 7])
    scores = ((values[0] + 1).square().mean() + (values[3] - 1).square().mean()) / 2
    pairs = bt_loss(values[2].mean()[None], values[1].mean()[None])
    assert stats.terms["score_loss_tokens"] == pytest.approx(float(scores), rel=1e-5)
    assert stats.terms["comparison_loss_tokens"] == pytest.approx(float(pairs), rel=1e-5)
    rest = 2.0 * stats.terms["score_loss"] + 3.0 * stats.terms["comparison_loss"]
    assert stats.loss == pytest.approx(rest + 0.5 * (2.0 * float(scores) + 3.0 * float(pairs)), rel=1e-5)


# --- early stopping ---


def test_best_weights_are_kept_and_put_back() -> None:
    model = toys.scalar(seed=1)
    best = EarlyStopping(model, patience=2)
    best.update(1.0)
    assert not best.should_stop
    wanted = model.score.weight.detach().clone()
    for loss, enough in ((1.1, False), (1.0, True)):
        with torch.no_grad():
            model.score.weight += 1
        best.update(loss)
        assert best.should_stop is enough
    again = EarlyStopping(model, patience=2)
    again.load_tensors({name: tensor.clone() for name, tensor in best.tensors().items()})
    assert (again.loss, again.waited, again.should_stop) == (1.0, 2, True)
    again.restore_best()
    assert torch.equal(model.score.weight, wanted)


def test_without_patience_nothing_is_kept() -> None:
    best = EarlyStopping(toys.scalar(), 0)
    assert not best.should_stop
    assert best.tensors() == {} and best.full_bytes() == 0
    best.load_tensors({})
    best.restore_best()


def test_training_stops_where_the_validation_loss_stops_improving(chain: Chain) -> None:
    chain.run("--reward.patience", "1", "--reward.lr", "0.3", "--reward.schedule", "constant", "--ppo.steps", "1")
    lines = chain.lines("reward")
    assert 2 < len(lines) < 14 and len(lines) % 2 == 0
    figures = json.loads((chain.home / "reward" / "model" / "manifest.json").read_text())["metrics"]
    assert figures["pairs"] > 0


# --- an ensemble ---


def test_an_ensemble_is_averaged_and_its_doubt_subtracted(chain: Chain) -> None:
    chain.run("--reward.ensemble-size", "3", "--ppo.uncertainty-penalty", "1")
    folder = chain.home / "reward" / "model"
    members = read_members(folder)
    assert len(members) == 3 and (folder / "member-3.safetensors").is_file()
    told = json.loads((folder / "evaluation.json").read_text())
    figures = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert len({member["pair_accuracy"] for member in told["members"]}) > 1
    assert figures["spearman_sd"] > 0 and figures["disagreement"] > 0
    samples = [Completion((5, 6), (7 + i, 8, 9), (), "") for i in range(4)]
    documents = [toys.document([5, 6, 7 + i, 8, 9]) for i in range(4)]
    scores = member_scores(members, documents, toys.CPU, 64)
    assert scores.std(0).min() > 1e-3
    assert reward_function(members, toys.CPU, 64)(samples) == pytest.approx(scores.mean(0).tolist(), abs=1e-5)
    wary = reward_function(members, toys.CPU, 64, uncertainty_penalty=2.0)(samples)
    assert wary == pytest.approx((scores.mean(0) - 2 * scores.std(0)).tolist(), abs=1e-5)
    assert len(load_reward(folder).members) == 3
    doubted = chain.lines("ppo")
    chain.run("--reward.ensemble-size", "3")
    assert chain.lines("ppo")[0]["score"] > doubted[0]["score"]


def test_the_first_member_is_what_it_is_alone(chain: Chain) -> None:
    chain.run("--reward.ensemble-size", "2", "--reward.patience", "0")
    first = read_tensors(chain.home / "reward" / "model" / "model.safetensors")
    chain.run("--reward.patience", "0")
    alone = read_tensors(chain.home / "reward" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in first.items())


def test_a_foreign_member_is_refused(chain: Chain, tmp_path: Path) -> None:
    toys.saved(tmp_path, toys.scalar())
    assert len(read_members(tmp_path)) == 1
    wide = toys.scalar(ff=toys.scalar().config.ff + 8)
    for other, code in ((toys.scalar(layers=1), "E-CKPT-KEYS"), (wide, "E-CKPT-SHAPE")):
        toys.write(tmp_path, {"member-2.safetensors": toys.members([toys.scalar(), other])["member-2.safetensors"]})
        with pytest.raises(UserError, match=code):
            read_members(tmp_path)


# --- a tokenizer of its own ---


def test_a_reward_model_with_its_own_tokenizer_reads_texts(chain: Chain) -> None:
    chain.run("--name", "small", "--tokenizer.vocab-size", "280", "--reward.data", "[]", "--ppo.prompts", "[]")
    small = str(chain.runs / "small" / "sft")
    with pytest.raises(UserError, match="E-MODEL-TOKENIZER") as raised:
        chain.run("--reward.from", small)
    assert 'ppo.critic = "actor"' in (raised.value.hint or "")
    chain.run("--reward.from", small, "--ppo.critic", "actor")
    tokenizers = [(chain.home / stage / "model" / "tokenizer.json").read_bytes() for stage in ("sft", "reward")]
    assert tokenizers[0] != tokenizers[1]
    figures = json.loads((chain.home / "reward" / "model" / "manifest.json").read_text())["metrics"]
    assert abs(figures["fresh_mean"]) < 3 and np.isfinite(chain.lines("ppo")[-1]["score"])


def test_nothing_of_the_optimizer_is_left_while_responses_are_sampled(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers, left, normalise = list[Optimizer](), list[int](), reward_stage.normalise
    begin = Optimizer.__init__

    def noted(self: Optimizer, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        optimizers.append(self)

    def sampling(*args: Any) -> Any:
        left.extend(len(one.tensors()) for one in optimizers)
        return normalise(*args)

    monkeypatch.setattr(Optimizer, "__init__", noted)
    monkeypatch.setattr(reward_stage, "normalise", sampling)
    read = recipe.read(chain.path, ["--run.out", str(chain.runs), "--reward.label-smoothing", "0.01"])
    runner.run(read, Console(out=io.StringIO(), err=io.StringIO()), only="reward")
    assert left and not any(left)
