"""Errors that a user can act on.

Every message says what is wrong, where, and what to do about it. The command-line programs print it without a
traceback; any other exception is a bug and keeps its traceback.
"""


class RdmError(Exception):
    """Base class of all errors that the user can fix."""


class ConfigError(RdmError):
    """The configuration is invalid, or does not fit the number of ranks."""


class DataError(RdmError):
    """A manifest, a shard or an input is missing, damaged or not what the run expects."""


class StorageError(DataError):
    """An input cannot be read from where it is stored: not a fault of its content, and a later attempt may succeed."""


class CheckpointError(RdmError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class IncompleteError(CheckpointError):
    """A checkpoint was never completed, or some of its files are missing."""


class NonFiniteError(RdmError):
    """A loss, a gradient, weights or samples are infinite or NaN."""


class OwnershipError(RdmError):
    """A directory belongs to another run, or was taken over by another process."""


class LaunchError(RdmError):
    """Ranks cannot meet: a host, a port or a rank is missing. A restart may help."""


class StopRequested(Exception):  # noqa: N818
    """A request to stop came where there is nothing to save; not an error."""
