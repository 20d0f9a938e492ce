"""Folders are found and told apart; replies depend on seed and number alone; rewards read what was sampled."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import tetrad
from families import conversation
from served import completed, documents_from_text, score_documents, tokenizer, write_model
from tetrad.api import generate
from tetrad.distributed.device import Device
from tetrad.errors import UserError
from tetrad.inference import engine, policy
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.policy import completion, encode_prompt, instruction_prompt, load, model_folder, request
from tetrad.model.lora import ALL, adapted, add_adapters
from tetrad.model.transformer import CausalLM
from tetrad.reward.model import load_reward, score_samples
from tetrad.settings import use
from tetrad.types import Prompt, Response, Turn

Change = Callable[[CausalLM], object]


def code_of(function: object, *arguments: object) -> UserError:
    with pytest.raises(UserError) as caught:
        function(*arguments)  # type: ignore[operator]
    return caught.value


def questions(model: policy.Policy, *inputs: str) -> list[EncodedPrompt]:
    return [encode_prompt(model, instruction_prompt("Go on.", text, where=text)) for text in inputs]


def test_a_stage_or_its_model_or_a_folder(run: Path, tmp_path: Path) -> None:
    assert model_folder(run / "sft") == run / "sft" / "model"
    assert model_folder(str(run / "sft" / "model")) == run / "sft" / "model"
    plain = shutil.copytree(run / "sft" / "model", tmp_path / "hf")
    (plain / "manifest.json").unlink()
    assert load(plain).form == load(run / "sft").form


def test_what_is_no_model_says_what_to_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "lineage.json").write_text("{}")
    for path, said in (
        (run, f"name one: {run / 'ppo'}"),
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "begun", "no finished"),
        (tmp_path, "no config.json"),
    ):
        error = code_of(model_folder, path)
        assert error.code == "E-MODEL-MISSING"
        assert said in str(error)


def test_roles(run: Path) -> None:
    assert code_of(load, run / "reward").code == "E-CKPT-ROLE"
    error = code_of(load_reward, run / "sft")
    assert (error.code, error.exit_code) == ("E-CKPT-ROLE", 4)
    assert "runs/NAME/reward" in error.hint
    assert isinstance(load(run / "ppo").model, CausalLM)


def test_template(run: Path) -> None:
    """The folder's own, or the chosen one; none is needed until something is asked."""
    base = load(run / "pretrain")
    error = code_of(encode_prompt, base, instruction_prompt("x"))
    assert error.code == "E-MODEL-TEMPLATE"
    assert "--template instruction or --template chatml" in error.hint
    assert load(run / "pretrain", "chatml").form.name == "chatml"
    assert load(run / "sft", "chatml").form.name == "chatml"
    assert load(run / "chat").form.name == "chatml"


