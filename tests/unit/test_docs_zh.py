"""Chinese pages are punctuated as Chinese is, and have one term for a thing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.zh-CN.md",
    *sorted((ROOT / "docs/zh").glob("*.md")),
    *sorted((ROOT / "examples").glob("*-zh/README.zh-CN.md")),
]
CODE = re.compile(r"`[^`]*`|\]\([^)]*\)|<[^>\s][^>]*>|https?://\S+|\*\*")
HAN = "\u3400-\u9fff"
HALF_WIDTH = re.compile(rf"[{HAN}] ?[,;:!?(]|[,;:!?)] ?[{HAN}]")
FOREIGN = {"门控": "准入检查", "闸门": "准入检查", "外来模型": "第三方模型目录", "留出集": "验证集", "裁判": "评价模型"}


def sentences(text: str) -> list[tuple[int, str]]:
    """Lines outside code blocks by number, with what is code or a link taken out."""
    lines, code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        if not (code or fence):
            lines.append((number, CODE.sub("", line)))
    return lines


def wrong(text: str) -> list[str]:
    """Each place with a half-width mark beside a Chinese character, or a word that has another term."""
    places = [f"{n}: {m[0]}" for n, line in sentences(text) for m in HALF_WIDTH.finditer(line)]
    return places + [
        f"{n}: {word} is {FOREIGN[word]}" for n, line in sentences(text) for word in FOREIGN if word in line
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_chinese_page(page: Path) -> None:
    assert not wrong(page.read_text(encoding="utf-8"))


def test_what_is_wrong_is_found() -> None:
    assert wrong("模型,数据") == ["1: 型,"]
    assert wrong("好\n训练(SFT)之后") == ["2: 练(", "2: )之"]
    assert wrong("留出集") == ["1: 留出集 is 验证集"]
    assert not wrong("```\n模型,数据\n```\n模型，`a, b`（SFT, PPO）")
