"""Run directory: its content, and the decision to start a run in it, resume one, or refuse."""

import errno
import fcntl
import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rdm_scale.checkpoint.directory import CheckpointDirectory, os_errors_reported, read_state
from rdm_scale.checkpoint.ownership import Ownership, new_id, refuse_other_owner
from rdm_scale.checkpoint.search import RUN_CONFIG, find_checkpoint
from rdm_scale.checkpoint.start_weights import StartWeights, find_start_weights
from rdm_scale.checkpoint.state import CheckpointState, StartRecord
from rdm_scale.config import ModelConfig, RunConfig, flatten, load_config, to_yaml
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.errors import CheckpointError, ConfigError
from rdm_scale.storage.json_lines import Report, read_json_lines
from rdm_scale.storage.location import Location
from rdm_scale.training.changed_keys import changed_keys
from rdm_scale.training.depth_profiles import DEPTH

_CANNOT_LOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without locks, as Lustre may be
CONFIG, METRICS, MEASURES, LOCK = RUN_CONFIG, "metrics.jsonl", "measures.jsonl", ".lock"
RUN_ID = "run.json"


@dataclass(frozen=True)
class Start:
    """Start of a run: step 0, from initial or given weights, or the step of a checkpoint."""

    step: int = 0
    checkpoint: str | None = None
    lost_shards: tuple[tuple[str, str], ...] = ()  # (digest of the manifest, name) of each, from the checkpoint
    weights: StartWeights | None = None  # given weights of step 0
    origin: StartRecord | None = None  # where the run began, for its checkpoints
    warnings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()  # a line for each key that differs from the configuration in the checkpoint


def checkpoints_of(config: RunConfig) -> CheckpointDirectory:
    return CheckpointDirectory(Location(config.checkpoint.dir or str(Path(config.run.dir) / "checkpoints")))


def plan_start(config: RunConfig, facts: DataFacts) -> Start:
    """Decide where the run begins, without writing anything.

    Raises:
        ConfigError: the directory holds another run, or any run where `checkpoint.resume` is never.
        CheckpointError: the checkpoint or weights asked for are not there, not complete or of another model.
    """
    identity = config.identity() | {"data": facts.identity}
    resume, directory, run_dir = config.checkpoint.resume, checkpoints_of(config), Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir} is not a directory")
    with os_errors_reported(f"read {directory.root}"):
        refuse_other_owner(directory.root, read_run_id(run_dir), config.checkpoint.take_over)
    latest, reasons = directory.newest()
    if resume == "never":
        if latest is not None or (run_dir / CONFIG).exists() or (run_dir / METRICS).exists():
            raise ConfigError(
                f"{run_dir} holds a run already and checkpoint.resume=never: set run.dir to a new directory, "
                "or checkpoint.resume=auto to go on with that run"
            )
        return _new_start(config, facts)
    _refuse_other_run(run_dir, config)
    own = None if latest is None else read_state(directory.folder(latest))
    if resume != "auto" and (own is None or _given(own) != resume):
        return _go_on_with(config, identity, directory, own)
    skipped = tuple(f"skipped {reason}" for reason in reasons)
    if own is None:
        return _new_start(config, facts, skipped)
    return _resume(config, own, directory.folder(own["step"]), identity, skipped)


def _new_start(config: RunConfig, facts: DataFacts, warnings: tuple[str, ...] = ()) -> Start:
    """Start of step 0, with the weights of `checkpoint.start_from` if it is set."""
    given = config.checkpoint.start_from
    if given is None:
        return Start(warnings=warnings)
    weights, differences = find_start_weights(config, facts)
    origin: StartRecord = {"given": given, "path": weights.path, "step": weights.step, "loaded": weights.weights}
    return Start(weights=weights, origin=origin, warnings=(*warnings, *differences))


def _go_on_with(
    config: RunConfig, identity: dict[str, Any], directory: CheckpointDirectory, own: CheckpointState | None
) -> Start:
    """Start from the checkpoint at `checkpoint.resume`, which is not where this directory's run began."""
    given = config.checkpoint.resume
    folder = Location(given)
    if not folder.name.startswith("step_"):  # for a checkpoint's folder, say what it lacks
        try:
            folder = find_checkpoint(given)
        except CheckpointError as error:
            raise CheckpointError(
                f"checkpoint.resume={given}: {error}. To begin a new run with weights alone, use checkpoint.start_from"
            ) from None
    state = read_state(folder)
    start = _resume(config, state, folder, identity)
    if own is not None and own["step"] > state["step"]:
        raise ConfigError(
            f"{directory.root} holds a later checkpoint (step {own['step']}) than the one to resume from (step "
            f"{state['step']}): set run.dir to a new directory to branch off, or remove the later ones to go back"
        )
    if str(folder) == str(directory.folder(state["step"])):  # this run's own newest one
        return start
    origin: StartRecord = {"given": given, "path": str(folder), "step": state["step"], "loaded": "all"}
    return replace(start, origin=origin)


def _given(state: CheckpointState) -> str | None:
    """Path of the checkpoint that the run of a checkpoint went on with."""
    origin = state.get("started_from")
    return origin.get("given") if isinstance(origin, dict) and origin.get("loaded") == "all" else None


def _resume(
    config: RunConfig,
    state: CheckpointState,
    folder: Location,
    identity: dict[str, Any],
    warnings: tuple[str, ...] = (),
) -> Start:
    advice = (
        f"set run.dir (and checkpoint.dir) elsewhere; checkpoint.start_from={folder} begins a new run with its weights"
    )
    refuse_other_identity(_binding(identity, state), state["identity"], f"the checkpoint {folder}", advice)
    lost = state.get("lost_shards", [])
    try:
        named = tuple((str(digest), str(shard)) for digest, shard in lost)
    except (TypeError, ValueError):
        raise CheckpointError(f"the checkpoint {folder} has an invalid list of lost shards: {lost!r}") from None
    changes = tuple(changed_keys(config, state.get("config")))
    origin = state.get("started_from")
    return Start(state["step"], str(folder), named, origin=origin, warnings=warnings, changes=changes)


