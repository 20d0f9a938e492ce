"""The data of Tetrad, from a line of a file to a training step: small frozen dataclasses, no string-keyed dicts.

Arrays are numpy arrays during tokenisation and torch tensors on the device; the classes accept both.
Shapes: T tokens of a packed micro-batch, B rows, D documents of a pack.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Array = Any  # numpy.ndarray or torch.Tensor
IGNORE = -100  # the target of a position that no loss reads, as in transformers


@dataclass(frozen=True, slots=True)
class Turn:
    """One piece of a conversation. role: system | user | assistant, or instruction | input of an Instruction record.

    train: false for an answer that is read as context and not learned.
    """

    role: str
    text: str
    train: bool = field(default=True, repr=False)


def lines(turns: Iterable[Turn]) -> str:
    """The text of all turns, one line per turn; empty ones are left out."""
    return "\n".join(turn.text for turn in turns if turn.text)


@dataclass(frozen=True, slots=True)
class Document:
    """A text of pre-training."""

    text: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model answers."""

    turns: tuple[Turn, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What SFT learns from; the last turn is the assistant's."""

    turns: tuple[Turn, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to one prompt in an order of preference: the lowest rank is best, equal ranks are ties.

    votes: how many people preferred each answer, if the ranks come from that.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    ranks: tuple[float, ...]
    annotator: str = ""
    margin: float = 0.0
    where: str = ""
    votes: tuple[float, ...] = ()


MOST_SCORED = 4000
"""Scored answers that are paired: all pairs of more would exhaust the memory."""


@dataclass(frozen=True, slots=True)
class Score:
    """One answer with a number on the declared scale. spread: the standard error of that number, if known."""

    prompt: Prompt
    answer: str
    score: float
    annotator: str = ""
    where: str = ""
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids: int32 [n]. train: bool [n], true where the token itself is a label (the answer and its end token)."""

    ids: Array
    train: Array
    where: str = ""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `length` tokens of document number `document` also begin each document after it, up to number `last`,
    and are not stored there again."""

    document: int
    length: int
    last: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Documents one after another, without padding; attention never crosses a bound, but to a shared prefix.

    ids_T; positions_T (from 0 in each document, or from its prefix's length); bounds: the D + 1 offsets; targets_T:
    the next token of the same document where it is a label, else IGNORE; where: the place of each document's record;
    prefixes: what documents have in common and is stored once. keys_T: each token's dropout key, if there is dropout.
    Of a pack on its device too: labelled_N, the places of the labels; offsets, `bounds` as int32; recompute: the
    backward computes what is inside a block again instead of keeping it.
    """

    ids_T: Array
    positions_T: Array
    bounds: tuple[int, ...]
    targets_T: Array
    where: tuple[str, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    keys_T: Array = None
    labelled_N: Array = None
    offsets: Array = None
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer, with the sampler's own log-probability of each id.

    reason: "end" if the last id is an end token, "stop" at a stop text, "length" if the response was cut at its maximum
    length, "cancelled". text: what was decoded, up to the stop text; empty if no text was requested.
    top: for each id the most likely ids there with their log-probabilities, if requested.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    text: str = ""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def finished(self) -> bool:
        """False if the response was cut."""
        return self.reason in ("end", "stop")


@dataclass(frozen=True)
class StageCost:
    """What a stage will do. trained, frozen: how many models, and `adapters` trained on one of the frozen ones. tokens:
    trained on, each as often as it is read; read: only read; labels, read_labels: those of them whose logits are
    computed; sampled: generated in `rounds` of `responses`, `slots` at once, each of at most `new` tokens and up to
    `positions` with its prompt, and `group` to a prompt; shown: how often a few are generated to be looked at; after:
    models loaded for sampling when training is over, and `pairs` of test answers compared; batch: tokens per optimizer
    step, in records of `length`."""

    name: str
    trained: float
    frozen: float
    tokens: float = 0.0
    labels: float = 0.0
    read: float = 0.0
    read_labels: float = 0.0
    sampled: float = 0.0
    adapters: float = 0.0
    slots: int = 0
    positions: int = 0
    batch: int = 0
    length: int = 0
    rounds: int = 1
    responses: int = 0
    new: int = 0
    group: int = 1
    shown: int = 0
    after: int = 0
    pairs: float = 0.0
