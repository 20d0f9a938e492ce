"""Decoding steps by CUDA graph replay: on a GPU a step is hundreds of small kernels, whose launches dominate.

One graph for each (rows, length) that occurs, both rounded up to powers of two, so that a few dozen at most serve all
steps; they share one memory pool, as a step's logits are read before the next. What padding rows compute is never
read; they write into unused slots, at position 0. On a CPU the step is called directly, with its exact sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tetrad.distributed.device import Device

_LEAST_LENGTH = 256
Compute = Callable[[Tensor, Tensor, int, bool], Tensor]
"""(ids_N, positions_N, length, whether all rows read the whole length) -> logits_NV."""


@dataclass(frozen=True)
class _Graph:
    """inputs: [2, rows] ids and positions; logits: [rows, V] logits."""

    graph: Any
    inputs: Tensor
    logits: Tensor


class Replayed:
    """Calls `compute` with one id and its position per row."""

    def __init__(self, compute: Compute, slots: int, positions: int, device: Device) -> None:
        self._compute, self._slots, self._positions, self._device = compute, slots, positions, device
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None

    def __call__(self, ids: list[int], positions: list[int]) -> Tensor:
        """Logits [N, V]; overwritten by the next call."""
        inputs, length = torch.tensor([ids, positions]), max(positions) + 1
        if self._device.torch_device.type != "cuda":
            return self._compute(inputs[0], inputs[1], length, len(ids) == 1)
        rows = rounded(len(ids), 1, self._slots)
        length = rounded(length, _LEAST_LENGTH, self._positions)
        captured = self._graphs.get((rows, length))
        if captured is None:
            captured = self._graphs[rows, length] = self._captured(rows, length)
        captured.inputs.zero_()
        captured.inputs[:, : len(ids)].copy_(self._device.move(inputs))
        captured.graph.replay()
        return captured.logits[: len(ids)]

    def _captured(self, rows: int, length: int) -> _Graph:
        """Warmed up first, so that no kernel is loaded during capture. What this writes goes to the last position,
        which no response reads: its last id is never an input."""
        place = self._device.torch_device
        inputs = torch.zeros(2, rows, dtype=torch.int64, device=place)
        inputs[1] = self._positions - 1
        side = torch.cuda.Stream(place)
        side.wait_stream(torch.cuda.current_stream(place))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(inputs[0], inputs[1], length, False)
        torch.cuda.current_stream(place).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's asks how far its kernels are.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._compute(inputs[0], inputs[1], length, False)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, inputs, logits)


def rounded(count: int, least: int, most: int) -> int:
    """The next power of two from `least` on, at most `most`."""
    size = least
    while size < count:
        size *= 2
    return min(size, most)
