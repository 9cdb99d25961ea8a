"""JSON files of untrusted origin, read within a bound on their size.

The caller chooses the class of the errors: the same file may be part of a data set, a codec or a checkpoint.
"""

import json
from typing import Any

from rdm_scale.errors import RdmError
from rdm_scale.storage.location import Location

MAX_JSON_BYTES = 2**26


def read_bounded(file: Location, error: type[RdmError], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file of at most `max_bytes`.

    Raises:
        OSError: the file is missing or cannot be read.
        error: it is larger.
    """
    content = file.read_range(0, max_bytes + 1)
    if len(content) > max_bytes:
        raise error(f"{file} is too large: at most {max_bytes:,} bytes are read. Check that it is the right file")
    return content


def read_json(file: Location, error: type[RdmError], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file of at most `max_bytes`.

    Raises:
        error: the file is missing, too large, not JSON, or cannot be read.
    """
    try:
        return json.loads(read_bounded(file, error, max_bytes))
    except FileNotFoundError:
        raise error(f"there is no {file}: check the path, or copy all files of the folder") from None
    except OSError as failure:
        raise error(f"cannot read {file}: {failure.strerror or failure}") from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{file} is not JSON: {failure}") from None


def read_json_object(file: Location, error: type[RdmError], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` as `read_json` does, and if the value is not an object."""
    value = read_json(file, error, max_bytes)
    if not isinstance(value, dict):
        raise error(f"{file} is not a JSON object: copy the file again")
    return value
