"""Text to ids and back, over a Hugging Face `tokenizer.json`.

User text is encoded by a twin of the tokenizer that has no control tokens, so that `<|im_end|>` or `<think>` in it is
plain text and never one of them; control tokens are inserted by id (chat_template.py). An added token is a control
token where it is special or enclosed in brackets, like `<think>`; other words that were added to a vocabulary are text,
with the ids that transformers gives them. Nothing is added around a text.
A tokenizer that exists only as a sentencepiece model is refused. Chat templates of a folder are never run.
"""

import codecs
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import tokenizers

from tetrad import disk
from tetrad.errors import UserError
from tetrad.storage import json_bytes
from tetrad.text.patterns import may_explode, patterns

END, SEPARATOR, PAD = "<|endoftext|>", "<|sep|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_NOT_PASSED_ON = ("chat_template", "tetrad", "auto_map", "tokenizer_class", "extra_special_tokens", "backend")
MAX_JSON_BYTES = 64 << 20  # twice the largest in use
MAX_OBJECT_BYTES = 8 << 20
_MOST_PARTS = 1_200_000  # lists and objects
ENDS = (END, IM_END, "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_BYTE_NAME = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PADS = ("pad", "reserved", "unused", "unk")
_BRACKETED = re.compile(r"[<\[].*[>\]]|【.*】", re.DOTALL)
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class of an exported tokenizer: transformers 4 and 5 both know it, and it does what tokenizer.json says."""
CONVERT = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers writes tokenizer.json"


class ChatFormat(Protocol):
    """What an exported folder needs from a template."""

    def end_id(self, tokenizer: "Tokenizer") -> int: ...
    def jinja(self, tokenizer: "Tokenizer") -> str: ...
    def record(self) -> dict[str, str]: ...


class Tokenizer:
    """A vocabulary with its control tokens. size: ids are below it. eos_ids: all ids that end a text.

    pad_id: a control token that is not an end token; None where none is free (see `with_pad`).
    """

    def __init__(
        self,
        text: str,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        config: Mapping[str, Any] | None = None,
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        """text: tokenizer.json; spec: the same, where it was read before. eos_ids, pad_id: looked up by name where
        missing. Errors: E-MODEL-TOKENIZER."""
        spec = spec or _load_spec(text)
        self.text = text
        self.config = dict(config or {})
        self._special = {int(t["id"]) for t in spec.get("added_tokens") or () if t.get("special")}
        twin = _twin_spec(spec)
        added = {str(t["content"]): int(t["id"]) for t in spec.get("added_tokens") or ()}
        texts = {str(t["content"]) for t in twin["added_tokens"]}
        self._controls = {name: i for name, i in added.items() if name not in texts}
        self._twin = _build(json.dumps(twin))
        ids_of = self._twin.get_vocab()
        if not ids_of.keys() - texts:
            raise UserError("E-MODEL-TOKENIZER", "tokenizer.json has no token for any text")
        self._moved = {ids_of[name]: added[name] for name in texts}
        self._names = {self._moved.get(i, i): name for name, i in ids_of.items()}
        self._names |= {i: name for name, i in self._controls.items()}
        self.size = max(self._names) + 1
        self._spelled: dict[int, bytes] = {}
        named = [self._controls[name] for name in ENDS if name in self._controls][:1]
        self.eos_ids: tuple[int, ...] = tuple(eos_ids) or tuple(named)
        if not self.eos_ids:
            hint = 'name one as "eos_token_id" in config.json'
            raise UserError("E-MODEL-TOKENIZER", "no token ends a text", hint=hint)
        self._added = set(added.values())
        spare = {name: i for name, i in self._controls.items() if i not in self.eos_ids}
        unsaid = {name: i for name, i in spare.items() if i in self._special}  # decoding removes a pad
        self.pad_id = pad_id if pad_id in spare.values() else _spare_pad(unsaid)
        self._byte_level = "ByteLevel" in json.dumps(spec.get("decoder") or {})
        ordered = sorted(self._controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer of a Hugging Face folder. End tokens: generation_config.json, else config.json, else its own.

        Errors: E-MODEL-MISSING, E-MODEL-TOKENIZER.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            _no_tokenizer(folder)
        try:
            text = _read_text(path, MAX_JSON_BYTES)
            spec = _load_spec(text)
            controls = {t["content"]: int(t["id"]) for t in spec.get("added_tokens") or ()}
            config = _read_object(folder / "tokenizer_config.json")
            return cls(text, _end_ids(folder, config, controls), _pad_id(folder, config, controls), config, spec)
        except UserError as error:
            raise UserError(error.code, error.what, where=error.where or str(path), hint=error.hint) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError("E-MODEL-TOKENIZER", f"cannot be read: {error!r}", where=str(path)) from None

    def encode(self, text: str) -> list[int]:
        """Ids of user text; never a control token."""
        with _told():
            return self._placed(self._twin.encode(text, add_special_tokens=False).ids)

    def encode_raw(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text that a program wrote whole, as a template's: names of control tokens in it are those tokens.
        special: with what tokenizer.json puts around a text."""
        with _told():
            return list(self._whole.encode(text, add_special_tokens=special).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each user text, on all cores."""
        with _told():
            return [self._placed(e.ids) for e in self._twin.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, keep_control: bool = False, partial: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. keep_control: special tokens are written out.

        partial: more ids will follow, so an unfinished character at the end is left out.
        """
        ids = [i for i in map(int, ids) if i in self._names and (keep_control or i not in self._special)]
        if not self._byte_level:
            text = self._whole.decode(ids, skip_special_tokens=False)
            return text.rstrip("\ufffd") if partial else text
        raw = b"".join(self._bytes(i) for i in ids)
        return codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final=not partial)

    def is_utf8(self, ids: Sequence[int], text: str) -> bool:
        """False where bytes of these ids are not UTF-8 and appear as U+FFFD in their text. text: what `decode` returned
        for them, or its beginning up to a stop string."""
        if "\ufffd" not in text:
            return True
        text_ids = [int(i) for i in ids if self._says(int(i))]
        if self._byte_level:  # U+FFFD itself may have been sampled: then its bytes are there
            return b"".join(map(self._bytes, text_ids)).startswith(text.encode())
        runs = groupby([self._names[i] for i in text_ids], lambda name: bool(_BYTE_NAME.fullmatch(name)))
        raws = [bytes(int(name[3:5], 16) for name in run) for is_bytes, run in runs if is_bytes]
        return all(raw == raw.decode(errors="ignore").encode() for raw in raws)

    def stream(self) -> Callable[[int | None], str]:
        """A decoder of one id at a time: it returns what the id adds to the text, only whole characters, and for None
        the remainder at the end. Concatenated, that is `decode` of all the ids."""
        if not self._byte_level:
            return self._redecoded()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def push(token: int | None) -> str:
            if token is None:
                return decoder.decode(b"", final=True)
            return decoder.decode(self._bytes(token)) if self._says(token) else ""

        return push

    def _redecoded(self) -> Callable[[int | None], str]:
        """For a tokenizer whose pieces depend on their neighbours: all ids are decoded again, up to a final run of
        byte tokens, as consecutive bytes become characters together or not at all."""
        ids: list[int] = []
        emitted = ""

        def push(token: int | None) -> str:
            nonlocal emitted
            ids.extend((token,) if token is not None and self._says(token) else ())
            known = len(ids)
            while token is not None and known and _BYTE_NAME.fullmatch(self._names[ids[known - 1]]):
                known -= 1
            text = self.decode(ids[:known], partial=token is not None)
            new, emitted = text[len(emitted) :], text if len(text) > len(emitted) else emitted
            return new

        return push

    def _says(self, token: int) -> bool:
        return token in self._names and token not in self._special

    def control(self, name: str) -> int | None:
        """The id of a control (added) token."""
        return self._controls.get(name)

    def name(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        return self._names[token]

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, control tokens by their name; empty for an id that is no token."""
        if self._byte_level or token not in self._names:
            return self._bytes(token) if token in self._names else b""
        name = self._names[token]
        return bytes((int(name[3:5], 16),)) if _BYTE_NAME.fullmatch(name) else name.replace("▁", " ").encode()

    def control_strings(self, texts: list[str]) -> int:
        """How often these user texts spell a control token."""
        joined = "\n".join(texts)
        if not any(name in joined for name in self._controls):  # fast path: nearly every text
            return 0
        return sum(len(self._control_pattern.findall(text)) for text in texts)

    @property
    def document_end(self) -> int:
        """The id after each document of pre-training: <|endoftext|>, else the first end token."""
        return self._controls.get(END, self.eos_ids[0])

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json without a padding token: what turns texts into ids."""
        spec = json.loads(self.text)
        spec["added_tokens"] = [t for t in spec.get("added_tokens") or () if t["content"] != PAD]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()

    def with_control(self, name: str) -> "Tokenizer":
        """The same tokenizer with one more control token, at the id `size`; itself where it has it."""
        if name in self._controls:
            return self
        spec = json.loads(self.text)
        spec["added_tokens"] = [*(spec.get("added_tokens") or ()), control_token(self.size, name)]
        return Tokenizer(json.dumps(spec, ensure_ascii=False), self.eos_ids, self.pad_id, self.config)

    def with_pad(self) -> "Tokenizer":
        """The same tokenizer with a padding token of its own, as transformers needs one to find where a text ends."""
        if self.pad_id is not None:
            return self
        grown = self.with_control(PAD)
        grown.pad_id = grown.control(PAD)
        return grown

    def files(self, template: ChatFormat | None = None) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json and special_tokens_map.json, read by transformers with equal ids.

        template: its end token becomes the eos token and its Jinja equivalent the chat template.
        """
        end = template.end_id(self) if template else self.eos_ids[0]
        special = {"eos_token": self._names[end]}
        if self.pad_id is not None:
            special["pad_token"] = self._names[self.pad_id]
        foreign = {k: v for k, v in self.config.items() if k not in _NOT_PASSED_ON}
        if _token_name(foreign.get("pad_token")) not in self._controls:  # transformers would remove it from texts
            foreign.pop("pad_token", None)
        more = self.config.get("extra_special_tokens")
        if isinstance(more, list):  # as transformers 5 writes it; 4 accepts a list only under this name
            foreign["additional_special_tokens"] = more
        elif more:
            foreign["extra_special_tokens"] = more
        config = {"clean_up_tokenization_spaces": False, **foreign, **special, "tokenizer_class": TOKENIZER_CLASS}
        if template:
            config |= {"chat_template": template.jinja(self), "tetrad": template.record()}
        texts = {"tokenizer_config.json": json_bytes(config), "special_tokens_map.json": json_bytes(special)}
        return {"tokenizer.json": self.text.encode(), **texts}

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        return _build(self.text)

    def _placed(self, ids: list[int]) -> list[int]:
        """The library renumbers the twin's few added tokens: back to their own ids."""
        return [self._moved.get(i, i) for i in ids] if self._moved else ids

    def _bytes(self, token: int) -> bytes:
        if token not in self._spelled:
            name = self._names[token]
            own = token not in self._added and all(c in _BYTE_OF for c in name)
            self._spelled[token] = bytes(_BYTE_OF[c] for c in name) if own else name.encode()
        return self._spelled[token]


def control_token(token: int, name: str) -> dict[str, Any]:
    """As tokenizer.json lists it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": True}


def _spare_pad(spare: Mapping[str, int]) -> int | None:
    """Of control tokens that are not end tokens, one that is named like a filler, else any."""
    for word in (*_PADS, ""):
        for name, i in spare.items():
            if name not in ENDS and word in name.lower():
                return i
    return None


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _load_spec(text: str) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("E-MODEL-TOKENIZER", f"tokenizer.json is not JSON: {error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError("E-MODEL-TOKENIZER", "tokenizer.json describes no model")
    for pattern in patterns(spec):
        if may_explode(pattern):
            what = f"the regular expression {pattern!a:.60} may need endless time: a repeat inside a repeat"
            raise UserError("E-MODEL-TOKENIZER", what, hint="use the tokenizer.json that its makers published")
    return spec


def _build(text: str) -> tokenizers.Tokenizer:
    with _told():
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def _told() -> Iterator[None]:
    """The library raises bare Exceptions, and its own BaseException where Rust panics (a regex out of retries)."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, MemoryError) or (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):
            raise
        raise UserError("E-MODEL-TOKENIZER", f"tokenizer.json cannot be used: {error!s:.200}") from None


def _twin_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer without control tokens: user text can spell none of them.

    Words and runs of spaces that were added are text and stay. A control token that also appears in the model's own
    vocabulary gets an unguessable name there (a piece of Unigram or WordPiece would match it), and merges that would
    build it or continue from it are left out.
    """
    nonce = secrets.token_hex(16)
    added = spec.get("added_tokens") or ()
    text_like = [t for t in added if not t.get("special") and not _BRACKETED.fullmatch(t["content"])]
    hidden = {t["content"]: f"{nonce} {t['content']}" for t in added if t not in text_like}
    model = dict(spec["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict) and not hidden.keys().isdisjoint(vocab):
        model["vocab"] = {hidden.get(name, name): i for name, i in vocab.items()}
        if model.get("merges"):
            model["merges"] = [merge for merge in model["merges"] if hidden.keys().isdisjoint(_parts(merge))]
    elif isinstance(vocab, list):
        model["vocab"] = [[hidden.get(name, name), score] for name, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**spec, **nothing, "model": model, "added_tokens": text_like}


def _parts(merge: str | Sequence[str]) -> tuple[str, ...]:
    """The two pieces of a merge, and what it builds from them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


def _read_text(path: Path, limit: int) -> str:
    """A file of the folder as text. Raises ValueError where it is not UTF-8."""
    try:
        size, raw = disk.start_of(path, limit)
    except OSError as error:
        raise UserError("E-MODEL-TOKENIZER", f"can't be read: {error.strerror}", where=str(path)) from None
    if size > limit:
        raise UserError("E-MODEL-TOKENIZER", f"{path.name} is larger than {limit >> 20} MiB", where=str(path))
    if raw.count(b"[") + raw.count(b"{") > _MOST_PARTS or raw.count(b",") > 4 * _MOST_PARTS:
        raise ValueError("it has more parts than any in use")
    return raw.decode()


def _read_object(path: Path) -> dict[str, Any]:
    """A folder's JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path, MAX_OBJECT_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError("E-MODEL-TOKENIZER", f"not JSON: {error}", where=str(path)) from None
    return value if isinstance(value, dict) else {}


def _end_ids(folder: Path, config: Mapping[str, Any], controls: Mapping[str, int]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if ids:
            return tuple(dict.fromkeys(ids))
    named = controls.get(_token_name(config.get("eos_token")))
    return () if named is None else (named,)


def _pad_id(folder: Path, config: Mapping[str, Any], controls: Mapping[str, int]) -> int | None:
    value = _read_object(folder / "config.json").get("pad_token_id")
    return controls.get(_token_name(config.get("pad_token")), value if isinstance(value, int) else None)


def _token_name(value: Any) -> str:
    return str(value.get("content", "") if isinstance(value, dict) else value or "")


def _no_tokenizer(folder: Path) -> NoReturn:
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if any(name.endswith((".model", ".spm")) or name in ("vocab.json", "merges.txt", "vocab.txt") for name in there):
        raise UserError("E-MODEL-TOKENIZER", "the folder has no tokenizer.json", where=str(folder), hint=CONVERT)
    what = f"tokenizer.json is missing; files there: {', '.join(there[:8]) or 'none'}"
    raise UserError("E-MODEL-MISSING", what, where=str(folder))
