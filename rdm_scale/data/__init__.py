"""Latent shards: their format, the global order of samples, and the streams that read them.

One batch passes through `batch_plan` (which samples; from `mixing` and `order`), `segment_loader` and
`contiguous_reader` (from shards to samples in memory) and `assembly` (to a `LatentBatch`); `stream` ties them together.
See docs/data.md.
"""

from typing import TYPE_CHECKING

from rdm_scale.lazy import lazy_names

if TYPE_CHECKING:
    from rdm_scale.data.compatibility import check_data
    from rdm_scale.data.held_out import HeldOut
    from rdm_scale.data.manifest import Manifest, read_manifest
    from rdm_scale.data.prefetch import Prefetcher
    from rdm_scale.data.shard_writer import ShardWriter
    from rdm_scale.data.stream import LatentStream

__all__ = ["HeldOut", "LatentStream", "Manifest", "Prefetcher", "ShardWriter", "check_data", "read_manifest"]

# Reading a manifest does not take the seconds of importing torch.
__getattr__ = lazy_names(
    __name__,
    {
        "compatibility": ("check_data",),
        "held_out": ("HeldOut",),
        "manifest": ("Manifest", "read_manifest"),
        "prefetch": ("Prefetcher",),
        "shard_writer": ("ShardWriter",),
        "stream": ("LatentStream",),
    },
)
