"""Every form of record, in any letter case, and one named error for each way to get it wrong."""

import json
from functools import partial
from pathlib import Path

import pytest

from tetrad.data.records import (
    answers,
    content_key,
    conversations_of,
    read_comparisons,
    read_conversations,
    read_documents,
    read_preferences,
    read_prompts,
    refuse_overlap,
)
from tetrad.data.source import Counts, sources
from tetrad.errors import UserError
from tetrad.types import Comparison, Conversation, Document, Prompt, Score, Turn

ASKED = (Turn("instruction", "Translate."), Turn("input", "hello"))
ALONE = (Turn("instruction", "hello"), Turn("input", ""))


@pytest.fixture
def write(tmp_path):
    def write(*records, name="f.jsonl"):
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
        return [path]

    return write


def choices(*pairs):
    return {"input": "q", "choices": [{"text": text, "rank": rank} for text, rank in pairs]}


def instruction(**fields):
    return {"instruction": "q", "output": "a", **fields}


def chat(**fields):
    return {"messages": [{"role": "user", "content": "a", **fields}, {"role": "assistant", "content": "b"}]}


def strip(records):
    return [r.turns for r in records]


def test_documents(write):
    counts = Counts()
    paths = [*write({"text": "a\nb"}, {"TEXT": " c "}), *write("one\n\ntwo\nlines\n", name="f.txt")]
    found = list(read_documents(paths, counts))
    assert [d.text for d in found] == ["a\nb", " c ", "one", "two\nlines"]
    assert [d.where.split("/")[-1] for d in found] == ["f.jsonl:1", "f.jsonl:2", "f.txt:1", "f.txt:3"]
    assert (counts.read, counts.kept) == (4, 4)
    with pytest.raises(UserError, match=r'E-DATA-MISSING.*needs "text"; fields seen: "body"'):
        list(read_documents(write({"body": "a"})))


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_instruction_records_in_any_letter_case(write, case):
    record = {case("instruction"): "Translate.", case("input"): "hello", case("output"): "你好"}
    assert strip(read_conversations(write(record))) == [(*ASKED, Turn("assistant", "你好"))]


@pytest.mark.parametrize("extra", [{}, {"Input": ""}, {"Input": None}])
def test_input_may_be_missing(write, extra):
    record = {"Instruction": "hello", **extra, "Output": "x"}
    assert strip(read_conversations(write(record))) == [(*ALONE, Turn("assistant", "x"))]


def test_prompt_and_completion(write):
    record = {"prompt": "hello", "completion": "x"}
    assert strip(read_conversations(write(record))) == [(*ALONE, Turn("assistant", "x"))]


