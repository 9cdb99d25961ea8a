"""Encoding: from images and videos to latent shards, and inspection of what was encoded."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_scale.encoding.inputs import MediaSet, find_media
    from rdm_scale.encoding.inspection import decode_samples, measure_statistics, verify
    from rdm_scale.encoding.job import EncodingJob, EncodingResult, ProcessRank
    from rdm_scale.encoding.output import OutputFolders
    from rdm_scale.encoding.planning import EncodingSettings, PixelBucket
    from rdm_scale.encoding.runner import encode
    from rdm_scale.encoding.text import TextEncoder, encode_prompts
    from rdm_scale.encoding.videos import decode_clip

__all__ = [
    "EncodingJob",
    "EncodingResult",
    "EncodingSettings",
    "MediaSet",
    "OutputFolders",
    "PixelBucket",
    "ProcessRank",
    "TextEncoder",
    "decode_clip",
    "decode_samples",
    "encode",
    "encode_prompts",
    "find_media",
    "measure_statistics",
    "verify",
]
_HOMES = {
    "inputs": ("MediaSet", "find_media"),
    "inspection": ("decode_samples", "measure_statistics", "verify"),
    "job": ("EncodingJob", "EncodingResult", "ProcessRank"),
    "output": ("OutputFolders",),
    "planning": ("PixelBucket", "EncodingSettings"),
    "runner": ("encode",),
    "text": ("TextEncoder", "encode_prompts"),
    "videos": ("decode_clip",),
}


def __getattr__(name: str) -> Any:
    # On demand: listing inputs needs none of the seconds that importing torch and the codecs takes.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
