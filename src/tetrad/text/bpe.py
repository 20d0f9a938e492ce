"""Trains a byte-level BPE with Qwen2's normalisation (NFC) and pre-tokenisation; control tokens come last.

NFC because transformers applies it to the tokenizer of any Qwen2 folder: text in NFC decodes to itself, and other text
to its NFC form.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tetrad.errors import UserError
from tetrad.text.tokenizer import END, IM_END, IM_START, PAD, SEPARATOR, Tokenizer, control_token

CONTROLS = (END, SEPARATOR, PAD, IM_START, IM_END)
SMALLEST = 256 + len(CONTROLS)
QWEN2 = (  # the pre-tokenisation of Qwen2's tokenizer.json: words, single digits, punctuation, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Report:
    """How well a tokenizer fits a text. single_han: share of the distinct Han characters seen that are one token."""

    characters: int
    tokens: int
    han: int
    single_han: float

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(self.tokens, 1)


def learn(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, max_bytes: int = 0) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, control tokens included; small texts give fewer.

    max_bytes: reads at most about this much (whole texts); 0 reads all. Errors: E-CONF-RANGE, E-DATA-EMPTY.
    """
    if vocab_size < SMALLEST:
        what = f"vocab_size {vocab_size} is less than the 256 bytes and {len(CONTROLS)} control tokens"
        raise UserError("E-CONF-RANGE", what, where="tokenizer.vocab_size", hint=f"at least {SMALLEST}")
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROLS),
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen: list[bool] = []
    core.train_from_iterator(_up_to(texts, max_bytes, seen), trainer)
    if not seen:
        raise UserError("E-DATA-EMPTY", "there is no text to learn a tokenizer from", where="tokenizer.text")
    spec = json.loads(core.to_str())
    size = core.get_vocab_size()
    spec["added_tokens"] = [control_token(size + i, name) for i, name in enumerate(CONTROLS)]
    return Tokenizer(json.dumps(spec, ensure_ascii=False), eos_ids=(size,), pad_id=size + CONTROLS.index(PAD))


def report(tokenizer: Tokenizer, texts: Iterable[str]) -> Report:
    """Characters per token and the share of single-token Han characters, over these texts."""
    characters = tokens = 0
    han: set[str] = set()
    for text in texts:
        characters += len(text)
        tokens += len(tokenizer.encode(text))
        han.update(_HAN.findall(text))
    single = sum(len(ids) == 1 for ids in tokenizer.encode_batch(sorted(han)))
    return Report(characters, tokens, len(han), single / max(len(han), 1))


def _up_to(texts: Iterable[str], max_bytes: int, seen: list[bool]) -> Iterator[str]:
    read = 0
    for text in texts:
        read += len(text.encode())
        if max_bytes and read > max_bytes and seen:
            return
        seen.append(True) if not seen and text else None
        yield text