def test_messages(write):
    talk = [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": text} for role, text in talk]}
    assert strip(read_conversations(write(record))) == [tuple(Turn(*pair) for pair in talk)]
    assert strip(read_prompts(write(record))) == [tuple(Turn(*pair) for pair in talk[:-1])]


@pytest.mark.parametrize(
    ("roles", "turn"),
    [
        ("user user assistant", 2),
        ("usr assistant", 1),
        ("user system assistant", 2),
        ("system system user assistant", 2),
        ("assistant", 1),
        ("system assistant", 2),
        ("user", 1),
        ("user assistant user", 3),
        ("system", 1),
        ("", 0),
    ],
)
def test_bad_chats(write, roles, turn):
    record = {"messages": [{"role": role, "content": "x"} for role in roles.split()]}
    with pytest.raises(UserError, match=rf"E-DATA-CHAT.*:1: turn {turn}:"):
        list(read_conversations(write(record)))


PROMPTS = [
    ({"Instruction": "Translate.", "Input": "hello"}, ASKED),
    ({"instruction": "Translate.", "input": "hello", "output": "x"}, ASKED),
    ({"input": "hello"}, ALONE),
    ({"prompt": "hello"}, ALONE),
    ({"prompt": "hello", "completion": "x"}, ALONE),
    ({"prompt": "hello", "chosen": "x", "rejected": "y"}, ALONE),
    ({"input": "hello", "choices": [{"text": "a", "rank": 1}]}, ALONE),
    ({"input": "hello", "output": "x", "score": 3}, ALONE),
    ({"messages": [{"role": "user", "content": "a"}]}, (Turn("user", "a"),)),
]


@pytest.mark.parametrize(("record", "turns"), PROMPTS)
def test_prompts_of_any_file(write, record, turns):
    counts = Counts()
    assert strip(read_prompts(write(record), counts)) == [turns]
    assert counts.unknown == {}


SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
SAID = (Turn("user", "a"), Turn("assistant", "b"))
SYSTEM = Turn("system", "be kind")
DIALECTS = [
    ("sharegpt conversations", {"conversations": SHARE}, SAID),
    ("sharegpt conversations", {"system": "be kind", "conversations": SHARE}, (SYSTEM, *SAID)),
    ("sharegpt conversations", {"conversations": [{"from": "system", "value": "be kind"}, *SHARE]}, (SYSTEM, *SAID)),
    (
        "alpaca with system or history",
        {"instruction": "c", "input": "d", "output": "e", "system": "be kind", "history": [["a", "b"]]},
        (SYSTEM, *SAID, Turn("user", "c\nd"), Turn("assistant", "e")),
    ),
    ("instruction and output", {"instruction": "c", "input": "", "output": "e", "system": "", "history": []}, None),
    (
        "prompt and completion",
        {
            "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        (SYSTEM, *SAID),
    ),
]


@pytest.mark.parametrize(("form", "record", "turns"), DIALECTS)
def test_dialects_are_recognised_and_said(write, form, record, turns):
    counts = Counts()
    (found,) = read_conversations(write(record), counts)
    assert found.turns == (turns or (Turn("instruction", "c"), Turn("input", ""), Turn("assistant", "e")))
    assert counts.forms == {form: 1} and counts.unknown == {} and counts.notes == [f"read as {form} (1)"]


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": talk("a"), "chosen": talk("", "x")[1:], "rejected": talk("", "y")[1:]},
        {"chosen": talk("a", "x"), "rejected": talk("a", "y")},
        {"prompt": "a", "chosen": talk("a", "x"), "rejected": talk("a", "y")},
        {
            "conversations": SHARE[:1],
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        {"messages": talk("a"), "choices": [{"text": "y", "rank": 2}, {"text": "x", "rank": 1}]},
    ],
)
def test_preferences_as_conversations(write, record):
    (found,) = read_preferences(write(record))
    assert found.prompt.turns == (Turn("user", "a"),)
    assert dict(zip(found.answers, found.ranks, strict=True)) == {"x": 1, "y": 2}


def test_pairs_of_different_conversations(write):
    for record in (
        {"chosen": talk("a", "x"), "rejected": talk("b", "y")},
        {"chosen": talk("a", "x", "c"), "rejected": talk("a", "x", "d")},
        {"prompt": "a", "chosen": talk("a", "x", "c", "d"), "rejected": "y"},
    ):
        with pytest.raises(UserError, match="E-DATA-CHAT"):
            read_preferences(write(record))


def marked(*marks, shape=("role", "content", "user", "assistant"), name="messages"):
    """A conversation with an answer for each mark: fields of the assistant's turn."""
    who, what, user, assistant = shape
    turns = [({who: user, what: "a"}, {who: assistant, what: "b", **mark}) for mark in marks]
    return {name: [turn for pair in turns for turn in pair]}


SHAREGPT = {"shape": ("from", "value", "human", "gpt"), "name": "conversations"}
NO = [
    {"weight": 0},
    {"weight": 0.0},
    {"loss": False},
    {"trainable": False},
    {"train": False},
    {"weight": 1, "train": 0},
]
YES = [{}, {"weight": 1}, {"loss": True}, {"weight": None, "train": True}, {"trainable": 1.0}]


@pytest.mark.parametrize("where", [{}, SHAREGPT])
@pytest.mark.parametrize("no", NO)
def test_an_answer_that_is_marked_is_not_learned(write, no, where):
    counts = Counts()
    records = [marked(no, yes, **where) for yes in YES] + [marked({}, no, **where), marked(no, no, **where)]
    found = list(read_conversations(write(*records), counts))
    assert [[t.train for t in r.turns if t.role == "assistant"] for r in found] == [[False, True]] * 5 + [[True, False]]
    assert all(turn.train for record in found for turn in record.turns if turn.role == "user")
    assert (counts.masked, counts.excluded, counts.kept, counts.unknown) == (8, 1, 6, {})
    assert any('"weight", "loss", "trainable", "train"): 8' in note for note in counts.notes)
    with pytest.raises(UserError, match=r"E-DATA-EMPTY.*all 2 records are marked"):
        list(read_conversations(write(marked(no), marked(no, no))))


@pytest.mark.parametrize("bad", [{"weight": 0.5}, {"loss": "false"}, {"train": [0]}, {"trainable": 2}])
def test_a_mark_that_is_neither_yes_nor_no(write, bad):
    with pytest.raises(UserError, match=r"E-DATA-TYPE.*:1: turn 4: .*true or false, or 1 or 0"):
        list(read_conversations(write(marked({}, bad))))


def test_a_mark_on_a_users_turn_is_harmless(write):
    (found,) = read_conversations(write(chat(weight=0.5, train=False)))
    assert all(turn.train for turn in found.turns)


def test_nested_fields_that_are_not_read_are_told(write):
    counts = Counts()
    talk = marked({"mask": 1, "weight": 1, "name": None})
    list(read_conversations(write(talk, chat(Name="x")), counts))
    assert counts.unknown.keys() == {"messages.mask", "messages.name"}
    assert counts.unknown["messages.name"].endswith(":2") and '"messages.mask" (first at' in counts.notes[-1]
    counts = Counts()
    ranked = choices(("a", 1), ("b", 2))
    ranked["choices"][0] |= {"votes": 3, "model": "m"}
    pair = {"chosen": talk["messages"], "rejected": [*talk["messages"][:1], {"role": "assistant", "content": "c"}]}
    read_preferences(write(ranked, pair), (), counts)
    assert counts.unknown.keys() == {"choices.votes", "choices.model", "chosen.mask", "chosen.weight"}
    counts = Counts()
    read_prompts(write(ranked), counts)
    assert counts.unknown == {}  # answers are not read at all


KTO = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize("bad", [False, 0, 0.0, "false", "False", "0"])
@pytest.mark.parametrize("good", [True, 1, "true", "1", None, "positive", 5])
def test_a_false_label_is_no_good_answer(write, bad, good):
    counts = Counts()
    records = [KTO | {"label": good}, KTO | {"label": bad}, KTO]
    assert len(list(read_conversations(write(*records), counts))) == 2
    assert (counts.read, counts.kept, counts.excluded) == (3, 2, 1)
    assert any('because of a false "label"' in note and note.endswith(": 1") for note in counts.notes)
    assert ("label" in counts.unknown) == (good in ("positive", 5))
    with pytest.raises(UserError, match=r"E-DATA-EMPTY.*all 1 records"):
        list(read_conversations(write(KTO | {"label": bad})))


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (instruction(label=False), 0),
        (instruction(label=0), 1),  # the class of a text
        (instruction(label="false"), 1),
        (instruction(kto_tag="false"), 0),
        (instruction(kto_tag=True), 1),
        (chat() | {"label": False}, 0),
        ({"prompt": chat()["messages"][:1], "completion": chat()["messages"][1:], "label": False}, 0),
    ],
)  # fmt: skip
def test_labels_of_other_forms(write, record, kept):
    assert len(list(read_conversations(write(instruction(), record)))) == 1 + kept


