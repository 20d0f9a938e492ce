"""Where and in which precision to compute, and moving data there.

Trained weights are float32; compute is bfloat16 by autocast on a GPU and float32 elsewhere. A CPU with units for
bfloat16 products computes in it if it is asked to; any other would be several times slower with it.
"""

import ctypes
import os
import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tetrad.distributed import collectives
from tetrad.errors import UserError
from tetrad.kernels.cpu import NO_BFLOAT16, multiplies_bfloat16
from tetrad.settings.check import build
from tetrad.settings.common import Run
from tetrad.types import IGNORE, Array, Packed

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


@dataclass(frozen=True)
class Device:
    """dtype: what matrix products are computed in. recompute: see Packed. shard: how models lie on several processes,
    see `sharding`."""

    torch_device: torch.device
    dtype: torch.dtype
    recompute: bool = False
    shard: str = "none"

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Around the pass of a model."""
        wide = self.dtype == torch.float32
        with (
            self.together("a pass of a sharded model"),
            nullcontext() if wide else torch.autocast(self.torch_device.type, self.dtype),
        ):
            yield

    def together(self, name: str) -> AbstractContextManager[object]:
        """Around what ranks compute together if models are sharded."""
        return nullcontext() if self.shard == "none" else collectives.collective(name, computes=True)

    def alone(self) -> "Device":
        """For models that this process has to itself."""
        return replace(self, shard="none")

    def put(self, packed: Packed) -> Packed:
        """numpy to tensors: ids, positions, targets and keys as int64. What a GPU would otherwise be waited for, where
        the labels are, is computed here."""

        def move(array: Array) -> Tensor:
            return self.move(torch.as_tensor(array).to(torch.int64))

        keys = None if packed.keys_T is None else self.move(torch.as_tensor(packed.keys_T))
        ids, positions, targets = map(move, (packed.ids_T, packed.positions_T, packed.targets_T))
        labelled = move(np.flatnonzero(np.asarray(packed.targets_T) != IGNORE))
        offsets = self.move(torch.tensor(packed.bounds, dtype=torch.int32))
        moved = replace(packed, ids_T=ids, positions_T=positions, targets_T=targets, keys_T=keys)
        return replace(moved, labelled_N=labelled, offsets=offsets, recompute=self.recompute)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """In which the matrices of a model that only reads are kept."""
        return self.dtype if self.torch_device.type == "cuda" else torch.float32

    def read(self, *tensors: Tensor) -> list[list[float]]:
        """Their numbers, tensors of one size. A GPU is waited for once."""
        if self.torch_device.type != "cuda":
            return [tensor.tolist() for tensor in tensors]
        rows: list[list[float]] = torch.stack([tensor.double() for tensor in tensors]).tolist()
        return rows

    def move(self, tensor: Tensor) -> Tensor:
        """From the CPU. To a GPU by way of pinned memory, from which a copy is not waited for."""
        if self.torch_device.type != "cuda":
            return tensor.to(self.torch_device)
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)


def choose(run: Run, stage: str = "") -> Device:
    """The device of a run; starts the process group under torchrun. stage: for the message if a rank is lost.

    Errors: E-CONF-DEVICE, E-CONF-DTYPE."""
    has_gpu = torch.cuda.is_available()
    if run.device == "cuda" and not has_gpu:
        raise UserError("E-CONF-DEVICE", "no CUDA device is visible", where="run.device", hint='set device = "cpu"')
    kind = "cuda" if has_gpu and run.device != "cpu" else "cpu"
    collectives.start(kind, stage)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if device.index >= (count := torch.cuda.device_count()):
            what = f"process {device.index} of this machine has no GPU of its own: there are {count}"
            raise UserError("E-CONF-DEVICE", what, where="run.nproc", hint="start no more processes than GPUs")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = run.dtype != "float32"
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if run.dtype == "bfloat16" and kind == "cpu" and not multiplies_bfloat16():
        raise UserError("E-CONF-DTYPE", NO_BFLOAT16, where="run.dtype", hint='set dtype = "float32"')
    bfloat16 = run.dtype == "bfloat16" if kind == "cpu" else run.dtype != "float32" and torch.cuda.is_bf16_supported()
    shard = run.shard if collectives.size() > 1 else "none"
    return Device(device, torch.bfloat16 if bfloat16 else torch.float32, run.activation_checkpointing, shard)


def chosen_device(device: str, dtype: str) -> Device:
    """That of a run with these settings. Errors: E-CONF-{DEVICE,DTYPE,RANGE,TYPE}."""
    return choose(build(Run, {"device": device, "dtype": dtype}, {"device": "device", "dtype": "dtype"}))


def peak_bytes() -> int:
    """The peak memory of this process so far: of the GPU if it uses one, else of the machine."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def release_memory() -> None:
    """Returns the memory of freed tensors to the system, where the C library does not by itself: with batches of many
    lengths it would hold what the rarest ones took. Takes milliseconds."""
    if _malloc_trim:
        _malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the GPU, or of the machine and this process's container, of which each of
    the processes that train together here takes an equal share."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    there = int(available[1]) << 10 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(there, *map(_left_of_group, _GROUPS)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# Folder of a memory cgroup as a container sees its own, names of its limit, its use and its files' share of the use.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _left_of_group(names: tuple[str, str, str, str]) -> int:
    """What a cgroup's limit leaves; files that can be dropped at once do not count. 2^62 if there is none."""
    folder, limit, used, files = Path(names[0]), *names[1:]
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        dropped = re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        return int(most) - int(taken) + int(dropped[1] if dropped else 0)
    except (OSError, ValueError):  # no such group, or "max"
        return 1 << 62
