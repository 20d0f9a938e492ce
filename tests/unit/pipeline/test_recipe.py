"""Recipes: every mistake has its code, its line and a way out, the same from the file and from the command line."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tetrad.data.source import files
from tetrad.errors import UserError
from tetrad.pipeline.recipe import Recipe, read, write
from tetrad.pipeline.validation import check

GOOD = """\
name = "demo"
seed = 3

[tokenizer]
text = ["data/a.txt", "data/*.jsonl"]
vocab_size = 512

[pretrain]
text = ["data/a.txt"]
tokens = 900_000

[sft]
data = ["data/sft.jsonl"]
separator = "\\n\\n"

[reward]
data = ["data/scores.jsonl"]
score_scale = [-4, 4]

[ppo]
prompts = ["data/prompts.jsonl"]
actor_lr = 1e-6

[evaluate]
prompts = ["data/prompts.jsonl"]
judges = ["judge.py:ridge"]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(GOOD)
    return path


def refused(path: Path, text: str | bytes, *words: str) -> UserError:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read(path, words)
    return caught.value


def test_values_and_defaults(recipe_file: Path) -> None:
    recipe = read(recipe_file)
    assert (recipe.name, recipe.seed, recipe.tokenizer.vocab_size) == ("demo", 3, 512)
    assert (recipe.ppo.actor_lr, recipe.ppo.critic, recipe.reward.score_scale) == (1e-6, "reward", (-4.0, 4.0))
    assert recipe.sft.separator == "\n\n"


def test_paths_start_at_the_recipe(recipe_file: Path) -> None:
    recipe = read(recipe_file)
    folder = recipe_file.parent
    assert recipe.tokenizer.text == (str(folder / "data/a.txt"), str(folder / "data/*.jsonl"))
    assert recipe.evaluate.judges == (f"{folder / 'judge.py'}:ridge",)
    assert recipe.run.out == "runs"


@pytest.mark.parametrize("folder", ["exp[1]", "what?", "a*b"])
def test_a_recipe_reads_its_own_files_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Not those of a sibling whose name the folder's would match as a pattern: named by any path, given anywhere."""
    for name in (folder, "exp1", "whatX", "aXb"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "s.jsonl").write_text("{}\n")
        (tmp_path / name / "judge.py").write_text("")
        (tmp_path / name / "base").mkdir()
    home = tmp_path / folder
    ppo = '[ppo]\nprompts = ["~/data/*.jsonl"]\nrewards = ["judge.py:f"]\n'
    (home / "r.toml").write_text('[model]\nfrom = "base"\n[sft]\ndata = ["data/*.jsonl"]\n' + ppo)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for place in (home / "r.toml", Path(folder, "r.toml")):
        recipe = read(place)
        given = read(place, ["--sft.data", "data/s*.jsonl"])
        again = tmp_path / "again.toml"
        again.write_text(write(recipe))
        for paths in (recipe.sft.data, given.sft.data, recipe.ppo.prompts, read(again).sft.data):
            assert [path.resolve() for path in files(paths)] == [home / "data" / "s.jsonl"]
        assert recipe.ppo.rewards == (f"{home}/judge.py:f",) and Path(recipe.model.from_).resolve() == home / "base"
        with pytest.raises(UserError, match="E-DATA-PATH"):
            files(read(place, ["--sft.data", "data/none.jsonl"]).sft.data)


def test_a_folder_with_a_name_in_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder there could never be written: its recipe and lineage are UTF-8."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xca\xfd")
    os.mkdir(folder)
    Path(folder, "r.toml").write_text('[sft]\ndata = ["s.jsonl"]\n')
    for place in (tmp_path, Path(folder)):
        monkeypatch.chdir(place)
        with pytest.raises(UserError, match=r"E-CONF-TYPE.*is not UTF-8 text"):
            read(Path(folder, "r.toml"))
    (tmp_path / "r.toml").write_text('[sft]\ndata = ["s.jsonl"]\n')
    with pytest.raises(UserError, match=r"E-CONF-TYPE.*run.out"):
        read(tmp_path / "r.toml")


