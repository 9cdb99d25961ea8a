"""Codecs: conversion of images and clips to latents and back.

`identity` leaves pixels as they are, `digits` is the small VAE of this package, and any other name is a folder (local
or any fsspec URL) with a VAE of diffusers: `config.json` and `diffusion_pytorch_model.safetensors`, or the shards of a
large one with their index. Weights are safetensors only: pickled ones could run code.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_scale.codecs.codec import LatentCodec, denormalize, normalize
    from rdm_scale.codecs.files import CONFIG, INDEX, WEIGHTS
    from rdm_scale.codecs.record import CodecRecord
    from rdm_scale.codecs.registry import codec_of, load_codec

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "CodecRecord",
    "LatentCodec",
    "codec_of",
    "denormalize",
    "load_codec",
    "normalize",
]
_HOMES = {
    "codec": ("LatentCodec", "denormalize", "normalize"),
    "files": ("CONFIG", "INDEX", "WEIGHTS"),
    "record": ("CodecRecord",),
    "registry": ("codec_of", "load_codec"),
}


def __getattr__(name: str) -> Any:
    # On demand: a manifest needs only the record, and is checked without the seconds that importing torch takes.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
