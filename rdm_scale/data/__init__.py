"""Latent shards: their format, how they are made, and the stream that reads them exactly once."""

from typing import Any

__all__ = ["LatentStream"]


def __getattr__(name: str) -> Any:
    # On demand, so that a manifest can be checked without the seconds that importing torch takes.
    if name == "LatentStream":
        from rdm_scale.data.stream import LatentStream

        return LatentStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