def test_from_is_beside_the_recipe_or_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = tmp_path / "r.toml"
    path.write_text('[model]\nfrom = "base"\n[reward]\nfrom = "runs/other/reward"\n')
    recipe = read(path)
    assert recipe.model.from_ == str(tmp_path / "base")
    assert recipe.reward.from_ == "runs/other/reward"


def test_name_is_the_file_s_or_the_folder_s(tmp_path: Path) -> None:
    for name, expected in (("mine.toml", "mine"), ("recipe.toml", tmp_path.name)):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name).name == expected


def test_overrides_beat_the_file(recipe_file: Path) -> None:
    words = ["--ppo.actor-lr", "2e-6", "--seed=7", "--sft.train-on-prompt", "--sft.data", '["x", "y"]']
    words += ["--reward.data", "p", "q", "--reward.data", "r", "--reward.score-scale", "-1", "5", "--model.no-tied"]
    recipe = read(recipe_file, words)
    folder = recipe_file.parent
    assert (recipe.ppo.actor_lr, recipe.seed, recipe.sft.train_on_prompt, recipe.model.tied) == (2e-6, 7, True, False)
    assert recipe.sft.data == (str(folder / "x"), str(folder / "y"))
    assert [Path(name).name for name in recipe.reward.data] == ["p", "q", "r"]
    assert recipe.reward.score_scale == (-1.0, 5.0)


def test_written_recipe_reads_the_same_from_elsewhere(recipe_file: Path, tmp_path: Path) -> None:
    recipe = replace(read(recipe_file), name="umläut-中")
    recipe = replace(recipe, run=replace(recipe.run, out=str(tmp_path / "runs")))
    other = tmp_path / "elsewhere" / "recipe.toml"
    other.parent.mkdir()
    other.write_text(write(recipe))
    assert read(other) == recipe
    for system in ("", "Be «brief».\n"):
        recipe = replace(recipe, sft=replace(recipe.sft, template="chatml", system=system))
        other.write_text(write(recipe))
        assert read(other) == recipe