NULLS = {"messages": None, "prompt": None, "choices": None, "label": None, "Input": None, "x": None}


def test_a_null_is_a_missing_field_at_every_depth(write):
    counts = Counts()
    turns = [{"from": None, "value": None, "role": "user", "content": "a", "weight": None}]
    turns += [{"from": "gpt", "value": "b", "role": None, "content": None}]
    found = list(read_conversations(write(NULLS | instruction(), NULLS | {"messages": turns}), counts))
    assert [r.turns for r in found] == [(Turn("instruction", "q"), Turn("input", ""), Turn("assistant", "a")), SAID]
    assert counts.unknown == {}
    ranks = [{"text": "x", "rank": 2, "votes": None}, {"text": "y", "rank": 1, "votes": None}]
    votes = [{"text": "x", "rank": None, "votes": 2}, {"text": "y", "rank": None, "votes": 1}]
    found = read_preferences(
        write(*({"input": "q", "choices": c, "chosen": None, "margin": None} for c in (ranks, votes)))
    )
    assert [(r.ranks, r.votes) for r in found] == [((2, 1), ()), ((1, 2), (2, 1))]
    renamed = sources(write({"question": None, "instruction": "q", "output": "a"}), rename={"question": "instruction"})
    assert len(list(read_conversations(renamed))) == 1


