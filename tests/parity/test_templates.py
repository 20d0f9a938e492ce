"""Every template against the real one of its family, run by transformers: 0 differing ids, asked and answered.

The real templates come from installed and fetched packages: TRL keeps Qwen2.5's, Qwen3's and Llama 3's, the GGUF of
SmolLM2 has its own, and Qwen2's is that one with another system prompt (its sha256 is known). The tokenizers are the
real one of SmolLM2 and a learned one, each with every family's control tokens. What a folder exports is run as well.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

import fetched
from families import conversation
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES, Template, recognised
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Turn

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

CONVERSATIONS = 240
FAMILY = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
IN_TRL = {"qwen2.5": "qwen2_5.jinja", "qwen3": "qwen3.jinja", "llama3": "llama3.jinja"}
SAID = (
    "What is the capital of France?", "请帮我翻译一句话:hello", "Write a haiku about rain.\n\nMake it sad.",
    "1 + 1 = ?", "def add(a, b):\n    return a + b\n", "你好!今天天气怎么样?", "价格是 3,500.25 元(含税)。",
    "🦊🦊 emoji & <b>html</b>", "  spaces  ", "Ünïcödé — “quotes” … №5", "a\tb\tc", "第一行\n第二行\n\n第四行",
    "It's what they'd've said, isn't it?", "https://example.org/?q=1&r=2", '{"json": [1, 2.5e-3, null]}', "OK",
    "好的。", "ALL CAPS AND 12345678901234567890", "mixed 中文 and English 混排", "line\r\nbreak",
)  # fmt: skip


@pytest.fixture(scope="module")
def jinja() -> dict[str, str]:
    """The real templates."""
    folder = Path(trl.__file__).parent / "chat_templates"
    found = {name: (folder / file).read_text() for name, file in IN_TRL.items()}
    found["smollm2"] = (fetched.smollm2() / "chat_template.jinja").read_text()
    named = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    found["qwen2"] = found["smollm2"].replace(named, "You are a helpful assistant.")
    for name, text in found.items():
        assert hashlib.sha256(text.strip().encode()).hexdigest()[:16] in TEMPLATES[name].known
    return found


def with_tokens(text: str) -> str:
    """A tokenizer.json with the control tokens of every family; those of Qwen3's thinking are not special."""
    spec = json.loads(text)
    known = {token["content"] for token in spec["added_tokens"]}
    size = Tokenizer(text).size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, name in enumerate(n for n in (*FAMILY, *ADDED) if n not in known):
        spec["added_tokens"].append({"id": size + number, "content": name, **flags, "special": name in FAMILY})
    return json.dumps(spec)


@pytest.fixture(scope="module", params=["smollm2", "learned"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """SmolLM2's cuts line ends as no Qwen or Llama does; the learned one cuts as those families do."""
    if request.param == "smollm2":
        return Tokenizer(with_tokens((fetched.smollm2() / "tokenizer.json").read_text()))
    return Tokenizer(with_tokens(bpe.learn([*SAID] * 3, 700).text))


def conversations() -> list[list[dict[str, str]]]:
    """Of one to five turns, with and without a system turn; answers do not begin with white space."""
    draw, found = random.Random(0), []
    for number in range(CONVERSATIONS):
        system = [{"role": "system", "content": draw.choice(SAID)}] if number % 3 == 0 else []
        turns = []
        for turn in range(draw.randint(1, 5)):
            text = " ".join(draw.sample(SAID, draw.randint(1, 3))) + draw.choice(["", "", " ", "\n", "。"])
            turns.append({"role": ("user", "assistant")[turn % 2], "content": text.lstrip() if turn % 2 else text})
        found.append([*system, *turns])
    return found


def theirs(tokenizer: Tokenizer, text: str, tmp_path: Path) -> Any:
    (tmp_path / "tokenizer.json").write_text(tokenizer.text)
    read = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    read.bos_token = "<|begin_of_text|>"
    read.chat_template = text
    return read


def skip_other_families(tokenizer: Tokenizer, name: str) -> None:
    if name in ("qwen3", "llama3") and tokenizer.size > 10_000:
        pytest.skip("SmolLM2's tokenizer is none of this family")


def ours(form: Template, tokenizer: Tokenizer, talk: list[dict[str, str]]) -> list[int]:
    turns = [Turn(turn["role"], turn["content"]) for turn in talk]
    if talk[-1]["role"] == "assistant":
        return list(conversation(form, tokenizer, turns).ids)
    return form.prompt(tokenizer, turns)


def differing(form: Template, tokenizer: Tokenizer, read: Any) -> list[list[dict[str, str]]]:
    found = []
    for talk in conversations():
        wait = talk[-1]["role"] == "user"
        ids = read.apply_chat_template(talk, add_generation_prompt=wait, enable_thinking=False, return_dict=False)
        if ids != ours(form, tokenizer, talk):
            found.append(talk)
    return found


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("instruction", "chatml")])
def test_ids_are_those_of_the_real_template(
    tokenizer: Tokenizer, jinja: dict[str, str], name: str, tmp_path: Path
) -> None:
    skip_other_families(tokenizer, name)
    read = theirs(tokenizer, jinja[name], tmp_path)
    assert differing(TEMPLATES[name], tokenizer, read) == []
    assert differing(
        TEMPLATES["chatml" if name != "llama3" else "qwen2"], tokenizer, read
    )  # the corpus tells them apart


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "instruction"])
def test_exported_folders_carry_the_template(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    skip_other_families(tokenizer, name)
    form = TEMPLATES[name]
    for file, content in tokenizer.files(form).items():
        (tmp_path / file).write_bytes(content)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert differing(form, tokenizer, read) == []
    assert read.eos_token == tokenizer.name(form.end_id(tokenizer))


def test_a_real_folder_is_recognised() -> None:
    assert recognised(fetched.smollm2()) == TEMPLATES["smollm2"]
