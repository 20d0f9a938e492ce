"""Greedy replies are those of transformers: 200 Chinese and English prompts, each with 64 tokens of reply, in one slot
and in 32 that are refilled.

The four families with random weights over SmolLM2's own vocabulary; SmolLM2 itself with TETRAD_SMOLLM2_PROMPTS of the
prompts (8 where unset: it has 135 million parameters). Prompts are cut to a few lengths, so that the peer's batches
need no padding. Two likeliest tokens within 1e-4 of one another are a tie, which rounding decides: replies may part
there, and how many do is limited.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

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


def theirs(peer: Any, asked: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """One batch for each length."""
    groups, found = defaultdict(list), [[0]] * len(asked)
    for number, ids in enumerate(asked):
        groups[len(ids)].append(number)
    for length, numbers in groups.items():
        ids = torch.tensor([asked[number] for number in numbers])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=2
        )
        for number, reply in zip(numbers, out[:, length:].tolist(), strict=True):
            ends = [i for i, token in enumerate(reply) if token in as_list(peer.generation_config.eos_token_id)]
            found[number] = reply[: ends[0] + 1] if ends else reply
    return found


def as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def parted(peer: Any, prompt: tuple[int, ...], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two replies differ; fails where they part at no tie."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            with torch.no_grad():
                z = peer(torch.tensor([[*prompt, *one[:place]]])).logits[0, -1]
            assert (z[a] - z[b]).abs() < 1e-4, (prompt, place, a, b)
            return True
    assert len(one) == len(other)
    return False


def compare(ours: CausalLM, peer: Any, asked: Sequence[tuple[int, ...]]) -> None:
    expected, fused = theirs(peer, asked), Fused(ours, torch.float32)
    ends = ours.config.eos_ids
    for slots in (1, 32):
        requests = [toys.request(p, i, max_new_tokens=NEW, temperature=0.0, ends=ends) for i, p in enumerate(asked)]
        replies = generate(fused, requests, toys.CPU, slots)
        ties = sum(parted(peer, p, want, reply.ids) for p, want, reply in zip(asked, expected, replies, strict=True))
        print(f"{len(asked)} prompts, {slots} slots, {sum(map(len, expected))} tokens: {ties} part at a tie")
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
