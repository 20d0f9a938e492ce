"""What is used in Tetrad and in transformers alike: a folder of ours, its tokens, its scores, loss and logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tetrad
import toys
from served import write_model
from tetrad.cli.main import main
from tetrad.inference.policy import instruction_prompt

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ASKED = [("Go on.", "the plot"), ("Go on.", ""), ("翻译", "这部电影很好看"), ("a film", "slow but moving <|sep|>")]
IGNORE = -100


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_model(folder / "sft", seed=1)
    write_model(folder / "chat", "chatml", seed=2, tied=False)
    write_model(folder / "reward", reward=True, reward_bias=-0.75)
    return folder


def messages(form: str, instruction: str, extra: str) -> list[dict[str, str]]:
    """What `generate --instruction --input` asks, as a chat."""
    if form == "chatml":
        return [{"role": "user", "content": instruction + (f"\n{extra}" if extra else "")}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": extra}]


@pytest.mark.parametrize("stage", ["sft", "chat"])
def test_greedy_tokens(run: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate(max_length=60)` in transformers, `tetrad generate --greedy` and `tetrad.generate` say the same."""
    folder = run / stage / "model"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = tetrad.load(run / stage)
    for instruction, extra in ASKED:
        chat = messages("chatml" if stage == "chat" else "instruction", instruction, extra)
        inputs = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if "<|" not in extra:  # transformers turns user text into control tokens, Tetrad never does
            output = theirs.generate(**inputs, max_length=60, do_sample=False)[0]
            prompt = inputs["input_ids"].shape[1]
            expected = words.decode(output[prompt:], skip_special_tokens=True)
            longest = 60 - prompt
            assert tetrad.generate(ours, [(instruction, extra)], max_new_tokens=longest, temperature=0.0) == [expected]
            given = ["--instruction", instruction, "--input", extra, "--greedy", "--max-new-tokens", str(longest)]
            assert main(["generate", str(run / stage), *given]) == 0
            assert capsys.readouterr().out == expected + "\n"
        ids = ours.form.prompt(ours.tokenizer, instruction_prompt(instruction, extra).turns)
        assert (ids == inputs["input_ids"][0].tolist()) == ("<|" not in extra)


def test_scores(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tetrad score` is the sequence classifier's number plus config.json's constant, batched on either side."""
    monkeypatch.chdir(tmp_path)
    folder = run / "reward" / "model"
    answers = ["was warm and funny", "很好看", "dull"]
    records = [{"Instruction": i, "Input": x, "Output": a} for (i, x), a in zip(ASKED, answers, strict=False)]
    Path("s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["score", str(run / "reward"), "--data", "s.jsonl", "--out", "o.jsonl"]) == 0
    ours = [json.loads(line)["score"] for line in Path("o.jsonl").read_text().splitlines()]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    bias = json.loads((folder / "config.json").read_text())["tetrad"]["reward_bias"]
    assert bias == -0.75
    chats = [
        [*messages("instruction", r["Instruction"], r["Input"]), {"role": "assistant", "content": r["Output"]}]
        for r in records
    ]
    for side in ("left", "right"):
        words.padding_side = side
        inputs = words.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            theirs = model(**inputs).logits[:, 0] + bias
        assert (torch.tensor(ours) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_forward(tmp_path: Path, family: str, side: str) -> None:
    """Loss and logits of a padded batch; the first token of a row has no label, as it has no predecessor."""
    folder = toys.saved(tmp_path, toys.causal(seed=7, family=family, tied=False))
    toys.write(folder, toys.tokenizer().files())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest, rows = 23, [toys.ids(length, length) for length in (23, 4, 11)]
    ids, mask, labels = (torch.full((3, longest), fill) for fill in (toys.PAD, 0, IGNORE))
    for place, row in enumerate(rows):
        at = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[place, at], mask[place, at], labels[place, at] = torch.tensor(row), 1, torch.tensor(row)
        labels[place, at][:2] = IGNORE
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        theirs = model(**given)
    loss, logits = tetrad.forward(tetrad.load(folder).model, ids, mask, labels)
    assert abs(float(loss) - float(theirs.loss)) <= 1e-5
    assert (logits - theirs.logits)[mask.bool()].abs().max() <= 1e-4
