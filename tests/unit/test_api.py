"""The public functions of `import tetrad`: what they give is what the commands give and what their parts compute."""

import json
import random
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import FrozenInstanceError, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tetrad
import tiny
from tetrad import api
from tetrad.cli.generate import generate_file
from tetrad.cli.score import score_file
from tetrad.console import Console
from tetrad.data.pack import pack
from tetrad.inference import engine
from tetrad.inference.fused_model import Fused
from tetrad.model.huggingface import read_causal, read_members
from tetrad.reward.model import documents_from_text, member_scores
from tetrad.settings.use import Generate, Sample, ScoreFile
from tetrad.text.chat_template import TEMPLATES
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Tokens, Turn
from toys import CPU

ROOT = Path(__file__).parents[2]
WORDS = ("plot", "film", "warm", "dull", "slow", "电影", "很好看", "story", "🎬")
FREE = {"temperature": 1.0, "top_p": 1.0}
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "这部电影"}]


def refused(code: str, function: Any, *arguments: Any, **settings: Any) -> tetrad.UserError:
    with pytest.raises(tetrad.UserError) as caught:
        function(*arguments, **settings)
    assert caught.value.code == code
    return caught.value


def test_every_public_name_is_there() -> None:
    assert set(api.__all__) == set(tetrad._PUBLIC) <= set(dir(tetrad))
    for name in api.__all__:
        assert getattr(tetrad, name).__doc__
    assert tetrad.objectives.ranks.centred_ranks and tetrad.objectives.preference.pair_loss_sum
    for module in (tetrad, tetrad.objectives):
        with pytest.raises(AttributeError, match="nothing"):
            module.nothing  # noqa: B018


def test_prompts_are_texts_pairs_or_messages(run: Path) -> None:
    for stage, form in (("sft", TEMPLATES["instruction"]), ("chat", TEMPLATES["chatml"])):
        model = tetrad.load(run / stage)
        pair = (Turn("instruction", "Go on."), Turn("input", "the plot"))
        talk = (Turn("system", "Be kind."), Turn("user", "这部电影"))
        alone = (Turn("instruction", "Go on."), Turn("input", ""))
        for prompt, turns in (("Go on.", alone), (("Go on.", "the plot"), pair), (MESSAGES, talk)):
            assert tetrad.prompt_ids(model, prompt) == form.prompt(model.tokenizer, turns)
            assert tetrad.generate(model, [prompt], n=1, max_new_tokens=2)[0].prompt_ids == tuple(
                tetrad.prompt_ids(model, prompt)
            )
    assert tetrad.load(run / "pretrain", template="chatml").form == TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("prompts", "code", "where"),
    [
        ("Go on.", "E-DATA-TYPE", "prompts"),
        (["x", 5], "E-DATA-TYPE", "prompt 1"),
        ([{"role": "user", "content": "x"}], "E-DATA-TYPE", "prompt 0"),
        ([[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]], "E-DATA-CHAT", "prompt 0"),
        ([[{"role": "tool", "content": "x"}]], "E-DATA-CHAT", "prompt 0"),
        ([[]], "E-DATA-CHAT", "prompt 0"),
        (["\ud800"], "E-DATA-ENCODING", "prompt 0"),
        (["x", "plot " * 90], "E-DATA-LONG", "prompt 1"),
    ],
    ids=str,
)
def test_a_prompt_that_is_none(run: Path, prompts: Any, code: str, where: str) -> None:
    assert refused(code, tetrad.generate, tetrad.load(run / "sft"), prompts, max_new_tokens=8).where == where


