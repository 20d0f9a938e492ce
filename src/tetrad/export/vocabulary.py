"""A tokenizer.json as llama.cpp needs it: names and types of all ids, merges, and which of its ways of splitting fits.

llama.cpp knows regular expressions by name only. The name is looked up by what the folder's tokenizer does, not by
where it comes from, so that a vocabulary of one's own has one too; where none fits the export is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tetrad.errors import UserError
from tetrad.model.config import DecoderConfig
from tetrad.text.bpe import QWEN2
from tetrad.text.tokenizer import ENDS, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
_DIGITS = "each digit"
_NAMES = {  # steps of the pre-tokenizer, and whether a whole word of the vocabulary needs no merges
    ((QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
}


def words(tokenizer: Tokenizer, config: DecoderConfig, ends: Sequence[int], where: str) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, by the names of gguf's `add_...`. ends: all ids that end a response.

    Rows of the model without a token get unused ones. Errors: E-MODEL-UNSUPPORTED.
    """
    spec = json.loads(tokenizer.text)
    rows, pre, first, model = config.vocab_size, _pre(spec, where), _first(spec), spec["model"]
    names, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for name, i in model["vocab"].items():
        names[i], types[i] = name, NORMAL
    for token in spec.get("added_tokens") or ():
        names[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if len(set(names)) < rows:
        raise _unsupported("two ids have the same name, which llama.cpp does not take", where)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": names,
        "token_types": types,
        "token_merges": [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or ()],
        # Without one llama.cpp takes id 11, whatever that is.
        "bos_token_id": next((i for i in (first, config.bos_id) if i is not None), tokenizer.document_end),
        "add_bos_token": first is not None,
        "eos_token_id": ends[0],
        "eot_token_id": ends[min(1, len(ends) - 1)],  # else llama.cpp picks one by its name
        "eom_token_id": ends[min(2, len(ends) - 1)],
        "pad_token_id": ends[0] if tokenizer.pad_id is None else tokenizer.pad_id,
    }


def differences(tokenizer: Tokenizer, ends: Sequence[int]) -> Iterator[str]:
    """What llama.cpp does otherwise than Tetrad with this tokenizer, for the user."""
    if json.loads(tokenizer.text).get("normalizer"):
        yield "llama.cpp does not normalise: text that is not in NFC gets other tokens there"
    if lost := [name for name in map(tokenizer.name, ends[3:]) if name not in ENDS]:
        yield f"llama.cpp takes three end tokens: it will not stop at {', '.join(lost)}"


def _pre(spec: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for how the tokenizer splits a text. Errors: E-MODEL-UNSUPPORTED."""
    model = spec["model"]
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type") != "BPE" or any(model.get(option) for option in options):
        raise _unsupported(f"the tokenizer is no plain byte-level BPE but {model.get('type')!s:.40}", where)
    if any(part.get("type") != "NFC" for part in _parts(spec.get("normalizer"), "normalizers")):
        raise _unsupported("the tokenizer changes a text before it splits it, and not to NFC", where)
    steps = [_step(part) for part in _parts(spec.get("pre_tokenizer"), "pretokenizers")]
    key = tuple(step for step in steps if step), bool(model.get("ignore_merges"))
    if key not in _NAMES or "ByteLevel" not in json.dumps(spec["pre_tokenizer"]):
        raise _unsupported(f"llama.cpp knows no pre-tokenizer that splits as {' then '.join(key[0])!s:.120}", where)
    return _NAMES[key]


def _parts(part: Mapping[str, Any] | None, inner: str) -> Sequence[Mapping[str, Any]]:
    return () if not part else part[inner] if part.get("type") == "Sequence" else (part,)


def _step(part: Mapping[str, Any]) -> str:
    """What one pre-tokenizer splits at; empty for nothing."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return _GPT2 if part.get("use_regex", True) else ""
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(regex)}} if not part.get("invert"):
            return regex
    return json.dumps(part)


def _first(spec: Mapping[str, Any]) -> int | None:
    """The id that the tokenizer puts before every text."""
    for part in _parts(spec.get("post_processor"), "processors"):
        match part:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
                return int(part["special_tokens"][name]["ids"][0])
    return None


def _unsupported(what: str, where: str) -> UserError:
    hint = "use the model in transformers, whose folder `--to` writes"
    return UserError("E-MODEL-UNSUPPORTED", what, where=where, hint=hint)
