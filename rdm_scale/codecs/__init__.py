"""Codecs: what turns images and clips into latents and back.

`identity` leaves pixels as they are, `digits` is the small VAE of this package, and any other name is a folder (local
or any fsspec URL) with a VAE of diffusers: `config.json` and `diffusion_pytorch_model.safetensors`, or the shards of a
large one with their index. Weights are safetensors only: pickled ones could run code.
"""

from rdm_scale.codecs.codec import LatentCodec, denormalize, normalize
from rdm_scale.codecs.files import CONFIG, INDEX, WEIGHTS
from rdm_scale.codecs.registry import codec_of, load_codec

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "LatentCodec", "codec_of", "denormalize", "load_codec", "normalize"]
