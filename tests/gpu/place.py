"""Where these tests compute: on the GPU. TETRAD_GPU_TESTS=cpu lets a CPU stand in, to see that the tests themselves
work; it shows nothing of a GPU."""

import os

import pytest
import torch

from tetrad.distributed.device import Device

STAND_IN = os.environ.get("TETRAD_GPU_TESTS") == "cpu"
KIND = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(KIND == "cpu" and not STAND_IN, reason="needs a GPU")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(dtype: str = "bfloat16", **changes: bool) -> Device:
    place = torch.device(KIND, 0) if KIND == "cuda" else torch.device(KIND)
    return Device(place, DTYPES[dtype], **changes)
