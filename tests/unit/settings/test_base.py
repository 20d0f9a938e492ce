"""Settings: each option is documented, and at most forty of them a stage."""

from tetrad.settings.base import options, tables
from tetrad.stages import STAGES, Recipe


def test_every_default_is_legal() -> None:
    from tetrad.settings.check import build

    assert build(Recipe, {}, {}) == Recipe()


def test_every_option_is_documented_and_few_enough() -> None:
    for name, cls in tables(Recipe).items():
        inside = options(cls, name + ".")
        assert len(inside) <= 40
        assert all(option.help for option in inside.values()), name


def test_names_flags_and_limits() -> None:
    named = options(Recipe)
    assert named["model.from"].flag == "--model.from"
    assert named["ppo.actor_lr"].flag == "--ppo.actor-lr"
    assert named["ppo.actor_lr"].wanted == "a number, above 0 and at most 1"
    assert named["sft.data"].wanted == "a list of files"
    assert named["sft.train_turns"].wanted == '"all" or "last"'
    assert not named["run.micro_batch_tokens"].keyed and named["run.dtype"].keyed


def test_what_people_change_first_is_little_and_groups_name_real_settings() -> None:
    for name, cls in tables(Recipe).items():
        grouped = [key for names in getattr(cls, "GROUPS", {}).values() for key in names.split()]
        assert len(set(grouped)) == len(grouped) and set(grouped) <= set(options(cls)), name
        if name in STAGES:
            assert len([option for option in options(cls).values() if not option.group]) <= 11, name
