"""An exported tokenizer gives transformers the ids that it gives us, with its chat template, in Chinese and English."""

import json

import pytest

from families import conversation
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES, Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Turn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = [
    "The film was long, but I'd watch it again: 10/10!",
    "请帮我翻译一句话：你好，世界！今天是2024年。",
    " leading and trailing  spaces \n\n and\tlines\r\n",
    "cafe\u0301 café 🦊 mixed 中英 text\u2028end",
    "",
]
TOKENIZER = bpe.learn(TEXTS * 4, 420)
CHATS = [
    [("user", "Hello, what is this?")],
    [("user", "请翻译：hello")],
    [("system", "把这句话翻译成英语。"), ("user", " 你好，\n世界 \n")],
    [("system", "Be brief."), ("user", "Hi there!\n"), ("assistant", " Hello.\n\n")],
    [("user", "写一句话"), ("assistant", "今天天气很好。")],
]
LONG_CHAT = [("system", "s"), ("user", "你好 "), ("assistant", "b"), ("user", "\nc"), ("assistant", "d e")]
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def exported(folder, tokenizer, template, config):
    for name, content in tokenizer.files(template).items():
        (folder / name).write_bytes(content)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


def jinja_ids(theirs, chat):
    messages = [{"role": role, "content": text} for role, text in chat]
    waits = chat[-1][0] != "assistant"
    return theirs.apply_chat_template(messages, add_generation_prompt=waits, return_dict=False)


def our_ids(template, tokenizer, chat):
    return [int(i) for i in conversation(template, tokenizer, [Turn(*turn) for turn in chat]).ids]


def test_pre_tokenisation_is_theirs():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert bpe.QWEN2 == PRETOKENIZE_REGEX


@pytest.mark.parametrize("config", [None, QWEN2, {"model_type": "llama"}], ids=["alone", "qwen2", "llama"])
@pytest.mark.parametrize("name", ["instruction", "chatml"])
def test_exported_folder(tmp_path, name, config):
    template = TEMPLATES[name]
    theirs = exported(tmp_path, TOKENIZER, template, config)
    for text in TEXTS:
        ids = TOKENIZER.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == TOKENIZER.decode(ids)
    assert len(theirs) == TOKENIZER.size
    assert theirs.eos_token_id == template.end_id(TOKENIZER)
    assert theirs.pad_token_id == TOKENIZER.pad_id
    for chat in CHATS if name == "instruction" else [*CHATS, LONG_CHAT]:
        assert jinja_ids(theirs, chat) == our_ids(template, TOKENIZER, chat), chat


def test_instruction_refuses_several_turns_there_too(tmp_path):
    theirs = exported(tmp_path, TOKENIZER, TEMPLATES["instruction"], QWEN2)
    for chat in (LONG_CHAT, [("system", "a")], [("assistant", "a")], [("user", "a"), ("user", "b")]):
        with pytest.raises(Exception, match="one question"):
            jinja_ids(theirs, chat)


def test_control_strings_differ_only_in_our_favour(tmp_path):
    theirs = exported(tmp_path, TOKENIZER, TEMPLATES["chatml"], QWEN2)
    text = "<|im_end|>\n<|im_start|>system"
    controls = {TOKENIZER.control(name) for name in bpe.CONTROLS}
    assert len(controls & set(theirs(text)["input_ids"])) == 2
    assert not controls & set(TOKENIZER.encode(text))


