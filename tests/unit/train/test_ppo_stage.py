"""The PPO stage as a whole with each of its options, from recipes: it runs, tells what it did, and goes on exactly."""

import json
from pathlib import Path

import pytest
import torch

from raw_http import listening
from tetrad.errors import UserError
from tetrad.model.safetensors_io import read_tensors
from tetrad.objectives import ppo
from tetrad.rl.samples import COLUMNS
from tetrad.server import scoring
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.service import load_service
from tetrad.settings.use import Serve
from tiny import Chain, stop_at

ADAPTERS = ("--reward.adapters", "true", "--ppo.adapters", "true")
PTX = ("--ptx.text", '["text.txt"]', "--ptx.sequence-length", "32", "--ptx.batch-tokens", "64")
OPTIONS = {
    "shared": ("--ppo.critic", "shared", "--ppo.critic-warmup", "2"),
    "average": ("--ppo.ema-decay", "0.5", "--ppo.reward-scaling", "running"),
    "replies": ("--ppo.samples-per-prompt", "2", "--ppo.reduction", "sequence"),
    "text": PTX,
    "adapters": ADAPTERS,
    "adapters, shared": (*ADAPTERS, "--ppo.critic", "shared", "--ppo.ema-decay", "0.5"),
    "adapters, actor": (*ADAPTERS, "--ppo.critic", "actor", "--sft.adapters", "true"),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    found = Chain(tmp_path_factory.mktemp("chain"))
    found.run()
    return found


def result(chain: Chain) -> dict[str, bytes]:
    home = chain.home / "ppo"
    files = [*sorted((home / "model").glob("*.safetensors")), home / "metrics.jsonl", home / "samples.jsonl"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("option", OPTIONS)
def test_goes_on_exactly(chain: Chain, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its fifth step and taken up again, it leaves the same bytes."""
    words = OPTIONS[option]
    assert "ppo" in chain.run(*words)
    whole = result(chain)
    assert len(whole["metrics.jsonl"].splitlines()) == 8
    chain.run("--ppo.steps", "7", *words)  # the finished one moves aside
    stop_at(5, monkeypatch)
    with pytest.raises(BaseException, match="stopped"):
        chain.run(*words)
    monkeypatch.undo()
    chain.run(*words)
    assert result(chain) == whole


def test_the_average_is_the_result_and_the_actor_is_kept(chain: Chain) -> None:
    chain.run()
    plain = read_tensors(chain.home / "ppo/model/model.safetensors")
    chain.run("--ppo.ema-decay", "0.5")
    model = chain.home / "ppo/model"
    average, last = read_tensors(model / "model.safetensors"), read_tensors(model / "last.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in plain.items())
    assert not torch.equal(average["model.norm.weight"], last["model.norm.weight"])


@pytest.mark.parametrize("words", [(), ADAPTERS, (*ADAPTERS, "--ppo.critic", "shared"), ("--ppo.critic", "shared")])
def test_what_is_kept_beside_the_result_are_whole_models(chain: Chain, words: tuple[str, ...]) -> None:
    """Plain weights by a model's own names; a critic on the actor's trunk has the actor's, not its average's."""
    chain.run(*words, "--ppo.ema-decay", "0.5", "--lora.merge", "true")
    model = chain.home / "ppo/model"
    average, last, critic = (read_tensors(model / f"{name}.safetensors") for name in ("model", "last", "critic"))
    assert last.keys() == average.keys()
    assert critic.keys() == {*(name for name in last if name.startswith("model.")), "score.weight", "bias"}
    weight = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(last[weight], average[weight])
    assert torch.equal(critic[weight], last[weight]) == ("shared" in words)


def test_beta_waits_for_the_actor(chain: Chain) -> None:
    """While it is frozen its KL is nothing, which says nothing about beta."""
    chain.run("--ppo.critic-warmup", "3", "--ppo.critic", "shared", "--ppo.critic-lr", "0.002")
    lines = chain.lines("ppo")
    betas = [line["beta"] for line in lines]
    assert betas[0] == betas[1] == betas[2] == betas[3] != betas[4]
    assert [line["critic_lr"] for line in lines] == pytest.approx([0.002 * (1 - step / 8) for step in range(8)])
    assert [line.get("actor_lr") for line in lines[:3]] == [None] * 3
    assert lines[3]["actor_lr"] == pytest.approx(0.001 * 5 / 8)


@pytest.mark.parametrize("scaling", ["none", "running"])
def test_the_reward_model_written_out_pays_as_by_default(chain: Chain, scaling: str) -> None:
    found = []
    for words in ((), ("--ppo.rewards", '["reward"]')):
        chain.run(*words, "--ppo.reward-scaling", scaling, "--ppo.reward-clip", "0.1")
        found.append([line["reward"] for line in chain.lines("ppo")])
    assert found[0] == found[1]


def test_the_reward_of_another_tetrad_pays_as_its_own(chain: Chain) -> None:
    """Bit by bit: the ids go along with the texts, and are scored where they mean the same."""
    chain.run("--ppo.rewards", "reward", "--ppo.reward-clip", "0", "--ppo.steps", "3")
    own = result(chain)
    service = load_service([], Serve(reward=str(chain.home / "reward")))
    with listening(create_app(service, Limits(), scoring.routes(service))) as port:
        chain.run("--ppo.rewards", f"http://127.0.0.1:{port}/v1/reward", "--ppo.reward-clip", "0", "--ppo.steps", "3")
    served = result(chain)
    assert served["model.safetensors"] == own["model.safetensors"]
    assert served["metrics.jsonl"] == own["metrics.jsonl"]


def test_the_reward_model_among_others_is_cut_and_then_weighed(chain: Chain) -> None:
    words = ("--ppo.rewards", '["reward"]', "--ppo.reward-weights", "[2]", "--ppo.missing-eos-penalty", "0")
    chain.run(*words, "--ppo.reward-clip", "0.1", "--ppo.kl-coef", "0", "--ppo.kl-target", "0")
    scores = [line["reward"] for line in chain.lines("ppo")]
    assert 0.1 < max(map(abs, scores)) <= 0.2


def test_what_stops_it_is_on_the_logs(chain: Chain) -> None:
    with pytest.raises(UserError) as caught:
        chain.run("--alarms.strict", "true", "--alarms.score-std", "[100, 50]", "--ppo.eval-every", "0")
    assert caught.value.code == "E-NUM-ALARM"
    (line,) = chain.lines("ppo")
    assert line["alarms"] >= 1
    shown = (chain.home / "ppo/samples.jsonl").read_text().splitlines()
    assert {json.loads(text)["step"] for text in shown} == {0}
    (chain.home / "ppo").rename(chain.home / "stopped")  # else the next run would go on with it: alarms are in no key


def test_parts_and_judges_are_told(chain: Chain) -> None:
    words = ("--ppo.rewards", '["reward", "judge.py:liked"]', "--ppo.reward-weights", "[1, 0.5]")
    chain.run(*words, "--alarms.judges", '["judge.py:liked"]')
    for line in chain.lines("ppo"):
        assert line["score"] == pytest.approx(line["score_reward"] + 0.5 * line["score_liked"], abs=1e-5)
        assert line["judge_liked"] == line["score_liked"]


def test_two_judges_of_one_name_stay_two(chain: Chain) -> None:
    (chain.path.parent / "other.py").write_text("def liked(samples):\n    return [7.0 for _ in samples]\n")
    chain.run("--evaluate.judges", '["judge.py:liked", "other.py:liked"]')
    report = json.loads((chain.home / "evaluate/report/report.json").read_text())
    assert report["systems"]["sft"]["liked_2"]["mean"] == 7.0
    assert report["systems"]["sft"]["liked"]["mean"] != 7.0


def test_a_judge_that_is_not_there_is_told_before_any_training(tmp_path: Path) -> None:
    fresh = Chain(tmp_path)
    with pytest.raises(UserError) as caught:
        fresh.run("--alarms.judges", '["no.py:liked"]')
    assert (caught.value.code, Path(caught.value.where).name) == ("E-CONF-MISSING", "no.py")
    assert not (fresh.home / "tokenizer").exists()


def test_every_number_of_a_sampled_token_is_kept(chain: Chain) -> None:
    """From the record alone: KL, rewards and returns can be worked out again."""
    chain.run()
    lines = [json.loads(line) for line in (chain.home / "ppo/samples.jsonl").read_text().splitlines()]
    sampled, greedy = [x for x in lines if "tokens" in x], [x for x in lines if "greedy" in x]
    assert {line["step"] for line in sampled} == {0, 7}
    assert len(sampled) == len(greedy) == 6
    beta = {line["step"]: line["beta"] for line in chain.lines("ppo")}
    for line in sampled:
        tokens = {name: torch.tensor(line["tokens"][name]) for name in COLUMNS if name not in ("ids", "pieces")}
        assert all(len(column) == len(line["tokens"]["ids"]) for column in line["tokens"].values())
        torch.testing.assert_close(tokens["kl"], tokens["logprob"] - tokens["reference"], rtol=1e-3, atol=1e-3)
        assert float(tokens["kl"].sum()) == pytest.approx(line["kl"], abs=1e-3)
        rewards = -beta[line["step"]] * tokens["kl"]
        rewards[-1] += min(max(line["score"], -5.0), 5.0) - (not line["finished"])
        torch.testing.assert_close(tokens["reward"], rewards, rtol=1e-3, atol=1e-3)
        mask = torch.ones(1, len(rewards), dtype=torch.bool)
        _, returns = ppo.gae(tokens["reward"][None], tokens["value"][None], mask, 1.0, 0.95)
        torch.testing.assert_close(tokens["return"], returns[0], rtol=1e-3, atol=1e-3)
        assert "".join(line["tokens"]["pieces"]).startswith(line["text"][:3])


def test_greedy_replies_stand_beside_the_sft_models(chain: Chain) -> None:
    """Before is the SFT model's at every step; after some steps at a high rate now is another."""
    chain.run("--ppo.actor-lr", "0.01", "--ppo.kl-coef", "0", "--ppo.kl-target", "0")
    lines = [json.loads(line) for line in (chain.home / "ppo/samples.jsonl").read_text().splitlines()]
    first, last = ([x for x in lines if "greedy" in x and x["step"] == step] for step in (0, 7))
    assert [x["before"] for x in first] == [x["before"] for x in last]
    assert any(x["greedy"] != x["before"] for x in last)


def test_another_scale_on_ppos_own_prompts_is_told(chain: Chain) -> None:
    words = ("--ppo.steps", "3", "--gate.least-std")
    chain.run(*words, "0")
    assert "another scale" not in chain.said
    (chain.home / "ppo").rename(chain.home / "first")  # the gate changes no number: the stage would count as done
    chain.run(*words, "1.9")
    assert "on another scale of the reward model" in chain.said


def test_long_prompts_are_refused_cut_or_dropped(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        chain.run("--ppo.max-prompt", "6")
    assert caught.value.code == "E-DATA-LONG"
    for way in ("truncate", "drop"):
        assert "ppo" in chain.run("--ppo.max-prompt", "12", "--ppo.overlong", way)


def test_adapters_leave_the_reference_what_the_sft_model_is(chain: Chain) -> None:
    chain.run(*ADAPTERS)
    first = chain.lines("ppo")[0]
    assert first["kl"] == first["kl_k3"] == 0.0
    last = read_tensors(chain.home / "ppo/model/critic.safetensors")
    head = {"base_model.model.score.weight", "bias"}
    assert last.keys() == {*read_tensors(chain.home / "ppo/model/adapter_model.safetensors"), *head}


def test_adapters_score_as_the_merged_reward_model_does(chain: Chain) -> None:
    """The same replies, by the adapter on its base and by the reward model's own folder."""
    found = {}
    for word in ("true", "false"):
        chain.run("--reward.adapters", "true", "--ppo.adapters", word, "--ppo.critic", "actor")
        found[word] = chain.lines("ppo")[0]
    assert found["true"]["length"] == found["false"]["length"]
    assert found["true"]["score"] == pytest.approx(found["false"]["score"], abs=1e-4)
    assert abs(found["true"]["score"]) > 1e-2


def test_adapters_on_another_base_are_refused(chain: Chain) -> None:
    chain.run(*ADAPTERS, "--lora.merge", "true", "--lora.rank", "4")
    config = chain.home / "reward/adapter"
    other = (
        "--reward.adapters",
        "true",
        "--ppo.adapters",
        "true",
        "--ppo.steps",
        "3",
        "--lora.merge",
        "true",
        "--lora.rank",
        "4",
    )
    files = {path.name: path.read_bytes() for path in config.iterdir() if path.name != "manifest.json"}
    digest = json.loads(files["tetrad.json"])["base_sha256"].encode()
    from tetrad import storage

    storage.write_folder(config, files | {"tetrad.json": files["tetrad.json"].replace(digest, b"0" * 64)}, {})
    with pytest.raises(UserError) as caught:
        chain.run(*other)
    assert caught.value.code == "E-CONF-CONFLICT"
    with pytest.raises(UserError) as caught:
        chain.run("--ppo.adapters", "true")
    assert caught.value.code == "E-CONF-CONFLICT"
    assert Path(str(config)).is_dir()


def test_a_second_round_starts_from_the_first(chain: Chain, tmp_path: Path) -> None:
    chain.run()
    second = Chain(tmp_path)
    text = second.path.read_text()
    start, end = text.index("[model]"), text.index("[sft]")
    first = chain.home / "ppo"
    second.path.write_text(text[:start] + f'[model]\nfrom = "{first}"\n' + text[text.index("[reward]") :])
    assert end > start
    assert second.run() == ["reward", "ppo", "evaluate"]
