"""One stage's run folder: its lock, its logs, its checkpoints, and an orderly stop.

    with StageRun(folder, seed=0, total_steps=1000) as run:
        saved = run.resume({"model": model_part, "optimizer": optimizer}, lambda: {"beta": kl.beta})
        for step in run.steps():
            run.log(step, loss=update(...))
        run.finish(files, meta)

A checkpoint (`training.checkpoint` says which is valid) holds no random state, since all random numbers are keyed by
(seed, purpose, step): the cursor is the number of finished steps. metrics.jsonl and samples.jsonl are truncated to
where they were at the checkpoint, so a run that was killed leaves the same bytes as one that never was; what depends on
the clock goes to timing.jsonl, which only grows. After the last step everything is saved, so that what follows
(validation metrics, probes) can be stopped at once. A checkpoint is intact or it is skipped, by step number and never
by the clock, and a run whose checkpoints are all damaged does not silently start over.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from tetrad import storage
from tetrad.console import phase
from tetrad.distributed import collectives, sharding
from tetrad.distributed.device import peak_bytes, release_memory
from tetrad.errors import Stopped, UserError
from tetrad.inference.model_folder import others_may_write
from tetrad.model.safetensors_io import read_tensors, tensor_chunks
from tetrad.signals import Stop
from tetrad.storage import Content, Json, LineLog
from tetrad.training import checkpoint
from tetrad.training.checkpoint import differences, file_of
from tetrad.training.step import timed, timer

_SAVES_A_STAGE = 10
_GIVE_BACK_EVERY = 20  # steps
_SHOWN_PHASES = 2  # of a step, the longest, in the progress bar
_TRUNCATED = ("metrics.jsonl", "samples.jsonl")


class Stateful(Protocol):
    """What a checkpoint holds: a model, an optimizer."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of its state, by name."""

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores the state; raises UserError E-CKPT-KEYS or E-CKPT-SHAPE if it isn't its own."""

    def full_bytes(self) -> int:
        """What the state takes on disk once the first step has filled it."""


