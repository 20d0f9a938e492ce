"""Text as it grows: whole characters, no beginning of a stop text, and together what decode makes of all ids."""

import random

import pytest
import tokenizers

import toys
from tetrad.text import bpe
from tetrad.text.stream import TextStream
from tetrad.text.tokenizer import Tokenizer

CORPUS = ["The fox 🦊 jumps over the lazy dog.\n", "狐狸跳过懒狗。很好！\n", "e\u0301 naïve <|im_end|> 👩‍👩‍👧‍👦\n"] * 40
LEARNED = bpe.learn(CORPUS, 400)


def test_the_words_are_tokens_of_several_letters():
    assert len(LEARNED.encode("the lazy dog")) <= 6


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    found = []
    for i in ids:
        found.append(stream.push(i))
        if stream.stopped:
            break
    return [*found, stream.close()], stream.stopped


@pytest.mark.parametrize("text", ["狐🦊狸 naïve e\u0301", "👩‍👩‍👧‍👦 family", "plain", ""])
def test_no_half_character(text):
    ids = LEARNED.encode(text)
    shown, _ = pieces(LEARNED, ids)
    assert "".join(shown) == LEARNED.decode(ids)
    assert not any("\ufffd" in piece for piece in shown)
    assert shown[-1] == ""  # nothing was kept that could be shown


def test_any_ids_give_what_decode_gives():
    chance = random.Random(0)
    for _ in range(500):
        ids = [chance.randrange(LEARNED.size + 3) for _ in range(chance.randrange(30))]
        assert "".join(pieces(LEARNED, ids)[0]) == LEARNED.decode(ids)


def test_control_tokens_show_nothing():
    ids = [*LEARNED.encode("a b"), LEARNED.eos_ids[0]]
    assert "".join(pieces(LEARNED, ids)[0]) == "a b"


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("the lazy dog", ["lazy dog"], "the "),
        ("the lazy cat", ["lazy dog"], None),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd", "bca"], "a"),  # the first in the text, not in the list
        ("xabby", ["abb", "b"], "xa"),  # complete first
        ("the lazy dog", ["laz", "a"], "the l"),  # and so where one token brings both
        ("狐狸跳过懒狗。", ["懒狗"], "狐狸跳过"),
        ("🦊🦊🦊", ["🦊🦊"], ""),
        ("ends with la", ["lazy"], None),
        ("text", [""], None),
    ],
)
def test_stop_texts_may_span_tokens(text, stops, kept):
    for ids in (LEARNED.encode(text), [i for c in text for i in LEARNED.encode(c)]):
        shown, stopped = pieces(LEARNED, ids, stops)
        assert stopped == (kept is not None)
        assert "".join(shown) == (text if kept is None else kept)


def test_what_may_become_a_stop_is_held_back_and_given_when_it_does_not():
    shown = []
    stream = TextStream(LEARNED, ["xyz"])
    for c in "axyaxyzb":
        shown += [stream.push(i) for i in LEARNED.encode(c)]
    assert shown == ["a", "", "", "xya", "", "", "", ""]
    assert stream.stopped and stream.close() == ""


def test_random_stops_cut_where_the_whole_text_would_be_cut():
    chance = random.Random(1)
    for _ in range(500):
        ids = [chance.choice([LEARNED.encode(c)[0] for c in "ab狐🦊"]) for _ in range(chance.randrange(1, 20))]
        stops = ["".join(chance.choice("ab") for _ in range(chance.randrange(1, 4))) for _ in range(2)]
        whole = LEARNED.decode(ids)
        found = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
        shown, stopped = pieces(LEARNED, ids, stops)
        assert stopped == bool(found)
        if stopped:
            assert "".join(shown) == whole[: min(found)[1]]
        else:
            assert "".join(shown) == whole


def test_a_tokenizer_that_is_not_byte_level():
    """Pieces of a metaspace tokenizer depend on their neighbours: bytes that make a character, the first space."""
    names = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    spec = tokenizers.Tokenizer(tokenizers.models.BPE({n: i for i, n in enumerate(names)}, [("▁", "a")]))
    spec.model.byte_fallback = True
    spec.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    d = tokenizers.decoders
    spec.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    spec.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(spec.to_str())
    fox = [2 + b for b in "狐".encode()]
    a, b = names.index("▁a"), names.index("b")
    shown, _ = pieces(tokenizer, [a, *fox, a])
    assert shown == ["a", "", "", "", "狐 a", ""]  # another byte could still undo the character
    chance = random.Random(2)
    for _ in range(300):
        ids = [chance.choice([a, b, *fox, fox[0], names.index("▁"), 1]) for _ in range(chance.randrange(12))]
        ids += fox * chance.randrange(2)
        assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids)
    shown, stopped = pieces(tokenizer, [*fox, fox[0], a, b, a, b], ["b a"])
    assert stopped and "".join(shown) == "\ufffd" * 4 + " a"


def test_words():
    tokenizer = toys.tokenizer()
    ids = [5, 6, toys.EOS, 7]
    assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids)