MISTAKES = [
    ("[ppo]\nactr_lr = 1e-6", "UNKNOWN", ":2", "ppo.actor_lr"),
    ("[sft]\nlerning_rate = 1e-6", "UNKNOWN", ":2", "sft.lr"),
    ("[sft]\nkl_coef = 0.1", "UNKNOWN", ":2", "ppo.kl_coef"),
    ("[sft]\nheld_out = ['x']", "UNKNOWN", ":2", "held_out is now validation"),
    ("[ppo]\nmini_batches = 2", "UNKNOWN", ":2", "mini_batches is now num_minibatches"),
    ("[sft]\nactor-lr = 0.1", "UNKNOWN", ":2", "ppo.actor_lr"),
    ("\nsede = 1", "UNKNOWN", ":2", "seed"),
    ("[pretrian]\ntokens = 1", "UNKNOWN", ":2", "pretrain"),
    ("[quux]\n", "UNKNOWN", ":1", "the settings are"),
    ("[model]\nfrom_ = 'x'", "UNKNOWN", ":2", "model.from"),
    ("[ppo]\nlr = 1\n", "UNKNOWN", ":2", "pretrain.lr or sft.lr or reward.lr"),
    ("[ppo]\nactor_lr = '1e-6'", "TYPE", ":2", "without quotes"),
    ("[ppo]\nsteps = 2.0", "TYPE", ":2", "a whole number"),
    ("[ppo]\nsteps = true", "TYPE", ":2", "a whole number"),
    ("[ppo]\nbootstrap_truncated = 1", "TYPE", ":2", "true or false"),
    ("[sft]\ndata = 'a.jsonl'", "TYPE", ":2", 'data = ["a.jsonl"]'),
    ("[sft]\ndata = ['a', 3]", "TYPE", ":2", "list of files"),
    ("[model]\nrope_theta = 1979-05-27", "TYPE", ":2", "a number"),
    ("[sft]\ntemplate = 1979-05-27", "TYPE", ":2", '"instruction"'),
    ("[sft]\nsystem = 3", "TYPE", ":2", "must be text. or leave system out"),
    ("[sft]\nsystem = 'Be brief.'", "CONFLICT", ":2", "no place for sft.system"),
    ("[model]\nfrom = 'x'\n[sft]\ntemplate = 'instruction'\nsystem = 'Be brief.'", "CONFLICT", ":5", "chatml"),
    ("sft = 3", "TYPE", ":1", "[sft]"),
    ("[[sft]]\nepochs = 3", "TYPE", ":1", "[sft]"),
    ("seed = '3'", "TYPE", ":1", "without quotes"),
    ("seed = 1.5", "TYPE", ":1", "whole number"),
    ("seed = -1", "RANGE", ":1", "at least 0"),
    ("seed = 9223372036854775808", "RANGE", ":1", "below 2^63"),
    ("[reward]\nscore_scale = [1]", "TYPE", ":2", "two numbers"),
    ("[reward]\nscore_scale = [5, 1]", "RANGE", ":2", "[1, 5]"),
    ("[reward]\nscore_scale = [1, 1]", "RANGE", ":2", "two numbers"),
    ("[sft]\nlr = -1", "RANGE", ":2", "above 0 and at most 1"),
    ("[sft]\nlr = 0", "RANGE", ":2", "above 0"),
    ("[sft]\nlr = nan", "RANGE", ":2", "above 0"),
    ("[sft]\nlr = inf", "RANGE", ":2", "above 0"),
    ("[sft]\nlr = 1e400", "RANGE", ":2", "above 0"),
    ("[sft]\nlr = 1e30", "RANGE", ":2", "at most 1"),
    ("[ppo]\ncritic = 'rewrad'", "RANGE", ":2", 'did you mean "reward"'),
    ("[sft]\nmax_tokens = 600\ndata = ['x']\n[model]\nmax_positions = 128", "RANGE", ":2", "lower sft.max_tokens"),
    ("[pretrain]\ntext = ['x']\ntokens = 10", "RANGE", ":3", "batch_tokens = 16384"),
    ("name = '../x'", "RANGE", ":1", "letters"),
    ("[evaluate]\njudges = ['judge.py']", "RANGE", ":2", "file.py:function"),
    (
        "[ppo]\nbatch_size = 10\nnum_minibatches = 4",
        "DIVIDE",
        ":2",
        "batch_size = 8 or 12, or num_minibatches = 2 or 5",
    ),
    ("[model]\nhidden_size = 130", "DIVIDE", ":2", "hidden_size = 128 or 132"),
    ("[model]\nhidden_size = 12", "DIVIDE", ":2", "must be even"),
    ("[model]\nheads = 8\nkv_heads = 3", "DIVIDE", ":2", "kv_heads = 2 or 4"),
    ("[pretrain]\ntext = ['x']\nbatch_tokens = 1000", "DIVIDE", ":3", "batch_tokens = 512 or 1024"),
    ("[sft]\nepochs = 1\nepochs = 2", "DUPKEY", ":3", "epochs is given twice"),
    ("[sft]\n[ppo]\n[sft]", "DUPKEY", ":3", "keep one"),
    ("[sft\n", "SYNTAX", ":1", "TOML"),
    ("sft:\n  lr: 1e-4", "SYNTAX", ":1", "TOML"),
    ("x: !!python/object/apply:os.system [ls]", "SYNTAX", ":1", "TOML"),
    (b"\x00\xff\xfe", "SYNTAX", "", "UTF-8"),
    ("#" * (1 << 20) + "#", "SIZE", "", "1 MiB"),
    ("[model]\nfrom = 'x'\n[tokenizer]\ntext = ['y']", "CONFLICT", ":4", "remove"),
    ("[ppo]\nkl_target = 6.0\nkl_coef = 0", "CONFLICT", ":2", "kl_coef = 0.05"),
    (
        "[ppo]\nkl_target = 6\nbatch_size = 128\nsamples_per_prompt = 4\nkl_horizon = 100",
        "RANGE",
        ":5",
        "kl_horizon = 103",
    ),
    (
        "[ppo]\nprompts = ['x']\nadapters = true\n[reward]\ndata = ['x']",
        "CONFLICT",
        ":3",
        "adapters = true in [reward]",
    ),
    (
        "[ppo]\nprompts = ['x']\nadapters = true\n[reward]\ndata = ['x']\nadapters = true\nensemble_size = 3",
        "CONFLICT",
        ":3",
        "ensemble_size = 1",
    ),
    ("[ppo]\nadapters = true\nuncertainty_penalty = 1", "CONFLICT", ":2", "uncertainty_penalty = 0"),
    ("[ppo]\nrewards = ['reward', 'a.py:f', 'reward']", "CONFLICT", ":2", "one larger weight"),
    ("[sft]\ndata = ['x']\nadapters = true\nadd_separator = true", "CONFLICT", ":3", "never learned"),
    ("[ptx]\ntext = ['x']\nsequence_length = 100\nbatch_tokens = 250", "DIVIDE", ":4", "batch_tokens = 200 or 300"),
    (
        "[ptx]\ntext = ['x']\nsequence_length = 600\nbatch_tokens = 600\n[model]\nmax_positions = 512",
        "RANGE",
        ":3",
        "512",
    ),
    ("[wandb]\napi_key = 'abcdef'", "SECRET", ":2", "environment variable"),
    ("hf_token = 'abcdef'", "SECRET", ":1", "environment variable"),
    ("[sft]\nseparator = 'sk-aaaaaaaaaaaaaaaaaaaa'", "SECRET", ":2", "environment variable"),
]


