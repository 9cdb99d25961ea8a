"""Saving while training goes on: every rank copies its share to host memory, and a thread writes the copy.

A save has two parts that ranks have to agree on: when all have written their files, and when the first rank has then
made the checkpoint complete. The threads never talk to other ranks. The training loop asks each rank once a step, along
with the sums that it makes anyway, whether its thread is still busy (`busy`), and calls `advance` when none is.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.index import FileRecord
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.checkpoint.sharded_state import slice_table
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config.schema import CheckpointConfig
from rdm_scale.errors import CheckpointError

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh
    from rdm_scale.parallel.parallel_model import ParallelModel

_NOTABLE_S = 0.1  # shorter waits for the save before are not worth a word


@dataclass
class _Save:
    """A save under way: first its files are written, then it is committed."""

    state: CheckpointState
    began: float
    work: Future[Any]
    stall_s: float
    committing: bool = False

    @property
    def step(self) -> int:
        return self.state["step"]


class Saver:
    """Writes the checkpoints of a run, one at a time. All methods are collective.

    Args:
        say: tells the user something; of the first rank it reaches the console.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        config: CheckpointConfig,
        model: "ParallelModel",
        mesh: "Mesh",
        say: Callable[[str], None],
    ) -> None:
        self.directory, self.config, self.model, self.mesh, self.say = directory, config, model, mesh, say
        self.failures = 0
        self.stall_s: float | None = None  # that the last save meant for training
        self._pieces = slice_table(model.owned_ranges)
        self._host: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._saved: int | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is not done yet."""
        return self._save is not None and not self._save.work.done()

    def take_stall(self) -> float | None:
        """Seconds for which the last save stopped training, once; None where no save began since the last call."""
        stall_s, self.stall_s = self.stall_s, None
        return stall_s

    def start(self, state: CheckpointState) -> None:
        """Begins to save the weights as they are now as the checkpoint of `state["step"]`.

        A save that is still under way is waited for, and the user is told.

        Raises:
            CheckpointError: as `advance` does.
        """
        began = time.perf_counter()
        self._wait_for_the_one_before()
        step = state["step"]
        try:
            self._together(lambda: self.directory.begin(step) if self.mesh.is_first else None)
        except CheckpointError as error:
            self._failed(step, error)
            return
        self._copy_to_host()
        work = self._thread.submit(write_tensors, self.directory.folder(step), self.mesh.rank, self._pieces, self._host)
        self.stall_s = time.perf_counter() - began
        self._save = _Save(state, began, work, self.stall_s)

    def _wait_for_the_one_before(self) -> None:
        late = self._save
        if late is not None:
            began = time.perf_counter()
            self.finish()
            waited_s = time.perf_counter() - began
            if waited_s > _NOTABLE_S:
                self.say(
                    f"warning: the checkpoint of step {late.step} was still being written when the next was due: "
                    f"training waited {waited_s:.1f} s for it. Raise checkpoint.every, or find a faster checkpoint.dir"
                )

    def advance(self) -> None:
        """Takes the save that is under way, if any, to its next part. Waits for this rank's own part to be done.

        Raises:
            CheckpointError: on every rank, when a rank could not write and `checkpoint.on_failure` is stop. What was
                written of this checkpoint is removed, and earlier ones are untouched.
        """
        save = self._save
        if save is None:
            return
        try:
            results = self._together(save.work.result)
        except CheckpointError as error:
            self._save = None
            self._failed(save.step, error)
            return
        if save.committing:
            self._save, self._saved = None, save.step
            for warning in filter(None, results):
                self.say(warning)
            took_s = time.perf_counter() - save.began
            self.say(
                f"saved {self.directory.folder(save.step)} (in {took_s:.1f} s, of which training waited "
                f"{save.stall_s:.2f} s)"
            )
        else:
            files = [record for records in results for record in records]
            save.work = self._thread.submit(self._commit, save, files)
            save.committing = True

    def finish(self) -> None:
        """Waits for the save that is under way, if any. Raises CheckpointError as `advance` does."""
        while self._save is not None:
            self.advance()

    def save(self, state: CheckpointState) -> None:
        """Saves, complete on return, unless the checkpoint of this step is there already.

        Raises:
            CheckpointError: it could not be saved, whatever `checkpoint.on_failure` says: nothing comes after it.
        """
        self.finish()
        if self._saved == state["step"]:
            return
        failures = self.failures
        self.start(state)
        self.finish()
        if self.failures > failures:
            raise CheckpointError(f"the last checkpoint, of step {state['step']}, could not be saved: see above")

    def _copy_to_host(self) -> None:
        """The copy's memory is kept for the next save: to get new memory takes longer than to fill it."""
        fields = self.model.state()._asdict()
        for name, parts in fields.items():  # in this order the fields will lie in the file
            if name not in self._host:
                self._host[name] = torch.empty(sum(part.numel() for part in parts), pin_memory=parts[0].is_cuda)

        def copy(name: str) -> None:
            parts = fields[name]
            for there, part in zip(self._host[name].split([part.numel() for part in parts]), parts, strict=True):
                there.copy_(part.detach(), non_blocking=True)

        if self.mesh.device.type == "cuda":
            for name in fields:
                copy(name)
            torch.cuda.synchronize()
        else:  # one core does not fill the memory's bandwidth
            with ThreadPoolExecutor(len(fields)) as pool:
                list(pool.map(copy, fields))

    def _commit(self, save: _Save, files: list[FileRecord]) -> str | None:
        """Makes the checkpoint complete, and then room; that there is none is no fault of the checkpoint."""
        if self.mesh.is_first:
            self.directory.commit(save.step, save.state, files)
            try:
                self.directory.prune(self.config.keep, self.config.keep_every)
            except CheckpointError as error:
                return f"warning: checkpoints older than checkpoint.keep stay for now: {error}"
        return None

    def _failed(self, step: int, error: CheckpointError) -> None:
        self.failures += 1
        message = str(error)
        try:
            self._together(lambda: self.directory.abandon(step) if self.mesh.is_first else None)
        except CheckpointError as also:
            message += f"; what was written of it stays for now: {also}"
        if self.config.on_failure == "stop":
            raise CheckpointError(message) from error
        self.say(f"warning: no checkpoint of step {step}, training goes on without: {message}")

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Runs `work` on every rank and returns all results, or raises on all ranks what the first failing one did."""
        outcome: tuple[Any, str | None]
        try:
            outcome = (work(), None)
        except (CheckpointError, OSError) as error:
            outcome = (None, str(error))
        outcomes = self.mesh.all_gather_object(outcome)
        failures = [message for _, message in outcomes if message is not None]
        if failures:
            raise CheckpointError(failures[0])
        return [result for result, _ in outcomes]
