"""Encoding: from images and videos to latent shards, and inspection of what was encoded."""

from typing import TYPE_CHECKING

from rdm_scale.lazy import lazy_names

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
# Listing inputs needs none of the seconds that importing torch and the codecs takes.
__getattr__ = lazy_names(
    __name__,
    {
        "inputs": ("MediaSet", "find_media"),
        "inspection": ("decode_samples", "measure_statistics", "verify"),
        "job": ("EncodingJob", "EncodingResult", "ProcessRank"),
        "output": ("OutputFolders",),
        "planning": ("PixelBucket", "EncodingSettings"),
        "runner": ("encode",),
        "text": ("TextEncoder", "encode_prompts"),
        "videos": ("decode_clip",),
    },
)
