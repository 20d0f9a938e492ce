"""CUDA tensors without numbers, where no GPU is: shapes, types and devices go through the code that a GPU would run.

What needs a number fails, as `.item()` and `nonzero` do: on a GPU the program would wait for it. There is no backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class Calls(TorchDispatchMode):
    """What was computed: operators with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((str(func), tree_leaves((args, kwargs or {})), tree_leaves(out)))
        return out

    def named(self, name: str) -> list[tuple[list[Any], list[Any]]]:
        return [(given, out) for each, given, out in self.calls if name in each]

    def copies_to_gpu(self) -> list[tuple[list[Any], list[Any]]]:
        """From the CPU's memory, numbers alone aside."""
        return [
            (given, out)
            for _, given, out in self.calls
            if any(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in given)
            and any(isinstance(x, Tensor) and x.is_cuda for x in out)
        ]


class _Indexed(TorchFunctionMode):
    """Brackets and copies, which a torch without CUDA refuses on such tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return self._chosen(*args)
        if func is Tensor.__setitem__ and args[0].is_cuda:
            value = args[2] if isinstance(args[2], Tensor) else torch.tensor(args[2])
            return torch.ops.aten.copy_(self._chosen(*args[:2]), value)
        if func is Tensor.copy_ and args[0].is_cuda:
            return torch.ops.aten.copy_(*args[:2], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _chosen(self, x: Tensor, at: Any) -> Tensor:
        dim, tensors = 0, list[Tensor | None]()
        at = at if isinstance(at, tuple) else (at,)
        if Ellipsis in [each for each in at if not isinstance(each, Tensor)]:
            raise NotImplementedError("an ellipsis")
        for each in at:
            if each is None:
                x = x.unsqueeze(dim)
            elif isinstance(each, slice):
                start, stop, _ = each.indices(x.shape[dim])
                x = x.narrow(dim, start, max(0, stop - start))
            elif isinstance(each, Tensor):
                tensors += [None] * (dim - len(tensors)) + [each]
            else:
                x, dim = x.select(dim, each), dim - 1
            dim += 1
        return torch.ops.aten.index(x, tensors) if tensors else x


@contextmanager
def fake_cuda(dtype: torch.dtype = torch.bfloat16) -> Iterator[Calls]:
    """In it tensors have no numbers, and CUDA's autocast computes in `dtype`; no gradients."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), Calls() as calls, _Indexed(), torch.no_grad():
        torch.set_autocast_enabled("cuda", dtype != torch.float32)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield calls
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
