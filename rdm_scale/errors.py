"""Errors that a user can act on.

Every message says what is wrong, where, and what to do about it. The mains print these as one message
without a traceback; any other exception is a bug and keeps its traceback.
"""


class RdmError(Exception):
    """Base of all errors that are a user's to mend."""


class ConfigError(RdmError):
    """The configuration is wrong, or does not fit the world it is started in."""


class DataError(RdmError):
    """A manifest, a shard or an input is missing, damaged or not what the run expects."""


class CheckpointError(RdmError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class IncompleteError(CheckpointError):
    """A checkpoint was never completed, or is no longer whole."""


class NonFiniteError(RdmError):
    """A loss or a gradient stopped being a finite number."""