def test_a_plain_separator_stays(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "sft" / "model", tmp_path / "hf")
    (folder / "manifest.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"separator": "<|sep|>"', '"separator": "##"'))
    assert load(folder, "instruction").form.separator == "##"


def test_damage_is_noticed(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "sft", tmp_path / "sft")
    path = folder / "model" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert code_of(load, folder).code == "E-CKPT-HASH"


def test_a_vocabulary_beyond_the_embedding(tmp_path: Path) -> None:
    write_model(tmp_path / "sft", vocab_size=290)
    assert code_of(load, tmp_path / "sft").code == "E-MODEL-TOKENIZER"


def test_ends(run: Path) -> None:
    model = load(run / "chat")
    assert model.ends == (model.tokenizer.control("<|im_end|>"),)
    base = load(run / "pretrain", "chatml")
    assert base.ends == (base.tokenizer.control("<|im_end|>"), base.tokenizer.control("<|endoftext|>"))


def test_replies_follow_from_seed_number_and_copy(run: Path) -> None:
    """Not from the questions beside, the copies beside, or the longest length."""
    model, settings = load(run / "sft"), use.Sample(max_new_tokens=12, seed=5)
    four = questions(model, "the plot", "a film", "这部电影", "slow")
    found = completed(model, four, settings, samples_per_prompt=3)
    ids = [c.response_ids for c in found]
    assert len(set(ids)) == 12
    assert [c.where for c in found[::3]] == ["the plot", "a film", "这部电影", "slow"]
    requests = [request(model, prompt, settings, number, 3) for number, prompt in enumerate(four[2:], 2)]
    numbered = engine.generate(model.fused, requests, model.device, 2, model.tokenizer)
    assert [response.ids for response in numbered] == ids[6:]
    assert [c.response_ids for c in completed(model, four, settings)] == ids[::3]
    short = completed(model, four, replace(settings, max_new_tokens=4), samples_per_prompt=3)
    assert [c.response_ids for c in short] == [i[:4] for i in ids]
    other = completed(model, four, replace(settings, seed=6), samples_per_prompt=3)
    assert all(c.response_ids != i for c, i in zip(other, ids, strict=True))


def test_public_names(run: Path) -> None:
    model = tetrad.load(run / "sft")
    texts = tetrad.generate(model, ["Go on.", ("Go on.", "the plot")], max_new_tokens=8, temperature=0.0)
    ids = model.form.prompt(model.tokenizer, (Turn("instruction", "Go on."), Turn("input", "the plot")))
    first = []
    for _ in range(8):
        _, logits = tetrad.forward(model.model, torch.tensor([[*ids, *first]]))
        first.append(int(logits[0, -1].argmax()))
        if first[-1] in model.ends:
            break
    assert texts[1] == model.tokenizer.decode(first)
    assert texts[0] != texts[1]
    assert tetrad.generate(model, []) == []
    assert tetrad.generate(model, ["x"], max_new_tokens=5) == tetrad.generate(model, ["x"], max_new_tokens=5)
    assert tetrad.generate(model, ["x"], max_new_tokens=5) != tetrad.generate(model, ["x"], max_new_tokens=5, seed=1)
    with pytest.raises(UserError, match="E-CONF-RANGE"):
        tetrad.generate(model, ["x"], temperature=-1.0)


def test_too_long(run: Path) -> None:
    model = load(run / "sft")
    assert code_of(completed, model, questions(model, "plot " * 90), use.Sample(max_new_tokens=8)).code == "E-DATA-LONG"


def test_broken_text(run: Path) -> None:
    error = code_of(encode_prompt, load(run / "sft"), instruction_prompt("Go on.", "\udcff", where="--instruction"))
    assert (error.code, error.where) == ("E-DATA-ENCODING", "--instruction")


def test_written_documents_are_those_of_training(run: Path) -> None:
    judge = load_reward(run / "reward")
    prompts = [Prompt((Turn("instruction", "Go on."), Turn("input", "the plot")), "f:1"), Prompt((Turn("user", "x"),))]
    whole, cut = documents_from_text(judge, prompts, ["is warm", "is warm"], [True, False])
    turns = (*prompts[0].turns, Turn("assistant", "is warm"))
    assert whole.ids.tolist() == conversation(judge.template, judge.tokenizer, turns).ids.tolist()
    assert whole.where == "f:1"
    asked_ids = judge.template.prompt(judge.tokenizer, prompts[1].turns)
    assert cut.ids.tolist() == [*asked_ids, *judge.tokenizer.encode("is warm")]


@pytest.mark.parametrize(("form", "reward"), [("sft", "reward"), ("sft", "judge"), ("chat", "reward")])
def test_rewards_read_what_is_written(run: Path, form: str, reward: str) -> None:
    """Whoever wrote it: cut replies without an end token, ended ones with it; a stop text ends one too."""
    model, judge = load(run / form), load_reward(run / reward)
    settings = use.Sample(max_new_tokens=20, stop=("w", "th"), temperature=0.8)
    found = completed(model, questions(model, *["the plot"] * 64), settings)
    assert {sample.finished for sample in found} == {True, False}
    prompts, texts = [Prompt(sample.turns) for sample in found], [sample.text for sample in found]
    documents = documents_from_text(judge, prompts, texts, [sample.finished for sample in found])
    assert score_samples(judge, found) == score_documents(judge, documents)
    again = [document.ids.tolist() for document in documents]
    assert again != [[*sample.prompt_ids, *sample.response_ids] for sample in found]  # so the test would notice


BYTES = {
    "plain": (b"warm", True),
    "chinese": ("这部电影".encode(), True),
    "a character cut by max_new_tokens": ("电影".encode()[:-1], False),
    "an emoji cut": ("a🎬".encode()[:-1], False),
    "half an emoji in the middle": ("🎬".encode()[:2] + b"b", False),
    "a lone continuation byte": (b"a\x80b", False),
    "an overlong form": (b"\xc0\xaf", False),
    "a surrogate": (b"\xed\xa0\x80", False),
    "beyond Unicode": (b"\xf4\x90\x80\x80", False),
    "U+FFFD itself": ("a\ufffdb".encode(), True),
    "U+FFFD itself and a wrong byte": ("a\ufffdb".encode() + b"\xff", False),
    "NUL": (b"a\0b", True),
    "spaces around": (b"  a \n", True),
    "a control token's name": (b"<|endoftext|><|sep|>", True),
    "nothing": (b"", True),
}


@pytest.mark.parametrize(("raw", "valid"), BYTES.values(), ids=BYTES)
def test_a_reply_that_is_no_utf8_is_known_and_scored_as_written(run: Path, raw: bytes, valid: bool) -> None:
    """As ids of single bytes, which no tokenizer would choose: the score is that of the text all the same."""
    model, judge = load(run / "sft"), load_reward(run / "reward")
    ids = tuple(model.tokenizer.encode(chr(byte))[0] if byte < 128 else byte_id(model, byte) for byte in raw)
    text = raw.decode(errors="replace")
    assert model.tokenizer.decode(ids) == text
    (asked_for,) = questions(model, "the plot")
    found = completion(model, asked_for, Response(ids, (0.0,) * len(ids), "length", text))
    assert found.valid_utf8 == valid
    documents = documents_from_text(judge, [asked_for.prompt], [text], [False])
    assert score_samples(judge, [found]) == score_documents(judge, documents)


def byte_id(model: policy.Policy, byte: int) -> int:
    """The id of one byte beyond ASCII, in a byte-level vocabulary."""
    return next(i for i in range(model.tokenizer.size) if model.tokenizer._bytes(i) == bytes([byte]))


def test_bytes_behind_a_stop_text_are_not_written(run: Path) -> None:
    """The reply ends before them, so it is valid whatever they are."""
    model = load(run / "sft")
    ids = (*model.tokenizer.encode("a"), *model.tokenizer.encode("b"), byte_id(model, 0x80))
    (asked_for,) = questions(model, "the plot")
    assert completion(model, asked_for, Response(ids, (0.0,) * 3, "stop", "a")).valid_utf8
    assert not completion(model, asked_for, Response(ids, (0.0,) * 3, "length", "ab\ufffd")).valid_utf8


def test_public_generate_takes_the_settings_of_the_command(run: Path) -> None:
    model = load(run / "sft")
    greedy = generate(model, ["the plot"], max_new_tokens=9, greedy=True)
    assert greedy == generate(model, ["the plot"], max_new_tokens=9, temperature=0.0, seed=5)
    assert greedy != generate(model, ["the plot"], max_new_tokens=9)
    stop = greedy[0][2]
    assert generate(model, ["the plot"], max_new_tokens=9, greedy=True, stop=(stop,))[0] == greedy[0].partition(stop)[0]
    for wrong, code in (
        ({"greedy": True, "temperature": 0.5}, "E-CONF-CONFLICT"),
        ({"template": "chatml"}, "E-CONF-CONFLICT"),
        ({"heat": 1.0}, "E-CONF-UNKNOWN"),
        ({"top_p": 2.0}, "E-CONF-RANGE"),
    ):
        assert code_of(partial(generate, model, ["x"], **wrong)).code == code


def matrices(model: CausalLM) -> list[torch.Tensor]:
    return [linear.weight for _, linear in adapted(model)]


@torch.no_grad()
def doubled_in_place(model: CausalLM) -> None:
    for weight in matrices(model):
        weight.mul_(2)


def doubled_behind_autograd(model: CausalLM) -> None:
    """Neither the address nor the version of a parameter tells of this one."""
    for weight in matrices(model):
        weight.data.mul_(2)


def doubled_by_numpy(model: CausalLM) -> None:
    for weight in matrices(model):
        weight.detach().numpy()[:] *= 2


def data_replaced(model: CausalLM) -> None:
    for weight in matrices(model):
        weight.data = weight.data * 2


def parameters_replaced(model: CausalLM) -> None:
    for _, linear in adapted(model):
        linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


def state_loaded(model: CausalLM) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def stepped(model: CausalLM) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loss, _ = tetrad.forward(model, torch.tensor([[5, 6, 7, 8]]), labels_BL=torch.tensor([[5, 6, 7, 8]]))
    assert loss is not None
    loss.backward()
    optimizer.step()


@torch.no_grad()
def rows_turned(model: CausalLM) -> None:
    """The same numbers in other places."""
    for weight in matrices(model):
        weight.data.copy_(weight.flip(0).clone())


@torch.no_grad()
def columns_turned(model: CausalLM) -> None:
    for weight in matrices(model):
        weight.data.copy_(weight.flip(1).clone())


@torch.no_grad()
def signs_turned(model: CausalLM) -> None:
    for weight in matrices(model):
        weight.data.neg_()


@torch.no_grad()
def norms_changed(model: CausalLM) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.mul_(torch.linspace(-2, 2, model.config.hidden_size))


def one_bit_changed(model: CausalLM) -> None:
    model.model.embed_tokens.weight.data.view(torch.int32)[7, 3] ^= 1


def with_adapters(model: CausalLM) -> None:
    add_adapters(model, 2, 8.0, ALL, seed=1)
    for _, linear in adapted(model):
        assert linear.adapter is not None
        linear.adapter.b.data.normal_(generator=torch.Generator().manual_seed(3))


def without_adapters(model: CausalLM) -> None:
    for _, linear in adapted(model):
        linear.adapter = None


def scaled_adapters(model: CausalLM) -> None:
    for _, linear in adapted(model):
        assert linear.adapter is not None
        linear.adapter.scale *= -3


def wider_norm(model: CausalLM) -> None:
    model.config = replace(model.config, norm_eps=0.5)


CHANGES: tuple[tuple[Change, ...], ...] = (
    (doubled_in_place,),
    (doubled_behind_autograd,),
    (doubled_by_numpy,),
    (data_replaced,),
    (data_replaced, data_replaced, data_replaced),
    (parameters_replaced,),
    (state_loaded,),
    (stepped, stepped),
    (rows_turned,),
    (columns_turned,),
    (signs_turned,),
    (norms_changed,),
    (with_adapters, scaled_adapters, without_adapters),
    (wider_norm,),
    (CausalLM.bfloat16, CausalLM.float),
    (CausalLM.double,),
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "+".join(change.__name__ for change in changes))
def test_a_changed_model_answers_as_its_fresh_copy(run: Path, changes: tuple[Change, ...]) -> None:
    """Bit for bit: the sampler's weights are made of the model's, and must not be older than they are."""
    model = load(run / "sft")
    asked_for, settings = questions(model, "the plot", "a film"), use.Sample(max_new_tokens=8)
    before = completed(model, asked_for, settings)
    for change in changes:
        change(model.model)
        fresh = replace(model, model=deepcopy(model.model))
        found = completed(model, asked_for, settings)
        assert found == completed(fresh, asked_for, settings)
        assert found != before  # so that old weights would be seen
        before = found


def test_a_model_answers_where_its_weights_are(run: Path) -> None:
    """Not where they were when it was opened: a module moves with `.to`."""
    model = load(run / "sft")
    moved = replace(model, device=Device(torch.device("meta"), torch.float32))
    assert generate(moved, ["the plot"], max_new_tokens=5) == generate(model, ["the plot"], max_new_tokens=5)


def test_one_bit_is_enough_and_nothing_is_made_twice(run: Path) -> None:
    model = load(run / "sft")
    first = model.fused
    assert model.fused is first
    one_bit_changed(model.model)
    assert model.fused is not first


def test_rate_refuses_what_it_cannot_read(run: Path) -> None:
    judge = load_reward(run / "reward")
    long = documents_from_text(judge, [instruction_prompt("x", where="f:3")], ["plot " * 90], [True])
    error = code_of(score_documents, judge, long)
    assert (error.code, error.where) == ("E-DATA-LONG", "f:3")
    with torch.no_grad():
        judge.members[0].score.weight.fill_(float("nan"))
    error = code_of(
        score_documents, judge, documents_from_text(judge, [instruction_prompt("x", where="f:4")], ["warm"], [True])
    )
    assert (error.code, error.where) == ("E-NUM-NONFINITE", "f:4")


def test_text_is_learned_with_chinese() -> None:
    """The other tests need tokens that hold half a character."""
    words = tokenizer()
    assert len(words.encode("电影")) > 1
