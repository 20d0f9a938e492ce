"""User text never becomes a control token; folders are read by their own end and pad tokens; text decodes whole."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tetrad.errors import UserError
from tetrad.text import bpe
from tetrad.text.chat_template import TEMPLATES
from tetrad.text.tokenizer import Tokenizer

LEARNED = bpe.learn(["hello world, 你好世界 <think> ends </s> [CLS] <|im_end|>"] * 5, 400)
CONTROL_IDS = set(range(LEARNED.size - 5, LEARNED.size))


def added(identity, content, special=True, **more):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identity, "content": content, "special": special, **flags, **more}


def foreign(*names, special=True):
    """A byte-level vocabulary with these control tokens after it."""
    spec = json.loads(LEARNED.text)
    size = LEARNED.size - 5
    spec["added_tokens"] = [added(size + i, name, special) for i, name in enumerate(names)]
    return json.dumps(spec)


def folder(path, text, **files):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(text)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@given(st.lists(st.sampled_from([*bpe.CONTROLS, "<|", "|>", "im_end", "hello", " ", "\n", "你"]), max_size=8))
def test_user_text_is_never_a_control_token(parts):
    text = "".join(parts)
    ids = LEARNED.encode(text)
    assert not CONTROL_IDS & set(ids)
    assert LEARNED.decode(ids) == text
    assert LEARNED.encode_batch([text, ""]) == [ids, []]
    assert LEARNED.control_strings([text]) == sum(text.count(name) for name in bpe.CONTROLS)


def test_added_tokens_that_are_not_special_are_plain_text_too():
    tokenizer = Tokenizer(foreign("<|endoftext|>", "<think>", special=False))
    assert tokenizer.control("<think>") is not None
    assert tokenizer.control("<think>") not in tokenizer.encode("<think>so</think>")
    assert tokenizer.decode([tokenizer.control("<think>")]) == "<think>"  # as transformers' skip_special_tokens


WORDS = bpe.learn(["hello world, 今天天气很好 cash flow cashflow running running the the"] * 8, 420)
IN_MERGES = "hello"
SAID = [
    "hello running cashflow world",
    "runningx xrunning RUNNING running",
    "  a  running  b ",
    "今天天气很好,天气预报:人工智能 天气",
    "cash flow cashflow the hello",
    "<|im_end|>running天气<think>",
]


def with_words(*words, **more):
    """A tokenizer.json with one control token and these words added to it, as (word, flags)."""
    spec = json.loads(WORDS.text)
    vocab, base = spec["model"]["vocab"], WORDS.size - 5
    tokens = [added(vocab.get(word, base + 1 + i), word, False, **flags) for i, (word, flags) in enumerate(words)]
    return json.dumps(spec | {"added_tokens": [added(base, "</s>"), *tokens]} | more)


FLAGS = [{}, *({name: True} for name in ("lstrip", "rstrip", "single_word", "normalized"))]
FLAGS += [{"lstrip": True, "rstrip": True, "single_word": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}], ids=["as-is", "lowercase"])
def test_words_that_were_added_are_text(flags, normalizer):
    """In Latin and Chinese, new or built by merges too, whatever their flags: the library's ids, and no control."""
    words = ("running", "天气", "人工智能", "cashflow", IN_MERGES)
    text = with_words(*((word, flags) for word in words), normalizer=normalizer)
    ours, core = Tokenizer(text), tokenizers.Tokenizer.from_str(text)
    assert IN_MERGES in json.loads(text)["model"]["vocab"]  # in the middle of the vocabulary
    used = set()
    for said in SAID:
        ids = ours.encode(said)
        used |= set(ids)
        assert ids == core.encode(said, add_special_tokens=False).ids == ours.encode_batch([said])[0]
        assert ours.decode(ids) == core.decode(ids)
    assert {core.token_to_id(word) for word in words} <= used
    assert ours.control_strings(SAID) == 0
    assert [ours.control(word) for word in words] == [None] * 5
    assert ours.encode("running</s>天气") != core.encode("running</s>天气", add_special_tokens=False).ids
    assert ours.control("</s>") not in ours.encode("running</s>天气")


def test_a_word_with_an_accent_is_written_whole():
    """The byte alphabet has the letter é too, for another byte."""
    text = with_words(("café", {}), ("naïve bar", {}))
    ours = Tokenizer(text)
    for said in ("a café b", "naïve bar x"):
        ids = ours.encode(said)
        assert ids == tokenizers.Tokenizer.from_str(text).encode(said, add_special_tokens=False).ids
        push = ours.stream()
        assert ours.decode(ids) == said == "".join(map(push, ids)) + push(None)


