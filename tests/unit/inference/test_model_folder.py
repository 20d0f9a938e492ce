"""What is told of a folder before its model is loaded. Hostile folders are in tests/faults."""

import json
from pathlib import Path

import pytest

import served
from tetrad.errors import UserError
from tetrad.inference.model_folder import (
    check,
    model_folder,
    others_may_write,
    own_sampling,
    refuse_other_tokenizer,
    usable,
)
from tetrad.pipeline.preflight import Folders
from tetrad.settings.ppo import Ppo
from tetrad.settings.sft import Sft
from tetrad.stages import Recipe
from tetrad.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("language")) / "model"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("judge"), reward=True) / "model"


def refused(code: str, function: object, *arguments: object, **named: object) -> None:
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)  # type: ignore[operator]
    assert caught.value.code == code


def test_roles(language: Path, judge: Path) -> None:
    assert not check(language).facts.reward
    assert check(judge, role="reward").facts.reward
    assert check(judge, role="any").facts.reward
    assert not check(language, role="any").facts.reward
    refused("E-CKPT-ROLE", check, judge)
    refused("E-CKPT-ROLE", check, language, role="reward")
    refused("E-CKPT-ROLE", usable, str(language), reward=True)


def test_a_template_is_needed_for_use(tmp_path: Path, language: Path) -> None:
    usable(str(language))
    plain = served.write_model(tmp_path, form="")
    refused("E-MODEL-TEMPLATE", usable, str(plain))
    usable(str(plain), template="instruction")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    refused("E-MODEL-TOKENIZER", check, served.write_model(tmp_path, vocab_size=20) / "model")


def test_a_stage_or_a_folder(language: Path) -> None:
    assert model_folder(language.parent) == model_folder(language) == language
    for name in ("none", "zero\0", "a" * 300):
        refused("E-MODEL-MISSING", model_folder, name)


def test_who_else_may_write(tmp_path: Path) -> None:
    folder = served.write_model(tmp_path) / "model"
    assert others_may_write(folder) == ""
    (folder / "config.json").chmod(0o666)
    assert "config.json" in others_may_write(folder)
    assert "config.json" in check(folder).note


def test_other_tokenizers(language: Path) -> None:
    own, other = Tokenizer.load(language), served.tokenizer(290)
    refuse_other_tokenizer(language, own, Tokenizer.load(language))
    refused("E-MODEL-TOKENIZER", refuse_other_tokenizer, language, own, other)


def test_each_folder_is_read_once_and_what_is_ahead_not_at_all(language: Path, judge: Path, tmp_path: Path) -> None:
    verified: list[Path] = []
    look = Folders(Recipe(), [tmp_path / "ahead"], verified.append)
    look.refuse("sft", {"base": language})
    look.refuse("ppo", {"sft": language, "reward": judge})
    look.refuse("evaluate", {"sft": tmp_path / "ahead", "reward": judge, "referee": language})
    assert verified == [language, judge]
    refused("E-CKPT-ROLE", look.refuse, "ppo", {"sft": judge})


def test_another_tokenizer_of_the_reward_model(language: Path, tmp_path: Path) -> None:
    other = served.write_model(tmp_path, reward=True, size=290) / "model"
    """Only a critic that starts from it must share it; told before the reward model is trained."""
    ways = [("ppo", {"sft": language, "reward": other}), ("reward", {"from": other, "base": language})]
    for stage, parents in ways:
        for ppo, wrong in ((Ppo(prompts=("p",)), True), (Ppo(prompts=("p",), critic="actor"), False), (Ppo(), False)):
            look = Folders(Recipe(ppo=ppo), [], lambda folder: None)
            if wrong:
                refused("E-MODEL-TOKENIZER", look.refuse, stage, parents)
            else:
                look.refuse(stage, parents)


def test_the_template_needs_its_control_tokens(language: Path, tmp_path: Path) -> None:
    words = (language / "tokenizer.json").read_text().replace("<|sep|>", "<|x|>")
    served.write_model(tmp_path)
    (tmp_path / "model/tokenizer.json").write_text(words)
    for settings in (Sft(add_separator=True), Sft(template="chatml"), Sft(separator="\n\n")):
        Folders(Recipe(sft=settings), [], lambda folder: None).refuse("sft", {"base": tmp_path / "model"})
    with pytest.raises(UserError, match=r"E-MODEL-TOKENIZER.*sft\.template.*add_separator"):
        Folders(Recipe(), [], lambda folder: None).refuse("sft", {"base": tmp_path / "model"})


QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [1],
}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
        ({"do_sample": True, "temperature": 1, "min_p": 0.1, "top_p": None}, {"temperature": 1, "min_p": 0.1}),
        (QWEN | {"do_sample": False}, {}),
        ({"temperature": 0.6, "eos_token_id": 1}, {}),
        ({"do_sample": True}, {}),
    ],
)
def test_a_folders_own_sampling(tmp_path: Path, stated: dict[str, object], expected: dict[str, float]) -> None:
    assert own_sampling(tmp_path) == own_sampling("zero\0") == {}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(stated))
    assert own_sampling(tmp_path) == own_sampling(str(tmp_path / "model")) == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "E-MODEL-FORMAT"),
        ('{"do_sample": true, "temperature": -1}', "E-CONF-RANGE"),
        ('{"do_sample": true, "top_k": "many"}', "E-CONF-TYPE"),
    ],
)
def test_an_own_sampling_that_is_none(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"{code}.*generation_config.json"):
        own_sampling(tmp_path)