def test_other_refusals(run: Path, tmp_path: Path) -> None:
    model, judge = tetrad.load(run / "sft"), tetrad.load_reward(run / "reward")
    for name, value in (("n", 0), ("logprobs", -1)):
        assert refused("E-CONF-RANGE", tetrad.generate, model, ["x"], **{name: value}).where == name
    refused("E-CONF-RANGE", tetrad.load, run / "sft", device="tpu")
    refused("E-CONF-RANGE", tetrad.load_reward, run / "reward", dtype="int8")
    refused("E-MODEL-TEMPLATE", tetrad.load, run / "sft", template="mine")
    for responses in ("ab", ["a"], []):
        refused("E-CONF-CONFLICT", tetrad.score, judge, ["x", "y"], responses)
        refused("E-CONF-CONFLICT", tetrad.logprobs, model, [[5], [6]], responses)
    assert refused("E-DATA-ENCODING", tetrad.score, judge, ["x", "y"], ["a", "\udcff"]).where == "prompt 1"
    assert refused("E-DATA-LONG", tetrad.logprobs, model, [[5], [5] * 50], [[6], [6] * 47]).where == "prompt 1"
    refused("E-DATA-LONG", tetrad.logprobs, model, [[]], [[6]])
    refused("E-IO-WRITE", tetrad.save, model, tmp_path)


def test_texts_are_the_first_of_n(run: Path) -> None:
    """Which response a number has does not depend on n; the text is that of the ids up to the end token."""
    model, prompts = tetrad.load(run / "sft"), ["Go on.", ("Go on.", "the plot"), MESSAGES]
    texts = tetrad.generate(model, prompts, max_new_tokens=12, seed=3, **FREE)
    four = tetrad.generate(model, prompts, n=4, max_new_tokens=12, seed=3, **FREE)
    assert [group.outputs[0].text for group in four] == texts
    assert tetrad.generate(model, prompts, logprobs=0, max_new_tokens=12, seed=3, **FREE) == [
        replace(group, outputs=group.outputs[:1]) for group in four
    ]
    assert len({output.ids for group in four for output in group.outputs}) == 12
    with pytest.raises(FrozenInstanceError):
        four[0].prompt_ids = ()  # type: ignore[misc]
    for output in (output for group in four for output in group.outputs):
        assert output.text == model.tokenizer.decode(output.ids)
        assert len(output.logprobs) == len(output.ids) <= 12 and not output.top_logprobs
        assert output.finish_reason == ("stop" if output.ids[-1] in model.ends else "length")
    assert tetrad.generate(model, [], n=2) == tetrad.generate(model, []) == []