@pytest.mark.parametrize("role", ["tool", "function_call", "observation"])
def test_turns_of_tools_have_a_reason(write, role):
    called = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    with pytest.raises(UserError, match=rf'E-DATA-CHAT.*turn 2: "{role}": calls of tools.*as text'):
        list(read_conversations(write({"messages": called})))
    called[1] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    with pytest.raises(UserError, match=r'E-DATA-CHAT.*turn 2: "tool_calls"'):
        list(read_conversations(write({"messages": called})))
    share = [{"from": "human", "value": "a"}, {"from": role, "value": "{}"}]
    with pytest.raises(UserError, match=r"E-DATA-CHAT.*calls of tools"):
        list(read_conversations(write({"conversations": share})))


def test_whole_dialogues_as_texts_have_a_way_out(write):
    start = "\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(UserError, match=r'E-DATA-MISSING.*no prompt beside them.*into "prompt".*lists of turns'):
        read_preferences(write({"chosen": f"{start} Hello", "rejected": f"{start} Go"}))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"Question": "a", "Answer": "b"}, "--data.rename question=instruction answer=output"),
        ({"问题": "a", "答案": "b"}, "--data.rename 问题=instruction 答案=output"),
        ({"query": "a", "question": "b", "response": "c"}, "--data.rename question=instruction response=output"),
    ],
)
def test_the_words_that_would_rename(write, record, words):
    with pytest.raises(UserError, match="E-DATA-MISSING") as caught:
        list(read_conversations(write(record)))
    assert words in caught.value.hint


def test_fields_of_other_names(write):
    given = sources(write({"Question": "hello", "ANSWER": "x"}), rename={"question": "instruction", "answer": "output"})
    (found,) = read_conversations(given)
    assert found.turns == (*ALONE, Turn("assistant", "x"))
    with pytest.raises(UserError, match=r'E-DATA-DUPKEY.*"output" stands twice.*two names'):
        list(read_conversations(sources(write({"answer": "x", "output": "y"}), rename={"answer": "output"})))


