"""Search for the newest checkpoint of a run, wherever its `checkpoint.dir` is."""

from rdm_scale.checkpoint.directory import CheckpointDirectory, is_checkpoint
from rdm_scale.config import recorded_checkpoint_dir
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location

RUN_CONFIG = "config.yaml"  # in a run's directory


def find_checkpoint(path: str) -> Location:
    """Find the checkpoint at `path`, or the newest one of the run or folder of checkpoints at `path`.

    The checkpoints of a run are where its `config.yaml` says, or in its folder `checkpoints`.

    Raises:
        CheckpointError: there is none.
    """
    here = Location(path)
    if is_checkpoint(here):
        return here
    elsewhere = _recorded_dir(here)
    places = [*([] if elsewhere is None else [Location(elsewhere)]), here / "checkpoints", here]
    for place in places:
        directory = CheckpointDirectory(place)
        latest = directory.latest()
        if latest is not None:
            return directory.folder(latest)
    also = "" if elsewhere is None else f" (its checkpoint.dir is {elsewhere}, which has none either)"
    raise CheckpointError(f"{here} is neither a complete checkpoint nor a run or folder with one{also}: check the path")


def _recorded_dir(run: Location) -> str | None:
    """`checkpoint.dir` in a run's `config.yaml`; None where there is no such file or key."""
    try:
        content = read_bounded(run / RUN_CONFIG, CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {run / RUN_CONFIG}: {error.strerror or error}") from error
    return recorded_checkpoint_dir(content)
