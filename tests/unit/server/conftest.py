from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from served import write_model
from serving import Running, serving
from tetrad.settings.use import Serve


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chat (chatml, long answers), sft (instruction, 96 positions), pretrain (no template)."""
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "chat", "chatml", seed=4, max_positions=2048)
    write_model(folder / "sft", seed=1)
    write_model(folder / "pretrain", "")
    return folder


@pytest.fixture(scope="module")
def running(served_models: Path) -> Iterator[Running]:
    names = [served_models / name for name in ("chat", "sft", "pretrain")]
    with serving(names, Serve(max_num_seqs=16)) as server:
        yield server


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client
