"""A real Chromium on the pages. Skipped where it or playwright is missing, and in CI.

    apt-get install chromium; pip install playwright; pytest tests/browser

TETRAD_CHROMIUM names another binary, TETRAD_AXE the file axe.min.js of the npm package axe-core, TETRAD_SHOTS a folder
for screenshots.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from served import write_model

CHROMIUM = os.environ.get("TETRAD_CHROMIUM", "/usr/bin/chromium")


class Server:
    """One command of tetrad that serves, and that may be killed and started again at the same port."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.words, self.log, self.address = words, folder / "server.log", f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tetrad", *self.words, "--port", str(self.port)]
        source = Path(__file__).parents[2] / "src"
        with self.log.open("ab") as log:
            env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        for _ in range(1_200):
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts commands; they end with the test."""
    servers: list[Server] = []

    def start(*words: str) -> Server:
        servers.append(Server(tmp_path, *words))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, ppo and reward, of chatml and with room for long answers; random weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in {"sft": 4, "ppo": 5, "reward": 2}.items():  # the first two do not end by themselves when greedy
        write_model(folder / name, "chatml", reward=name == "reward", seed=seed, max_positions=1024)
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if os.environ.get("CI"):
        pytest.skip("browser tests are not for CI")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser profile of its own. At the end no console had an error, no dialog was opened, and every
    request went to this host. `page.faults` has what a test expects and may clear."""
    contexts, faults = [], list[str]()

    def open_window(language: str = "en-US", width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = chromium.new_context(locale=language, viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.faults = faults
        page.on("console", lambda m: faults.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith("http://127.0.0.1:") else faults.append(r.url))
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def shoot() -> Callable[[Any, str], None]:
    """Takes a screenshot, where a folder for them is named."""

    def take(page: Any, name: str) -> None:
        if folder := os.environ.get("TETRAD_SHOTS"):
            page.screenshot(path=Path(folder) / f"{name}.png")

    return take
