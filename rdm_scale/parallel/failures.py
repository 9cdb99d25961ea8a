"""Failures of ranks: one rank says what happened, on which hosts and at which step, and all exit with the same code.

Each rank has a thread with a connection of its own to the ranks' store. When a rank fails, the threads of the others
answer for theirs with its step and phase, also while it is stuck in a collective. Who does not answer is lost.
"""

import errno
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rdm_scale.activity import Activity
from rdm_scale.errors import CheckpointError, LaunchError, RdmError, StopRequested
from rdm_scale.parallel.hosts import Hosts, rank_list
from rdm_scale.parent_death import parent_death_setter
from rdm_scale.run_status import EXIT_CODES, STATES, JobState, RunStatus
from rdm_scale.stop_request import StopRequest

if TYPE_CHECKING:
    from torch.distributed import Store  # torch takes seconds to import

FIRST_FAILURE_KEY = "rdm_scale/first_failure"
EXIT_CODE_FILE = "RDM_SCALE_EXIT_CODE_FILE"  # variable: the script that starts torchrun finds the ranks' code there
_ANSWERS, _VERDICT = "rdm_scale/answers", "rdm_scale/verdict"
_REPORT_GRACE_S = 3.0  # a launcher ends all ranks when one exits: let the reporting rank finish its message first
_STORE_GRACE_S = 1.0
STORE_S = 10.0  # a store that is cut off never answers
_ANSWER_S = 5.0
WAIT_S = 86_400  # of one wait in a store; then another one follows
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BY_A_PEER = re.compile(r"gloo|NCCL|Connection|[Tt]imed out|Socket|recv|Broken pipe")

Result = TypeVar("Result")


class FailureReporter:
    """Reports the failure of this attempt, once for all ranks.

    Before the ranks share a store, all ranks of a node fail for the same reason (a bad configuration), and local rank 0
    reports. After that, the first rank to claim a key in the store does: the others mostly fail because their
    connection to it breaks.

    Attributes:
        store: store for reports that all ranks share; None before `watch`.
        hosts: host of every rank.
        activity: what this rank does; kept up to date by the training loop.
        stop: the request to stop.
        run_dir: directory of the run, where status.json belongs; None until this run owns it.
    """

    def __init__(self, stop: StopRequest | None = None) -> None:
        self.store: Store | None = None
        self.hosts = Hosts([])
        self.activity = Activity()
        self.stop = stop or StopRequest()
        self.run_dir: Path | None = None
        self.rank = int(os.environ.get("RANK", 0))

    def watch(self, store: "Store", hosts: Hosts) -> None:
        """Use the store for reports from now on, and answer when another rank fails."""
        self.store, self.hosts = store, hosts
        own: Any = store  # torch's stubs lack clone and append
        threading.Thread(target=self._answer, args=(own.clone(),), name="failures", daemon=True).start()

    def claim(self) -> bool:
        """True for the one rank that is to report."""
        store = self.store
        if store is None:
            return int(os.environ.get("LOCAL_RANK", 0)) == 0
        own = str(self.rank)
        winner = _within(STORE_S, lambda: store.compare_set(FIRST_FAILURE_KEY, "", own))
        if winner is None:  # the rank that hosts the store is lost, or this host is cut off: one rank a host reports
            return int(os.environ.get("LOCAL_RANK", 0)) == 0
        return winner == own.encode()

    def fail(self, error: Exception) -> int:
        """Report `error` if this rank is the one to do so. Returns the exit code, which all ranks share."""
        code = exit_code(error, training=self.activity.step is not None)
        if not self.claim():
            verdict = None if self.store is None else _within(_REPORT_GRACE_S, self._verdict)
            self._linger()
            return code if verdict is None else verdict
        reason = self._what_happened(error)
        self._conclude(code, reason)
        if self.rank == 0 and self.hosts.ranges:
            self._linger()
        return code

    def record(self, state: JobState, reason: str = "") -> None:
        """Write status.json, if this rank has the run's directory."""
        if self.run_dir is not None:
            self.status(state, reason).write(self.run_dir)

    def status(self, state: JobState, reason: str = "") -> RunStatus:
        """Status of the run as this rank knows it."""
        return RunStatus(
            state,
            step=self.activity.completed,
            checkpoint=self.activity.checkpoint,
            rank=self.rank,
            reason=reason,
            restarting=state is JobState.STOPPED and self.stop.by_launcher,
        )

    def _linger(self) -> None:
        """Wait for the report. The store may live in rank 0, which the others look into: it stays longer than they."""
        time.sleep(_REPORT_GRACE_S + (_STORE_GRACE_S if self.rank == 0 and self.hosts.ranges else 0))

    def _conclude(self, code: int, reason: str) -> None:
        """Write status.json, and tell the other ranks with which code to exit."""
        self.record(STATES[code], reason)
        store = self.store
        if store is not None:
            _within(STORE_S, lambda: store.set(_VERDICT, json.dumps([code, reason])))

    def _verdict(self) -> int:
        assert self.store is not None
        self.store.wait([_VERDICT], timedelta(seconds=WAIT_S))
        return int(json.loads(self.store.get(_VERDICT))[0])

    def _answer(self, store: Any) -> None:
        """Wait for a failure anywhere, answer for this rank, and exit with the code of the report."""
        try:
            _wait_for(store, FIRST_FAILURE_KEY)
            store.append(_ANSWERS, f"{self.rank}|{self.activity}\n")
            _wait_for(store, _VERDICT)
            code, reason = json.loads(store.get(_VERDICT))
        except RuntimeError:  # the store has gone: at the end of the run, or with its host, which the main thread sees
            return
        self._linger()
        if self.rank == 0:  # the directory may be on the disk of its node
            self.record(STATES[code], reason)
        _exit(code)

    def _what_happened(self, error: Exception) -> str:
        """Print the report of `error`; returns its essence in one line."""
        host = socket.gethostname()
        if isinstance(error, RdmError):
            print(f"\nerror: {error}", file=sys.stderr)
            return str(error)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            where = error.filename or "to run.dir"
            reason = f"there is no room to write {where}: {error.strerror}; make room, and the same command goes on"
            print(f"\nerror: {reason}", file=sys.stderr)
            return reason
        lost = self._lost_ranks() if self.store is not None and _by_a_peer(error) else ""
        reason = lost or f"{type(error).__name__}: {error}".splitlines()[0]
        where = f"rank {self.rank} failed" if not self.hosts.ranges else f"rank {self.rank} on {host} failed"
        step = "" if self.activity.step is None else f" in {self.activity}"
        if lost:
            print(f"\nerror: {lost}{step}; {self._next()}\n{where}:", file=sys.stderr)
        else:
            print(f"\n{where}{step}:", file=sys.stderr)
        traceback.print_exception(error)
        return f"{reason}{step}"

    def _lost_ranks(self) -> str:
        """Phrase for the ranks that do not answer; empty if all do."""
        store, world = self.store, self.hosts.ranges[-1].last + 1 if self.hosts.ranges else 1
        assert store is not None

        def answers() -> set[int]:
            if not store.check([_ANSWERS]):
                return set()
            return {int(line.partition("|")[0]) for line in store.get(_ANSWERS).decode().splitlines()}

        deadline, present = time.monotonic() + _ANSWER_S, {self.rank}  # each answer extends it
        while time.monotonic() < deadline and len(present) < world:
            found = _within(STORE_S, answers)
            if found is None:
                return f"{socket.gethostname()} ({rank_list([self.rank])}) has lost the connection to the other hosts"
            if not found <= present:
                present |= found
                deadline = time.monotonic() + _ANSWER_S
            time.sleep(0.1)
        silent = [rank for rank in range(world) if rank not in present]
        return f"{self.hosts.describe(silent)} was lost" if silent else ""

    def _next(self) -> str:
        """Phrase that says how the run goes on, and from which step."""
        step = self.activity.checkpoint
        where = "from the beginning: there is no checkpoint yet" if step is None else f"from step {step:,}"
        left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        )
        return f"{'starting again' if left > 0 else 'the same command goes on'} {where}"


