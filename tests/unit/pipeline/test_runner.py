"""The pipeline with stages that only write a file: what is skipped, made anew, moved aside, refused."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tetrad import storage
from tetrad.console import Console
from tetrad.errors import Stopped, UserError
from tetrad.pipeline import hashes, runner
from tetrad.pipeline.recipe import read
from tetrad.stages import STAGES
from tetrad.training.context import StageContext

RECIPE = """
name = "demo"
[tokenizer]
text = ["data/wiki.txt"]
[pretrain]
text = ["data/wiki.txt"]
[sft]
data = ["data/sft.jsonl"]
[reward]
data = ["data/rm-*.jsonl"]
[ppo]
prompts = ["data/prompts.jsonl"]
[evaluate]
prompts = ["data/prompts.jsonl"]
judges = ["judge.py:ridge"]
"""
ALL = ["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"]


@contextmanager
def faked(stages: Mapping[str, Callable[[StageContext], None]]) -> Iterator[None]:
    """These functions instead of the stages' own; their data is no real data, so it is not looked at."""

    def function_of(name: str) -> Callable[[StageContext], None]:
        module, _, function = name.partition(":")
        stage = next((stage for stage, row in STAGES.items() if row.module == module and function == "run"), "")
        return stages[stage] if stage else lambda context: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "function_of", function_of)
        patch.setattr(runner, "preflight", lambda *args: [])
        yield


@dataclass
class Workshop:
    """A folder with a recipe and data; `run` returns the stages that ran, `said` is what was printed."""

    folder: Path
    contexts: dict[str, StageContext] = field(default_factory=dict)
    said: str = ""
    before: Callable[[StageContext], None] = lambda context: None
    report: dict[str, Any] = field(default_factory=lambda: {"verdict": None})
    notes: dict[str, Any] = field(default_factory=lambda: {"gate": [], "alarms": []})

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *words: str, only: str = "", stages: Mapping[str, runner.StageFunction] | None = None) -> list[str]:
        self.contexts, out = {}, StringIO()
        stages = stages or dict.fromkeys(ALL, self.stage)
        page = () if "--run.report" in words else ("--run.report", "false")
        words = ("--run.out", str(self.folder / "runs"), *page, *words)
        try:
            with faked(stages):
                runner.run(read(self.folder / "recipe.toml", words), Console(out=out, err=out), only=only)
        finally:
            self.said = out.getvalue()
        return list(self.contexts)

    def status(self) -> list[str]:
        out = StringIO()
        runner.status(read(self.folder / "recipe.toml", ["--run.out", str(self.folder / "runs")]), Console(out=out))
        self.said = out.getvalue()
        return [line.split()[1] for line in self.said.splitlines()[2:8]]

    def stage(self, context: StageContext) -> None:
        self.contexts[context.folder.name] = context
        self.before(context)
        stage, key = context.folder.name, context.key
        if stage == "evaluate":
            storage.write_folder(
                context.folder / "report", {"report.json": json.dumps(self.report).encode()}, {"key": key}
            )
            return
        metrics = {"metrics": self.notes} if stage == "ppo" else {}
        card = {"README.md": f"# {stage}\n".encode()}
        storage.write_folder(context.folder / "model", {"weights.bin": key.encode()}, {"key": key, **metrics}, card)

    @property
    def home(self) -> Path:
        return self.folder / "runs" / "demo"

    def names(self) -> list[str]:
        return sorted(path.name for path in self.home.iterdir())


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    shop = Workshop(tmp_path)
    files = {"recipe.toml": RECIPE, "judge.py": "def ridge(rows): return rows\n"}
    files |= {f"data/{name}": name for name in ("wiki.txt", "sft.jsonl", "rm-1.jsonl", "rm-2.jsonl", "prompts.jsonl")}
    for name, text in files.items():
        shop.write(name, text)
    return shop


def test_all_stages_run_once(shop: Workshop) -> None:
    assert shop.run() == ALL
    assert shop.run() == []
    assert shop.said.count("unchanged, skipped") == 6
    assert shop.said.endswith("nothing to do\n")
    assert shop.status() == ["done"] * 6


