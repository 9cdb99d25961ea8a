"""One message from many ranks: the first rank that fails speaks, the others end quietly and at once."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rdm_scale.errors import RdmError
from rdm_scale.parent_death import parent_death_setter

_KEY = "rdm_scale/first_failure"
_SPEAKER_GRACE_S = 3.0  # a launcher ends all ranks when one exits: let the speaker finish its message first


class Reporter:
    """Decides which rank reports a failure.

    Before the ranks have met, all of a node fail alike (a bad configuration), and local rank 0 speaks. Once they
    have, the first to claim a key in their common store does: its peers only see a connection break.
    """

    def __init__(self) -> None:
        self.store: Any = None  # torch.distributed.Store, once the ranks have met

    def claim(self) -> bool:
        """True for the one rank that is to report."""
        if self.store is None:
            return int(os.environ.get("LOCAL_RANK", 0)) == 0
        me = os.environ.get("RANK", "0")
        try:
            return bool(self.store.compare_set(_KEY, "", me) == me.encode())
        except RuntimeError:  # the store has gone with the rank that kept it, which therefore failed first
            return False


REPORTER = Reporter()


def end_with_launcher() -> None:
    """Has the kernel end this rank when the launcher that started it dies (Linux).

    An orphan would train on unseen, and write into a directory that the next launch takes for its own.
    """
    if "LOCAL_RANK" in os.environ and (end_with_parent := parent_death_setter()):
        launcher = os.getppid()
        end_with_parent()
        if os.getppid() != launcher:  # it died before it could be watched
            _leave(1)


def run_main(body: Callable[[], None]) -> NoReturn:
    """Runs the main of a rank and ends the process: code 0, or 1 after one message from all ranks together.

    An RdmError is the user's to mend and is told without a traceback; anything else is a bug and keeps its own.
    """
    try:
        body()
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if REPORTER.claim():
            _tell(error)
        else:
            time.sleep(_SPEAKER_GRACE_S)
        _leave(1)
    _leave(0)


def _tell(error: Exception) -> None:
    if isinstance(error, RdmError):
        print(f"\nerror: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"\nerror: there is no room to write {error.filename or 'to run.dir'}: {error.strerror}", file=sys.stderr)
    else:
        print(f"\nrank {os.environ.get('RANK', '0')} failed:", file=sys.stderr)
        traceback.print_exception(error)


def _leave(code: int) -> NoReturn:
    """Ends the process without waiting for communication threads, which may hang on ranks already gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