@pytest.mark.parametrize("control", ["hello", "Ġrunning", "he"])
def test_a_control_token_that_merges_build_is_not_built_from_text(control):
    spec = json.loads(WORDS.text)
    identity = spec["model"]["vocab"][control]
    spec["added_tokens"] = [added(identity, control), added(WORDS.size - 5, "</s>")]
    ours = Tokenizer(json.dumps(spec))
    for said in SAID:
        assert identity not in ours.encode(said)
        assert ours.decode(ours.encode(said)) == said
    assert ours.control(control) == identity


def test_runs_of_spaces_added_as_tokens_stay_text():
    base = LEARNED.size - 5
    spec = json.loads(LEARNED.text) | {"added_tokens": [added(base, "</s>"), added(base + 1, "   ", special=False)]}
    tokenizer = Tokenizer(json.dumps(spec))
    assert tokenizer.encode("a   b</s>")[1] == base + 1
    assert tokenizer.encode_batch(["a   b</s>"]) == [tokenizer.encode("a   b</s>")]
    assert base not in tokenizer.encode("a   b</s>")
    assert tokenizer.decode(tokenizer.encode("a   b</s>")) == "a   b</s>"
    assert tokenizer.size == base + 2
    assert tokenizer.control("   ") is None and tokenizer.control_strings(["a   b</s>"]) == 1
    assert tokenizer.pad_id != base + 1


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece"])
def test_control_tokens_inside_the_vocabulary_are_not_matched(kind):
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "<": 4, "/": 5, "s": 6, ">": 7}
    core = {
        "unigram": lambda: models.Unigram([(name, -1.0) for name in vocab], unk_id=0),
        "wordlevel": lambda: models.WordLevel(vocab, unk_token="<unk>"),
        "wordpiece": lambda: models.WordPiece(vocab, unk_token="<unk>"),
    }[kind]()
    made = tokenizers.Tokenizer(core)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(made.to_str())
    assert made.encode("a </s> b").ids == [2, 1, 3]
    assert 1 not in tokenizer.encode("a </s> b")
    assert tokenizer.eos_ids == (1,)


def test_decode_joins_characters_split_over_tokens():
    ids = LEARNED.encode("🦊鑫")
    assert len(ids) > 2  # bytes
    assert LEARNED.decode(ids) == "🦊鑫"
    grown = [LEARNED.decode(ids[:n], partial=True) for n in range(len(ids) + 1)]
    assert all("\ufffd" not in text and "🦊鑫".startswith(text) for text in grown)
    assert LEARNED.decode(ids[:1]).endswith("\ufffd")
    assert LEARNED.decode([*ids[:2], *LEARNED.encode("x")], partial=True) == "\ufffdx"


def test_decode_of_control_and_unknown_ids():
    end = LEARNED.eos_ids[0]
    ids = [*LEARNED.encode("hi"), end, 10**6]
    assert LEARNED.decode(ids) == "hi"
    assert LEARNED.decode(ids, keep_control=True) == "hi<|endoftext|>"


@given(st.lists(st.integers(0, LEARNED.size - 1), max_size=30))
def test_decode_equals_the_library(ids):
    core = tokenizers.Tokenizer.from_str(LEARNED.text)
    assert LEARNED.decode(ids) == core.decode(ids, skip_special_tokens=True)
    assert LEARNED.decode(ids, keep_control=True) == core.decode(ids, skip_special_tokens=False)


def test_decode_of_another_kind_goes_through_the_library():
    core = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "</s>": 2}, unk_token="▁a"))
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["</s>"])
    assert Tokenizer(core.to_str()).decode([0, 1, 2]) == "a b"


@given(st.lists(st.integers(0, LEARNED.size - 1), max_size=12))
def test_ids_that_are_no_utf8_are_known(ids):
    """Whatever else they say: U+FFFD itself, control tokens, a text cut before its end."""
    raw = b"".join(LEARNED._bytes(i) for i in ids if i not in CONTROL_IDS)
    text = LEARNED.decode(ids)
    assert LEARNED.is_utf8(ids, text) == (raw.decode(errors="ignore").encode() == raw)
    shown = text[: text.find("\ufffd")] if "\ufffd" in text else text
    assert LEARNED.is_utf8(ids, shown)
    assert LEARNED.is_utf8([*ids, *LEARNED.encode("\ufffd")], text + "\ufffd") == LEARNED.is_utf8(ids, text)


