"""The optimizer of one model: AdamW, or Muon on the matrices with AdamW on the rest; and learning-rate schedules.

State is float32 and named by parameter, so that a checkpoint reads like the model. Only `update` steps it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tetrad.distributed.sharding import by_owner, local, part_of
from tetrad.errors import UserError
from tetrad.settings.common import Optim

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


@dataclass
class Group:
    """Parameters that share a scheduled learning rate and a weight decay."""

    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


class _Algorithm:
    """The state of each parameter that it has stepped, by name."""

    def __init__(self, groups: Sequence[Group], settings: Optim) -> None:
        self.groups, self.settings = groups, settings
        self.state: dict[Tensor, dict[str, Tensor]] = {}


class AdamW(_Algorithm):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), by torch's fused kernel. torch.optim.AdamW is the
    same, but loads all of torch.compile to do it: two seconds at every start."""

    slots = 2  # state values per weight

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            moved = [p for p in group.parameters if p.grad is not None]
            if not moved:
                continue
            states = [self.state.get(p) or self._begin(p) for p in moved]
            names = ("exp_avg", "exp_avg_sq", "step")
            means, squares, steps = ([local(state[name]) for state in states] for name in names)
            gradients = [local(p.grad) for p in moved if p.grad is not None]
            options: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False}
            options |= {name: getattr(self.settings, name) for name in ("beta1", "beta2", "eps")}
            options |= {"lr": group.lr, "weight_decay": group.weight_decay}
            adamw([local(p) for p in moved], gradients, means, squares, [], steps, **options)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        self.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
        return self.state[parameter]


class Muon(_Algorithm):
    """Momentum, orthogonalised (Jordan et al. 2024). Matrices of one shape are handled as one stack: on a CPU that is
    several times faster than one by one in 16 bit, as torch.optim.Muon does."""

    slots = 1

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group.parameters:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for same in shapes.values():
                self._step(same, group)

    def _step(self, parameters: list[Tensor], group: Group) -> None:
        states = [self.state.setdefault(p, {}) for p in parameters]
        moments = [s.setdefault("momentum", torch.zeros_like(p)) for s, p in zip(states, parameters, strict=True)]
        own, buffers = [local(p) for p in parameters], [local(moment) for moment in moments]
        grads = [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - self.settings.muon_momentum)
        ahead = torch._foreach_lerp(grads, buffers, self.settings.muon_momentum)  # Nesterov
        rows, columns = parameters[0].shape
        scale = -group.lr * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(own, 1 - group.lr * group.weight_decay)
        torch._foreach_add_(own, by_owner(parameters, list(ahead), orthogonalised), alpha=scale)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with Muon for the matrices of the blocks where `muon_lr` is given."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        settings: Optim,
        *,
        muon_lr: float = 0.0,
        lr_overrides: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """lr_overrides: separate peak learning rates for parameters whose name begins so."""
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {n for n, p in self.names.items() if muon_lr and p.dim() == 2 and ".layers." in n}
        own = {n: rate for n in self.names for start, rate in lr_overrides.items() if n.startswith(start)}
        matrices = [p for n, p in self.names.items() if n not in hidden and n not in own and p.dim() > 1]
        vectors = [p for n, p in self.names.items() if p.dim() < 2 and n not in own]
        groups = [Group(matrices, lr, settings.weight_decay), Group(vectors, lr, 0.0)]
        groups += [Group([self.names[n]], rate, 0.0) for n, rate in own.items()]
        self.parts: list[AdamW | Muon] = [AdamW(groups, settings)]
        if hidden:
            rest = [self.names[n] for n in self.names if n in hidden]
            self.parts.append(Muon([Group(rest, muon_lr, settings.weight_decay)], settings))
        self.groups = [group for part in self.parts for group in part.groups]
        self.peaks = [group.lr for group in self.groups]
        self.lr = lr

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rate."""
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group.lr = peak * factor
        for part in self.parts:
            part.step()

    def clear(self) -> None:
        for parameter in self.names.values():
            parameter.grad = None

    def release(self) -> None:
        """Frees gradients and state, where nothing is trained any more."""
        self.clear()
        for part in self.parts:
            part.state.clear()

    def tensors(self) -> dict[str, Tensor]:
        """State by "<parameter>/<name>", for a checkpoint."""
        state = {}
        for name, parameter in self.names.items():
            for part in self.parts:
                for key, value in part.state.get(parameter, {}).items():
                    state[f"{name}/{key}"] = value
        return state

    def full_bytes(self) -> int:
        return sum(p.nbytes * part.slots for part in self.parts for group in part.groups for p in group.parameters)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Errors: E-CKPT-KEYS where the state isn't this model's."""
        owners = {p: part for part in self.parts for group in part.groups for p in group.parameters}
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in self.names:
                raise UserError("E-CKPT-KEYS", f"the optimizer's state names {name!r}, which isn't trained", where=key)
            parameter = self.names[name]
            owners[parameter].state.setdefault(parameter, {})[slot] = part_of(value, parameter)


class OptimizerGroup:
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
    """The share of the peak learning rate at `step` (from 0) of `total`; warm-up is a share of the steps."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    left = (total - step) / max(1, total - rise)
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if schedule == "linear" else 1.0
