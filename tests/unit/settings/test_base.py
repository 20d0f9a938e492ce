"""Settings: each knob is documented, and at most forty of them a stage."""

from tetrad.registry import Recipe
from tetrad.settings.base import knobs, tables


def test_every_default_is_legal() -> None:
    from tetrad.settings.check import build

    assert build(Recipe, {}, {}) == Recipe()


def test_every_knob_is_documented_and_few_enough() -> None:
    for name, cls in tables(Recipe).items():
        inside = knobs(cls, name + ".")
        assert len(inside) <= 40
        assert all(knob.help for knob in inside.values()), name


def test_names_flags_and_limits() -> None:
    all_knobs = knobs(Recipe)
    assert all_knobs["model.from"].flag == "--model.from"
    assert all_knobs["ppo.actor_lr"].flag == "--ppo.actor-lr"
    assert all_knobs["ppo.actor_lr"].wanted == "a number, above 0 and at most 1"
    assert all_knobs["sft.data"].wanted == "a list of files"
    assert all_knobs["sft.train_turns"].wanted == '"all" or "last"'
    assert not all_knobs["run.micro_batch_tokens"].keyed and all_knobs["run.dtype"].keyed
