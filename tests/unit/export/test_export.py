"""`tetrad export`: what is written can be read, in the type that was named, and what cannot be written is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import families
import tetrad
import toys
from served import write_model
from tetrad.cli.main import main
from tetrad.errors import UserError
from tetrad.export.ollama import go_template
from tetrad.export.vocabulary import differences, words
from tetrad.model.huggingface import read_causal, read_members
from tetrad.reward.model import load_reward
from tetrad.storage import verify_folder, write_folder
from tetrad.text.bpe import QWEN2
from tetrad.text.chat_template import TEMPLATES, Template, recorded
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Turn

LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def exported(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What was printed by a command that must succeed."""
    assert main(["export", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) != 0
    return capsys.readouterr().err


# --- a folder ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_in_every_type(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    out = tmp_path / "out"
    exported(capsys, run / "chat", "--to", out, "--dtype", dtype)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    manifest = verify_folder(out)
    assert manifest["exported"]["dtype"] == dtype and str(tmp_path) not in json.dumps(manifest)
    source = dict(read_causal(run / "chat/model").named_parameters())
    for name, tensor in read_causal(out).named_parameters():
        assert torch.equal(tensor, source[name].to(getattr(torch, dtype)).float())
    assert (out / "model.safetensors").stat().st_size < 0.6 * (run / "chat/model/model.safetensors").stat().st_size or (
        dtype == "float32"
    )
    assert recorded(out) == TEMPLATES["chatml"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (run / "chat/model" / name).read_bytes()
    assert f"Weights in {dtype}" in (out / "README.md").read_text()
    assert tetrad.generate(tetrad.load(out), ["a"], max_new_tokens=2, temperature=0.0)


def test_keys_of_types_differ(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later stage that starts from one of them is another stage."""
    for dtype in ("float32", "bfloat16"):
        exported(capsys, run / "chat", "--to", tmp_path / dtype, "--dtype", dtype)
    keys = {verify_folder(tmp_path / dtype)["key"] for dtype in ("float32", "bfloat16")}
    assert len(keys) == 2 and "" not in keys


def test_a_reward_model_keeps_its_bias_and_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = write_model(tmp_path / "reward", reward=True, reward_bias=-0.5)
    size = json.loads((stage / "model/config.json").read_text())["vocab_size"]
    models = [toys.scalar(seed, 0.3 * seed, vocab_size=size, max_positions=96) for seed in range(3)]
    kept = {path.name: path.read_bytes() for path in (stage / "model").iterdir() if path.name != "manifest.json"}
    write_folder(stage / "model", {**kept, **toys.members(models)}, {"key": "k"})
    exported(capsys, stage, "--to", tmp_path / "out", "--dtype", "bfloat16")
    assert not (tmp_path / "out/generation_config.json").exists()
    assert len(load_reward(tmp_path / "out").members) == 3
    biases = [float(member.bias) for member in read_members(tmp_path / "out")]
    assert biases == pytest.approx([-0.5, 0.3, 0.6], abs=1e-6)  # not rounded to bfloat16


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = write_model(tmp_path / "big")
    from tetrad.model.huggingface import model_files

    model = read_causal(stage / "model")
    model.model.norm.weight.data[0] = 1e6
    toys.write(tmp_path / "hf", {**model_files(model), **Tokenizer.load(stage / "model").files()})
    error = refused(capsys, tmp_path / "hf", "--to", tmp_path / "out", "--dtype", "float16")
    assert "E-NUM-NONFINITE" in error and "model.norm.weight" in error and not (tmp_path / "out").exists()


CONFLICTS = [
    (("--to", "{full}"), "E-CONF-CONFLICT", "something is there"),
    (("--to", "{model}"), "E-CONF-CONFLICT", "own folder"),
    (("--to", "{model}/deeper"), "E-CONF-CONFLICT", "own folder"),
    (("--gguf", "{model}/x.gguf"), "E-CONF-CONFLICT", "own folder"),
    (("--to", "{new}", "--dtype", "float8"), "E-CONF-", "float16"),
    ((), "E-CONF-MISSING", "--to FOLDER or --gguf FILE"),
    (("--to", "{new}", "--gguf", "{new}.gguf"), "E-CONF-CONFLICT", "not both"),
    (("--to", "{new}", "--type", "f32"), "E-CONF-CONFLICT", "--gguf"),
    (("--gguf", "{new}", "--dtype", "float32"), "E-CONF-CONFLICT", "--to"),
    (("--to", "{new}", "--base", "x"), "E-CONF-CONFLICT", "--adapter-only"),
    (("--to", "{new}", "--adapter-only"), "E-MODEL-MISSING", "no adapters"),
]


@pytest.mark.parametrize(("flags", "code", "text"), CONFLICTS)
def test_refusals(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: str, text: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    places = {"full": tmp_path / "full", "model": run / "chat/model", "new": tmp_path / "new"}
    error = refused(capsys, run / "chat", *(flag.format(**places) for flag in flags))
    assert code in error and text in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_gguf_refuses_reward_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, run / "reward", "--gguf", tmp_path / "x.gguf")
    assert "E-CKPT-ROLE" in error and "--to" in error


def test_without_the_package(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tetrad.export.gguf", None)
    assert ".[gguf]" in refused(capsys, run / "chat", "--gguf", tmp_path / "x.gguf")


# --- GGUF ---


def written(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, **changes: Any) -> tuple[Path, Any]:
    stage = write_model(tmp_path / "stage", "chatml", **{"hidden_size": 64, "head_dim": 16, "ff": 80, **changes})
    exported(capsys, stage, "--gguf", tmp_path / "out/m.gguf", "--type", kind)
    return stage, gguf.GGUFReader(tmp_path / "out/m.gguf")


def llama_rows(weight: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Row 2i of a head is row i in Hugging Face's order, row 2i + 1 is row i + half."""
    rows = []
    for head in range(len(weight) // head_dim):
        for i in range(head_dim // 2):
            rows += [weight[head * head_dim + i], weight[head * head_dim + head_dim // 2 + i]]
    return np.stack(rows)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    stage, reader = written(tmp_path, capsys, "f32", family=family, head_dim=16, tied=family == "qwen2")
    ours = {name: p.detach().numpy() for name, p in read_causal(stage / "model").named_parameters()}
    theirs = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(theirs) == len(ours)
    permuted = family in ("llama", "mistral")
    for matrix, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        weight = ours[f"model.layers.1.self_attn.{matrix}_proj.weight"]
        expected = llama_rows(weight, 16) if permuted and matrix in "qk" else weight
        assert np.array_equal(theirs[f"blk.1.{name}.weight"], expected), name
    for matrix in ("gate", "up", "down"):
        assert np.array_equal(theirs[f"blk.0.ffn_{matrix}.weight"], ours[f"model.layers.0.mlp.{matrix}_proj.weight"])
    assert np.array_equal(theirs["token_embd.weight"], ours["model.embed_tokens.weight"])
    assert ("output.weight" in theirs) == (family != "qwen2")
    if family == "qwen2":
        assert np.array_equal(theirs["blk.1.attn_k.bias"], ours["model.layers.1.self_attn.k_proj.bias"])
    if family == "qwen3":
        assert np.array_equal(theirs["blk.1.attn_k_norm.weight"], ours["model.layers.1.self_attn.k_norm.weight"])
    sizes = {name: reader.fields[f"{'llama' if permuted else family}.{name}"].contents() for name in SIZES}
    assert sizes == SIZES


SIZES = {
    "context_length": 96,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 80,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "rope.dimension_count": 16,
    "rope.freq_base": 10_000.0,
}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_types(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Rows of 64 are cut into blocks of 32, rows of 80 are not; what is one number a channel stays float32."""
    stage, reader = written(tmp_path, capsys, kind)
    ours = dict(read_causal(stage / "model").named_parameters())
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert {types["blk.0.attn_norm.weight"], types["blk.0.attn_q.bias"], types["output_norm.weight"]} == {"F32"}
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    back = gguf.quants.dequantize(up.data, up.tensor_type)
    expected = ours["model.layers.0.mlp.up_proj.weight"].detach().numpy()
    assert np.abs(back - expected).max() < np.abs(expected).max() / (127 if kind == "q8_0" else 2000)


def test_llama_3s_frequencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tetrad.model.config import RopeScaling

    scaling = RopeScaling(8.0, 1.0, 4.0, 32)
    _, reader = written(tmp_path, capsys, "f16", family="llama", rope_scaling=scaling, head_dim=16, rope_theta=10_000.0)
    factors = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert factors.tensor_type.name == "F32"
    waves = 2 * np.pi * 10_000.0 ** (np.arange(0, 16, 2) / 16)
    expected = [1.0 if wave < 32 / 4 else 8.0 if wave > 32 else 0.0 for wave in waves]
    known = [i for i, factor in enumerate(expected) if factor]
    assert known != list(range(8)) and np.allclose(factors.data[known], np.array(expected)[known], rtol=1e-6)
    between = [i for i in range(8) if i not in known]
    smooth = (32 / waves[between] - 1) / (4 - 1)
    assert np.allclose(factors.data[between], 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5)
    stage = write_model(tmp_path / "other", "chatml", family="qwen3", rope_scaling=scaling)
    assert "Llama 3's rotary" in refused(capsys, stage, "--gguf", tmp_path / "other.gguf")


def test_a_width_of_heads_that_llama_cpp_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = write_model(tmp_path / "stage", "chatml", head_dim=16)  # 4 heads of a model of 32
    error = refused(capsys, stage, "--gguf", tmp_path / "out/m.gguf")
    assert "E-MODEL-UNSUPPORTED" in error and "width" in error and not (tmp_path / "out/m.gguf").exists()


def test_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Self-trained, with three rows of the model that no token has."""
    tokenizer = Tokenizer.load(write_model(tmp_path / "other", "chatml") / "model")
    stage, reader = written(tmp_path, capsys, "f16", vocab_size=tokenizer.size + 3, eos_ids=(0,))
    spec = json.loads(tokenizer.text)
    say = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    tokens, types = say["tokenizer.ggml.tokens"], say["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.size + 3 and types[-3:] == [5, 5, 5]
    assert tokens[: tokenizer.size] == [tokenizer.name(i) for i in range(tokenizer.size)]
    controls = {token["id"] for token in spec["added_tokens"]}
    assert [i for i, kind in enumerate(types) if kind == 3] == sorted(controls)
    assert say["tokenizer.ggml.merges"] == [" ".join(merge) for merge in spec["model"]["merges"]]
    assert (say["tokenizer.ggml.model"], say["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    end = tokenizer.control("<|im_end|>")
    assert (say["tokenizer.ggml.eos_token_id"], say["tokenizer.ggml.add_bos_token"]) == (end, False)
    assert say["tokenizer.ggml.padding_token_id"] == tokenizer.pad_id
    config = json.loads((stage / "model/tokenizer_config.json").read_text())
    assert say["tokenizer.chat_template"] == config["chat_template"]


def changed(**parts: Any) -> Tokenizer:
    spec = json.loads(families.learned().text)
    for name, value in parts.items():
        (spec["model"] if name == "ignore_merges" or name == "byte_fallback" else spec)[name] = value
    return Tokenizer(json.dumps(spec))


def split(regex: str, **options: Any) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pattern = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **options}
    return {"type": "Sequence", "pretokenizers": [pattern, byte_level]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [705], "tokens": ["<|begin_of_text|>"]}},
}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2", {}),
        ("llama-bpe", {"pre_tokenizer": split(LLAMA3), "ignore_merges": True}),
        ("dbrx", {"pre_tokenizer": split(LLAMA3)}),
        ("gpt-2", {"pre_tokenizer": BYTES, "normalizer": None}),
        ("smollm", {"pre_tokenizer": DIGITS}),
        ("", {"ignore_merges": True}),
        ("", {"pre_tokenizer": split(QWEN2 + "|x")}),
        ("", {"pre_tokenizer": split(QWEN2, invert=True)}),
        ("", {"pre_tokenizer": {**BYTES, "add_prefix_space": True}}),
        ("", {"pre_tokenizer": split(QWEN2)["pretokenizers"][0]}),
        ("", {"normalizer": {"type": "Lowercase"}}),
        ("", {"byte_fallback": True}),
    ],
)
def test_how_it_splits_decides_the_name(name: str, parts: dict[str, Any]) -> None:
    tokenizer = changed(**parts)
    config = toys.config(vocab_size=tokenizer.size)
    if name:
        assert words(tokenizer, config, tokenizer.eos_ids, "x")["tokenizer_pre"] == name
        return
    with pytest.raises(UserError) as caught:
        words(tokenizer, config, tokenizer.eos_ids, "x")
    assert caught.value.code == "E-MODEL-UNSUPPORTED"


def test_start_and_end_tokens() -> None:
    tokenizer = changed(post_processor=BOS)
    bos = tokenizer.control("<|begin_of_text|>")
    ends = tuple(tokenizer.control(name) or 0 for name in ("<|im_end|>", "<|eot_id|>", "<|sep|>", "<|endoftext|>"))
    config = toys.config(vocab_size=tokenizer.size)
    say = words(tokenizer, config, ends, "x")
    assert say["add_bos_token"] and json.loads(tokenizer.text)["post_processor"]["special_tokens"]
    assert (say["eos_token_id"], say["eot_token_id"], say["eom_token_id"]) == ends[:3]
    assert not any("stop" in note for note in differences(tokenizer, ends))  # the fourth it knows by its name
    other = tokenizer.control("<|start_header_id|>") or 0
    assert any("<|start_header_id|>" in note for note in differences(tokenizer, (*ends, other)))
    plain = words(families.learned(), config, ends[:1], "x")
    assert (plain["eot_token_id"], plain["bos_token_id"]) == (ends[0], families.learned().document_end)
    assert not plain["add_bos_token"] and bos != plain["bos_token_id"]


# --- Ollama ---


def go(text: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that these templates have."""
    system = "\n\n".join(m["Content"] for m in messages if m["Role"] == "system")
    conditions = {
        '(ne (index .Messages 0).Role "system")': lambda m, i: messages[0]["Role"] != "system",
        "(eq (len (slice $.Messages $i)) 1)": lambda m, i: i == len(messages) - 1,
        ".System": lambda m, i: bool(system),
        "not .System": lambda m, i: not system,
    }
    tokens = re.split(r"(\{\{.*?\}\})", text, flags=re.DOTALL)

    def block(at: int, message: Any, index: int) -> tuple[str, int]:
        out = ""
        while at < len(tokens):
            token = tokens[at]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action is None:
                out += token
            elif action == "end":
                return out, at
            elif action.startswith("range"):
                assert action in ("range .Messages", "range $i, $_ := .Messages")
                end = at
                for number, each in enumerate(messages):
                    inner, end = block(at + 1, each, number)
                    out += inner
                at = end
            elif action.startswith("if "):
                condition = action[3:]
                key = condition if condition in conditions else f"({condition})"
                inner, at = block(at + 1, message, index)
                out += inner if conditions[key](message, index) else ""
            elif action.startswith('"'):
                out += json.loads(action)
            else:
                out += {
                    ".Role": lambda: message["Role"],
                    ".Content": lambda: message["Content"],
                    ".System": lambda: system,
                }[action]()
            at += 1
        return out, at

    return block(0, None, 0)[0]


CHATS = [
    [("user", "What is it?")],
    [("system", "Be brief."), ("user", "你好\n{{ .Role }}\n")],
    [("user", "a"), ("assistant", "b"), ("user", "c  d")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


@pytest.mark.parametrize("form", [*TEMPLATES.values(), Template(separator='\n"x"{{\n')], ids=lambda form: form.name)
@pytest.mark.parametrize("chat", CHATS)
def test_the_modelfiles_template_writes_the_prompt(form: Template, chat: list[tuple[str, str]]) -> None:
    if not form.start and len(chat) > 2:
        pytest.skip("takes one question")
    tokenizer = families.learned()
    prompt = form.prompt(tokenizer, [Turn(role, text.strip() if form.trims else text) for role, text in chat])  # type: ignore[arg-type]
    end = tokenizer.name(form.end_id(tokenizer))
    messages = [{"Role": role, "Content": text.strip() if form.trims else text} for role, text in chat]
    assert go(go_template(form, end, add_bos=False), messages) == tokenizer.decode(prompt, keep_control=True)
    assert go(go_template(form, end, add_bos=True), messages) == tokenizer.decode(
        prompt[bool(form.begin) :], keep_control=True
    )


def test_the_modelfile(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = exported(capsys, run / "chat", "--gguf", tmp_path / "m.gguf")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER temperature 0.7" in lines
    assert "PARAMETER repeat_penalty 1.0" in lines and "NFC" in said
    assert "something is there" in refused(capsys, run / "chat", "--gguf", tmp_path / "n.gguf")  # its Modelfile
    exported(capsys, run / "pretrain", "--gguf", tmp_path / "base/m.gguf")
    assert "TEMPLATE" not in re.findall(r"^\w+", (tmp_path / "base/Modelfile").read_text(), re.MULTILINE)
