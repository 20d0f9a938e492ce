"""The chat page in a real browser."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def two(serve: Callable[..., Any], models: Path) -> Any:
    return serve("serve", str(models / "sft"), str(models / "ppo"), "--reward", str(models / "reward"))


def opened(page: Any, address: str, tokens: int) -> Any:
    page.goto(f"{address}/")
    page.wait_for_function("() => document.querySelectorAll('#models input').length > 0")
    page.click("#open-settings")
    page.fill("#max_tokens", str(tokens))
    page.click("#open-settings")
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")


def posted(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json", "Host": address[7:]}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_answers_of_two_models_stream_and_stop(two: Any, window: Callable[..., Any]) -> None:
    page = opened(window(), two.address, 900)
    page.evaluate("() => { document.getElementById('temperature').value = 0; }")
    ask(page, "the plot")
    count = 0
    for _ in range(4):  # it grows, token by token
        longer = "(one) => one.querySelectorAll('.token').length > count"
        page.wait_for_function(f"count => [...document.querySelectorAll('.reply')].every({longer})", arg=count)
        count = page.evaluate("document.querySelectorAll('.reply')[0].querySelectorAll('.token').length")
    assert count < 900
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert [("stopped" in one) for one in page.locator(".reply .under").all_inner_texts()] == [True, True]
    page.wait_for_timeout(500)
    before = page.evaluate("document.querySelectorAll('.token').length")
    page.wait_for_timeout(500)
    assert page.evaluate("document.querySelectorAll('.token').length") == before


def test_logprobs_rewards_and_another_seed(two: Any, window: Callable[..., Any]) -> None:
    page = opened(window(), two.address, 12)
    ask(page, "a warm and")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.reward')].filter((one) => one.textContent).length == 2"
    )
    texts = page.locator(".reply .text").all_inner_texts()
    messages = [{"role": "user", "content": "a warm and"}]
    sampling = {"messages": messages, "seed": 0, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "logprobs": True}
    for number, model in enumerate(("sft", "ppo")):
        choice = posted(two.address, "/v1/chat/completions", {"model": model, **sampling})["choices"][0]
        pieces = page.evaluate(
            "(number) => [...document.querySelectorAll('.reply')[number].querySelectorAll('.token')]"
            ".flatMap((piece) => piece.tokens.map((one) => one.logprob))",
            number,
        )
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
        assert pieces == pytest.approx(logprobs[: len(pieces)], abs=1e-5)
        sample = {"messages": messages, "text": choice["message"]["content"]}
        sample["finished"] = choice["finish_reason"] != "length"
        (score,) = posted(two.address, "/v1/reward", {"samples": [sample]})["scores"]
        shown = page.locator(".reply .reward").nth(number).inner_text()
        assert shown == f"reward {score:+.3f}".replace("-", "−")
    page.click("#colour")
    box = page.locator(".reply .text").first
    box.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.chosen").count() == 1
    assert "%" in page.inner_text(".detail")
    page.locator(".again").first.click()
    page.wait_for_selector("#send:visible")
    assert "Seed 1" in page.locator(".reply .under").first.inner_text()
    after = page.locator(".reply .text").all_inner_texts()
    assert (after[0] == texts[0], after[1] == texts[1]) == (False, True)


def test_what_people_and_models_write_stays_text(two: Any, window: Callable[..., Any]) -> None:
    page = opened(window(), two.address, 4)
    payload = "<img src=x onerror=alert(1)> <script>alert(2)</script> ![x](http://evil.example/) \u202eabc"
    ask(page, payload)
    page.wait_for_selector("#send:visible")
    assert page.locator(".message .text").inner_text() == payload
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0


def test_a_refusal_is_shown(two: Any, window: Callable[..., Any]) -> None:
    page = opened(window("zh-CN"), two.address, 5_000)
    ask(page, "the plot")
    page.wait_for_function("() => document.querySelector('.fault').textContent")
    assert "1024" in page.locator(".fault").first.inner_text() or page.locator(".fault").first.inner_text()
    page.faults[:] = [fault for fault in page.faults if "400" not in fault]
