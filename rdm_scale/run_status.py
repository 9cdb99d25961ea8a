"""State of a run and exit codes: what a rank returns to its launcher, and run.dir/status.json."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

STATUS = "status.json"


class JobState(StrEnum):
    """State of a run, as status.json says it."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    USER_ERROR = "user error"
    FAILED = "failed"


# 75 is EX_TEMPFAIL of sysexits.h: try again later.
EXIT_CODES = {JobState.FINISHED: 0, JobState.STOPPED: 75, JobState.USER_ERROR: 2, JobState.FAILED: 1}
STATES = {code: state for state, code in EXIT_CODES.items()}


@dataclass(frozen=True)
class RunStatus:
    """Content of status.json.

    Attributes:
        step: last completed step; None before the first, or where the rank does not know.
        checkpoint: step of the newest complete checkpoint.
        host: host of the rank that reports.
        reason: one line: what happened, or which signal stopped the run.
        restarting: the launcher itself asked the ranks to stop; if it lives on, it starts them again.
    """

    state: JobState
    step: int | None = None
    checkpoint: int | None = None
    host: str = ""
    rank: int = 0
    reason: str = ""
    restarting: bool = False

    def write(self, run_dir: Path) -> None:
        """Write status.json, atomically, if `run_dir` exists on this node."""
        if not run_dir.is_dir():
            return
        content = asdict(self) | {
            "exit_code": EXIT_CODES.get(self.state),
            "host": self.host or socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "launcher": _launcher(),
        }
        part = run_dir / f".{STATUS}.{os.getpid()}"
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(run_dir / STATUS)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Content of status.json; empty if there is none that can be read."""
    try:
        content = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def ended_under_this_launcher(run_dir: Path) -> JobState | None:
    """State in which an earlier attempt of the same torchrun ended for good, None if this attempt is to work.

    torchrun restarts its ranks after any exit code but 0, even after a run that was stopped on request or whose
    configuration is wrong. A new launcher works in any case. One rank of each node says so.
    """
    status = read_status(run_dir)
    found, own = status.get("launcher"), _launcher()
    if own is None or not isinstance(found, dict):
        return None
    later_attempt = own["id"] == found.get("id") and _attempt() > 0
    if not later_attempt and own != found:
        return None
    stopped = status.get("state") == JobState.STOPPED and not status.get("restarting")
    if not stopped and status.get("state") != JobState.USER_ERROR:
        return None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        begin = "start" if stopped else "mend that and start"
        print(
            f"nothing is started again, because the run has ended ({status['state']}: {status.get('reason')}): {begin} "
            "the launcher anew to go on",
            flush=True,
        )
    return JobState(status["state"])


def replace_older_end(run_dir: Path) -> None:
    """Mark a run that an earlier launch ended as running again, in the first attempt of this one.

    Launchers of the same id, as `launch/torchrun.sh` gives by default, look alike from another node: a second attempt
    would take the end of last week's launch for its own.
    """
    found = read_status(run_dir)
    if _attempt() == 0 and found.get("state") in (JobState.STOPPED, JobState.USER_ERROR):
        RunStatus(JobState.RUNNING, found.get("step"), found.get("checkpoint")).write(run_dir)


def _attempt() -> int:
    """Number of times that torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _launcher() -> dict[str, Any] | None:
    """Identity of the torchrun process that started this rank; None under another launcher, or none."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    pid = os.getppid()
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        started = 0
    return {"id": run_id, "host": socket.gethostname(), "pid": pid, "started": started}
