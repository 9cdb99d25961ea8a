"""Asynchronous saving: a copy of each rank's state in host memory, written by a thread while training continues.

A save has two phases, and all ranks must agree on the end of each: all ranks write their files, then rank 0 writes the
commit. The threads never take part in collectives: the records of a rank's files go to rank 0 through the ranks' store,
as text that rank 0 joins, so that a save costs training nothing that grows with the number of ranks. Once per step,
along with the all-reduced statistics, the training loop finds out if the thread of any rank is still busy (`busy`), and
calls `advance` when none is.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.checkpoint.ownership import Ownership
from rdm_scale.checkpoint.sharded_state import slice_table
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config import CheckpointConfig
from rdm_scale.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh
    from rdm_scale.parallel.parallel_model import ParallelModel

_RECORDS = "checkpoint/records"  # keys in the ranks' store
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.5  # between looks at a save that training waits for
_NOTABLE_S = 0.1  # shorter waits for the previous save are not reported

Result = TypeVar("Result")


@dataclass
class _Save:
    """A save in progress: first the files are written, then it is committed."""

    state: CheckpointState
    began: float
    stall_s: float
    writing: Future[None]
    committing: Future[str | None] | None = None  # its result is a warning

    @property
    def work(self) -> Future[None] | Future[str | None]:
        """Future of the current phase."""
        return self.committing or self.writing

    @property
    def step(self) -> int:
        return self.state["step"]


class Saver:
    """Asynchronous saver of the checkpoints of a run, one at a time. All methods are collective.

    Args:
        directory: directory of the run's checkpoints.
        config: cadence and retention of checkpoints.
        model: the model to save.
        mesh: the ranks.
        say: logs a message; only that of rank 0 is printed.
        owner: lease of the directory, on rank 0. Once another process has taken it, rank 0 raises OwnershipError and
            the run ends: nothing is written, removed or abandoned any more.

    Attributes:
        failures: number of failed saves.
        stall_s: time that training waited for the last save; None if there was none.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        config: CheckpointConfig,
        model: "ParallelModel",
        mesh: "Mesh",
        say: Callable[[str], None],
        owner: Ownership | None = None,
    ) -> None:
        self.directory, self.config, self.model, self.mesh, self.say = directory, config, model, mesh, say
        self.owner = owner
        self.failures = 0
        self.stall_s: float | None = None
        self._table = slice_table(model.owned_ranges)
        self._host: dict[str, Tensor] = {}
        self._store = mesh.own_store()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._saved: int | None = None

    @property
    def saved(self) -> int | None:
        """Step of the last complete save."""
        return self._saved

    @property
    def busy(self) -> bool:
        """True while this rank's thread is working on a save."""
        return self._save is not None and not self._save.work.done()

    def take_stall(self) -> float | None:
        """Return how long the last save stopped training, in seconds; None if no save began since the last call."""
        stall_s, self.stall_s = self.stall_s, None
        return stall_s

    def start(self, state: CheckpointState) -> None:
        """Start saving the current weights as the checkpoint of `state["step"]`.

        If the previous save is still in progress, wait for it with a warning.

        Raises:
            CheckpointError: as `advance` does.
        """
        began = time.perf_counter()
        self._wait_for_previous_save()
        step = state["step"]
        try:
            self._on_all_ranks(lambda: self._begin(step) if self.mesh.is_first else None)
        except CheckpointError as error:
            self._failed(step, error)
            return
        self._copy_to_host()
        writing = self._thread.submit(self._write, step)
        self.stall_s = time.perf_counter() - began
        self._save = _Save(state, began, self.stall_s, writing)

    def _wait_for_previous_save(self) -> None:
        previous = self._save
        if previous is not None:
            began = time.perf_counter()
            self.finish()
            waited_s = time.perf_counter() - began
            if waited_s > _NOTABLE_S:
                self.say(
                    f"warning: the checkpoint of step {previous.step} was still being written when the next was due: "
                    f"training waited {waited_s:.1f} s for it. Raise checkpoint.every, or find a faster checkpoint.dir"
                )

    def advance(self) -> None:
        """Move the save in progress, if any, to its next phase. Waits for this rank's thread.

        Raises:
            CheckpointError: on every rank, if a rank could not write and `checkpoint.on_failure` is stop. The files of
                this checkpoint are removed, and earlier checkpoints are untouched.
            NonFiniteError: on every rank, if there is NaN or infinity in what is saved, whatever `on_failure` says.
        """
        if self.owner is not None:
            self.owner.check()
        save = self._save
        if save is None:
            return
        try:
            if save.committing is None:
                self._on_all_ranks(save.writing.result)
                save.committing = self._thread.submit(self._commit, save)
            else:
                self._completed(save, self._on_all_ranks(save.committing.result))
        except (CheckpointError, NonFiniteError) as error:
            self._save = None
            self._failed(save.step, error)

    def _completed(self, save: _Save, warning: str | None) -> None:
        self._save, self._saved = None, save.step
        if warning is not None:
            self.say(warning)
        took_s = time.perf_counter() - save.began
        self.say(
            f"saved {self.directory.folder(save.step)} (in {took_s:.1f} s, of which training waited "
            f"{save.stall_s:.2f} s)"
        )

    def finish(self) -> None:
        """Wait for the save in progress, if any. Raises CheckpointError as `advance` does, and on a time-out.

        Ranks that are done ask for the others again and again: none of these questions takes long, so that a save may
        take longer than a collective.
        """
        while self._save is not None:
            save, wait_s = self._save, _FIRST_WAIT_S
            while self.mesh.all_reduce_sum([float(self.busy)])[0] > 0:
                overdue = time.perf_counter() - save.began > self.config.timeout_s
                if self.mesh.all_reduce_sum([float(overdue)])[0] > 0:
                    raise CheckpointError(
                        f"the checkpoint of step {save.step} was not saved within checkpoint.timeout_s="
                        f"{self.config.timeout_s}: find a faster checkpoint.dir, or allow more time"
                    )
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            self.advance()

    def save(self, state: CheckpointState) -> None:
        """Save the last checkpoint of a run and wait until it is complete; do nothing if its step is already saved.

        Raises:
            CheckpointError: it could not be saved, even if `checkpoint.on_failure` is continue.
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
        """Copy all state entries to host memory, which is reused: allocating it takes longer than filling it."""
        entries = self.model.state()._asdict()
        for name, parts in entries.items():  # in the storage order of the file
            if name not in self._host:
                self._host[name] = torch.empty(sum(part.numel() for part in parts), pin_memory=parts[0].is_cuda)

        def copy(name: str) -> None:
            parts = entries[name]
            for target, part in zip(self._host[name].split([part.numel() for part in parts]), parts, strict=True):
                target.copy_(part.detach(), non_blocking=True)

        if self.mesh.device.type == "cuda":
            for name in entries:
                copy(name)
            torch.cuda.synchronize()
        else:  # one core does not saturate the memory bandwidth
            with ThreadPoolExecutor(len(entries)) as pool:
                list(pool.map(copy, entries))

    def _begin(self, step: int) -> None:
        if self.owner is not None:
            self.owner.confirm()
        self.directory.begin(step)

    def _write(self, step: int) -> None:
        """Write this rank's files, and leave their records where rank 0 finds them."""
        records = write_tensors(self.directory.folder(step), self.mesh.rank, self._table, self._host)
        self._store.set(f"{_RECORDS}/{self.mesh.rank}", "\n".join(record.model_dump_json() for record in records))

    def _commit(self, save: _Save) -> str | None:
        """Complete the checkpoint and prune old ones. Returns a warning if old ones could not be removed."""
        if self.mesh.is_first:
            if self.owner is not None:
                self.owner.confirm()
            found = self._store.multi_get([f"{_RECORDS}/{rank}" for rank in range(self.mesh.world_size)])
            self.directory.commit(save.step, save.state, [record for each in found for record in each.split(b"\n")])
            try:
                self.directory.prune(save.step, self.config.keep, self.config.keep_every)
            except CheckpointError as error:
                return f"warning: checkpoints older than checkpoint.keep are not removed yet: {error}"
        return None

    def _failed(self, step: int, error: CheckpointError | NonFiniteError) -> None:
        self.failures += 1
        message = str(error)
        try:
            self._on_all_ranks(lambda: self.directory.abandon(step) if self.mesh.is_first else None)
        except CheckpointError as also:
            message += f"; its files are not removed yet: {also}"
        if self.config.on_failure == "stop" or isinstance(error, NonFiniteError):
            raise type(error)(message) from error
        self.say(f"warning: no checkpoint of step {step}, training continues without it: {message}")

    def _on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank and return its result on this one.

        Raises:
            CheckpointError, NonFiniteError: on every rank, that of the first rank on which `work` failed.
        """
        failure: CheckpointError | NonFiniteError | None = None
        try:
            result = work()
        except (CheckpointError, NonFiniteError) as error:
            failure = error
        except OSError as error:
            failure = CheckpointError(str(error))
        failures = self.mesh.gather_rare(failure)
        if failures:
            raise failures[min(failures)]
        return result
