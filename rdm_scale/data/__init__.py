"""Latent shards: their format, the global order of samples, and the streams that read them.

One batch passes through `batch_plan` (which samples; from `mixing` and `order`), `segment_loader` and
`contiguous_reader` (from shards to samples in memory) and `assembly` (to a `LatentBatch`); `stream` ties them together.
See docs/data.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_scale.data.compatibility import check_data
    from rdm_scale.data.held_out import HeldOut
    from rdm_scale.data.manifest import Manifest, read_manifest
    from rdm_scale.data.prefetch import Prefetcher
    from rdm_scale.data.shard_writer import ShardWriter
    from rdm_scale.data.stream import LatentStream

__all__ = ["HeldOut", "LatentStream", "Manifest", "Prefetcher", "ShardWriter", "check_data", "read_manifest"]

_MODULES = {
    "HeldOut": "held_out",
    "LatentStream": "stream",
    "Manifest": "manifest",
    "Prefetcher": "prefetch",
    "ShardWriter": "shard_writer",
    "check_data": "compatibility",
    "read_manifest": "manifest",
}


def __getattr__(name: str) -> Any:
    # On demand, so that reading a manifest does not take the seconds of importing PyTorch.
    if name in _MODULES:
        return getattr(importlib.import_module(f"rdm_scale.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
