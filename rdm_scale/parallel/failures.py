"""Failures of ranks: the first rank that fails reports it, the others exit silently."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from rdm_scale.errors import RdmError
from rdm_scale.parent_death import parent_death_setter

if TYPE_CHECKING:
    from torch.distributed import Store  # torch takes seconds to import

FIRST_FAILURE_KEY = "rdm_scale/first_failure"
_REPORT_GRACE_S = 3.0  # a launcher ends all ranks when one exits: let the reporting rank finish its message first


class FailureReporter:
    """Selects the rank that reports a failure.

    Before the ranks share a store, all ranks of a node fail for the same reason (a bad configuration), and local rank 0
    reports. After that, the first rank to claim a key in the store does: the others mostly fail because their
    connection to it breaks.

    Attributes:
        store: store that all ranks share; None before `build_mesh` sets it.
    """

    def __init__(self) -> None:
        self.store: Store | None = None

    def claim(self) -> bool:
        """True for the one rank that is to report."""
        if self.store is None:
            return int(os.environ.get("LOCAL_RANK", 0)) == 0
        rank = os.environ.get("RANK", "0")
        try:
            return bool(self.store.compare_set(FIRST_FAILURE_KEY, "", rank) == rank.encode())
        except RuntimeError:  # the rank that hosts the store is gone: it failed first
            return False


def end_with_launcher() -> None:
    """Let the kernel kill this rank when the launcher that started it dies (Linux).

    An orphan would train on unnoticed, and write into a directory that the next launch uses.
    """
    if "LOCAL_RANK" in os.environ and (end_with_parent := parent_death_setter()):
        launcher = os.getppid()
        end_with_parent()
        if os.getppid() != launcher:  # the launcher died before the call above
            _exit(1)


def run_main(body: Callable[[FailureReporter], None]) -> NoReturn:
    """Run the main function of a rank, then exit with code 0, or with 1 after a failure, which one rank reports.

    An RdmError is printed without a traceback, since the user can fix it; any other error is a bug and keeps it.
    """
    reporter = FailureReporter()
    try:
        body(reporter)
    except KeyboardInterrupt:
        _exit(130)
    except Exception as error:
        if reporter.claim():
            _report(error)
        else:
            time.sleep(_REPORT_GRACE_S)
        _exit(1)
    _exit(0)


def _report(error: Exception) -> None:
    if isinstance(error, RdmError):
        print(f"\nerror: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"\nerror: there is no room to write {error.filename or 'to run.dir'}: {error.strerror}", file=sys.stderr)
    else:
        print(f"\nrank {os.environ.get('RANK', '0')} failed:", file=sys.stderr)
        traceback.print_exception(error)


def _exit(code: int) -> NoReturn:
    """End the process without waiting for communication threads, which may hang on ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
