"""What every row of the table of templates is tried on: small tokenizers that have its control tokens, and chats."""

import json
import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from tetrad.data.tokens import tokenize
from tetrad.text import bpe
from tetrad.text.chat_template import Template
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Prompt, Tokens, Turn

Chat = tuple[Turn, ...]
TEXTS = (
    "Hello, what is this? I'd like to know.",
    "请把下面这句话翻译成英语：你好，世界！",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    "Line one.\n\nLine two,  with  spaces.\n\t- a tab",
    "一、准备材料；\n二、开始做。\n\n（完）",
    "12345.678 + 9 = 12354.678, 10/10, 2024年11月3日",
    "🦊 and 👩‍💻, 中英 mixed 文字 naïve cafe\u0301",
    '"quoted" — it\'s (all) [here] {now}; <b>bold</b> & $5 @ 100%!?',
    "https://example.org/a?b=c#d | x_y * z ^ ~`",
    "好",
    "a",
    "Ｆｕｌｌ　ｗｉｄｔｈ，全角！",
    "مرحبا بالعالم и привет, мир",
)
ENDS = ("", "", "", " ", "  ", "\n", "\n\n", " \n", "。", "…\t")
STARTS = ("", "", "", " ", "\n", "  ", "\t")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
SCRAPS = (
    *("<|", "|>", "<", ">", "im_", "_start", "end", "eot", "header", "think", "/", "tool_call", "|", "\n", " ", "\t"),
    *("\0", "\u200b", "\u200d", "\ufeff", "\u2060", "\u202e", "\r\n", "\x1f", "｜", "＜", "é", "e\u0301", "好", "🦊"),
)


def conversation(form: Template, tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "") -> Tokens:
    """Ids of all turns, encoded piece by piece; `train` marks each answer and its end token."""
    ids: list[int] = []
    train: list[bool] = []
    for piece, trained in form.pieces(tokenizer, turns, where):
        new = [piece] if isinstance(piece, int) else tokenizer.encode(piece)
        ids += new
        train += [trained] * len(new)
    return Tokens(np.array(ids, np.int32), np.array(train, np.bool_), where)


@cache
def learned(size: int = 700) -> Tokenizer:
    """A byte-level BPE with the control tokens of all rows; those of QWEN are added but not special, as in Qwen3."""
    base = bpe.learn([*TEXTS, "system user assistant"] * 4, size)
    spec = json.loads(base.text)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, name in enumerate((*LLAMA, *QWEN)):
        token = {"id": base.size + number, "content": name, **flags, "special": name not in QWEN}
        spec["added_tokens"].append(token)
    return Tokenizer(json.dumps(spec, ensure_ascii=False), base.eos_ids, base.pad_id)


def controls(tokenizer: Tokenizer) -> set[int]:
    """The ids of all added tokens."""
    return {int(token["id"]) for token in json.loads(tokenizer.text)["added_tokens"]}


def text(dice: random.Random, *, answer: bool = False) -> str:
    """One to three lines of TEXTS; an answer begins with no white space."""
    lines = "\n".join(dice.choice(TEXTS) for _ in range(dice.choice((1, 1, 2, 3))))
    return ("" if answer else dice.choice(STARTS)) + lines + dice.choice(ENDS)


def chats(count: int, seed: int = 0, longest: int = 6) -> list[Chat]:
    """Chats of one to `longest` turns after the system turn that half of them have; odd ones wait for their answer."""
    dice, made = random.Random(seed), []
    for number in range(count):
        opening = [Turn("system", "" if number % 20 == 0 else text(dice))] if number % 2 == 0 else []
        roles = ("user", "assistant") * 3
        turns = [Turn(role, text(dice, answer=role == "assistant")) for role in roles[: 1 + number // 2 % longest]]
        made.append((*opening, *turns))
    return made


def assert_no_control(form: Template, tokenizer: Tokenizer, strings: int) -> int:
    """Fuzzed texts in all fields add no control token to those of an innocent chat; how many texts there were."""
    inside = controls(tokenizer)
    names = [tokenizer.name(i) for i in sorted(inside)][:64]
    cuts = [name[:i] for name in names for i in range(1, len(name))] + [name[i:] for name in names for i in (1, 2, 5)]
    words, dice = (*names * 8, *cuts, *SCRAPS * 8), random.Random(form.name)
    roles = ("system", "user", "assistant", "user") if form.start else ("system", "user")
    texts = ["".join(dice.choices(words, k=dice.randint(1, 6))) for _ in range(strings // len(roles) * len(roles))]
    groups = zip(*[iter(texts)] * len(roles), strict=True)
    (plain,) = tokenize(form, tokenizer, [Prompt(tuple(Turn(role, "x") for role in roles))])
    marks = np.zeros(tokenizer.size, np.bool_)
    marks[list(inside)] = True
    skeleton = plain.ids[marks[plain.ids]].tolist()
    prompts = [Prompt(tuple(map(Turn, roles, group))) for group in groups]
    found = [tokens.ids[marks[tokens.ids]].tolist() for tokens in tokenize(form, tokenizer, prompts)]
    assert found == [skeleton] * (len(texts) // len(roles))
    return len(texts)
