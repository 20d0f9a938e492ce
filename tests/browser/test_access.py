"""Both pages by axe-core, in each language, scheme and width; and screenshots to look at."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.asking import asked, enter, write

AXE = os.environ.get("TETRAD_AXE", "")


@pytest.mark.skipif(not Path(AXE).is_file(), reason="TETRAD_AXE names no axe.min.js (npm install axe-core)")
def test_no_serious_finding(
    serve: Callable[..., Any], window: Callable[..., Any], shoot: Callable[..., None], models: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [asked(i) for i in range(20)])
    rank = serve("rank", "--prompts", prompts, "--out", str(tmp_path / "ranked.jsonl"), "--scale", "1", "5")
    chat = serve("serve", str(models / "sft"), str(models / "ppo"), "--reward", str(models / "reward"))
    findings: list[str] = []

    def opened(language: str, width: int, scheme: str) -> Any:
        """axe-core is no script of the page, so the policy is lifted, and with it what keeps favicon.ico away."""
        page = window(language, width, 844, color_scheme=scheme, bypass_csp=True)
        page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
        return page

    def look(page: Any, name: str) -> None:
        shoot(page, name)
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            findings.append(f"{name}: wider than the window")
        page.evaluate(Path(AXE).read_text())
        result = page.evaluate("() => axe.run()")
        bad = [one for one in result["violations"] if one["impact"] in ("serious", "critical")]
        findings.extend(f"{name}: {one['id']} {json.dumps([n['target'] for n in one['nodes']][:3])}" for one in bad)

    for language in ("en-US", "zh-CN"):
        for width, scheme in ((1280, "light"), (390, "dark"), (390, "light"), (1280, "dark")):
            name = f"{language}-{width}-{scheme}"
            page = opened(language, width, scheme)
            page.goto(f"{rank.address}/rank")
            page.wait_for_selector("#enter:visible")
            look(page, f"enter-{name}")
            enter(page, rank.address, name)
            look(page, f"rank-{name}")
            page.keyboard.press("2")
            page.keyboard.press("1")
            page.keyboard.press("e")
            look(page, f"edit-{name}")
            page = opened(language, width, scheme)
            page.goto(f"{chat.address}/")
            page.wait_for_function("() => document.querySelectorAll('#models input').length > 0")
            page.click("#open-settings")
            page.fill("#max_tokens", "8")
            look(page, f"settings-{name}")
            page.click("#open-settings")
            page.click("#colour")
            page.fill("#message", "the plot")
            page.keyboard.press("Enter")
            page.wait_for_function("() => [...document.querySelectorAll('.reward')].some((one) => one.textContent)")
            page.locator(".reply .token").first.click()
            look(page, f"chat-{name}")
    assert findings == []