@pytest.mark.parametrize(
    ("names", "valid"),
    [
        (["<0xEF>", "<0xBF>", "<0xBD>"], True),
        (["\ufffd"], True),
        (["a", "<0xE4>", "<0xBD>", "<0xA0>"], True),
        (["a", "<0xE4>", "<0xBD>"], False),
        (["<0xE4>", "a", "<0xBD>", "<0xA0>"], False),
        (["\ufffd", "<0x80>"], False),
    ],
    ids=str,
)
def test_the_same_where_bytes_have_tokens_of_their_own(names, valid):
    vocab = ["<unk>", "</s>", "a", "\ufffd", *(f"<0x{byte:02X}>" for byte in range(256))]
    built = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(vocab)}, [], byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spec = json.loads(built.to_str()) | {"added_tokens": [added(1, "</s>")]}
    tokenizer = Tokenizer(json.dumps(spec))
    ids = [vocab.index(name) for name in names]
    assert tokenizer.is_utf8(ids, tokenizer.decode(ids)) == valid


def test_export_and_load_agree(tmp_path):
    for template in (None, *(form for name, form in TEMPLATES.items() if name != "llama3" and name != "qwen3")):
        path = tmp_path / (template.name if template else "none")
        path.mkdir()
        for name, content in LEARNED.files(template).items():
            (path / name).write_bytes(content)
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == LEARNED.fingerprint
        assert loaded.pad_id == LEARNED.pad_id
        assert loaded.eos_ids == ((template.end_id(LEARNED),) if template else LEARNED.eos_ids)
        assert loaded.document_end == LEARNED.control("<|endoftext|>")


def test_end_ids_come_from_generation_config_then_config_then_the_tokenizer(tmp_path):
    text, base = foreign("<|a|>", "<|b|>", "<|c|>"), LEARNED.size - 5
    path = folder(tmp_path / "m", text, tokenizer_config={"eos_token": {"content": "<|c|>"}})
    assert Tokenizer.load(path).eos_ids == (base + 2,)
    folder(path, text, config={"eos_token_id": base + 1})
    assert Tokenizer.load(path).eos_ids == (base + 1,)
    folder(path, text, generation_config={"eos_token_id": [base + 1, base]})
    assert Tokenizer.load(path).eos_ids == (base + 1, base)
    with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*no token ends a text"):
        Tokenizer.load(folder(tmp_path / "none", text))


@pytest.mark.parametrize(
    ("names", "pad", "expected"),
    [
        (("<|endoftext|>", "<|x|>", "<|pad|>"), "<|x|>", "<|x|>"),  # a pad token of its own stays
        (("<|endoftext|>", "<|x|>", "<|fim_pad|>"), "<|endoftext|>", "<|fim_pad|>"),  # Qwen2.5 base: pad = eos
        (("<|endoftext|>", "<|x|>", "<|im_end|>"), None, "<|x|>"),
        (("<|x|>", "<|reserved_1|>", "<|endoftext|>"), None, "<|reserved_1|>"),
    ],
)
def test_pad_is_never_an_end_token(tmp_path, names, pad, expected):
    path = folder(tmp_path / "m", foreign(*names), tokenizer_config={"eos_token": "<|endoftext|>", "pad_token": pad})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.name(tokenizer.pad_id) == expected
    assert tokenizer.pad_id not in tokenizer.eos_ids
    written = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert (written["pad_token"], written["eos_token"]) == (expected, "<|endoftext|>")


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "a"])  # none, as GPT-2's tuners write it, and a word of texts
def test_a_word_is_never_the_pad(tmp_path, pad):
    config = {"eos_token": "<|endoftext|>", "pad_token": pad}
    path = folder(tmp_path / "m", foreign("<|endoftext|>"), tokenizer_config=config, config={"pad_token_id": 0})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.pad_id is None
    written = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert written.get("pad_token") == (pad if pad == "<|endoftext|>" else None)
    grown = tokenizer.with_pad()
    assert (grown.name(tokenizer.size), grown.pad_id, grown.size) == ("<|pad|>", tokenizer.size, tokenizer.size + 1)
    assert grown.with_pad() is grown
    assert grown.fingerprint == tokenizer.fingerprint  # the same ids for every text
    assert json.loads(grown.files()["special_tokens_map.json"])["pad_token"] == "<|pad|>"


@pytest.mark.parametrize("word", ["<think>", "[x]", "hello", "  "])
def test_what_a_text_may_show_is_never_chosen_as_the_pad(word):
    """transformers takes a pad out of texts, and `<think>`, which is not special, stands in them."""
    spec = json.loads(foreign("<|endoftext|>"))
    spec["added_tokens"].append(added(LEARNED.size - 4, word, special=False))
    tokenizer = Tokenizer(json.dumps(spec))
    assert tokenizer.pad_id is None
    assert "pad_token" not in json.loads(tokenizer.files()["tokenizer_config.json"])


@pytest.mark.parametrize("pad", ["<unk>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"])
def test_a_pad_of_other_families(tmp_path, pad):
    """Llama without a pad of its own: what was reserved, or <unk>, before any other."""
    text = foreign("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", pad)
    path = folder(tmp_path / "m", text, tokenizer_config={"eos_token": "<|eot_id|>"})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.name(tokenizer.pad_id) == pad
    assert json.loads(tokenizer.files()["special_tokens_map.json"]) == {"eos_token": "<|eot_id|>", "pad_token": pad}


