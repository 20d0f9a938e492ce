"""The optimizer of one model: AdamW, or Muon on the matrices with AdamW on the rest; and how learning rates move.

State is float32 and named by parameter, so that a checkpoint reads like the model. Only `update` steps it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tetrad.errors import UserError
from tetrad.settings.common import Optim

_NONE: Mapping[str, float] = MappingProxyType({})
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: five steps bring singular values near 1


def orthogonalised(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration on a stack [n, rows, columns]: the nearest ones with equal singular values, roughly."""
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    if x.is_cuda:
        x = x.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024). Matrices of one shape are handled as one stack: on a CPU that is
    several times faster than one by one in 16 bit, as torch.optim.Muon does."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for same in shapes.values():
                self._step(same, group)
        return None

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
        rows, columns = parameters[0].shape
        scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(orthogonalised(torch.stack(ahead)).unbind()), alpha=scale)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with Muon for the matrices of the blocks where `muon_lr` is given."""

    def __init__(
        self, model: nn.Module, lr: float, settings: Optim, *, muon_lr: float = 0.0, quick: Mapping[str, float] = _NONE
    ) -> None:
        """quick: highest learning rates of their own for parameters whose name begins so."""
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {n for n, p in self.names.items() if muon_lr and p.dim() == 2 and ".layers." in n}
        own = {n: rate for n in self.names for start, rate in quick.items() if n.startswith(start)}
        matrices = [p for n, p in self.names.items() if n not in hidden and n not in own and p.dim() > 1]
        vectors = [p for n, p in self.names.items() if p.dim() < 2 and n not in own]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups += [{"params": [self.names[n]], "weight_decay": 0.0, "lr": rate} for n, rate in own.items()]
        betas = (settings.beta1, settings.beta2)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.eps, fused=True)
        ]
        if hidden:
            parameters = [self.names[n] for n in self.names if n in hidden]
            self.parts.append(Muon(parameters, muon_lr, settings.muon_momentum, settings.weight_decay))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self.lr = lr

    def step(self, factor: float) -> None:
        """One step at `factor` times the highest learning rate."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()

    def clear(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """State by "<parameter>/<name>", for a checkpoint."""
        found = {}
        for name, parameter in self.names.items():
            for part in self.parts:
                for key, value in part.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = torch.as_tensor(value)
        return found

    def full_bytes(self) -> int:
        """AdamW keeps two numbers a weight, Muon one."""
        return sum(
            p.nbytes * (1 if isinstance(part, Muon) else 2)
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        )

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS where the state isn't this model's."""
        owners = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in self.names:
                raise UserError("E-CKPT-KEYS", f"the optimizer's state names {name!r}, which isn't trained", where=key)
            parameter = self.names[name]
            owners[id(parameter)].state[parameter][slot] = value.to(parameter.device)


class Together:
    """The optimizers of several models as one part of a checkpoint."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, one in enumerate(self.optimizers) for name, t in one.tensors().items()}

    def full_bytes(self) -> int:
        return sum(one.full_bytes() for one in self.optimizers)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS."""
        for i, one in enumerate(self.optimizers):
            mine = {n.removeprefix(f"{i}."): tensor for n, tensor in tensors.items() if n.startswith(f"{i}.")}
            one.load_tensors(mine)


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the highest learning rate at `step` (from 0) of `total`; warm-up is a share of the steps."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    left = (total - step) / max(1, total - rise)
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if schedule == "linear" else 1.0