def test_a_separator_added_to_a_foreign_tokenizer(tmp_path):
    foreign = Tokenizer(TOKENIZER.text.replace("<|sep|>", "<|other|>"))
    for template, tokenizer in (
        (TEMPLATES["instruction"], foreign.with_control("<|sep|>")),
        (Template(separator="\n\n"), foreign),
    ):
        theirs = exported(tmp_path, tokenizer, template, QWEN2)
        for chat in CHATS[:3]:  # prompts: around plain text an answer is encoded apart, as it is generated
            assert jinja_ids(theirs, chat) == our_ids(template, tokenizer, chat)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_folder_that_transformers_wrote(tmp_path, kind):
    """Their class saves, we load: equal ids, its end token, and a pad of our own choice where theirs is the end."""
    spec = json.loads(TOKENIZER.text)["model"]
    merges = [tuple(pair) for pair in spec["merges"]]
    made = getattr(transformers, kind)(
        vocab=spec["vocab"], merges=merges, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == made(text)["input_ids"]
    assert ours.eos_ids == (made.eos_token_id,)
    assert ours.pad_id not in ours.eos_ids
    again = tmp_path / "again"
    again.mkdir()
    theirs = exported(again, ours, TEMPLATES["chatml"], None)
    assert jinja_ids(theirs, CHATS[2]) == our_ids(TEMPLATES["chatml"], ours, CHATS[2])
    assert theirs.pad_token_id == ours.pad_id


FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "".join(flags) or "plain")
def test_words_that_were_added(tmp_path, flags):
    """By `add_tokens`, some of them built by merges already: equal ids and texts before and after our export."""
    theirs = exported(tmp_path, TOKENIZER, TEMPLATES["chatml"], QWEN2)
    words = ("harbourmaster", "人工智能", "watch", "翻译", "<think>")
    theirs.add_tokens(
        [transformers.AddedToken(word, special=False, **{"normalized": False, **flags}) for word in words]
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    exports = exported(again, ours, TEMPLATES["chatml"], QWEN2)
    said = [*TEXTS, "the harbourmaster's  watch: 人工智能翻译 harbourmasters 翻译 watch 人工智能"]
    for text in said:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids == exports(text)["input_ids"]
        assert exports.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert {theirs.convert_tokens_to_ids(word) for word in words[:4]} <= set(ours.encode(said[-1]))
    assert ours.control_strings(said) == 0
    thought = theirs.convert_tokens_to_ids("<think>")
    assert thought in theirs("<think>")["input_ids"] and thought not in ours.encode(
        "<think>"
    )  # it is placed by id alone
    assert theirs.decode([thought], skip_special_tokens=True) == "<think>" == ours.decode([thought])
    assert exports.decode([thought], skip_special_tokens=True) == "<think>"


ONE, TWO = ("<|endoftext|>",), ("<|endoftext|>", "<think>")


@pytest.mark.parametrize(
    ("names", "special", "config"),
    [
        (ONE, True, {}),  # GPT-2
        (ONE, True, {"pad_token": "<|endoftext|>"}),
        (ONE, True, {"pad_token": "!"}),
        (ONE, True, {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}),
        (TWO, False, {}),
        (("<s>", "</s>", "<unk>"), True, {"eos_token": "</s>", "unk_token": "<unk>"}),  # Llama without a pad
        (("<s>", "</s>", "<unk>"), True, {"eos_token": "</s>", "pad_token": "<unk>"}),
    ],
    ids=str,
)
def test_texts_are_as_before_an_export(tmp_path, names, special, config):
    """Whatever pad is chosen: ids and texts of the exported folder are those of the one that training started from."""
    spec, base = json.loads(TOKENIZER.text), TOKENIZER.size - 5
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": base + i, "content": name, "special": special or i == 0, **flags} for i, name in enumerate(names)
    ]
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(usual | config))
    before = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    after = exported(again, Tokenizer.load(tmp_path), None, {"model_type": "llama"})
    said = [text for text in [*TEXTS, 'No! Are you "sure"? #1!!!', "<think>a!</think>"] if text]
    if config.get("pad_token") == "!":  # there it is taken out of texts
        before = transformers.AutoTokenizer.from_pretrained(tmp_path, pad_token=None)
    for text in said:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert after.pad_token_id is None or after.pad_token in after.all_special_tokens
    assert len(after) == len(before)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizerFast"])
def test_the_class_of_an_export(tmp_path, kind):
    """Whatever class a folder names, the export has equal ids and the same special tokens."""
    exported(tmp_path, TOKENIZER, TEMPLATES["chatml"], QWEN2)
    path = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": kind, "backend": "tokenizers", "extra_special_tokens": ["<|im_start|>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    again = tmp_path / "again"
    again.mkdir()
    theirs = exported(again, Tokenizer.load(tmp_path), TEMPLATES["chatml"], QWEN2)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    assert "<|im_start|>" in theirs.all_special_tokens
    assert theirs.eos_token == "<|im_end|>"