def test_why_a_response_ended(run: Path) -> None:
    model = tetrad.load(run / "sft")
    groups = tetrad.generate(model, ["x"], n=64, max_new_tokens=24, stop=("w",), **FREE)
    outputs = groups[0].outputs
    for output in outputs:
        ended = output.ids[-1] in model.ends or output.text != model.tokenizer.decode(output.ids)
        assert output.finish_reason == ("stop" if ended else "length")
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert {output.valid_utf8 for output in outputs} == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_forward_and_of_the_sampler(run: Path, temperature: float) -> None:
    model = tetrad.load(run / "sft")
    settings = {"max_new_tokens": 10, "temperature": temperature, "top_p": 1.0}
    groups = tetrad.generate(model, ["Go on.", ("Go on.", "the plot")], n=3, logprobs=2, **settings)
    outputs = [output for group in groups for output in group.outputs]
    prompt_ids = [group.prompt_ids for group in groups for _ in group.outputs]
    values, mask = tetrad.logprobs(model, prompt_ids, [output.ids for output in outputs], temperature)
    assert values.shape == mask.shape == (6, max(len(output.ids) for output in outputs))
    assert mask.sum(1).tolist() == [len(output.ids) for output in outputs] and not values[~mask].any()
    for row, prompt, output in zip(values, prompt_ids, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.ids]])
        _, logits = tetrad.forward(model.model, ids)
        each = (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        expected = each.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (row[: len(expected)] - expected).abs().max() < 1e-5
        assert (row[: len(expected)] - torch.tensor(output.logprobs)).abs().max() < 1e-4
        for place, top in zip(each, output.top_logprobs, strict=True):
            assert [i for i, _ in top] == place.topk(2).indices.tolist()
            assert [p for _, p in top] == pytest.approx(place.topk(2).values.tolist(), abs=1e-4)


def test_gradients_of_logprobs_are_those_of_forward(run: Path) -> None:
    model, prompt, response = tetrad.load(run / "sft"), [5, 9, 3], [7, 40, 41, 8]
    assert not tetrad.logprobs(model, [prompt], [response])[0].requires_grad
    model.model.requires_grad_(True)
    (-tetrad.logprobs(model, [prompt], [response])[0].mean()).backward()
    own = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    labels = torch.tensor([[-100] * 3 + response])
    loss, _ = tetrad.forward(model.model, torch.tensor([[*prompt, *response]]), None, labels)
    assert loss is not None
    loss.backward()
    assert own.keys() == dict(model.model.named_parameters()).keys()
    for name, p in model.model.named_parameters():
        assert p.grad is not None and torch.allclose(own[name], p.grad, rtol=1e-4, atol=1e-6)


def test_scores_are_those_of_the_commands(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 responses, many no valid UTF-8: by `generate --reward`, by `tetrad score` and by the public functions."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(0)
    records = [{"Instruction": "Go on.", "Input": " ".join(dice.choices(WORDS, k=3))} for _ in range(1000)]
    Path("p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"max_new_tokens": 8, "seed": 3, **FREE}
    console = Console(out=StringIO(), err=StringIO())
    paths = {"model": str(run / "sft"), "prompts": "p.jsonl", "out": "a.jsonl", "reward": str(run / "judge")}
    generate_file(Generate(**paths, **settings), console)
    score_file(ScoreFile(model=str(run / "judge"), data="a.jsonl", out="b.jsonl"), console)
    by_generate, by_score = ([json.loads(line) for line in Path(f"{n}.jsonl").read_text().splitlines()] for n in "ab")

    prompts = [(record["Instruction"], record["Input"]) for record in records]
    groups = tetrad.generate(tetrad.load(run / "sft"), prompts, n=1, **settings)
    outputs = [group.outputs[0] for group in groups]
    assert [output.text for output in outputs] == [record["response"] for record in by_generate]
    assert sum(not output.valid_utf8 for output in outputs) > 100
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    scores = tetrad.score(tetrad.load_reward(run / "judge"), prompts, outputs)
    assert np.std(scores) > 0.3
    for other in (by_generate, by_score):
        assert np.abs(np.array(scores) - [record["score"] for record in other]).max() <= 1e-6


def test_a_text_is_scored_as_one_that_ended(run: Path) -> None:
    judge = tetrad.load_reward(run / "reward")
    ended, cut = (tetrad.Output("is warm", (), (), reason) for reason in ("stop", "length"))
    text, whole, part = tetrad.score(judge, ["x"] * 3, ["is warm", ended, cut])
    assert text == whole != part
    assert tetrad.score(judge, [], []) == []


# A training loop through public functions, and through what is below them.

STARTS, N = ("the plot", "a film", "这部电影"), 4
SAMPLING = {"max_new_tokens": 10, **FREE}
Step = tuple[list[tuple[int, ...]], list[float], torch.Tensor, list[torch.Tensor]]


def policy_loss(values_BT: torch.Tensor, mask_BT: torch.Tensor, scores: list[float]) -> torch.Tensor:
    rewards = torch.tensor(scores)
    return -((rewards - rewards.mean())[:, None] * values_BT).sum() / mask_BT.sum()


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> list[torch.Tensor]:
    """Gradients and new weights."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return gradients + [p.detach().clone() for p in model.parameters()]


def public_loop(run: Path) -> Iterator[Step]:
    actor, judge = tetrad.load(run / "sft"), tetrad.load_reward(run / "reward")
    actor.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(actor.model.parameters(), lr=1e-2)
    prompts = [("Go on.", start) for start in STARTS]
    for step in range(3):
        groups = tetrad.generate(actor, prompts, n=N, seed=step, **SAMPLING)
        outputs = [output for group in groups for output in group.outputs]
        scores = tetrad.score(judge, [prompt for prompt in prompts for _ in range(N)], outputs)
        ids = [output.ids for output in outputs]
        values, mask = tetrad.logprobs(actor, [group.prompt_ids for group in groups for _ in range(N)], ids)
        yield ids, scores, values.detach(), stepped(actor.model, optimizer, policy_loss(values, mask, scores))


def private_loop(run: Path) -> Iterator[Step]:
    folder, (judge,) = run / "sft" / "model", read_members(run / "reward" / "model")
    actor, words, form = read_causal(folder), Tokenizer.load(folder), TEMPLATES["instruction"]
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-2)
    turns = [(Turn("instruction", "Go on."), Turn("input", start)) for start in STARTS]
    heads = [form.prompt(words, each) for each in turns]
    for step in range(3):
        requests = [
            engine.Request(
                tuple(head),
                Sample(seed=step, **SAMPLING),
                tuple((step, "generate", copy, number) for copy in range(N)),
                words.eos_ids,
            )
            for number, head in enumerate(heads)
        ]
        responses = engine.generate(Fused(actor, torch.float32), requests, CPU, len(requests) * N, words)
        each = [(turns[i // N], heads[i // N], response) for i, response in enumerate(responses)]
        samples = [api.Completion((), (), t, r.text, finished=r.finished) for t, _, r in each]
        documents = documents_from_text(form, words, samples)
        scores = member_scores([judge], documents, CPU, 4096)[0].tolist()
        rows = [np.array([*head, *response.ids], np.int32) for _, head, response in each]
        marks = [np.arange(len(row)) >= len(head) for row, (_, head, _) in zip(rows, each, strict=True)]
        flat, _ = actor(CPU.put(pack(list(map(Tokens, rows, marks)))), "logprobs")
        mask = torch.zeros(len(each), max(len(r.ids) for r in responses), dtype=torch.bool)
        for row, response in zip(mask, responses, strict=True):
            row[: len(response.ids)] = True
        values = torch.zeros(mask.shape)
        values[mask] = flat
        ids = [response.ids for response in responses]
        yield ids, scores, values.detach(), stepped(actor, optimizer, policy_loss(values, mask, scores))


def test_a_loop_of_ones_own_is_that_of_the_parts_bit_for_bit(run: Path) -> None:
    """REINFORCE: sampled ids, scores, log-probabilities, gradients and weights of three steps."""
    steps = list(zip(public_loop(run), private_loop(run), strict=True))
    for (ids, scores, values, tensors), (own_ids, own_scores, own_values, own_tensors) in steps:
        assert ids == own_ids
        assert scores == own_scores
        assert torch.equal(values, own_values)
        assert all(map(torch.equal, tensors, own_tensors)) and len(tensors) == len(own_tensors) > 20
    assert steps[0][0][0] != steps[1][0][0] and steps[0][0][1] != steps[2][0][1]


def test_a_trained_model_answers_and_is_saved_with_its_new_weights(run: Path, tmp_path: Path) -> None:
    """Bit for bit as the copy that is loaded afresh, also in its log-probabilities."""
    model = tetrad.load(run / "chat")
    asked: dict[str, Any] = {"n": 3, "max_new_tokens": 8, **FREE}
    before = tetrad.generate(model, ["x", MESSAGES], **asked)
    model.model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.model.parameters(), lr=1.0)
    for number in range(2):
        ids = [group.outputs[0].ids for group in before]
        stepped(model.model, optimizer, -tetrad.logprobs(model, [group.prompt_ids for group in before], ids)[0].sum())
        fresh = tetrad.load(tetrad.save(model, tmp_path / f"saved-{number}"))
        now = tetrad.generate(model, ["x", MESSAGES], **asked)
        assert now == tetrad.generate(fresh, ["x", MESSAGES], **asked) != before
        assert fresh.template == model.template and fresh.ends == model.ends
        before = now
    assert refused("E-IO-WRITE", tetrad.save, model, tmp_path / "saved-0").hint == "name a new folder"


# Recipes.


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tokenizer and a few steps of pre-training."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny.write_tiny(folder)
    text = [str(folder / "text.txt")]
    model = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ff": 48, "max_positions": 64}
    pretrain = {"text": text, "tokens": 1024, "sequence_length": 32, "batch_tokens": 512}
    tables = {"name": "own", "model": model, "tokenizer": {"text": text, "vocab_size": 300}, "pretrain": pretrain}
    return tables | {"run": {"out": str(folder / "runs")}}


def test_a_recipe_of_tables_runs_and_is_skipped(tables: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = json.dumps(tables)
    result = tetrad.run(tables, quiet=True)
    assert capsys.readouterr() == ("", "")
    assert result.folder == Path(tables["run"]["out"]) / "own"
    assert (result.trained, result.verdict) == (("tokenizer", "pretrain"), None)
    assert result.stages == {stage: result.folder / stage for stage in result.trained}
    assert isinstance(tetrad.load(result.stages["pretrain"], template="chatml"), tetrad.Policy)
    again = tetrad.run(tables)
    assert again.trained == () and again.stages == result.stages
    assert "nothing to do" in capsys.readouterr().out
    for overrides in ({"pretrain.tokens": 512}, {"pretrain": {"tokens": 1536}}):
        assert tetrad.run(tables, overrides, quiet=True).trained == ("pretrain",)
        written = (result.folder / "pretrain" / "recipe.toml").read_text()
        assert f"tokens = {next(iter(overrides.values())) if 'pretrain.tokens' in overrides else 1536}\n" in written
    assert json.dumps(tables) == before


def test_mistakes_in_a_recipe(tables: dict[str, Any], tmp_path: Path) -> None:
    run = tetrad.run
    assert refused("E-CONF-CONFLICT", run, tables, {"run.nproc": 2}).where == "run.nproc"
    assert refused("E-CONF-UNKNOWN", run, tables, {"pretrain.step": 5}).where == "overrides"
    assert refused("E-CONF-TYPE", run, tables, {"pretrain": {"tokens": "5"}}).where == "overrides"
    refused("E-CONF-UNKNOWN", run, tables | {"pretrian": {"tokens": 5}})
    refused("E-CONF-MISSING", run, tmp_path / "none.toml")


# The pages.


def loop_of(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (code,) = (code for code in blocks if "backward" in code)
    return str(code)


@pytest.mark.parametrize("page", ["docs/python.md", "docs/zh/python.md"])
def test_the_loop_of_the_page_runs(run: Path, tmp_path: Path, page: str) -> None:
    code, written = loop_of(page), StringIO()
    assert len(code.splitlines()) <= 40
    saved = tmp_path / "reinforce"
    code = re.sub(r'"runs/reviews-\w\w-quick/reinforce"', repr(str(saved)), code)
    code = re.sub(r'"runs/reviews-\w\w-quick/(\w+)"', lambda match: repr(str(run / match[1])), code)
    with redirect_stdout(written):
        exec(code, {})
    lines = written.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    assert "KL +0.00 nats" in lines[0].replace("KL 0.00", "KL +0.00").replace("KL -0.00", "KL +0.00")
    assert "KL 0.00" not in lines[2]
    assert tetrad.generate(tetrad.load(saved), ["x"], max_new_tokens=3)


def test_both_pages_have_one_loop() -> None:
    pages = ("docs/python.md", "docs/zh/python.md")
    english, chinese = (re.sub(r"#.*|\"[^\"]*\"", "", loop_of(page)) for page in pages)
    assert [line.rstrip() for line in english.splitlines()] == [line.rstrip() for line in chinese.splitlines()]
