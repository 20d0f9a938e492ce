"""A CPU computes in bfloat16 if it is asked to and has the units; else that is refused before anything starts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tetrad.data.pack import pack
from tetrad.distributed.device import Device, choose
from tetrad.errors import UserError
from tetrad.kernels import cpu
from tetrad.model.config import DecoderConfig
from tetrad.model.transformer import ScalarModel
from tetrad.pipeline.recipe import read
from tetrad.settings.common import Run
from tetrad.types import Tokens

FLAGS = {True: "flags\t: fpu avx512_bf16 amx_bf16 amx_tile\n", False: "flags\t: fpu avx512_bf16\n"}


@pytest.fixture(params=[True, False, None], ids=["amx", "no amx", "no cpuinfo"])
def has_units(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param is not None:
        (tmp_path / "cpuinfo").write_text(FLAGS[request.param])
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    cpu.multiplies_bfloat16.cache_clear()
    yield bool(request.param)
    cpu.multiplies_bfloat16.cache_clear()


def test_bfloat16_needs_its_units(has_units: bool, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[run]\ndevice = "cpu"\ndtype = "bfloat16"\n')
    if has_units:
        assert read(tmp_path / "r.toml").run.dtype == "bfloat16"
        assert choose(Run(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16
    else:
        with pytest.raises(UserError, match="AMX") as error:
            read(tmp_path / "r.toml")
        assert (error.value.code, error.value.where) == ("E-CONF-DTYPE", f"{tmp_path / 'r.toml'}:3")
        with pytest.raises(UserError, match="AMX"):
            choose(Run(device="cpu", dtype="bfloat16"))
    assert choose(Run(device="cpu")).dtype == torch.float32


def test_bfloat16_is_near_and_attends_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards and gradients of a small decoder; the kernel of attention never sees 16 bits, whose backward is slow."""
    config = DecoderConfig("qwen2", 64, 32, 2, 4, 2, 8, 64, 64, init_std=0.1)
    torch.manual_seed(0)
    model = ScalarModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.1)
    ids = [np.arange(length, dtype=np.int32) * 7 % 64 for length in (9, 30, 17)]
    documents = [Tokens(one, np.zeros(len(one), np.bool_)) for one in ids]
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        device = Device(torch.device("cpu"), dtype)
        with device.compute():
            scores = model(device.put(pack(documents)), "scores")
        gradients = torch.autograd.grad(scores.square().sum(), model.parameters())
        results[dtype] = scores.detach(), torch.cat([g.flatten() for g in gradients])
    (scores, gradient), (near, near_gradient) = results.values()
    assert not torch.equal(scores, near)
    torch.testing.assert_close(near, scores, rtol=0.03, atol=0.03)
    assert torch.cosine_similarity(gradient, near_gradient, dim=0) > 0.999

    from tetrad.model import attention

    q, k, v = (torch.randn(30, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    plan = attention.plan_for([0, 9, 30], torch.device("cpu"))
    expected = attention.packed_attention(q.float(), k.float(), v.float(), plan)
    assert torch.equal(attention.packed_attention(q, k, v, plan), expected.bfloat16())