def test_parents(shop: Workshop) -> None:
    shop.run()
    parents = {stage: list(context.parents) for stage, context in shop.contexts.items()}
    assert parents == {
        "tokenizer": [],
        "pretrain": ["tokenizer"],
        "sft": ["pretrain"],
        "reward": ["sft"],
        "ppo": ["sft", "reward"],
        "evaluate": ["sft", "reward", "pretrain", "ppo"],
    }
    assert shop.contexts["ppo"].parents["sft"] == shop.home / "sft" / "model"


CHANGES = [
    (["--ppo.kl-coef", "0.1"], ["ppo", "evaluate"]),
    (["--reward.lr", "1e-4"], ["reward", "ppo", "evaluate"]),
    (["--sft.template", "chatml"], ["sft", "reward", "ppo", "evaluate"]),
    (["--evaluate.best-of", "4"], ["evaluate"]),
    (["--sampling.temperature", "0.5"], ["evaluate"]),
    (["--model.layers", "2"], ALL[1:]),
    (["--optim.beta2", "0.99"], ALL[1:]),
    (["--run.dtype", "bfloat16"], ALL[1:]),
    (["--seed", "1"], ALL[1:]),
    (["--tokenizer.vocab-size", "300"], ALL),
    (["--run.log-every", "3", "--run.save-every", "7", "--run.micro-batch-tokens", "64", "--ppo.eval-every", "2"], []),
]


@pytest.mark.parametrize(("words", "expected"), CHANGES)
def test_a_setting_touches_only_what_follows_from_it(shop: Workshop, words: list[str], expected: list[str]) -> None:
    shop.run()
    assert shop.run(*words) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("data/rm-2.jsonl", "other", ["reward", "ppo", "evaluate"]),
        ("data/rm-3.jsonl", "one more that the glob finds", ["reward", "ppo", "evaluate"]),
        ("data/prompts.jsonl", "other", ["ppo", "evaluate"]),
        ("judge.py", "def ridge(rows): return [1.0]\n", ["evaluate"]),
        ("recipe.toml", "# a comment\n" + RECIPE, []),
        ("data/wiki.txt", "wiki.txt", []),
    ],
)
def test_a_file_touches_only_what_follows_from_it(shop: Workshop, name: str, text: str, expected: list[str]) -> None:
    shop.run()
    shop.write(name, text)
    assert shop.run() == expected


def test_the_key_is_of_contents_not_of_places(shop: Workshop) -> None:
    shop.run()
    (shop.folder / "data").rename(shop.folder / "texts")
    shop.write("recipe.toml", RECIPE.replace("data/", "texts/"))
    assert shop.run() == []


def test_a_system_prompt_is_in_the_key_once_it_is_given(shop: Workshop) -> None:
    shop.run("--sft.template", "qwen2.5")
    settings = json.loads((shop.home / "sft" / "lineage.json").read_text())["settings"]
    assert "sft.template" in settings and "sft.system" not in settings  # finished stages of before keep their keys
    assert shop.run("--sft.template", "qwen2.5", "--sft.system", "") == ALL[2:]
    assert json.loads((shop.home / "sft" / "lineage.json").read_text())["settings"]["sft.system"] == ""
    assert shop.run("--sft.template", "qwen2.5", "--sft.system", "Be brief.") == ALL[2:]


