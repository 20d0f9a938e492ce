"""Greedy replies are those of transformers: 200 Chinese and English prompts, each with 64 tokens of reply, in one slot
and in 32 that are refilled.

The four families with random weights over SmolLM2's own vocabulary; SmolLM2 itself with TETRAD_SMOLLM2_PROMPTS of the
prompts (8 where unset: it has 135 million parameters). The peer reads prompt and reply in one forward, and each token
of the reply must be its likeliest there: the definition of a greedy reply, held at every token, also behind a tie
(`test_generate` compares with the peer's own `generate`). Two likeliest tokens within 1e-4 of one another are a tie,
which rounding decides: a reply may take the other one, and how many do is limited.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import fetched
import toys
from tetrad.inference.engine import generate
from tetrad.inference.fused_model import Fused
from tetrad.model.config import RopeScaling
from tetrad.model.huggingface import read_causal
from tetrad.model.transformer import CausalLM
from tetrad.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
T = TypeVar("T")

NEW = 64
LENGTHS = (3, 8, 14, 21)
ENGLISH = (
    ("Describe", "Draw", "Remember", "Find"),
    ("the old clock", "a red fox", "the last train", "an honest friend", "the recipe for bread"),
    ("near Paris", "near the museum", "in a small village", "by the river", "behind our school"),
    (" and say why it matters.",),
)
CHINESE = (
    ("请描述", "请画出", "请记住", "请找到"),
    ("北京附近的", "博物馆旁边的", "一个小村庄里的", "河边的", "我们学校后面的"),
    ("那只旧钟", "一只红狐狸", "最后一班火车", "一位诚实的朋友", "做面包的方法"),
    (",并说明它为什么重要。",),
)
TEXTS = [*map(" ".join, product(*ENGLISH)), *map("".join, product(*CHINESE))]
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "family": "llama",
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 16,
        "hidden_size": 48,
        "rope_theta": 100_000.0,
    },
    "qwen2": {"family": "qwen2", "hidden_size": 64, "head_dim": 16, "rope_theta": 1_000_000.0},
    "qwen3": {"family": "qwen3", "hidden_size": 48, "head_dim": 24, "rope_theta": 1_000_000.0},
    "llama": {"family": "llama", "hidden_size": 64, "head_dim": 16, "tied": False, "rope_scaling": LLAMA3},
}


def prompts(count: int = len(TEXTS)) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.load(fetched.smollm2())
    step = len(TEXTS) // count
    ids = [tokenizer.encode(text) for text in TEXTS[::step]]
    return [tuple(found[: LENGTHS[i % len(LENGTHS)]]) for i, found in enumerate(ids)]


def behind(peer: Any, asked: Sequence[tuple[int, ...]], replies: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """By how much the peer's likeliest token is ahead of each token of the replies, in logits. What stands behind a
    reply in its batch is seen by none of its tokens."""
    found = []
    for chunk in batched(zip(asked, replies, strict=True), 8):
        ids = pad_sequence([torch.tensor([*prompt, *reply]) for prompt, reply in chunk], batch_first=True)
        with torch.no_grad():
            logits_BTV = peer(ids).logits
        for logits_TV, (prompt, reply) in zip(logits_BTV, chunk, strict=True):
            z = logits_TV[len(prompt) - 1 :][: len(reply)]
            found.append(z.amax(-1) - z.gather(1, torch.tensor(reply)[:, None])[:, 0])
    return found


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def compare(ours: CausalLM, peer: Any, asked: Sequence[tuple[int, ...]]) -> None:
    fused, ends = Fused(ours, torch.float32), as_list(peer.generation_config.eos_token_id)
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    for slots in (1, 32):
        requests = [
            toys.request(p, i, max_new_tokens=NEW, temperature=0.0, ends=ours.config.eos_ids)
            for i, p in enumerate(asked)
        ]
        replies = [tuple(reply.ids) for reply in generate(fused, requests, toys.CPU, slots)]
        for reply in replies:
            assert len(reply) == NEW or reply[-1] in ends
            assert not set(reply[:-1]) & set(ends)
        pairs = list(zip(asked, replies, strict=True))
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known |= zip(fresh, behind(peer, *zip(*fresh, strict=True)), strict=True) if fresh else ()
        for pair in pairs:
            assert (known[pair] < 1e-4).all(), (pair, known[pair])
        ties = sum(bool((known[pair] > 0).any()) for pair in pairs)
        print(f"{len(asked)} prompts, {slots} slots, {sum(map(len, replies))} tokens: {ties} take the other of a tie")
        assert ties <= len(asked) // 50


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_hundred_prompts(name: str, tmp_path: Path) -> None:
    asked = prompts()
    assert len(set(asked)) > 100 and len(asked) == 200
    model = toys.causal(seed=3, std=0.3, vocab_size=49_152, max_positions=96, eos_ids=(toys.EOS,), **FAMILIES[name])
    peer = transformers.AutoModelForCausalLM.from_pretrained(toys.saved(tmp_path, model), dtype=torch.float32).eval()
    compare(model, peer, asked)


@pytest.mark.timeout(3600)
def test_smollm2_itself() -> None:
    folder = fetched.smollm2()
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compare(read_causal(folder), peer, prompts(int(os.environ.get("TETRAD_SMOLLM2_PROMPTS", "8"))))
