"""Early stopping: the weights that did best on held-out data, and how long ago that was."""

import math

import torch
from torch import Tensor, nn

from tetrad.training.stage import Weights


class EarlyStopping:
    """A part of a checkpoint. patience: evaluations without a lower loss after which there were enough; 0 keeps
    nothing and never has."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.weights, self.patience = Weights(model), patience
        self.loss, self.waited = math.inf, 0
        self.kept: dict[str, Tensor] = {}

    @property
    def enough(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.waited

    def see(self, loss: float) -> None:
        """Takes the held-out loss of the weights as they are."""
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.kept = {name: tensor.clone() for name, tensor in self.weights.tensors().items()}
        else:
            self.waited += 1

    def put_back(self) -> None:
        """The model gets its best weights."""
        if self.kept:
            self.weights.load_tensors(self.kept)

    def tensors(self) -> dict[str, Tensor]:
        if not self.kept:
            return {}
        numbers = {"loss": torch.tensor(self.loss, dtype=torch.float64), "waited": torch.tensor(self.waited)}
        return {**numbers, **{f"best/{name}": tensor for name, tensor in self.kept.items()}}

    def full_bytes(self) -> int:
        return self.weights.full_bytes() if self.patience else 0

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self.loss, self.waited = float(tensors["loss"]), int(tensors["waited"])
            own = self.weights.tensors()
            kept = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
            self.kept = {name: tensor.to(own[name].device) for name, tensor in kept.items()}
