"""Early stopping: the best weights on validation data, and how long ago they were reached."""

import math

import torch
from torch import Tensor, nn

from tetrad.distributed.sharding import part_of
from tetrad.training.stage import Weights


class EarlyStopping:
    """A part of a checkpoint. patience: evaluations without a lower loss after which training stops; 0 keeps
    nothing and never stops."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.weights, self.patience = Weights(model), patience
        self.loss, self.waited = math.inf, 0
        self.best_tensors: dict[str, Tensor] = {}

    @property
    def should_stop(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.waited

    def update(self, loss: float) -> None:
        """Takes the validation loss of the current weights."""
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.best_tensors = {name: tensor.clone() for name, tensor in self.weights.tensors().items()}
        else:
            self.waited += 1

    def restore_best(self) -> None:
        """Loads the best weights into the model."""
        if self.best_tensors:
            self.weights.load_tensors(self.best_tensors)

    def tensors(self) -> dict[str, Tensor]:
        if not self.best_tensors:
            return {}
        numbers = {"loss": torch.tensor(self.loss, dtype=torch.float64), "waited": torch.tensor(self.waited)}
        return {**numbers, **{f"best/{name}": tensor for name, tensor in self.best_tensors.items()}}

    def full_bytes(self) -> int:
        return self.weights.full_bytes() if self.patience else 0

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self.loss, self.waited = float(tensors["loss"]), int(tensors["waited"])
            own = self.weights.tensors()
            best_tensors = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
            self.best_tensors = {name: part_of(tensor, own[name]) for name, tensor in best_tensors.items()}
