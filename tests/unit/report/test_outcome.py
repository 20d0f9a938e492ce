"""The verdict in the card of a finished model: whole at every failing call, and the manifest stays right."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from faults.doubles import FAULTS, Counting, Failing, using
from tetrad import storage
from tetrad.errors import UserError
from tetrad.report import outcome
from tetrad.report.verdict import AlarmSpan, Verdict
from tetrad.settings.evaluate import Evaluate
from tetrad.stages import Recipe

BEFORE = Verdict("not evaluated", "", ("run on to evaluate it",))
AFTER = Verdict("PPO is better", "PPO", ("ridge: PPO less SFT is +1.34 [+1.18, +1.50]",))


def model(folder: Path) -> Path:
    """A finished one, whose card says BEFORE."""
    card = outcome.with_verdict("# demo: ppo\n", BEFORE)
    storage.write_folder(folder / "model", {"weights.bin": b"w"}, {"key": "k"}, {outcome.CARD: card.encode()})
    return folder / "model"


def test_the_card_is_written_and_the_manifest_stays(tmp_path: Path) -> None:
    place = model(tmp_path)
    manifest = (place / storage.MANIFEST).read_bytes()
    outcome.write_card(place, AFTER)
    assert (place / outcome.CARD).read_text() == (
        "# demo: ppo\n\n## Verdict\n\n**PPO is better: use PPO**\n\n- ridge: PPO less SFT is +1.34 [+1.18, +1.50]\n"
    )
    assert (place / storage.MANIFEST).read_bytes() == manifest
    assert storage.verify_folder(place)["files"].keys() == {"weights.bin"}
    calls = Counting()
    with using(calls):
        outcome.write_card(place, AFTER)
    assert not calls.trace.count("rename"), "what is said already is not written again"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_call_leaves_the_old_card_or_the_new_one(fault: str, tmp_path: Path) -> None:
    calls = Counting()
    with using(calls):
        outcome.write_card(model(tmp_path / "calm"), AFTER)
    for k in range(1, calls.count + 1):
        place = model(tmp_path / str(k))
        old = (place / outcome.CARD).read_text()
        try:
            with using(Failing(k, fault)):
                outcome.write_card(place, AFTER)
        except UserError as error:
            assert error.exit_code == 6
        assert (place / outcome.CARD).read_text() in (old, outcome.with_verdict(old, AFTER))
        assert storage.verify_folder(place)["key"] == "k"
        outcome.write_card(place, AFTER)
        assert (place / outcome.CARD).read_text() == outcome.with_verdict(old, AFTER)
        assert sorted(path.name for path in place.iterdir()) == ["README.md", "manifest.json", "weights.bin"]


def test_what_ppo_notes_is_read_back() -> None:
    written = outcome.Notes(["length pays"], [AlarmSpan("kl", 2, 3, 9), AlarmSpan("finished", 1, 0, 1)])
    record = {"gate": ["length pays"], "alarms": [asdict(alarm) for alarm in written.alarms]}
    notes = outcome.Notes.read(json.loads(json.dumps(written.record())))
    assert notes == written and written.record() == record
    assert notes.faults() == [
        "gate: length pays",
        "alarm kl: at its second limit, first at step 3, last at step 9",
    ]
    asked = replace(Recipe(), evaluate=Evaluate(prompts=("p.jsonl",)))
    assert outcome.before_evaluation(asked, notes).outcome == "not to be trusted"
    assert outcome.before_evaluation(asked, outcome.Notes()) == BEFORE
    assert outcome.before_evaluation(Recipe(), outcome.Notes()).reasons == ("add [evaluate]",)
