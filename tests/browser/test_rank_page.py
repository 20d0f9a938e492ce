"""The ranking page in a real browser."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.asking import asked, enter, write
from tetrad.data.records import preferences_of
from tetrad.data.source import Counts, sources
from tetrad.types import Comparison

HOSTILE = (
    "<script>alert({n})</script>",
    "<img src=x onerror=alert({n})>",
    "<svg onload=alert({n})>",
    '"><iframe srcdoc="<script>alert({n})</script>"></iframe>',
    '<a href="javascript:alert({n})">{n}</a>',
    "![x](http://evil.example/?q={n})",
    "<style>*{{display:none}}</style>{n}",
    "</textarea></div><form action=//evil.example><button autofocus onfocus=alert({n})>",
    "\x1b[31m\x1b]0;title {n}\x07\x1b[2J",
    "\u202e\u2066gnirts desrever {n}\u2069",
    "<b><i><table><td {n}",
    "{n}<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "data:text/html,<script>alert({n})</script>",
    "<math><mi//xlink:href='data:x,<script>alert({n})</script>'>",
    "{n}" + "\u0301\u0489" * 500,
    "${{alert({n})}}{{{{constructor.constructor('alert({n})')()}}}}",
    "<link rel=stylesheet href=http://evil.example/{n}.css>",
    "<base href=http://evil.example/>{n}<!--",
    "]]>&lt;script&gt;alert({n})&lt;/script&gt;&#x3c;script>",
    "\u2028\u2029\ufeff\u200b{n}<noscript><p title='</noscript><img src=x onerror=alert({n})>'>",
)


def question(page: Any) -> str:
    return str(page.locator("#turns .text").inner_text())


def rank_by_length(page: Any, backwards: bool = False) -> dict[str, int]:
    """Ranks by clicks: the longest answer first. Returns the ranks by text."""
    texts = page.locator(".answer .text").all_inner_texts()
    order = sorted(texts, key=len, reverse=not backwards)
    for number, text in enumerate(texts):
        page.locator(".answer").nth(number).locator(f"button[data-rank='{order.index(text) + 1}']").click()
    return {text: order.index(text) + 1 for text in texts}


def wait_for_another(page: Any, before: str) -> None:
    changed = "document.querySelector('#turns .text').textContent !== before"
    page.wait_for_function(f"before => document.getElementById('item').hidden || {changed}", arg=before)


def store(page: Any) -> None:
    before = question(page)
    page.click("#next")
    wait_for_another(page, before)


def test_two_people_rank_twenty_each_over_a_kill_and_the_file_trains(
    serve: Callable[..., Any], window: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [asked(i) for i in range(30)]), tmp_path / "ranked.jsonl"
    server = serve("rank", "--prompts", prompts, "--out", str(out), "--overlap", "0.5")
    kim, lee = window(), window("zh-CN")
    enter(kim, server.address, "kim")
    enter(lee, server.address, "李雷")
    draw, answered = random.Random(0), dict[tuple[str, str], dict[str, int]]()
    kills = {7, 19, 31}
    for number in range(40):
        page, name = ((kim, "kim"), (lee, "李雷"))[number % 2]
        key = (question(page), name)
        assert key not in answered
        answered[key] = rank_by_length(page, backwards=name == "李雷" and draw.random() < 0.3)
        if number in kills:
            server.kill()
            page.click("#next")  # refused: the page keeps the ranking and tries again
            page.wait_for_selector("#banner:visible")
            server.start()
            page.wait_for_function(
                "before => document.querySelector('#turns .text').textContent !== before", arg=key[0]
            )
        else:
            store(page)
    faults = [fault for fault in kim.faults if "ERR_CONNECTION" not in fault]  # of the kills
    kim.faults[:] = faults
    assert server.stop() == 0
    records = list(preferences_of(out, sources([out]), Counts()))
    stored = {
        (r.prompt.turns[0].text, r.annotator): dict(zip(r.answers, r.ranks, strict=True))
        for r in records
        if isinstance(r, Comparison)
    }
    assert stored == answered
    assert len(records) == 40
    assert Counter(annotator for _, annotator in stored) == {"kim": 20, "李雷": 20}
    train(models, out, tmp_path)


def train(models: Path, out: Path, folder: Path) -> None:
    """The file through `tetrad check`, which sees the disagreement, and `tetrad run`."""
    import subprocess
    import sys

    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'name = "again"\n[model]\nfrom = "{models}/sft/model"\n'
        f'[reward]\ndata = ["{out}"]\nepochs = 1\nbatch_size = 8\n[run]\nout = "{folder}/runs"\n'
    )
    for words in (["check", str(out), "--json", str(folder / "check.json")], ["run", str(recipe)]):
        done = subprocess.run([sys.executable, "-m", "tetrad", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "check.json").read_text()
    assert '"alpha_pairs"' in text
    assert (folder / "runs/again/reward/model/model.safetensors").exists()


def test_hostile_texts_stay_texts(serve: Callable[..., Any], window: Callable[..., Any], tmp_path: Path) -> None:
    payloads = [HOSTILE[n % len(HOSTILE)].format(n=n) for n in range(200)]
    records = [
        {"input": payloads[5 * n], "choices": payloads[5 * n + 1 : 5 * n + 5]} for n in range(len(payloads) // 5)
    ]
    prompts, out = write(tmp_path / "prompts.jsonl", records), tmp_path / "ranked.jsonl"
    server = serve("rank", "--prompts", prompts, "--out", str(out))
    page = window()
    enter(page, server.address, "<img src=x onerror=alert(1)>")
    shown: list[str] = []
    for _ in records:
        assert page.evaluate("document.querySelectorAll('.text *').length") == 0
        shown += page.evaluate("[...document.querySelectorAll('.text')].map((box) => box.textContent)")
        for number in range(4):
            page.locator(".answer").nth(number).locator("button[data-rank='1']").click()
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        store(page)
    pictures = {code: 0x2400 + code for code in (*range(9), *range(11, 32))}
    assert sorted(shown) == sorted(payload.translate(pictures) for payload in payloads)
    assert page.title() == "Tetrad · Rank"
    kept = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert sorted(c["text"] for record in kept for c in record["choices"]) == sorted(
        payload for n, payload in enumerate(payloads) if n % 5
    )


def test_the_keyboard_is_enough(serve: Callable[..., Any], window: Callable[..., Any], tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [asked(i) for i in range(5)]), tmp_path / "ranked.jsonl"
    server = serve("rank", "--prompts", prompts, "--out", str(out), "--scale", "1", "5")
    page = window()
    keys = page.keyboard
    page.goto(f"{server.address}/rank")
    page.wait_for_selector("#enter:visible")
    while page.evaluate("document.activeElement.id") != "name":
        keys.press("Tab")
    keys.type("kim")
    keys.press("Enter")
    page.wait_for_selector(".answer")

    def next_after(*pressed: str) -> str:
        before = question(page)
        for key in pressed:
            keys.type(key[1:]) if key.startswith("=") else keys.press(key)
        wait_for_another(page, before)
        return before

    # The focus goes on by itself; ties are equal numbers.
    first = next_after("3", "1", "1", "2", "Enter")
    # Arrows move, lower and raise; a comment and an edited answer are written without the mouse.
    second = next_after(
        *("1", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowDown", "4", "3"),
        *("c", "=a comment", "Escape", "e", "Control+A", "=A better answer.", "Escape", "Enter"),
    )
    third, fourth = next_after("s"), next_after("b")
    # A score by Tab: rank buttons are passed over.
    texts = page.locator(".answer .text").all_inner_texts()
    next_after("1", "ArrowUp", "Tab", "=4.5", "Escape", "ArrowDown", "2", "2", "2", "Enter")
    page.wait_for_selector("#message:visible")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    ranked = {line["input"]: line for line in lines if "choices" in line}
    assert [choice["rank"] for choice in ranked[first]["choices"]] == [3, 1, 1, 2]
    assert [choice["rank"] for choice in ranked[second]["choices"]] == [2, 1, 4, 3]
    assert ranked[second]["comment"] == "a comment"
    assert [(line["output"], line["score"]) for line in lines if "output" in line] == [(texts[0], 4.5)]
    aside = [json.loads(line) for line in (tmp_path / "ranked-beside/aside.jsonl").read_text().splitlines()]
    assert {line["input"]: line["verdict"] for line in aside} == {third: "skip", fourth: "all bad"}
    (edited,) = (tmp_path / "ranked-beside/sft.jsonl").read_text().splitlines()
    assert json.loads(edited) == {"Instruction": second, "Output": "A better answer."}


def test_answers_are_dragged_onto_ranks(serve: Callable[..., Any], window: Callable[..., Any], tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [asked(0)]), tmp_path / "ranked.jsonl"
    server = serve("rank", "--prompts", prompts, "--out", str(out))
    page = window()
    enter(page, server.address, "kim")
    for number, rank in enumerate((2, 1, 2, 4)):
        page.locator(".handle").nth(number).scroll_into_view_if_needed()
        page.locator(".handle").nth(number).hover()
        page.mouse.down()
        box = page.locator(f".slot[data-rank='{rank}']").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20, steps=5)
        assert page.locator(".slot.over").get_attribute("data-rank") == str(rank)
        page.mouse.up()
    assert [slot.inner_text().split() for slot in page.locator(".slot .chips").all()] == [["B"], ["A", "C"], [], ["D"]]
    page.click("#next")
    page.wait_for_selector("#message:visible")
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    assert [choice["rank"] for choice in record["choices"]] == [2, 1, 2, 4]


def test_a_reload_loses_nothing_and_another_tab_makes_no_second_row(
    serve: Callable[..., Any], window: Callable[..., Any], tmp_path: Path
) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [asked(i) for i in range(2)]), tmp_path / "ranked.jsonl"
    server = serve("rank", "--prompts", prompts, "--out", str(out))
    page = window()
    enter(page, server.address, "kim")
    page.keyboard.press("2")
    page.fill("#comment", "half a thought")
    page.reload()
    page.wait_for_selector(".answer")
    assert page.locator(".ranks button[aria-pressed='true']").all_inner_texts() == ["2"]
    assert page.input_value("#comment") == "half a thought"
    other = page.context.new_page()
    other.goto(f"{server.address}/rank")
    other.wait_for_selector(".answer")
    assert question(other) == question(page)
    rank_by_length(other)
    store(other)
    rank_by_length(page, backwards=True)
    page.click("#next")
    page.wait_for_function("() => document.getElementById('banner').textContent.includes('before')")
    page.faults[:] = [fault for fault in page.faults if "409" not in fault]
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_links_sampling_and_what_is_said_at_the_end(
    language: str, serve: Callable[..., Any], window: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    """Answers are sampled while people rank; a personal link opens the page, and nothing names a model."""
    prompts = write(tmp_path / "prompts.jsonl", [{"input": f"the plot {i}"} for i in range(3)])
    (tmp_path / "people.txt").write_text("kim\n李雷\n", encoding="utf-8")
    words = ("--annotators", str(tmp_path / "people.txt"), "--max-new-tokens", "8", "--reward", str(models / "reward"))
    made_by = (str(models / "sft"), str(models / "ppo"))
    server = serve("rank", *made_by, "--prompts", prompts, "--out", str(tmp_path / "ranked.jsonl"), *words)
    page = window(language)
    page.goto(f"{server.address}/rank")
    page.wait_for_selector("#message:visible")
    link = next(line.split()[-1] for line in server.log.read_text().splitlines() if "李雷" in line)
    page.goto(link)
    page.wait_for_selector(".answer")
    assert "#" not in page.url
    for _ in range(3):
        content = page.content()
        assert "sft" not in content and "ppo" not in content
        assert page.locator(".answer").count() == 4
        for number in range(4):
            page.locator(".answer").nth(number).locator("button[data-rank='1']").click()
        store(page)
    page.wait_for_selector("#message:visible")
    expected = {"en-US": "All done. Thank you!", "zh-CN": "全部完成，谢谢！"}[language]
    assert page.inner_text("#message") == expected
    page.click("#language")
    assert page.inner_text("#message") != expected
    items = [json.loads(line) for line in (tmp_path / "ranked-beside/items.jsonl").read_text().splitlines()]
    assert Counter(c["model"] for item in items for c in item["choices"]) == {"sft": 6, "ppo": 6}
    assert server.stop() == 0
    assert "3 of 3 items done" in server.log.read_text()
