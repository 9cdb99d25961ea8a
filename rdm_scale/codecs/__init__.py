"""Codecs: conversion of images and clips to latents and back.

`identity` leaves pixels as they are, `digits` is the small VAE of this package, and any other name is a folder (local
or any fsspec URL) with a VAE of diffusers: `config.json` and `diffusion_pytorch_model.safetensors`, or the shards of a
large one with their index, or a variant of these such as fp16. The folder of a pipeline with its VAE in `vae` will do.
Weights are safetensors only: pickled ones could run code.
"""

from typing import TYPE_CHECKING

from rdm_scale.lazy import lazy_names

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
# A manifest needs only the record, and is checked without the seconds that importing torch takes.
__getattr__ = lazy_names(
    __name__,
    {
        "codec": ("LatentCodec", "denormalize", "normalize"),
        "files": ("CONFIG", "INDEX", "WEIGHTS"),
        "record": ("CodecRecord",),
        "registry": ("codec_of", "load_codec"),
    },
)