def test_bad_rows_can_be_set_aside(write):
    counts, aside = Counts(), []
    bad = ['{"instruction": 5, "output": "x"}\n', "{'a': 1}\n", "\n"]
    (path,) = write(instruction(), *bad, instruction(), '{"instruction": "a\n')
    read = partial(conversations_of, given=sources([path]), counts=counts)
    found = list(read(path, refuse=lambda error, text: aside.append((error.code, error.where, text))))
    assert len(found) == 2 and (counts.read, counts.kept, counts.refused, counts.blank) == (5, 2, 3, 1)
    assert [(code, where[-2:]) for code, where, _ in aside] == [
        ("E-DATA-TYPE", ":2"),
        ("E-DATA-SYNTAX", ":3"),
        ("E-DATA-SYNTAX", ":6"),
    ]
    assert [text for *_, text in aside] == [bad[0].strip(), bad[1].strip(), '{"instruction": "a']
    (array,) = write(json.dumps([instruction(), {"instruction": "q"}, instruction()]), name="f.json")
    assert len(list(read(array, refuse=lambda error, text: aside.append(text)))) == 2
    assert json.loads(aside[-1]) == {"instruction": "q"}


def test_a_prompt_that_waits_for_nothing(write):
    with pytest.raises(UserError, match="E-DATA-CHAT"):
        read_prompts(write({"messages": [{"role": "system", "content": "a"}]}))


def test_comparisons(write):
    counts = Counts()
    ranked = {
        "input": "hello",
        "choices": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}, {"TEXT": "c", "Rank": 4}],
    }
    pair = {"prompt": "hello", "chosen": "a", "rejected": "b", "margin": 0.5, "annotator": 2**70}
    tied = {
        "Instruction": "Translate.",
        "Input": "hello",
        "choices": [{"text": "a", "rank": 2}] * 2,
        "annotator": "kim",
    }
    first, second, third = read_preferences(write(ranked, pair, tied), (), counts)
    assert first == Comparison(Prompt(ALONE, first.where), ("a", "b", "c"), (1, 1, 4), where=first.where)
    assert (second.answers, second.ranks) == (("a", "b"), (1, 2))
    assert (second.annotator, second.margin) == (str(2**70), 0.5)
    assert third.prompt.turns == ASKED and third.annotator == "kim"
    assert (counts.read, counts.kept, counts.tied) == (3, 3, 1)
    assert first.where.endswith("f.jsonl:1") and third.prompt.where.endswith("f.jsonl:3")


def test_votes_are_ranks(write):
    three = [("a", 3), ("b", 5), ("c", 3)]
    listed = {"input": "q", "choices": [{"text": text, "votes": votes} for text, votes in three]}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "votes": [2, 7]}
    first, second = read_preferences(write(listed, pair))
    assert (first.ranks, first.votes) == ((2, 1, 2), (3, 5, 3))
    assert (second.answers, second.ranks, second.votes) == (("a", "b"), (2, 1), (2, 7))
    counts = Counts()
    (tied,) = read_preferences(write({**pair, "votes": [4, 4]}), (), counts)
    assert tied.ranks == (1, 1) and counts.tied == 1
    assert not counts.unknown


def test_scores(write):
    record = {"input": "hello", "output": "x", "score": 4.5, "annotator": 7}
    (score,) = read_preferences(write(record), (1, 5))
    assert score == Score(Prompt(ALONE, score.where), "x", 4.5, "7", score.where)
    (unsure,) = read_preferences(write({**record, "spread": 0.25}), (1, 5))
    assert unsure.spread == 0.25
    mixed = read_preferences(write(record, {"prompt": "p", "chosen": "a", "rejected": "b"}), (1, 5))
    assert [type(r) for r in mixed] == [Score, Comparison]


def test_a_missing_scale_says_the_range_and_the_line(write):
    paths = write(*({"input": "a", "output": "b", "score": s} for s in (2, -1.5, 4)))
    with pytest.raises(UserError, match=r"E-DATA-SCALE.*:1: 3 records.*-1.5 to 4.*score_scale = \[-1.5, 4\]"):
        read_preferences(paths)
    with pytest.raises(UserError, match=r"E-DATA-NUMBER.*:3: .*4, outside the scale -2 to 3"):
        read_preferences(paths, (-2, 3))


