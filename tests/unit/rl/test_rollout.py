"""Responses as PPO lays them out, and the prompts they answer."""

import json

import numpy as np
import pytest
import torch

import toys
from tetrad.data.source import Counts
from tetrad.errors import UserError
from tetrad.inference.completions import EncodedPrompt, read_encoded_prompts
from tetrad.rl.rollout import packs, read_logprobs, read_values, roll_out, unpack
from tetrad.settings.common import Sampling
from tetrad.text.chat_template import TEMPLATES
from tetrad.types import Prompt, Turn

TOKENIZER = toys.tokenizer()
ASKED = [EncodedPrompt(tuple(toys.ids(2 + i % 3, i)), Prompt((Turn("user", f"q{i}"),), f"p:{i}")) for i in range(8)]


def rolled(asked=ASKED, numbers=None, key=(0, "rollout", 0), **sampling):
    model = toys.causal(seed=1, eos_ids=(1, 5, 9, 13))
    places = range(len(asked)) if numbers is None else numbers
    return roll_out(model, asked, places, key, Sampling(max_new_tokens=7, **sampling), TOKENIZER, toys.CPU)


def test_unpack():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    out = unpack(torch.arange(1.0, 7), mask)
    assert out.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]


def test_a_row_is_its_prompt_and_reply():
    rollout = rolled()
    lengths = rollout.mask_BT.sum(1).tolist()
    assert len(set(lengths)) > 2
    assert rollout.mask_BT.shape[1] == max(lengths)
    for i, (sample, document) in enumerate(zip(rollout.samples, rollout.documents, strict=True)):
        assert len(sample.response_ids) == lengths[i]
        assert document.ids.tolist() == list(ASKED[i].ids + sample.response_ids)
        assert document.ids.dtype == np.int32
        assert int(document.train.sum()) == lengths[i]
        assert document.where == sample.where == f"p:{i}"
        assert sample.text == TOKENIZER.decode(sample.response_ids)
        assert sample.turns == ASKED[i].prompt.turns
        assert bool(rollout.finished_B[i]) == (sample.response_ids[-1] in (1, 5, 9, 13))
    assert not rollout.sampler_logprobs_BT[~rollout.mask_BT].any()
    assert (rollout.sampler_logprobs_BT[rollout.mask_BT] < 0).all()


def test_a_prompt_keeps_its_random_numbers():
    """Whichever part of the batch a process has: the place in the whole batch decides."""
    whole = rolled()
    for rank in range(2):
        part = rolled(ASKED[rank::2], range(rank, 8, 2))
        assert [s.response_ids for s in part.samples] == [s.response_ids for s in whole.samples[rank::2]]
    assert [s.response_ids for s in rolled(max_num_seqs=2).samples] == [s.response_ids for s in whole.samples]
    for key in ((1, "rollout", 0), (0, "evaluate", 0), (0, "rollout", 1)):
        assert [s.response_ids for s in rolled(key=key).samples] != [s.response_ids for s in whole.samples]


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 4096])
def test_read_back_in_place(micro_batch_tokens):
    rollout, model, critic = rolled(), toys.causal(seed=4), toys.scalar(seed=5)
    logprobs = read_logprobs(model, rollout, micro_batch_tokens, toys.CPU, 1.0)
    values, after = read_values(critic, rollout, micro_batch_tokens, toys.CPU)
    assert logprobs.shape == values.shape == rollout.mask_BT.shape
    for i, document in enumerate(rollout.documents):
        n, first = int(document.train.sum()), int((~document.train).sum())
        with torch.no_grad():
            logits = model(toys.packed([document]), "logits").log_softmax(-1)
            hidden = critic.model(toys.packed([document])) @ critic.score.weight[0]
        expected = torch.stack([logits[t - 1, document.ids[t]] for t in range(first, first + n)])
        torch.testing.assert_close(logprobs[i, :n], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(values[i, :n], hidden[first - 1 : first + n - 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[i], hidden[-1], rtol=0, atol=1e-5)
    assert not logprobs[~rollout.mask_BT].any()


def test_packs_keep_the_order():
    found = packs(toys.documents(9), 40, toys.CPU)
    assert [i for group, _ in found for i in group] == list(range(9))
    assert all(packed.bounds[-1] <= 40 for _, packed in found)


def questions(tmp_path, texts, limit=12, room=4):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"Instruction": text}) + "\n" for text in texts))
    return read_encoded_prompts([path], TEMPLATES["instruction"], TOKENIZER, Counts(), limit, room)


def test_questions(tmp_path):
    found = questions(tmp_path, ["w5 w6", "w7"])
    assert [q.ids for q in found] == [(5, 6, 0, 0), (7, 0, 0)]
    assert found[1].prompt.where.endswith("p.jsonl:2")


def test_a_question_without_room(tmp_path):
    """Prompt and reply must fit; the first that doesn't is named."""
    fits = " ".join(["w5"] * 6)
    assert len(questions(tmp_path, [fits])[0].ids) == 8
    with pytest.raises(UserError) as raised:
        questions(tmp_path, ["w5", fits + " w5", fits + " w5 w5"])
    assert raised.value.code == "E-DATA-LONG"
    assert raised.value.where.endswith("p.jsonl:2")


def test_long_prompts_lose_their_beginning_or_go(tmp_path):
    """cut keeps the end of the question; drop leaves it out; both are counted."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b c d e f g h"}\n{"prompt": "a"}\n')
    form, whole = TEMPLATES["instruction"], {}
    for way, limit in (("refuse", 128), ("truncate", 12), ("drop", 12)):
        counts = Counts()
        whole[way] = read_encoded_prompts([path], form, TOKENIZER, counts, limit, 6, way)
        assert (counts.cut, counts.dropped) == (way == "truncate", way == "drop")
    long, short = whole["refuse"]
    assert len(long.ids) > 6 >= len(short.ids)
    assert [q.ids for q in whole["truncate"]] == [long.ids[-6:], short.ids]
    assert [q.ids for q in whole["drop"]] == [short.ids]
    with pytest.raises(UserError, match="E-DATA-LONG"):
        read_encoded_prompts([path], form, TOKENIZER, Counts(), 12, 6)
    with pytest.raises(UserError, match="E-DATA-EMPTY"):
        read_encoded_prompts([path], form, TOKENIZER, Counts(), 7, 6, "drop")
    with pytest.raises(UserError, match="E-DATA-LONG"):
        read_encoded_prompts([path], form, TOKENIZER, Counts(), 6, 6, "truncate")  # nothing of a prompt would be left
