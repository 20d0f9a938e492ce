"""A stage in miniature, whose numbers any interruption would change: two parts, two logs, a value of its own."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tetrad.errors import UserError
from tetrad.model.safetensors_io import tensor_chunks
from tetrad.seeds import generator_for
from tetrad.storage import remove_leftovers, step_folders, verify_folder
from tetrad.training.run_folder import StageRun

STEPS, EVERY = 7, 2


class Part:
    """A few numbers that are checkpointed."""

    def __init__(self, start: float) -> None:
        self.numbers = torch.full((4,), start)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"numbers": self.numbers}

    def full_bytes(self) -> int:
        return 16

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.numbers = tensors["numbers"].clone()


class Stage:
    """`run()` trains from where the folder stands; `began` is the step it began with."""

    def __init__(self, folder: Path, each_step: Callable[[int], None] = lambda step: None) -> None:
        self.folder, self.each_step = folder, each_step
        self.model, self.optimizer, self.beta = Part(1.0), Part(0.0), 0.2
        self.began = -1
        self.notes: list[str] = []

    def run(self, **options: object) -> None:
        arguments = {"seed": 3, "total_steps": STEPS, "save_every": EVERY, **options}
        with StageRun(self.folder, **arguments) as run:
            saved = run.resume({"model": self.model, "optimizer": self.optimizer}, lambda: {"beta": self.beta})
            if saved is not None:
                self.beta = saved["beta"]
            self.began, self.notes = run.step, run.notes
            for step in run.steps():
                self.each_step(step)
                self.update(run, step)
            run.finish({"model.safetensors": tensor_chunks(self.model.tensors())}, {"key": "k"})

    def update(self, run: StageRun, step: int) -> None:
        noise = torch.from_numpy(generator_for(3, "noise", step).standard_normal(4)).float()
        self.optimizer.numbers = 0.9 * self.optimizer.numbers + noise
        self.model.numbers = self.model.numbers - self.beta * self.optimizer.numbers
        self.beta *= 1.1
        run.log(step, loss=float(self.model.numbers.sum()), beta=self.beta)
        run.sample({"step": step, "text": f"样本 {step}"})
        run.timing(tokens=10)


def result(folder: Path) -> dict[str, str]:
    """sha256 of everything that a resumed run must repeat."""
    names = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "model/manifest.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def newest_whole(folder: Path) -> int:
    """Steps that are safe: the number of the newest whole checkpoint, or all of them once the model is whole."""
    for place in (folder, folder / "checkpoints"):
        remove_leftovers(place)
    with suppress(UserError):
        verify_folder(folder / "model")
        return STEPS
    for step, path in reversed(step_folders(folder / "checkpoints").items()):
        with suppress(UserError):
            verify_folder(path)
            return step
    return 0