@pytest.mark.parametrize(("text", "code", "line", "said"), MISTAKES)
def test_mistakes_of_a_file(tmp_path: Path, text: str | bytes, code: str, line: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    error = refused(path, text)
    assert error.code == f"E-CONF-{code}"
    assert error.where == f"{path}{line}"
    assert said in f"{error.what} {error.hint}"
    assert error.exit_code == 2
    assert "sk-aaa" not in str(error)
    assert "abcdef" not in str(error)


FLAGS = [
    (["--ppo.actr-lr", "1"], "UNKNOWN", "--ppo.actr-lr", "ppo.actor_lr"),
    (["--ppo.actor-lr", "fast"], "TYPE", "--ppo.actor-lr", "a number"),
    (["--ppo.actor-lr", "2"], "RANGE", "--ppo.actor-lr", "at most 1"),
    (["--ppo.steps", "2.0"], "TYPE", "--ppo.steps", "whole"),
    (["--ppo.steps"], "MISSING", "--ppo.steps", "a whole number"),
    (["--ppo.steps", "1", "--ppo.steps=2"], "DUPKEY", "--ppo.steps", "twice"),
    (["--ppo.bootstrap-truncated=maybe"], "TYPE", "--ppo.bootstrap-truncated", "true or false"),
    (["--sft.data", "[x"], "SYNTAX", "--sft.data", '["a", "b"]'),
    (["stray"], "SYNTAX", "", "--TABLE.KEY"),
    (["--ppo.batch-size", "10", "--ppo.num-minibatches", "4"], "DIVIDE", "--ppo.batch-size", "8 or 12"),
    (["--wandb.api-key", "sk-aaaaaaaaaaaaaaaaaaaa"], "SECRET", "--wandb.api-key", "environment"),
]


@pytest.mark.parametrize(("words", "code", "where", "said"), FLAGS)
def test_mistakes_of_the_command_line(recipe_file: Path, words: list[str], code: str, where: str, said: str) -> None:
    error = refused(recipe_file, GOOD, *words)
    assert (error.code, error.where) == (f"E-CONF-{code}", where)
    assert said in f"{error.what} {error.hint}"
    assert "sk-aaa" not in str(error)


def test_no_recipe(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none.toml", "MISSING"), (tmp_path, "SIZE")):
        with pytest.raises(UserError, match=code):
            read(path)


def test_a_model_from_a_folder_is_not_measured_here(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[model]\nfrom = 'x'\nhidden_size = 130\n[sft]\ndata = ['y']\nmax_tokens = 4096\n")
    assert read(path).sft.max_tokens == 4096


def test_check_needs_no_places() -> None:
    check(Recipe(name="x"))
    with pytest.raises(UserError, match="E-CONF-RANGE"):
        check(Recipe(name=""))