@pytest.mark.parametrize(
    "kind", ["TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizerFast", "LlamaTokenizer", "My", ""]
)
def test_an_exported_class_is_one_that_all_versions_know(tmp_path, kind):
    """And nothing of what only one of them reads, or would run."""
    theirs = {"tokenizer_class": kind, "eos_token": "</s>", "backend": "tokenizers", "is_local": False, "add_bos": True}
    theirs |= {"auto_map": {"AutoTokenizer": ["my.My", None]}, "extra_special_tokens": ["<|x|>"]}
    path = folder(tmp_path / "m", foreign("</s>", "<|x|>"), tokenizer_config=theirs)
    written = json.loads(Tokenizer.load(path).files()["tokenizer_config.json"])
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|x|>"]
    assert not {"auto_map", "extra_special_tokens", "backend"} & written.keys()
    assert written["add_bos"] is True


def test_named_special_tokens_stay_named(tmp_path):
    named = {"eos_token": "</s>", "extra_special_tokens": {"image_token": "<|x|>"}}
    path = folder(tmp_path / "m", foreign("</s>", "<|x|>"), tokenizer_config=named)
    written = json.loads(Tokenizer.load(path).files()["tokenizer_config.json"])
    assert written["extra_special_tokens"] == {"image_token": "<|x|>"}
    assert "additional_special_tokens" not in written


def test_with_control_adds_one_id(tmp_path):
    tokenizer = Tokenizer(foreign("<|endoftext|>"))
    grown = tokenizer.with_control("<|sep|>")
    assert grown.control("<|sep|>") == tokenizer.size and grown.size == tokenizer.size + 1
    assert grown.with_control("<|sep|>") is grown
    assert grown.encode("a <|sep|> b") == tokenizer.encode("a <|sep|> b")
    assert tokenizer.control("<|sep|>") is None


def test_files_drop_what_would_run(tmp_path):
    config = {
        "chat_template": "{{ ''.__class__ }}",
        "auto_map": {"AutoTokenizer": "x.py"},
        "eos_token": "<|endoftext|>",
    }
    tokenizer = Tokenizer.load(folder(tmp_path / "m", foreign("<|endoftext|>"), tokenizer_config=config))
    written = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert "chat_template" not in written and "auto_map" not in written


def test_bad_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"E-MODEL-MISSING.*none"):
        Tokenizer.load(empty)
    with pytest.raises(UserError, match="E-MODEL-MISSING"):
        Tokenizer.load(tmp_path / "nowhere")
    (empty / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*save_pretrained"):
        Tokenizer.load(empty)
    cyclic = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "added_tokens": []})
    for text in ("{", "[]", '{"model": {"type": "BPE"}}', "[" * 10**5, cyclic, '{"model": {}, "added_tokens": [{}]}'):
        with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*tokenizer\.json"):
            Tokenizer.load(folder(tmp_path / "bad", text))
    (tmp_path / "bad" / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="E-MODEL-TOKENIZER"):
        Tokenizer.load(tmp_path / "bad")
    folder(tmp_path / "bad", LEARNED.text)
    (tmp_path / "bad" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*tokenizer_config\.json"):
        Tokenizer.load(tmp_path / "bad")


def test_a_forked_child_encodes_without_a_warning():
    """The library's threads do not live on in a child: it encodes on one thread, without a warning, hook or setting."""
    program = (
        "import os, sys\n"
        "from tetrad.text import bpe\n"
        "t = bpe.learn(['hello world'] * 50, 270)\n"
        "ids = t.encode_batch(['hello world'] * 500)\n"
        "if (child := os.fork()) == 0:\n"
        "    os._exit(t.encode_batch(['hello world'] * 500) != ids)\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "sys.exit(code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_regular_expression_that_runs_out_of_retries() -> None:
    """Rust panics, which is no Exception; no process ends on it."""
    spec = json.loads(LEARNED.text)
    pattern = {"Regex": "(a|aa)+$"}
    spec["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    slow = Tokenizer(json.dumps(spec))
    assert slow.encode("b")
    for function in (slow.encode, lambda text: slow.encode_batch([text])):
        with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*cannot be used"):
            function("a" * 60 + "!")


@pytest.mark.parametrize("pattern", ["(a+)+", r"(\w+\s?)+$"])
def test_a_repeat_inside_a_repeat_is_refused(pattern: str) -> None:
    spec = json.loads(LEARNED.text)
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
    with pytest.raises(UserError, match="E-MODEL-TOKENIZER"):
        Tokenizer(json.dumps(spec))
