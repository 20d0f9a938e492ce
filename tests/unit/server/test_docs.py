"""The programs of docs/serve.md run as they stand, on a server at another port."""

import re
from pathlib import Path

import pytest

from raw_http import listening
from serving import Running
from tetrad.server import scoring
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.service import load_service
from tetrad.settings.use import Serve

ROOT = Path(__file__).parents[3]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["docs/serve.md", "docs/zh/serve.md"])
def test_openai(running: Running, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    program = blocks(page, "python")[0]
    exec(program.replace("http://localhost:8000", running.url).replace('"ppo"', '"chat"'), {})
    assert len(capsys.readouterr().out) > 10


def test_a_reward_function_for_verl(served_models: Path) -> None:
    pytest.importorskip("requests")
    from served import write_model

    write_model(served_models / "reward", "chatml", reward=True)
    service = load_service([], Serve(reward=str(served_models / "reward")))
    with listening(create_app(service, Limits(), scoring.routes(service))) as port:
        names: dict[str, object] = {}
        program = next(block for block in blocks("docs/serve.md", "python") if "compute_score" in block)
        exec(program.replace(":8000", f":{port}"), names)
        score = names["compute_score"]
        assert callable(score)
        assert isinstance(score("set", "a warm story", None, {"prompt": "the plot is"}), float)


def test_both_languages_have_the_same_programs() -> None:
    def plain(page: str) -> list[str]:
        """Without the examples' texts."""
        words = [re.sub(r'"[^"\n]*[^\x00-\x7f][^"\n]*"', '""', block) for block in blocks(page, r"\w+")]
        english = r'"(The plot is|a warm and funny story|dull)"'
        return [re.sub(english, '""', block) for block in words]

    assert plain("docs/serve.md") == plain("docs/zh/serve.md")