def exit_code(error: Exception, *, training: bool) -> int:
    """Exit code of a rank that ends with `error`: 2 where a restart would meet the same error, else 1."""
    causes, cause = [], error.__cause__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    if any(isinstance(each, OSError) and each.errno in _NO_ROOM for each in [error, *causes]):
        return EXIT_CODES[JobState.USER_ERROR]
    permanent = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    transient = any(isinstance(each, OSError) and not isinstance(each, permanent) for each in causes)
    if not isinstance(error, RdmError) or isinstance(error, LaunchError) or transient:
        return EXIT_CODES[JobState.FAILED]
    if isinstance(error, CheckpointError) and training:  # the place of the checkpoints failed after it had worked
        return EXIT_CODES[JobState.FAILED]
    return EXIT_CODES[JobState.USER_ERROR]


def end_with_launcher() -> None:
    """Let the kernel kill this rank when the launcher that started it dies (Linux).

    An orphan would train on unnoticed, and write into a directory that the next launch uses.
    """
    if "LOCAL_RANK" in os.environ and (end_with_parent := parent_death_setter()):
        launcher = os.getppid()
        end_with_parent()
        if os.getppid() != launcher:  # the launcher died before the call above
            _exit(1)


def run_main(body: Callable[[FailureReporter], JobState | None], stop: StopRequest | None = None) -> NoReturn:
    """Run the main function of a rank, then exit with the code of the state that it returns (None: finished).

    After a failure one rank reports. An RdmError is printed without a traceback, since the user can fix it; any other
    error is a bug and keeps it.
    """
    reporter = FailureReporter(stop)
    if (path := os.environ.get(EXIT_CODE_FILE)) and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        Path(path).write_text("", encoding="utf-8")  # codes of an earlier attempt
    try:
        state = body(reporter) or JobState.FINISHED
    except KeyboardInterrupt:
        _exit(130)
    except StopRequested:
        if reporter.rank == 0:
            reporter.record(JobState.STOPPED, f"{reporter.stop.signal_name} during {reporter.activity.phase}")
        _exit(EXIT_CODES[JobState.STOPPED])
    except Exception as error:
        _exit(reporter.fail(error))
    _exit(EXIT_CODES[state])


def _by_a_peer(error: Exception) -> bool:
    """Test if a lost peer may be the reason of an error."""
    return isinstance(error, RuntimeError) and bool(_BY_A_PEER.search(str(error)))


def _wait_for(store: Any, key: str) -> None:
    """Wait for a key of a store, however long the run takes; RuntimeError if the store has gone."""
    while True:
        try:
            store.wait([key], timedelta(seconds=WAIT_S))
        except RuntimeError:
            store.check([key])  # answers after a time-out, and raises where the store has gone
        else:
            return


def _within(seconds: float, call: Callable[[], Result]) -> Result | None:
    """Result of `call`, or None if it fails or takes longer: a store behind a cut cable never answers."""
    results: list[Result] = []

    def run() -> None:
        try:
            results.append(call())
        except RuntimeError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _exit(code: int) -> NoReturn:
    """End the process without waiting for communication threads, which may hang on ranks that are gone."""
    if path := os.environ.get(EXIT_CODE_FILE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{code}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
