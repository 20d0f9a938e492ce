"""How much memory can still be taken."""

from pathlib import Path

import pytest
import torch

from tetrad.distributed import device
from tetrad.distributed.device import free_bytes

CPU = torch.device("cpu")


def test_the_machine_has_some() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_processes_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == pytest.approx(whole / 4, rel=0.2)


@pytest.mark.parametrize("stat", ["inactive_file 4096\nactive_file 8192\n", "inactive_anon 1\n"])
def test_a_container_may_have_less(stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit less its use, of which files that nobody needs do not count."""
    for name, text in (("max", "1000000\n"), ("current", "400000\n"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text)
    group = (str(tmp_path), "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(device, "_GROUPS", (group,))
    assert free_bytes(CPU) == 600_000 + (4096 if "inactive_file" in stat else 0)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 1 << 20
    monkeypatch.setattr(device, "_GROUPS", ((str(tmp_path / "none"), *group[1:]),))
    assert free_bytes(CPU) > 1 << 20
