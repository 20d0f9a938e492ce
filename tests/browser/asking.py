"""What is asked on the ranking page, and how one gets there."""

import json
from pathlib import Path
from typing import Any

ANSWERS = ("a warm and funny story", "a slow plot", "dull", "what a bright film, slow but moving")


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def asked(number: int, *answers: str) -> dict[str, Any]:
    return {"input": f"question {number}", "choices": [f"{text} {number}" for text in answers or ANSWERS]}


def enter(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}/rank")
    page.wait_for_selector("#enter:visible")
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer")