BAD = [
    (read_conversations, "hello", "E-DATA-TYPE", "object with named fields, got text"),
    (read_conversations, None, "E-DATA-TYPE", "got null"),
    (read_conversations, 5, "E-DATA-TYPE", "got a number"),
    (read_conversations, {"question": "a", "answer": "b"}, "E-DATA-MISSING", '"Output".*seen: "question", "answer"'),
    (read_conversations, {}, "E-DATA-MISSING", "seen: none"),
    (read_conversations, {"input": "a", "output": "b"}, "E-DATA-MISSING", '"Instruction"'),
    (read_conversations, {"prompt": "a"}, "E-DATA-MISSING", '"completion"'),
    (read_conversations, {"prompt": None, "completion": "b"}, "E-DATA-NULL", '"prompt"'),
    (read_conversations, {"prompt": ["p"], "completion": "b"}, "E-DATA-TYPE", '"prompt" must be text, got a list'),
    (read_conversations, {"prompt": "p", "completion": True}, "E-DATA-TYPE", "got true or false"),
    (read_conversations, {"prompt": "p", "completion": {}}, "E-DATA-TYPE", "got an object"),
    (read_conversations, {"prompt": "", "completion": "b"}, "E-DATA-BLANK", '"prompt" is empty'),
    (read_conversations, {"prompt": "p", "completion": ""}, "E-DATA-BLANK", '"completion" is empty'),
    (read_conversations, instruction(output=" \n"), "E-DATA-BLANK", '"output"'),
    (read_conversations, instruction(instruction="", input=" "), "E-DATA-BLANK", '"instruction"'),
    (read_conversations, instruction(input=3), "E-DATA-TYPE", '"input"'),
    (read_conversations, instruction(Output="b"), "E-DATA-DUPKEY", '"output" stands twice'),
    (read_conversations, {"messages": None}, "E-DATA-NULL", "messages"),
    (read_conversations, {"messages": "x"}, "E-DATA-TYPE", "a list of turns"),
    (read_conversations, {"messages": ["x"]}, "E-DATA-TYPE", r"messages\[1\]"),
    (read_conversations, {"messages": [{"who": "human", "value": "x"}]}, "E-DATA-MISSING", '"role".*turn 1'),
    (read_conversations, {"messages": [{"from": "human"}]}, "E-DATA-MISSING", '"from" and "value" in turn 1'),
    (read_conversations, {"conversations": [{"from": "bot", "value": "x"}]}, "E-DATA-CHAT", '"bot" is no role'),
    (read_conversations, {"prompt": "p", "completion": [{"role": "user", "content": "x"}]}, "E-DATA-CHAT", "turn 1"),
    (read_conversations, instruction(history="x"), "E-DATA-TYPE", '"history" must be a list of pairs'),
    (read_conversations, instruction(history=[["x"]]), "E-DATA-TYPE", r"history\[1\]"),
    (read_conversations, instruction(history=[["x", ""]]), "E-DATA-BLANK", '"answer"'),
    (read_conversations, chat(content=None), "E-DATA-NULL", "content"),
    (read_conversations, chat(content=""), "E-DATA-BLANK", "content"),
    (read_conversations, chat(content=[{"type": "text"}]), "E-DATA-TYPE", "content"),
    (read_prompts, {"output": "a"}, "E-DATA-MISSING", '"Instruction"'),
    (read_prompts, {"input": None}, "E-DATA-NULL", '"input"'),
    (read_prompts, {"text": "a"}, "E-DATA-MISSING", '"text"'),
    (read_preferences, {"input": "a", "output": "b"}, "E-DATA-MISSING", '"choices"'),
    (read_preferences, {"choices": [{"text": "a", "rank": 1}] * 2}, "E-DATA-MISSING", '"input"'),
    (read_preferences, {"input": "a", "choices": None}, "E-DATA-NULL", "choices"),
    (read_preferences, {"input": "a", "choices": {}}, "E-DATA-TYPE", "a list of answers"),
    (read_preferences, {"input": "a", "choices": ["x", "y"]}, "E-DATA-TYPE", r"choices\[1\]"),
    (read_preferences, {"input": "a", "choices": [{"text": "x"}] * 2}, "E-DATA-MISSING", '"rank" in answer 1'),
    (read_preferences, choices(), "E-DATA-RANK", "two or more"),
    (read_preferences, choices(("x", 1)), "E-DATA-RANK", "two or more"),
    (read_preferences, choices(("x", 1), ("y", 2), ("x", 3)), "E-DATA-RANK", "different ranks"),
    (read_preferences, choices(("x", "1"), ("y", 2)), "E-DATA-TYPE", '"rank"'),
    (read_preferences, choices(("x", True), ("y", 2)), "E-DATA-TYPE", '"rank"'),
    (read_preferences, choices(("x", None), ("y", 2)), "E-DATA-NULL", '"rank"'),
    (read_preferences, choices(("x", 2**64), ("y", 2)), "E-DATA-NUMBER", "too large"),
    (read_preferences, choices(("", 1), ("y", 2)), "E-DATA-BLANK", '"text"'),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "a"}, "E-DATA-RANK", "different ranks"),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "E-DATA-NUMBER", "margin"),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": ["k"]}, "E-DATA-TYPE", "annotator"),
    (read_preferences, {"input": "a", "output": "b", "score": 4, "spread": -1}, "E-DATA-NUMBER", "spread"),
    (read_preferences, {"input": "a", "output": "b", "score": 4, "spread": "1"}, "E-DATA-TYPE", "spread"),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "votes": 3}, "E-DATA-TYPE", "two numbers"),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "votes": [3]}, "E-DATA-TYPE", "two numbers"),
    (read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "votes": [3, -1]}, "E-DATA-NUMBER", "votes"),
    (
        read_preferences,
        {"input": "a", "choices": [{"text": "x", "votes": 1}, {"text": "y", "rank": 2}]},
        "E-DATA-MISSING",
        '"rank" in answer 1',
    ),
    (
        read_preferences,
        {"input": "a", "choices": [{"text": "x", "votes": "1"}, {"text": "y", "votes": 2}]},
        "E-DATA-TYPE",
        '"votes"',
    ),
    (read_preferences, {"prompt": "p", "chosen": [], "rejected": []}, "E-DATA-TYPE", "chosen"),
    (read_preferences, {"input": "a", "output": "b", "score": "4"}, "E-DATA-TYPE", "score"),
    (read_preferences, '{"input": "a", "output": "b", "score": 1e999}\n', "E-DATA-NUMBER", "score"),
    (read_documents, {"text": " "}, "E-DATA-BLANK", "text"),
]


