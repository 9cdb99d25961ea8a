"""Checks of a start on several ranks, before the model is built: checkpoints reach all of them, and clocks agree."""

import contextlib
import secrets
from collections.abc import Iterator, Sequence

from rdm_scale.errors import ConfigError
from rdm_scale.parallel.mesh import Mesh, clock_warnings
from rdm_scale.storage.location import Location


def check_start(mesh: Mesh, checkpoints: Location) -> list[str]:
    """Check what the ranks share. Returns warnings. Collective.

    Raises:
        ConfigError: not all ranks can write where the checkpoints go, or they write to different disks.
    """
    if mesh.world_size == 1:
        return []
    check_shared_directory(mesh, checkpoints)
    return clock_warnings(mesh)


def check_shared_directory(mesh: Mesh, folder: Location) -> None:
    """Check that rank 0 sees what every rank writes in `folder`. Collective.

    On an object store one rank of each host writes a file, on disks every rank: a mount may belong to one container.

    Raises:
        ConfigError: on every rank; names the hosts and ranks.
    """
    token = mesh.broadcast(secrets.token_hex(8))
    writers = range(mesh.world_size) if folder.is_local else [each.first for each in mesh.hosts.ranges]
    own = folder / _name(token, mesh.rank)
    with _probe(own if mesh.rank in writers else None) as problem:
        problems = mesh.gather_rare(problem)
        if problems:
            raise ConfigError(f"{mesh.hosts.describe(problems)} cannot write to {folder}: {problems[min(problems)]}")
        unseen = mesh.on_first(lambda: sorted(set(writers) - _seen(folder, token, writers)))
        if unseen:
            raise ConfigError(
                f"{folder} is not the same directory on all hosts: {mesh.hosts.describe([0])} does not see what "
                f"{mesh.hosts.describe(unseen)} wrote there, so that no checkpoint would be complete. Set "
                "checkpoint.dir to a shared disk or an object store (s3://...), and run.dir to a shared disk"
            )


def _name(token: str, rank: int) -> str:
    return f".probe-{token}-{rank}"


def _seen(folder: Location, token: str, writers: Sequence[int]) -> set[int]:
    """Ranks whose file is there. On disks each name is looked up: listings may come from a cache (NFS)."""
    if folder.is_local:
        return {rank for rank in writers if (folder / _name(token, rank)).exists()}
    names = set(folder.names())
    return {rank for rank in writers if _name(token, rank) in names}


@contextlib.contextmanager
def _probe(file: Location | None) -> Iterator[str | None]:
    """Write a file and remove it afterwards; yields the reason why it cannot be written."""
    problem = None
    if file is not None:
        try:
            file.parent.make_dir()
            file.write(b"x")
        except OSError as error:
            problem = error.strerror or str(error)
    try:
        yield problem
    finally:
        if file is not None and problem is None:
            with contextlib.suppress(OSError):
                file.remove()
