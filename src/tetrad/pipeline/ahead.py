"""Before any training, every record that the coming stages will read is read once; the first bad one ends the run.

Otherwise a bad line of PPO's prompts would be found after hours of pre-training. It needs no torch and holds no text.
Documents of more than MOST_BYTES are left to their own stage, which begins with them.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from tetrad import storage
from tetrad.console import counted
from tetrad.data.records import Record, refuse_no_scale, refuse_overlap
from tetrad.data.source import Counts, DataFiles
from tetrad.datacheck.reading import reader, settings_of, stage_of
from tetrad.registry import Recipe

MOST_BYTES = 64 << 20


def read_ahead(recipe: Recipe, stages: Collection[str], keys: Collection[str], memory: Path) -> None:
    """Reads what these stages read. keys: of the stages; memory: a file with the keys that passed before.

    Errors: E-DATA-*.
    """
    passed = _remembered(memory)
    if passed >= set(keys):
        return
    held: dict[str, DataFiles] = {}
    for setting, what, given in settings_of(recipe):
        if stage_of(setting) not in stages:
            continue
        held[setting] = given
        if what == "documents" and sum(path.stat().st_size for path in given.paths) > MOST_BYTES:
            continue
        refuse_no_scale(_records(what, given, recipe), recipe.reward.score_scale)
    if "reward.data" in held:
        tests = [held[name] for name in ("reward.validation", "reward.test") if name in held]
        apart = (record for given in tests for record in _records("preferences", given, recipe))
        refuse_overlap(_records("preferences", held["reward.data"], recipe), apart)
    storage.write_file(memory, json.dumps(sorted(passed | set(keys))[-200:]).encode())


def _records(what: str, given: DataFiles, recipe: Recipe) -> Iterator[Record]:
    read = reader(what, recipe.reward.score_scale)
    for path in given.paths:
        yield from counted(f"reading {path.name}", read(path, given, Counts(), None), 0)


def _remembered(memory: Path) -> set[str]:
    try:
        return {str(key) for key in json.loads(memory.read_bytes())}
    except (OSError, ValueError, TypeError):
        return set()