def test_a_raised_version_makes_the_stage_anew(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run()
    row = replace(STAGES["reward"], version=STAGES["reward"].version + 1)
    monkeypatch.setitem(STAGES, "reward", row)  # type: ignore[misc]
    assert shop.run() == ["reward", "ppo", "evaluate"]
    assert "arithmetic changed" in shop.said


def test_old_results_are_moved_and_never_overwritten(shop: Workshop) -> None:
    shop.run()
    key = json.loads((shop.home / "ppo/lineage.json").read_text())["key"]
    shop.run("--ppo.steps", "5")
    assert "ppo.steps was 100, is 5" in shop.said
    assert (shop.home / f"old/ppo-{key[:8]}/model/weights.bin").read_bytes() == key.encode()
    shop.run()
    shop.run("--ppo.steps", "5")
    assert len(list((shop.home / "old").glob(f"ppo-{key[:8]}*"))) == 2


def test_a_stopped_stage_goes_on_in_its_folder(shop: Workshop) -> None:
    def stop(context: StageContext) -> None:
        if context.folder.name == "sft" and not (context.folder / "mark").exists():
            (context.folder / "mark").write_text("here")
            raise Stopped("after step 3")

    shop.before = stop
    with pytest.raises(Stopped):
        shop.run()
    assert shop.status() == ["done", "done", "stopped", "new", "new", "new"]
    assert shop.run() == ["sft", "reward", "ppo", "evaluate"]
    assert "goes on where it stopped" in shop.said
    assert (shop.home / "sft/mark").exists()
    assert "old" not in shop.names()


def test_a_stopped_stage_whose_key_changed_begins_anew(shop: Workshop) -> None:
    def stop(context: StageContext) -> None:
        raise Stopped("at once")

    shop.before = stop
    with pytest.raises(Stopped):
        shop.run()
    shop.before = lambda context: None
    assert shop.run("--tokenizer.vocab-size", "300") == ALL
    assert len(list((shop.home / "old").iterdir())) == 1


def test_lineage_is_written_before_the_stage_begins(shop: Workshop) -> None:
    seen = {}

    def look(context: StageContext) -> None:
        seen[context.folder.name] = json.loads((context.folder / "lineage.json").read_text())
        assert read(context.folder / "recipe.toml") == read(context.folder / "recipe.toml")

    shop.before = look
    shop.run()
    assert seen["ppo"]["key"] == shop.contexts["ppo"].key
    assert seen["ppo"]["parents"]["sft"]["key"] == shop.contexts["sft"].key
    assert [Path(item["path"]).name for item in seen["reward"]["data"]["reward.data"]] == ["rm-1.jsonl", "rm-2.jsonl"]
    assert seen["evaluate"]["data"]["evaluate.judges"][0]["function"] == "ridge"
    assert seen["sft"]["settings"]["sft.epochs"] == 1.0


def test_the_written_recipe_goes_on_with_the_same_run(shop: Workshop) -> None:
    shop.run()
    recipe = read(shop.home / "sft/recipe.toml")
    out = StringIO()
    with faked(dict.fromkeys(ALL, shop.stage)):
        runner.run(recipe, Console(out=out, err=out))
    assert out.getvalue().endswith("nothing to do\n")


def test_a_locked_folder_is_not_moved(shop: Workshop) -> None:
    shop.run()
    with storage.RunLock(shop.home / "ppo/lock"):
        with pytest.raises(UserError) as caught:
            shop.run("--ppo.steps", "5")
        assert (caught.value.code, caught.value.exit_code) == ("E-RUN-LOCKED", 7)
        assert "old" not in shop.names()
    assert shop.run("--ppo.steps", "5") == ["ppo", "evaluate"]


def test_status_says_running_and_stale(shop: Workshop) -> None:
    shop.run()
    shop.write("data/prompts.jsonl", "other")
    with storage.RunLock(shop.home / "ppo/lock"):
        assert shop.status() == ["done"] * 4 + ["running", "stale"]
    assert "ppo.prompts changed" in shop.said
    assert "sft.jsonl " in shop.said


def test_status_of_a_new_stage_tells_no_differences(shop: Workshop) -> None:
    """Nothing differs from anything: not where all is new, not behind stages that are done."""
    assert shop.status() == ["new"] * 6
    assert " was " not in shop.said and "is new" not in shop.said
    shop.run(only="tokenizer")
    assert shop.status() == ["done"] + ["new"] * 5
    assert " was " not in shop.said and "is new" not in shop.said


def test_status_of_a_stale_stage_says_why(shop: Workshop) -> None:
    shop.run()
    (shop.home / "evaluate/lineage.json").write_text("{}")
    place = shop.home / "ppo/lineage.json"
    made = json.loads(place.read_text())
    del made["settings"]["ppo.steps"]
    made["settings"]["ppo.batch_size"] = 9
    place.write_text(json.dumps({**made, "key": "other"}))
    (shop.home / "ppo/model/manifest.json").unlink()
    (shop.home / "ppo/checkpoints/step-000004").mkdir(parents=True)
    shop.write("data/prompts.jsonl", "other")
    assert shop.status() == ["done"] * 4 + ["stale", "stale"]
    assert "ppo.steps is new; ppo.batch_size was 9, is 64; ppo.prompts changed; at step 4" in " ".join(
        shop.said.split()
    )
    assert "its lineage is unknown" in shop.said


def verdict_of(outcome: str, reason: str = "ridge: PPO less SFT is +0.10 [-0.10, +0.30]") -> dict[str, Any]:
    return {"verdict": {"outcome": outcome, "use": "SFT", "reasons": [reason]}}


def test_the_verdict_is_the_last_line_of_run_and_status_and_in_the_card(shop: Workshop) -> None:
    shop.report = verdict_of("no difference shown")
    last = ["because    ridge: PPO less SFT is +0.10 [-0.10, +0.30]", "verdict    no difference shown: use SFT"]
    for said in (lambda: shop.run(), lambda: shop.run(), lambda: shop.run(only="evaluate")):
        said()
        assert shop.said.splitlines()[-2:] == last
    out = StringIO()
    runner.status(read(shop.folder / "recipe.toml", ["--run.out", str(shop.folder / "runs")]), Console(out=out))
    assert out.getvalue().splitlines()[-2:] == last
    card = (shop.home / "ppo/model/README.md").read_text()
    assert card.startswith("# ppo\n") and card.count("## Verdict") == 1
    assert "**no difference shown: use SFT**\n\n- ridge: PPO less SFT is" in card
    shop.report = verdict_of("PPO is better")
    shop.run("--evaluate.samples", "9")
    again = (shop.home / "ppo/model/README.md").read_text()
    assert again == card.replace("no difference shown", "PPO is better")
    assert (
        storage.verify_folder(shop.home / "ppo/model")["key"]
        == shop.contexts["evaluate"].lineage["parents"]["ppo"]["key"]
    )


def test_under_strict_a_result_not_to_be_trusted_is_exit_5_every_time(shop: Workshop) -> None:
    shop.report = verdict_of("not to be trusted", "gate: the reward follows the length of responses")
    assert shop.run() == ALL
    for expected in ([], []):
        with pytest.raises(UserError, match="gate: the reward follows") as caught:
            shop.run("--evaluate.strict", "true")
        assert (caught.value.code, caught.value.exit_code) == ("E-NUM-VERDICT", 5)
        assert list(shop.contexts) == expected
    assert shop.status()[:6] == ["done"] * 6
    assert (shop.home / "evaluate/report/report.json").is_file()
    assert "not to be trusted" in (shop.home / "ppo/model/README.md").read_text()
    shop.report = verdict_of("no difference shown")
    assert shop.run("--evaluate.strict", "true", "--evaluate.samples", "9") == ["evaluate"]


def test_without_evaluate_ppo_speaks_for_itself(shop: Workshop) -> None:
    shop.write("recipe.toml", RECIPE.partition("[evaluate]")[0])
    shop.run()
    assert shop.said.splitlines()[-2:] == ["because    add [evaluate]", "verdict    not evaluated"]
    span = {"figure": "length", "level": 2, "first": 12, "last": 19}
    shop.notes = {"gate": ["the reward follows the length"], "alarms": [span, {**span, "figure": "kl", "level": 1}]}
    shop.run("--ppo.steps", "9")
    assert shop.said.splitlines()[-4:] == [
        "because    gate: the reward follows the length",
        "because    alarm length: at its second limit, first at step 12, last at step 19",
        "because    add [evaluate]",
        "verdict    not to be trusted: use SFT",
    ]
    with pytest.raises(UserError, match="E-NUM-VERDICT"):
        shop.run("--ppo.steps", "9", "--evaluate.strict", "true")
    shop.run(only="sft")
    assert "verdict" not in shop.said


def test_a_kill_before_the_card_is_made_good(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is there and the card says another verdict: the next run writes it, and clears what the kill left."""
    shop.report = verdict_of("PPO is better")
    monkeypatch.setattr(runner.outcome, "write_card", lambda *_: None)
    shop.run()
    monkeypatch.undo()
    model = shop.home / "ppo/model"
    (model / ".tmp-README.md-12345678").write_text("half")
    assert "Verdict" not in (model / "README.md").read_text()
    shop.run(only="ppo")
    assert "Verdict" not in (model / "README.md").read_text(), "one stage alone says nothing of what follows"
    assert shop.run() == []
    assert "PPO is better" in (model / "README.md").read_text()
    assert not list(model.glob(".tmp*"))


def test_status_of_nothing_writes_nothing(shop: Workshop) -> None:
    assert shop.status() == ["new"] * 6
    assert not shop.home.exists()


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.write_bytes(b"x" * 64), "E-CKPT-HASH"),
        (lambda path: path.write_bytes(b"x"), "E-CKPT-SIZE"),
        (lambda path: path.unlink(), "E-CKPT-MISSING"),
    ],
)
def test_a_damaged_result_is_an_error(shop: Workshop, damage: Callable[[Path], None], code: str) -> None:
    shop.run()
    damage(shop.home / "sft/model/weights.bin")
    with pytest.raises(UserError) as caught:
        shop.run()
    assert caught.value.code == code


def test_large_files_are_hashed_once(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)  # as if all files were old
    shop.run()
    shop.run()

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(storage, "sha256_file", fail)
    assert shop.run() == []


def test_one_stage_alone(shop: Workshop) -> None:
    with pytest.raises(UserError, match=r"pretrain, which is not done.*tetrad pretrain RECIPE") as caught:
        shop.run(only="sft")
    assert caught.value.code == "E-CONF-MISSING"
    assert shop.run(only="tokenizer") == ["tokenizer"]
    assert shop.run(only="pretrain") == ["pretrain"]
    assert shop.run(only="pretrain") == []
    (shop.folder / "data/prompts.jsonl").unlink()
    assert shop.run(only="sft") == ["sft"], "a later stage's files are not looked at"


MISSING = [
    ("[sft]\ndata = ['data/sft.jsonl']", "", "E-CONF-MISSING", "[pretrain] text"),
    ("[pretrain]\ntext = ['data/wiki.txt']", "", "E-CONF-MISSING", "[tokenizer] text"),
    ("[ppo]\nprompts = ['data/prompts.jsonl']\n[model]\nfrom='base'", "", "E-CONF-MISSING", "[reward] data"),
    (
        "[ppo]\nprompts = ['data/prompts.jsonl']\nrewards = ['judge.py:ridge']\n[model]\nfrom='base'",
        "",
        "E-CONF-MISSING",
        'critic = "actor"',
    ),
    ("[reward]\ndata = ['data/rm-1.jsonl']", "", "E-CONF-MISSING", "[sft] data"),
    ("[reward]\nfrom = 'base'\ndata = ['data/rm-1.jsonl']", "", "E-CONF-MISSING", "[sft] data"),
    ("", "", "E-CONF-MISSING", "[sft]"),
    ("[sft]\ndata = ['data/sft.jsonl']", "ppo", "E-CONF-MISSING", "[ppo]"),
    ("[tokenizer]\ntext = ['data/none.txt']", "", "E-DATA-PATH", "none.txt"),
    ("[tokenizer]\ntext = ['data/none*.txt']", "", "E-DATA-PATH", "none*.txt"),
    ("[sft]\ndata = ['data/sft.jsonl']\n[model]\nfrom='data'", "", "E-MODEL-MISSING", "config.json"),
    ("[sft]\ndata = ['data/sft.jsonl']\n[model]\nfrom='nowhere'", "", "E-MODEL-MISSING", "names no folder"),
    (
        "[model]\nfrom='base'\n[evaluate]\nprompts = ['data/prompts.jsonl']\njudges=['none.py:f']",
        "",
        "E-CONF-MISSING",
        "none.py",
    ),
]


def base_folder(shop: Workshop) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shop.write(f"base/{name}", name)


@pytest.mark.parametrize(("recipe", "only", "code", "said"), MISSING)
def test_what_is_missing_is_said_before_anything_runs(
    shop: Workshop, recipe: str, only: str, code: str, said: str
) -> None:
    base_folder(shop)
    shop.write("recipe.toml", "name = 'demo'\n" + recipe)
    with pytest.raises(UserError) as caught:
        shop.run(only=only)
    assert caught.value.code == code
    assert said in str(caught.value)
    assert not shop.home.exists()


def test_a_folder_to_start_from(shop: Workshop) -> None:
    base_folder(shop)
    text = "name = 'demo'\n[model]\nfrom = 'base'\n[sft]\ndata = ['data/sft.jsonl']\n"
    text += "[reward]\nfrom = 'runs/demo/sft'\ndata = ['data/rm-1.jsonl']\n"
    shop.write("recipe.toml", text.partition("[reward]")[0])
    assert shop.run() == ["sft"]
    assert shop.contexts["sft"].parents == {"base": shop.folder / "base"}
    shop.write("recipe.toml", text)
    assert shop.run() == ["reward"]
    assert shop.contexts["reward"].parents == {"from": shop.home / "sft/model", "sft": shop.home / "sft/model"}
    shop.write("base/README.md", "no number depends on it")
    assert shop.run() == []
    shop.write("base/model.safetensors", "other weights")
    assert shop.run() == ["sft", "reward"]
    assert shop.run() == []


def test_a_reward_model_of_another_run(shop: Workshop) -> None:
    shop.run()
    text = RECIPE.replace("demo", "second").replace('[reward]\ndata = ["data/rm-*.jsonl"]', "[reward]\nfrom = 'other'")
    shop.write("recipe.toml", text)
    (shop.home / "reward").rename(shop.folder / "other")
    assert shop.run() == ["tokenizer", "pretrain", "sft", "ppo", "evaluate"]
    assert shop.contexts["ppo"].parents["reward"] == shop.folder / "other/model"


def test_a_python_reward_needs_no_reward_model(shop: Workshop) -> None:
    shop.write("recipe.toml", RECIPE + "[run]\nthreads=1\n")
    shop.run("--ppo.rewards", "judge.py:ridge", "--ppo.critic", "actor")
    assert list(shop.contexts["ppo"].parents) == ["sft"]
    assert shop.run("--ppo.rewards", "judge.py:ridge", "--ppo.critic", "actor", "--reward.lr", "0.01") == [
        "reward",
        "evaluate",
    ]


def test_the_template_counts_where_no_sft_carries_it(shop: Workshop) -> None:
    base_folder(shop)
    shop.write("recipe.toml", "name='demo'\n[model]\nfrom='base'\n[reward]\ndata=['data/rm-1.jsonl']\n")
    assert shop.run() == ["reward"]
    assert shop.run("--sft.template", "chatml") == ["reward"]


def test_full_memory_and_disk_are_explained(shop: Workshop) -> None:
    def fail(error: BaseException) -> runner.StageFunction:
        def stage(context: StageContext) -> None:
            raise error

        return stage

    cases = [(MemoryError(), "E-MEM-FULL"), (OSError(28, "No space left on device"), "E-IO-SPACE")]
    cases += [(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "E-MEM-FULL")]
    for error, code in cases:
        with pytest.raises(UserError) as caught:
            shop.run(stages={"tokenizer": fail(error)})
        assert (caught.value.code, caught.value.where, caught.value.exit_code) == (code, "tokenizer", 6)
    with pytest.raises(RuntimeError, match="something else"):
        shop.run(stages={"tokenizer": fail(RuntimeError("something else"))})


def test_a_stage_that_leaves_no_result_is_a_fault(shop: Workshop) -> None:
    with pytest.raises(RuntimeError, match="ended without a result"):
        shop.run(stages={"tokenizer": lambda context: None})


def test_other_processes_of_torchrun_write_nothing(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run()
    monkeypatch.setenv("RANK", "1")
    assert shop.run("--ppo.steps", "5") == ["ppo", "evaluate"]
    assert "old" not in shop.names()


def test_a_run_that_is_done_says_so_quickly_and_without_torch(shop: Workshop) -> None:
    shop.run()
    script = (
        "import sys; from tetrad.cli.main import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    words = ["run", str(shop.folder / "recipe.toml"), "--run.out", str(shop.folder / "runs")]
    env = {"PYTHONPATH": str(Path(runner.__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.endswith("evaluate   unchanged, skipped\nnothing to do\n0 False\n")
    assert time.perf_counter() - began < 5


def test_a_page_of_the_run_follows_each_stage_and_never_ends_it(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = shop.home / "report.html"
    states: list[bool] = []
    shop.before = lambda context: states.append(page.is_file() and "had not finished" in page.read_text())
    assert shop.run("--run.report", "true") == ALL
    assert states == [False, *[True] * (len(ALL) - 1)]  # after each stage, saying that others follow
    assert f"report     {page}" in shop.said and "had not finished" not in page.read_text()

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr(runner, "write_page", broken)
    assert shop.run("--run.report", "true", "--ppo.kl-coef", "0.3") == ["ppo", "evaluate"]
    assert "note: report.html could not be written: no such colour" in shop.said
