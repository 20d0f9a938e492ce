"""The page of a run: what it says, that its numbers are the logs', and that nothing a model wrote is more than text."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from reported import HOSTILE, write_run
from tetrad.cli.main import main
from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.pipeline.recipe import read
from tetrad.report import charts
from tetrad.report import html as pieces
from tetrad.report.records import read_runs
from tetrad.report.run_page import page, write_page
from tetrad.rl.explain import explain
from tetrad.settings.use import Explain

EVENTS = re.compile(r"on\w+$")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def whole(run: Path) -> str:
    return page(read_runs([str(run)]))


class Elements(HTMLParser):
    """Every element with its attributes, the text of scripts, and all other text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text, self._script = "", ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("id") or "code") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._script = "" if tag == "script" else self._script

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += data


def test_hostile_texts_are_only_text(whole: str) -> None:
    """No element, attribute, script or address comes from a run; the one script is the page's own, by its hash."""
    elements = Elements(whole)
    kinds = {tag for tag, _ in elements.tags}
    assert not kinds & {"img", "iframe", "object", "embed", "link", "form", "base", "audio", "video"}
    assert [tag for tag, _ in elements.tags].count("script") == 3 and set(elements.scripts) == {
        "samples",
        "numbers-of-charts",
        "code",
    }
    for tag, attributes in elements.tags:
        assert not any(EVENTS.fullmatch(name) for name in attributes), (tag, attributes)
        for name in ("href", "xlink:href", "src", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    digest = base64.b64encode(hashlib.sha256(elements.scripts["code"].encode()).digest()).decode()
    policy = next(a["content"] or "" for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "unsafe-inline'; script-src" in policy and policy.count("unsafe") == 1  # styles alone
    for bad in ("\x1b", "\x00", "\u202e"):
        assert bad not in whole
    assert all(text in html.unescape(whole) for text in HOSTILE if text.isprintable())


def test_the_numbers_are_those_of_the_logs(run: Path, whole: str) -> None:
    """Every charted value is the log's, to the last digit; the first and the last stand below the curve."""
    data = json.loads(Elements(whole).scripts["numbers-of-charts"])
    lines = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    names = [chart["name"] for chart in data.values()]
    for metric in ("score", "kl", "length", "finished", "entropy", "explained_variance", "clip_fraction", "actor_lr"):
        (chart,) = (chart for chart in data.values() if chart["name"] == f"ppo.{metric}")
        _, steps, values, *_ = chart["series"][0]
        assert steps == [line["step"] for line in lines] and values == [line[metric] for line in lines], metric
    assert f"{lines[0]['score']:.4g} → {lines[-1]['score']:.4g}" in whole
    assert {"sft.loss", "pretrain.tokens_per_second", "reward.loss", "reliability", "ppo.phases"} <= set(names)
    (frontier,) = (chart for chart in data.values() if chart["name"] == "frontier")
    assert [[row[1], row[2]] for row in frontier["series"]][:2] == [
        [[line["kl"] for line in lines], [line["score"] for line in lines]],
        [[0.0, 0.64, 1.84], [0.0, 0.6, 1.1]],
    ]


def test_the_page_and_explain_read_the_same_records(run: Path, whole: str) -> None:
    """A token's numbers on the page are those that `tetrad explain` prints."""
    samples = json.loads(Elements(whole).scripts["samples"])
    record = next(sample for sample in samples if sample["step"] == 29)
    out = StringIO()
    explain(Explain(model=str(run)), Console(out=out, err=out), lambda path: read(str(path), []))
    assert f"{record['score']:+.3f}" in out.getvalue()
    for value in record["tokens"]["kl"]:
        assert f"{value:+.3f}" in out.getvalue()


def test_five_questions_are_answered_in_the_first_lines(whole: str) -> None:
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", whole[whole.index('<dl class="answers"') :])))[
        :3000
    ]
    for answer in (
        "alarms: 1; commonest word in 5% of the responses at the start, 63% at the end",
        "81.0% of 2,000 held-out pairs in order [79.0%, 83.0%]",
        "; ridge baseline 77.0%",
        "60 prompts with the response of every system",
        "8.70 nats a response at the end; most at the token",
        "right in 31% of the judgements [20%, 45%]",
        "警报数：1",
        "哪位标注者与众不同？",
    ):
        assert answer in words


def test_the_table_the_gate_and_the_alarms(whole: str) -> None:
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", whole)))
    for part in ("+0.9 [+0.8, +1]", "PPO 更好", "1.25", "700.2", "Gate: failed.", "ridge, a baseline", "cheapest: PPO"):
        assert part in words, part
    assert "Alarms at their second limit: not to be trusted" in words and "20-29 (!!)" in words
    assert "ppo.kl_coef 0.5 0.05" in words  # what differs from the default, beside it


def test_every_text_is_there_in_both_languages(whole: str) -> None:
    assert whole.count('class="en"') == whole.count('class="zh"')
    table = pieces._words()
    assert all(re.search("[\u4e00-\u9fff]", zh) or zh == en for en, zh in table.values())
    assert all(en.count("{") == zh.count("{") for en, zh in table.values())


def test_two_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second" / "demo", shift=0.5)
    text = page(read_runs([str(run), str(other)]))
    data = json.loads(Elements(text).scripts["numbers-of-charts"])
    (score,) = (chart for chart in data.values() if chart["name"] == "ppo.score")
    first, second = (row[0] for row in score["series"])
    assert f"{first} · PPO" in text and f"{second} · PPO" in text  # one table
    assert first != second and second.endswith("second/demo") and first in text
    assert [b - a for a, b in zip(score["series"][0][2], score["series"][1][2], strict=True)] == pytest.approx(
        [0.5] * 30
    )


def test_what_is_not_there_yet_is_left_out(tmp_path: Path) -> None:
    """After the first stages; and nothing at all is an error."""
    run = write_run(tmp_path / "begun")
    for stage in ("reward", "ppo", "evaluate"):
        (run / stage / "lineage.json").unlink()
    text = page(read_runs([str(run)]), going_on=True)
    assert "The run had not finished" in text and 'id="policy"' not in text and 'id="language"' in text
    with pytest.raises(UserError, match="E-CKPT-MISSING"):
        read_runs([str(tmp_path / "nothing")])


def test_what_check_kept_stands_beside_the_data(tmp_path: Path) -> None:
    run = write_run(tmp_path / "checked")
    assert "adds here what it finds" in page(read_runs([str(run)]))
    (run / "check.json").write_text(json.dumps({"findings": []}))
    assert "found nothing that needs attention" in page(read_runs([str(run)]))
    finding = {"level": "warning", "name": "x", "text": "3 rows stand twice <b>", "where": "a:1", "fix": "drop one"}
    (run / "check.json").write_text(json.dumps({"findings": [finding]}))
    assert "3 rows stand twice &lt;b&gt;" in page(read_runs([str(run)]))


def test_without_the_extra_numbers_stay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    text = page(read_runs([str(run)]))
    assert "<svg" not in text and ".[report]" in text and "data-csv" in text


def test_long_logs_are_thinned_and_their_last_step_stays() -> None:
    series = charts.Series("", tuple(range(12_345)), tuple(float(i) for i in range(12_345)))
    assert len(series.thinned.x) <= charts.MOST_POINTS + 1 and series.thinned.x[-1] == 12_344
    assert all(x == y for x, y in zip(series.thinned.x, series.thinned.y, strict=True))


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.html"
    assert main(["report", str(run), "--out", str(target)]) == 0
    assert f"report: {target}" in capsys.readouterr().out and target.stat().st_size < 2_000_000
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 4
    assert write_page([str(run)], run / "report.html").is_file()