@pytest.mark.parametrize(("reader", "record", "code", "words"), BAD)
def test_bad_records(write, reader, record, code, words):
    good = {"text": "x", "prompt": "p", "completion": "x", "chosen": "a", "rejected": "b"}
    bad = record if isinstance(record, str) and record.startswith("{") else json.dumps(record) + "\n"
    with pytest.raises(UserError, match=words) as caught:
        list(reader(write(good, bad)))
    assert (caught.value.code, caught.value.where.rpartition(":")[2]) == (code, "2")


def test_unknown_fields_are_noted_once(write):
    counts = Counts()
    paths = write(instruction(x=1), instruction(X=2, score=3), chat())
    assert len(list(read_conversations(paths, counts))) == 3
    assert counts.forms == {"instruction and output": 2, "messages": 1}
    form, note = counts.notes
    assert form == "read as instruction and output (2), messages (1)"
    assert '"score" (first at' in note and '"x" (first at' in note and note.count('"') == 4
    assert "f.jsonl:2" in note.partition('"x"')[0]
    counts = Counts()
    read_preferences(write(choices(("a", 1), ("b", 2)) | {"score": 3, "margin": None, "Annotator": "k"}), (), counts)
    assert list(counts.unknown) == ["score"]


def test_nothing_is_read_before_the_first_record_is_asked_for(write):
    records = read_conversations(write(instruction(), "{\n"))
    assert next(records).turns[-1].text == "a"
    with pytest.raises(UserError, match="E-DATA-SYNTAX"):
        next(records)


