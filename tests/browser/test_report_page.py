"""The page of a run from the disk, with the network off: both languages, both widths, hostile texts, axe-core."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reported import HOSTILE, STEPS, write_run
from tetrad.report.run_page import write_page

AXE = os.environ.get("TETRAD_AXE", "")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo")
    return write_page([str(folder)], folder / "report.html")


@pytest.fixture
def opened(window: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """The page in a browser without a network; only the page's own file may be asked for."""

    def open_page(target: Path = path, **options: Any) -> Any:
        page = window(offline=True, **options)
        page.goto(target.as_uri())
        page.faults[:] = [fault for fault in page.faults if fault != target.as_uri() and not fault.startswith("blob:")]
        return page

    return open_page


def test_hostile_texts_do_nothing_and_are_shown(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.title() == "tetrad: demo"
    assert (
        page.evaluate("document.querySelectorAll('img, iframe, form, link, object, [onload], [onerror]').length") == 0
    )
    text = page.evaluate("document.body.textContent")
    assert HOSTILE[0] in text and HOSTILE[1] in text
    page.locator("#tokens button").first.click()
    assert page.evaluate("document.querySelectorAll('#tokens img, #tokens script, #numbers *').length") == 0


@pytest.mark.parametrize(("language", "other"), [("en-US", "zh"), ("zh-CN", "en")])
def test_the_browsers_language_and_the_switch(opened: Callable[..., Any], language: str, other: str) -> None:
    page = opened(language=language)
    own = language[:2]
    assert page.evaluate("document.documentElement.lang") == own
    assert page.locator(f"h2 .{own}").first.is_visible() and not page.locator(f"h2 .{other}").first.is_visible()
    page.click("#language")
    assert page.locator(f"h2 .{other}").first.is_visible() and not page.locator(f"h2 .{own}").first.is_visible()


def test_search_order_and_tokens(opened: Callable[..., Any]) -> None:
    page = opened()
    before = page.locator(".reply:visible").count()
    page.fill("#search", "prompt 7 ")
    assert 0 < page.locator(".reply:visible").count() < before
    page.fill("#search", "")
    gains = "[...document.querySelectorAll('.reply')].map((one) => +one.dataset.gain)"
    assert page.evaluate(gains) == sorted(page.evaluate(gains), reverse=True)
    page.click("[data-order=falls]")
    assert page.evaluate(gains) == sorted(page.evaluate(gains))
    page.click("[data-column=advantage]")
    assert page.get_attribute("[data-column=advantage]", "aria-pressed") == "true"
    page.locator("#tokens button").first.focus()
    page.keyboard.press("ArrowRight")
    numbers, sample = page.inner_text("#numbers"), json.loads(page.locator("#samples").text_content())[-1]
    assert f"advantage {sample['tokens']['advantage'][1]}" in numbers and "(2 / 7)" in numbers


def test_every_chart_gives_its_numbers(opened: Callable[..., Any], path: Path) -> None:
    page = opened()
    data = json.loads(page.locator("#numbers-of-charts").text_content())
    assert page.locator("[data-csv]").count() == len(data) == page.locator("figure svg").count() > 15
    name = next(key for key, chart in data.items() if chart["name"] == "ppo.kl")
    with page.expect_download() as download:
        page.click(f"[data-csv={name}]")
    assert download.value.suggested_filename == "ppo.kl.csv"
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    lines = [json.loads(line) for line in (path.parent / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [float(row["kl"]) for row in rows] == [line["kl"] for line in lines] and len(rows) == STEPS
    page.faults[:] = [fault for fault in page.faults if not fault.startswith("blob:")]


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_five_questions_are_answered_in_one_screen(
    opened: Callable[..., Any], shoot: Callable[..., None], language: str
) -> None:
    """All five on the first, at 1280 x 900 and on a phone; each leads to the part that shows more."""
    for width, height in ((1280, 900), (390, 844)):
        page = opened(language=language, width=width, height=height)
        assert page.locator(".answers dt").count() == page.locator(".answers dd").count() == 5
        box = page.locator(".answers").bounding_box()
        assert box["y"] + box["height"] <= height
        for number in range(5):
            page.locator(".answers dt a").nth(number).click()
            part = page.evaluate("document.querySelector(location.hash).getBoundingClientRect()")
            assert -1 <= part["top"] < height / 2
            shoot(page, f"question-{number + 1}-{language}-{width}")


def test_on_paper_nothing_is_cut(opened: Callable[..., Any]) -> None:
    """Every part, and no wider than the sheet: A4 at 96 points an inch."""
    page = opened(width=794, height=1123)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    parts = page.locator("section h2")
    assert parts.count() > 7 and all(parts.nth(number).is_visible() for number in range(parts.count()))


@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path(AXE).is_file(), reason="TETRAD_AXE names no axe.min.js (npm install axe-core)")
def test_no_serious_finding(opened: Callable[..., Any], shoot: Callable[..., None], path: Path, tmp_path: Path) -> None:
    """Of one run and of two side by side, in each language, scheme and width; nothing is wider than the window."""
    other = write_run(tmp_path / "second", shift=0.5)
    two = write_page([str(path.parent), str(other)], tmp_path / "two.html")
    findings: list[str] = []
    for target in (path, two):
        for language, width, scheme in (
            ("en-US", 1280, "light"),
            ("zh-CN", 390, "dark"),
            ("en-US", 390, "light"),
            ("zh-CN", 1280, "dark"),
        ):
            name = f"{target.stem}-{language}-{width}-{scheme}"
            page = opened(target, language=language, width=width, color_scheme=scheme, bypass_csp=True)
            shoot(page, name)
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                findings.append(f"{name}: wider than the window")
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            page.evaluate(Path(AXE).read_text())
            result = page.evaluate("() => axe.run({ exclude: [['svg']] })")  # hidden from readers
            bad = [one for one in result["violations"] if one["impact"] in ("serious", "critical")]
            findings += [f"{name}: {one['id']} {json.dumps([n['html'][:90] for n in one['nodes']][:3])}" for one in bad]
    assert findings == []