class StageRun:
    """The run folder of a stage, taken for this process while entered: lock, logs, checkpoints, signals.

    Of several processes the first alone writes. step: steps finished. notes: messages to the user, such as skipped
    checkpoints. Raises UserError E-RUN-LOCKED on entering; Stopped on leaving, for a stop that came too late to matter.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        total_steps: int,
        save_every: int = 0,
        keep: int = 2,
        environment: Mapping[str, Json] | None = None,
        grace: float | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """save_every: steps between checkpoints, 0 for about ten per stage. keep: checkpoints kept, at least two.
        environment: what a checkpoint records and a resume compares. grace: seconds that a step may continue after
        SIGTERM, None for no limit. warn: prints a line, from any thread, in response to a signal."""
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.step, self.total_steps = 0, total_steps
        self.notes: list[str] = []
        self._every = save_every or max(1, math.ceil(total_steps / _SAVES_A_STAGE))
        self._keep, self._seed = max(2, keep), seed
        conditions = {**(environment or {}), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        self._environment: dict[str, Json] = json.loads(json.dumps(conditions))  # as it is read back
        self._parts: dict[str, Stateful] = {}
        self._values: Callable[[], Mapping[str, Json]] = dict
        self._main, self._logs = collectives.is_main(), dict[str, LineLog]()
        self._stop = Stop(warn, lambda: f"what follows step {self.step}", self._stopped_after)
        self._stop.until, self._stop.grace = "before the next step", grace
        self._saved_step, self._ends_early = 0, False
        self._timing: dict[str, Json] = {}
        if save_every > total_steps:
            effect = "no checkpoint but the last, the finished model"
            self.notes.append(f"save_every = {save_every} is more than all {total_steps} steps: {effect}")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._main:
                lock = stack.enter_context(storage.RunLock(self.folder / "lock"))
                self.notes += [lock.note] if lock.note else []
                storage.remove_leftovers(self.folder)
                storage.remove_leftovers(self.checkpoints)
                stack.callback(self._close_logs)
                for name in _TRUNCATED:
                    if (self.folder / name).exists():
                        self._log(name)
            stack.enter_context(self._stop.listening())
            self._leave = stack.pop_all()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._leave.close()
        if self._stop.wanted and not error:
            raise Stopped("stopped at the end of the stage; the same command goes on with the next one")

    # Logs

    def log(self, step: int, **numbers: Json) -> None:
        """A line of metrics.jsonl. Raises E-NUM-NONFINITE. Nothing here may depend on the clock: see `timing`."""
        self._append("metrics.jsonl", {"step": step, **numbers})

    def sample(self, record: Mapping[str, Json]) -> None:
        """A line of samples.jsonl."""
        self._append("samples.jsonl", record)

    def timing(self, tokens: float) -> dict[str, float | str]:
        """What the progress bar shows of the step's speed. A line of timing.jsonl, which a resumed run does not
        reproduce, follows when the step has been saved.

        tokens: what the step trained on or sampled, on all ranks.
        """
        timer.enter("other")
        seconds = {name: value for name, value in timer.seconds.items() if name != "eval"}
        rate, peak = tokens / max(sum(seconds.values()), 1e-9), peak_bytes() / 2**20
        self._timing = {"tokens_per_second": rate, "peak_mib": peak}
        longest = sorted(seconds.items(), key=lambda item: -item[1])[:_SHOWN_PHASES]
        phases = ", ".join(f"{name} {value:.2g} s" for name, value in longest)
        return {"tokens/s": rate, "peak_MiB": peak, "phases": phases}

    def _log_timing(self) -> None:
        timer.enter("other")
        if self._timing:
            seconds = sum(timer.seconds.values())
            record = {"step": self.step - 1, "seconds": seconds, **self._timing, "phases": timer.seconds}
            self._append("timing.jsonl", record)

    def _append(self, name: str, record: Mapping[str, Json]) -> None:
        if self._main:
            self._log(name).append(record)

    def _log(self, name: str) -> LineLog:
        """The open log; a stage that logs nothing leaves no empty one."""
        if name not in self._logs:
            self._logs[name] = LineLog(self.folder / name)
        return self._logs[name]

    def _close_logs(self) -> None:
        for log in self._logs.values():
            log.close()

    def _log_sizes(self) -> dict[str, int]:
        return {name: self._logs[name].size() if name in self._logs else 0 for name in _TRUNCATED}

    # Checkpoints

    def resume(
        self, parts: Mapping[str, Stateful], values: Callable[[], Mapping[str, Json]] = dict
    ) -> dict[str, Any] | None:
        """Loads the newest intact checkpoint into `parts` and returns the stage's own values; None for a fresh start.

        `parts` and what `values` returns (KL beta, score statistics) are also what is saved from now on. Raises
        UserError E-CKPT-* if checkpoints exist but none is intact.
        """
        self._parts, self._values = dict(parts), values
        path, state, failures = self._newest()
        if path is not None:
            self._set_aside(failures)
            self._continue_from(path, state)
            return dict(state["values"])
        for log in self._logs.values():
            log.truncate(0)
        return None

    def _newest(self) -> tuple[Path | None, Any, checkpoint.Failures]:
        """The first rank chooses, the others load what it has chosen."""
        newest = checkpoint.newest(self.checkpoints, self._load) if self._main else (None, None, [])
        name = collectives.from_main(newest[0].name if newest[0] else "")
        if self._main or not name:
            return newest
        path = self.checkpoints / name
        if not path.is_dir():
            what = f"rank 0 goes on from {name}, which is not here"
            hint = "let run.out be a folder on a disk that all machines share"
            raise UserError("E-RANK-FOLDER", what, where=str(path), hint=hint)
        return path, self._load(path), []

    def _load(self, path: Path) -> dict[str, Any]:
        ours = {"seed": self._seed, "total_steps": self.total_steps}
        loaders = {name: part.load_tensors for name, part in self._parts.items()}
        return checkpoint.load(path, loaders, read_tensors, self._values(), ours)

    def _set_aside(self, failures: checkpoint.Failures) -> None:
        """Damaged checkpoints no longer count as kept ones; nothing of them is deleted before the stage ends."""
        for path, error in failures:
            self.notes.append(f"{path.name} was passed over: {error.where}: {error.what} [{error.code}]")
            if self._main:
                storage.move_aside(path, path.with_name(f"damaged-{path.name}"))

    def _continue_from(self, path: Path, state: Mapping[str, Any]) -> None:
        self.step = self._saved_step = state["step"]
        if changed := differences(state["environment"], self._environment):
            self.notes.append(f"{path.name} was written under other conditions, numbers may differ: {changed}")
        if note := others_may_write(path):
            self.notes.append(note)
        for name, size in self._log_sizes().items() if self._main else ():
            recorded = state["logs"][name]
            if size < recorded:
                self.notes.append(f"{name} has lost lines: {size} bytes of {recorded}")
            if size > recorded:
                self._logs[name].truncate(recorded)

    @timed("save")
    def _save(self) -> None:
        parts = {name: part.tensors() for name, part in self._parts.items()}
        for name, tensors in parts.items():
            _refuse_nonfinite(name, tensors)
        contents = {file_of(name): tensor_chunks(tensors, sharding.whole) for name, tensors in parts.items()}
        if not self._main:  # rank 0 asks for one tensor after another while it writes
            for tensors in parts.values():
                for name in sorted(tensors):
                    sharding.whole(tensors[name])
        else:
            for log in self._logs.values():
                log.sync()
            state: dict[str, Json] = {"step": self.step, "seed": self._seed, "total_steps": self.total_steps}
            state |= {"logs": self._log_sizes(), "values": dict(self._values()), "environment": self._environment}
            with phase("writing a checkpoint"):
                checkpoint.save(self.checkpoints, contents, state, self._keep)
        self._saved_step = self.step

    # The loop

    def steps(self) -> Iterator[int]:
        """The remaining steps; each body is followed by the count, the save if due, and the stop if requested.

        Raises Stopped; UserError E-IO-SPACE before the first step if the checkpoints won't fit; E-NUM-NONFINITE.
        """
        self._check_space()
        if collectives.any_rank(self._stop.wanted):
            raise Stopped(f"stopped before step {self.step} of {self.total_steps}; the same command goes on from there")
        while self.step < self.total_steps and not self._ends_early:
            self._expect_stop()
            timer.restart()
            self._timing = {}
            yield self.step
            self._stop.message = ""
            self.step += 1
            if self.step % _GIVE_BACK_EVERY == 0:
                release_memory()
            stop, last = collectives.any_rank(self._stop.wanted), self._ends_early or self.step == self.total_steps
            if stop or self.step % self._every == 0 or (last and self._every <= self.total_steps):
                self._save()
            self._log_timing()
            if stop:
                done = f"stopped after {self.step} of {self.total_steps} steps, all saved"
                raise Stopped(f"{done}; the same command goes on from there")
        self._stop.until = self._stop.lost = ""

    def end_early(self) -> None:
        """No step after the current one, or none at all: early stopping."""
        self._ends_early = True

    def _expect_stop(self) -> None:
        """What a signal in the coming step waits for, and what is lost where it can't wait."""
        lost = f"{self.step - self._saved_step} finished steps since the last checkpoint"
        self._stop.until = f"after step {self.step + 1} of {self.total_steps}, with a checkpoint"
        self._stop.lost = f"this step and {lost}"
        what = f"stopped in step {self.step} of {self.total_steps}, which didn't end in time"
        self._stop.message = f"{what}: it and {lost} are lost"

    def _stopped_after(self) -> Stopped:
        saved = f"the last checkpoint is of step {self._saved_step}"
        done = f"stopped after {self.step} of {self.total_steps} steps, in what follows them; {saved}"
        return Stopped(f"{done}; the same command goes on from there")

    def _check_space(self) -> None:
        size = sum(part.full_bytes() for part in self._parts.values())
        copies = max(2, min(self._keep + 1, self.total_steps // self._every))
        if self._main and self.step < self.total_steps:
            there = len(storage.step_folders(self.checkpoints))
            storage.free_space_check(self.folder, max(1, copies - there) * size)

    def finish(
        self, files: Mapping[str, Content], meta: Mapping[str, Json], unlisted: Mapping[str, Content] | None = None
    ) -> None:
        """Writes the stage's result to <folder>/model, reads it back, and only then removes the checkpoints.

        files, meta, unlisted: as `storage.write_folder` takes them.
        """
        self._stop.until = "when the model is written"
        for name, part in self._parts.items():
            _refuse_nonfinite(name, part.tensors())
        if self._main:
            for log in self._logs.values():
                log.sync()
            with phase("writing the model"):
                storage.write_folder(self.folder / "model", files, meta, unlisted)
                storage.verify_folder(self.folder / "model")
                storage.remove_folder(self.checkpoints)


def _refuse_nonfinite(part: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in ((name, sharding.local(tensor)) for name, tensor in tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            what = f"{bad} of {tensor.numel()} numbers are not finite; nothing was saved"
            hint = "lower the learning rate; checkpoints from before this are whole"
            raise UserError("E-NUM-NONFINITE", what, where=f"{part}: {name}", hint=hint)