def test_answers(write):
    (record,) = read_preferences(write(choices(("a", 2), ("b", 1))))
    assert [c.turns[-1] for c in answers(record)] == [Turn("assistant", "a"), Turn("assistant", "b")]
    assert all(c.turns[:-1] == record.prompt.turns and c.where == record.where for c in answers(record))
    score = Score(record.prompt, "x", 1.0)
    assert [c.turns[-1].text for c in answers(score)] == ["x"]


def test_overlap():
    train = [Conversation((Turn("user", t), Turn("assistant", "x")), f"a:{t}") for t in "abc"]
    held = [Conversation((Turn("user", t), Turn("assistant", "x")), f"b:{t}") for t in "dbc"]
    refuse_overlap(train, held[:1])
    with pytest.raises(UserError, match=r"E-DATA-OVERLAP. b:b: 2 of 3"):
        refuse_overlap(train, held)
    assert content_key(Document("a", "x")) == content_key(Document("a", "y")) != content_key(Document("b", "x"))
    prompt = Prompt(ALONE, "p")
    ranked = [Comparison(Prompt(ALONE, "q"), ("a", "b"), ranks, where="w") for ranks in ((1.0, 2.0), (2.0, 1.0))]
    assert len({content_key(r) for r in ranked}) == 2
    assert content_key(Comparison(prompt, ("a", "b"), (1.0, 2.0))) == content_key(ranked[0])


def rated(folder: Path, *rows: tuple[str, str, float, str]) -> Path:
    """Rows of prompt, answer, score and annotator; a pair before them and a tie behind."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    tie = {"prompt": "t", "choices": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]}
    names = ("prompt", "output", "score", "annotator")
    records = [pair, *(dict(zip(names, row, strict=True)) for row in rows), tie]
    (folder / "rated.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "rated.jsonl"


def test_scores_become_ranked_lists(tmp_path: Path) -> None:
    """By prompt and annotator, at the place of the first; an answer is worse where its score is lower by the gap."""
    rows = [("q", "low", 1.0, "kim"), ("r", "x", 2.0, "kim"), ("q", "high", 5.0, "kim"), ("q", "near", 4.1, "kim")]
    rows += [("q", "chained", 3.2, "kim"), ("q", "low", 2.0, "kim"), ("r", "y", 1.0, "kim"), ("q", "z", 9.0, "lee")]
    counts = Counts()
    pair, first, second = read_comparisons([rated(tmp_path, *rows)], 1.0, counts=counts)
    assert (pair.answers, pair.ranks) == (("a", "b"), (1.0, 2.0))
    assert dict(zip(first.answers, first.ranks, strict=True)) == {"low": 2, "high": 1, "near": 1, "chained": 1}
    assert (second.answers, second.ranks, second.where.rpartition(":")[2]) == (("x", "y"), (1, 2), "3")
    assert counts.tied == 2  # lee's one answer, and the tie


def test_scores_are_refused_where_nothing_says_what_they_mean(tmp_path: Path) -> None:
    path = rated(tmp_path, ("q", "x", 1.0, ""), ("q", "y", 1.5, ""))
    with pytest.raises(UserError, match="2 records of dpo") as error:
        read_comparisons([path], 0.0)
    assert (error.value.code, error.value.where) == ("E-CONF-MISSING", f"{path}:2")
    (tmp_path / "tied.jsonl").write_text(path.read_text().splitlines()[-1])
    with pytest.raises(UserError) as error:
        read_comparisons([tmp_path / "tied.jsonl"], 1.0)
    assert error.value.code == "E-DATA-EMPTY"
