"""Record of a codec in the manifest of the latents that it encoded: its identity and normalization."""

from pydantic import BaseModel, ConfigDict, Field


class CodecRecord(BaseModel):
    """Identity of a codec and the affine map from raw latents to unit scale.

    Normalized latents are (raw - shift) * scale, with one number for all channels or one for each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="identity, digits (the packaged VAE), or the class of a diffusers VAE")
    location: str = Field(description="what load_codec takes to load it again")
    digest: str = Field("", description="sha256 of the codec's weights; empty for identity")
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