class HeldDirectories:
    """A run's hold on its directory and its checkpoints; `close` ends it.

    Attributes:
        owner: lease of the directory of checkpoints.
        warnings: what was found in the directory and is not used.
    """

    def __init__(self, lock: IO[str], owner: Ownership, warnings: list[str]) -> None:
        self.owner, self.warnings, self._lock = owner, warnings, lock

    def close(self) -> None:
        """Let other processes use the directories."""
        self.owner.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def prepare(config: RunConfig, start: Start) -> HeldDirectories:
    """Prepare the directory: write the resolved configuration, truncate metrics to the step where the run begins.

    Returns:
        The hold on the directories: while it is open, and as long as this process lives, no other run may use them.

    Raises:
        ConfigError: another run uses the directory, or it cannot be written.
        OwnershipError: another run owns the checkpoints.
    """
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _locked(run_dir)
        run_id = read_run_id(run_dir) or _write_run_id(run_dir)
        owner = _claim(config, run_id)
        Location(run_dir / CONFIG).write(to_yaml(config).encode())
        warnings: list[str] = []
        for path in (run_dir / METRICS, run_dir / MEASURES, run_dir / DEPTH):
            _truncate(path, start.step, warnings.append)
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={run_dir}: {error.strerror or error}") from None
    return HeldDirectories(lock, owner, warnings)


def _claim(config: RunConfig, run_id: str) -> Ownership:
    """Become the owner of the directory of checkpoints, which also shows now that they can be written."""
    root = checkpoints_of(config).root
    try:
        root.make_dir()
        return Ownership.claim(root, run_id, str(Path(config.run.dir).resolve()), take_over=config.checkpoint.take_over)
    except OSError as error:
        raise ConfigError(f"cannot write checkpoints to {root}: {error.strerror or error}") from None


def read_run_id(run_dir: Path) -> str | None:
    """Id of the run in a directory; None where there is no run, or one of an earlier version."""
    try:
        found = json.loads((run_dir / RUN_ID).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    run_id = found.get("id") if isinstance(found, dict) else None
    return run_id if isinstance(run_id, str) else None


def _write_run_id(run_dir: Path) -> str:
    run_id = new_id()
    Location(run_dir / RUN_ID).write(json.dumps({"format": "rdm_scale.run", "version": 1, "id": run_id}).encode())
    return run_id


def _locked(run_dir: Path) -> IO[str]:
    lock = (run_dir / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ConfigError(
            f"run.dir={run_dir} is in use by a run that is alive ({lock.read().strip()}): end that one, or set run.dir "
            "elsewhere"
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _truncate(path: Path, step: int, report: Report) -> None:
    """Remove the lines of steps after `step`, which are about to be trained again, and damaged ones.

    Where the run begins again at step 0, for instance because its checkpoints are not where they were, the lines are
    added to a file beside it.
    """
    if not path.exists():
        return
    lines = read_json_lines(path, lambda record: type(record.get("step")) is int, report, "not a record of a step")
    kept = [line.content for line in lines if line.record["step"] <= step]
    if step == 0 and lines:
        before = path.with_name(f"{path.stem}.before{path.suffix}")
        with before.open("ab") as file:
            file.writelines(line.content for line in lines)
        report(f"the run begins again at step 0: the {len(lines)} lines of {path.name} are in {before}")
    Location(path).write(b"".join(kept))


def _refuse_other_run(run_dir: Path, config: RunConfig) -> None:
    if (run_dir / CONFIG).exists():
        if not any((run_dir / name).exists() for name in (LOCK, RUN_ID, METRICS, "checkpoints")):
            raise ConfigError(
                f"run.dir={run_dir} holds a {CONFIG} that no run wrote, and a run would replace it: set run.dir "
                "elsewhere, or move that file"
            )
        refuse_other_identity(config.identity(), load_config(run_dir / CONFIG).identity(), str(run_dir))
    elif (run_dir / METRICS).exists():
        raise ConfigError(
            f"{run_dir} holds {METRICS} but no {CONFIG}: it is not a run of rdm_scale; set run.dir elsewhere"
        )


def _binding(identity: dict[str, Any], state: CheckpointState) -> dict[str, Any]:
    """Part of a run's identity that a checkpoint must agree on.

    All of it, unless no step has been trained (imported weights): then only the part that the checkpoint states.
    """
    if state["step"] > 0 or not isinstance(state["identity"], dict):
        return identity
    stated = dict(flatten(state["identity"]))
    return {name: value for name, value in flatten(identity) if name in stated}


def refuse_other_identity(
    expected: dict[str, Any], found: Any, where: str, advice: str = "set run.dir (and checkpoint.dir) elsewhere"
) -> None:
    """Raise ConfigError, with the keys that differ, if a directory or checkpoint belongs to another run.

    Args:
        expected: identity of this run.
        found: identity in `where`; CheckpointError if it is no dictionary.
        advice: last line of the message.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds no identity of the run that it belongs to")
    expected, found = dict(flatten(expected)), dict(flatten(found))
    # A version that did not have a key yet behaved as its default does now.
    defaults = flatten({"model": ModelConfig().model_dump(mode="json")})
    found = {name: value for name, value in defaults if name in expected} | found
    differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if differing:
        lines = [f"{name}: {found.get(name)} there, {expected.get(name)} here" for name in differing]
        raise ConfigError("\n  ".join([f"{where} belongs to another run:", *lines, advice]))
