"""Content of a checkpoint's `state.json`."""

from collections.abc import Sequence
from typing import Any, Required, TypedDict


class WriterLayout(TypedDict, total=False):
    """Layout of the run that wrote a checkpoint; for information only."""

    tensor: int
    pipeline: int
    data: int
    imported_from: str  # path of the imported weights


class GrowthRecord(TypedDict):
    """Checkpoint and depth that a model was grown from, and the placement of its new blocks."""

    checkpoint: str
    depth: int
    placement: str


class StartRecord(TypedDict):
    """Checkpoint or weights that a run began with."""

    given: str  # path in the configuration
    path: str  # what was found there
    step: int  # its step; 0 for published weights
    loaded: str  # `all`: the run goes on from there; `ema` or `raw`: only these weights were taken


class CheckpointState(TypedDict, total=False):
    """State of a run besides its tensors.

    Keys may be missing in older checkpoints, and unknown keys are kept. Reading a checkpoint validates only `step`;
    validate any other value where it is used.
    """

    step: Required[int]
    samples: int
    config: dict[str, Any]
    identity: dict[str, Any]  # values that a resumed run must agree on
    codec: dict[str, Any]
    class_names: list[str]
    text: dict[str, Any] | None  # encoding of the captions
    lost_shards: Sequence[Sequence[str]]  # (digest of the manifest, name of the shard)
    layout: WriterLayout
    grown_from: GrowthRecord
    started_from: StartRecord | None  # None: from initial weights
