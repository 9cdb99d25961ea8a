"""Files that this project may replace: those that it wrote, which carry its name near their beginning."""

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

MARK = "rdm_scale"  # in pictures as their software or comment, in pages as their generator
_HEAD_BYTES = 2**16


def refuse_to_replace(file: Location) -> None:
    """Refuse a place for a picture or page where there is a file that this project did not write.

    Raises:
        DataError: there is such a file, or it cannot be read.
    """
    try:
        head = file.read_range(0, _HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"cannot write to {file}: {error.strerror or error}; choose another place") from None
    if MARK.encode() not in head:
        raise DataError(f"{file} exists and was not written by rdm_scale: choose another name, or move that file")
