"""`config.json` of diffusers' `DiTTransformer2DModel`, to and from this project's model configuration."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.errors import CheckpointError
from rdm_scale.models.parameterization import depth_ratio

PIPELINE_CLASSES = 1000  # of ImageNet, written into diffusers' DiTPipeline


def refuse_inexpressible(config: ModelConfig) -> None:
    """Raise CheckpointError, with all reasons, unless `DiTTransformer2DModel` can compute the same function."""
    size, (t, h, w) = config.input, config.patch_size
    reasons = {
        f"model.residual={config.residual} has no adaLN-Zero blocks": config.residual != "adaln_zero",
        f"model.condition={config.condition}: it supports class labels only": config.condition != "class",
        f"model.stacking={config.stacking}: it supports a chain of blocks only": config.stacking != "flow",
        f"model.attention={config.attention}: it supports full attention only": config.attention != "joint",
        f"model.positions={config.positions}: it supports fixed tables only": config.positions != "sincos",
        "model.qk_norm=true: it does not normalize queries and keys": config.qk_norm,
        f"model.input.frames={size.frames}: it supports images only": size.frames != 1 or t != 1,
        f"model.input {size.height} x {size.width} with patches {h} x {w} is not square": (size.height, h)
        != (size.width, w),
        f"model.base_depth={config.base_depth}: it does not scale its branches": depth_ratio(config) != 1,
        f"model.mlp_ratio={config.mlp_ratio}: its ratio is always 4": config.mlp_ratio != 4,
        f"model.timestep_spacing={config.timestep_spacing}: it spaces timestep frequencies with i/127 (diffusers), so "
        "its outputs would differ; train with model.timestep_spacing=diffusers to export": config.timestep_spacing
        != "diffusers",
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise CheckpointError(
            "\n  ".join(
                [
                    "diffusers' DiTTransformer2DModel cannot express this model:",
                    *found,
                    "merge it without --to diffusers: rdm_scale.sampling.RDMPipeline samples from that folder",
                ]
            )
        )


def encode_diffusers_config(config: ModelConfig) -> bytes:
    """Encode diffusers' `config.json` of a model. Raises CheckpointError as `refuse_inexpressible` does."""
    refuse_inexpressible(config)
    channels = config.input.channels
    tree = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": channels,
        "out_channels": channels * (2 if config.learned_variance else 1),
        "num_layers": config.depth,
        "sample_size": config.input.height,
        "patch_size": config.patch_size[1],
        "num_embeds_ada_norm": config.num_classes,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return json.dumps(tree, indent=1).encode()


def pipeline_warning(config: ModelConfig) -> str | None:
    """Reason why diffusers' `DiTPipeline` cannot draw with guidance from an exported model; None where it can."""
    if config.num_classes == PIPELINE_CLASSES:
        return None
    return (
        f'diffusers\' DiTPipeline takes class {PIPELINE_CLASSES} for "no class", and this model has '
        f"{config.num_classes} classes: with guidance the pipeline fails or draws from another class. Draw there with "
        "guidance_scale=1, or from a merged folder with rdm_scale.sampling.RDMPipeline, which knows the model's classes"
    )


class DiffusersConfig(BaseModel):
    """Entries of diffusers' `config.json` that define a model; other values mean another architecture."""

    model_config = ConfigDict(extra="ignore", strict=True)

    kind: Literal["DiTTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    num_attention_heads: int = Field(16, ge=1, le=2**10)
    attention_head_dim: int = Field(72, ge=1, le=2**12)
    in_channels: int = Field(4, ge=1, le=2**12)
    out_channels: int | None = Field(None, ge=1, le=2**13)
    num_layers: int = Field(28, ge=1, le=2**16)
    sample_size: int = Field(32, ge=1, le=2**12)
    patch_size: int = Field(2, ge=1, le=2**8)
    num_embeds_ada_norm: int = Field(1000, ge=1, le=2**24)
    attention_bias: Literal[True] = True
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: float = Field(1e-5, gt=0, le=1e-5)  # published DiTs say 1e-5, but were trained with 1e-6, as here


def parse_diffusers_config(tree: dict[str, Any], where: object) -> ModelConfig:
    """Convert diffusers' `config.json` to a model configuration.

    Raises:
        CheckpointError: it describes another architecture.
    """
    try:
        external = DiffusersConfig.model_validate(tree)
        out = external.out_channels or external.in_channels
        if out not in (external.in_channels, 2 * external.in_channels):
            raise CheckpointError(f"{where}: out_channels={out} must be in_channels or twice that")
        return ModelConfig(
            input=InputConfig(
                channels=external.in_channels, frames=1, height=external.sample_size, width=external.sample_size
            ),
            patch_size=(1, external.patch_size, external.patch_size),
            hidden_size=external.num_attention_heads * external.attention_head_dim,
            depth=external.num_layers,
            num_heads=external.num_attention_heads,
            residual="adaln_zero",
            condition="class",
            num_classes=external.num_embeds_ada_norm,
            learned_variance=out == 2 * external.in_channels,
            timestep_spacing="diffusers",
        )
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise CheckpointError("\n  ".join([f"{where} does not describe a DiT that can be imported:", *lines])) from None
