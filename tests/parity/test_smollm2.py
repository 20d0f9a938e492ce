"""A checkpoint that others trained, SmolLM2-135M-Instruct (Apache-2.0): read, compared with transformers, written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fetched
import toys
from tetrad.inference.engine import generate
from tetrad.model.huggingface import model_files, read_causal
from tetrad.model.transformer import CausalLM
from tetrad.text.chat_template import TEMPLATES
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import IGNORE, Turn

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

# Logits reach 40 here, and two float32 forwards may differ by 3e-4 on random tokens (each 1e-4 from float64).
TEXT = "Paris is the capital of France, and London is the capital of England. What is two plus two? It is four."
OTHER = "巴黎是法国的首都。 def add(a, b):\n    return a + b\n"
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one line of Python that prints hello."]


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetched.smollm2()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> CausalLM:
    return read_causal(folder).eval()


@torch.no_grad()
def assert_equal(ours: CausalLM, theirs: Any, ids: list[int]) -> None:
    """Logits, and the loss after the first quarter of the text."""
    document = toys.document(ids, len(ids) // 4)
    packed = toys.packed([document])
    inputs = torch.tensor([ids])
    labels = torch.where(torch.as_tensor(document.train), inputs, IGNORE)
    expected = theirs(inputs, labels=labels)
    logits, loss = ours(packed, "logits"), float(ours(packed, "nll")) / int((packed.targets_T != IGNORE).sum())
    assert expected.logits.std() > 1
    assert (logits - expected.logits[0]).abs().max() <= 1e-4
    assert abs(loss - float(expected.loss)) <= 1e-5


def test_read(folder: Path, ours: CausalLM, theirs: Any) -> None:
    tokenizer = Tokenizer.load(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.encode(text) for text in (TEXT, OTHER)] == read([TEXT, OTHER])["input_ids"]
    assert_equal(ours, theirs, tokenizer.encode(TEXT))


def test_shards_of_theirs(folder: Path, ours: CausalLM, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="150MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = dict(read_causal(tmp_path).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in ours.named_parameters())


def test_shards_of_ours(folder: Path, ours: CausalLM, theirs: Any, tmp_path: Path) -> None:
    toys.write(tmp_path, model_files(ours, 150 << 20))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert again.config.rope_parameters == theirs.config.rope_parameters
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 100_000
    assert_equal(ours, again.eval(), Tokenizer.load(folder).encode(TEXT))


def test_greedy(folder: Path, ours: CausalLM, theirs: Any) -> None:
    tokenizer = Tokenizer.load(folder)
    prompts = [TEMPLATES["chatml"].prompt(tokenizer, [Turn("user", question)]) for question in QUESTIONS]
    ends = ours.config.eos_ids
    replies = generate(
        ours, [toys.request(p, max_new_tokens=32, temperature=0.0, ends=ends) for p in prompts], toys.CPU, 3
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        assert list(reply.ids) == out[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(replies[0].ids)
    assert any(reply.finished for reply in replies)
