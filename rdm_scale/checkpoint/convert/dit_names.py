"""How a DiT is called elsewhere: in diffusers (`DiTTransformer2DModel`) and in the files of the original DiT.

Both name the parameters of `residual: adaln_zero` otherwise, order the rows of qkv as (q/k/v, head, channel) where ours
are (head, q/k/v, channel), and keep the patch embedding as a convolution. diffusers moreover keeps q, k and v apart and
gives every block a copy of the timestep and class embeddings, of which the copies of the first block are used for the
last layer. It spaces the timestep frequencies with i/127, the original with i/128.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rdm_scale.checkpoint.sources import parameter_shapes
from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.errors import CheckpointError
from rdm_scale.models.parameterization import depth_ratio
from rdm_scale.storage.safetensors_folder import Shape

Transform = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Correspondence:
    """One of our parameters and what it is elsewhere: its parts side by side along dim 0, each perhaps several times.

    `theirs[i]` are the names of part i; all of them hold the same.
    """

    shape: Shape
    theirs: list[list[str]]
    forth: Transform = field(default=_same)
    back: Transform = field(default=_same)

    def shapes(self) -> dict[str, Shape]:
        """Their names and shapes, in the order of `to_theirs`."""
        return {name: tuple(t.shape) for name, t in self.to_theirs(torch.empty(self.shape, device="meta"))}

    def to_theirs(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        for names, part in zip(self.theirs, self.forth(ours).chunk(len(self.theirs)), strict=True):
            for name in names:
                yield name, part

    def to_ours(self, read: Callable[[str], Tensor]) -> Tensor:
        """Reads the parts. Raises CheckpointError when copies of the same differ, with their names."""
        parts = []
        for first, *copies in self.theirs:
            part = read(first)
            for name in copies:
                if not torch.equal(read(name), part):
                    raise CheckpointError(
                        f"{name} differs from {first}: this model embeds the condition once for all blocks, and cannot "
                        "take one with embedders that were trained apart"
                    )
            parts.append(part.float())
        return self.back(parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)


Naming = Callable[[ModelConfig], dict[str, list[list[str]]]]


def diffusers_names(config: ModelConfig) -> dict[str, list[list[str]]]:
    """Our names without `.weight` or `.bias`, and those of diffusers."""
    blocks = [f"transformer_blocks.{i}" for i in range(config.depth)]
    embedders = [f"{block}.norm1.emb" for block in blocks]
    names = {
        "patch_embed": [["pos_embed.proj"]],
        "timestep_embed.hidden": [[f"{e}.timestep_embedder.linear_1" for e in embedders]],
        "timestep_embed.out": [[f"{e}.timestep_embedder.linear_2" for e in embedders]],
        "class_embed": [[f"{e}.class_embedder.embedding_table" for e in embedders]],
        "head.modulation": [["proj_out_1"]],
        "head.out": [["proj_out_2"]],
    }
    for i, block in enumerate(blocks):
        names |= {
            f"blocks.{i}.attention.branch.qkv": [[f"{block}.attn1.to_{x}"] for x in "qkv"],
            f"blocks.{i}.attention.branch.out": [[f"{block}.attn1.to_out.0"]],
            f"blocks.{i}.mlp.branch.up": [[f"{block}.ff.net.0.proj"]],
            f"blocks.{i}.mlp.branch.down": [[f"{block}.ff.net.2"]],
            f"blocks.{i}.modulation": [[f"{block}.norm1.linear"]],
        }
    return names


def original_names(config: ModelConfig) -> dict[str, list[list[str]]]:
    """Our names without `.weight` or `.bias`, and those of the original DiT."""
    names = {
        "patch_embed": "x_embedder.proj",
        "timestep_embed.hidden": "t_embedder.mlp.0",
        "timestep_embed.out": "t_embedder.mlp.2",
        "class_embed": "y_embedder.embedding_table",
        "head.modulation": "final_layer.adaLN_modulation.1",
        "head.out": "final_layer.linear",
    }
    for i in range(config.depth):
        names |= {
            f"blocks.{i}.attention.branch.qkv": f"blocks.{i}.attn.qkv",
            f"blocks.{i}.attention.branch.out": f"blocks.{i}.attn.proj",
            f"blocks.{i}.mlp.branch.up": f"blocks.{i}.mlp.fc1",
            f"blocks.{i}.mlp.branch.down": f"blocks.{i}.mlp.fc2",
            f"blocks.{i}.modulation": f"blocks.{i}.adaLN_modulation.1",
        }
    return {ours: [[theirs]] for ours, theirs in names.items()}


def correspondences(naming: Naming, config: ModelConfig) -> dict[str, Correspondence]:
    """Every parameter of a model of kind adaln_zero, in order, and what it is in the other naming."""
    names = naming(config)
    found = {}
    for name, shape in parameter_shapes(config).items():
        stem, _, leaf = name.rpartition(".")
        theirs = [[f"{their}.{leaf}" for their in part] for part in names[stem]]
        found[name] = Correspondence(shape, theirs, *_transforms(stem, leaf, config))
    return found


def _transforms(stem: str, leaf: str, config: ModelConfig) -> tuple[Transform, Transform]:
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    if stem.endswith(".qkv"):
        return (
            lambda t: t.unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2),
            lambda t: t.unflatten(0, (3, heads, size)).transpose(0, 1).flatten(0, 2),
        )
    if stem == "patch_embed" and leaf == "weight":
        channels, (_, h, w) = config.input.channels, config.patch_size
        return lambda t: t.view(-1, channels, h, w), _same  # to_ours gives every tensor our shape
    return _same, _same


def refuse_inexpressible(config: ModelConfig) -> None:
    """Raises CheckpointError unless `DiTTransformer2DModel` computes what this model computes."""
    size, (t, h, w) = config.input, config.patch_size
    reasons = {
        f"model.residual={config.residual} has no adaLN-Zero blocks": config.residual != "adaln_zero",
        f"model.condition={config.condition}: it takes class labels only": config.condition != "class",
        f"model.stacking={config.stacking}: it knows a chain of blocks only": config.stacking != "flow",
        f"model.attention={config.attention}: all its tokens attend to each other": config.attention != "joint",
        f"model.positions={config.positions}: it has fixed tables only": config.positions != "sincos",
        "model.qk_norm=true: it does not normalize queries and keys": config.qk_norm,
        f"model.input.frames={size.frames}: it takes images only": size.frames != 1 or t != 1,
        f"model.input {size.height} x {size.width} with patches {h} x {w} is not square": (size.height, h)
        != (size.width, w),
        f"model.base_depth={config.base_depth}: it has no multiplier of its branches": depth_ratio(config) != 1,
        f"model.mlp_ratio={config.mlp_ratio}: it always has 4": config.mlp_ratio != 4,
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
                    "merge it without --to diffusers: rdm_scale.sampling.RDMPipeline draws from that folder",
                ]
            )
        )


def config_of(config: ModelConfig) -> bytes:
    """`config.json` of diffusers. Raises CheckpointError as `refuse_inexpressible`."""
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


class DiffusersConfig(BaseModel):
    """What of diffusers' `config.json` makes a model; anything but these values is another architecture."""

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
    norm_eps: float = Field(1e-5, gt=0, le=1e-5)  # published DiTs say 1e-5, and were trained with our 1e-6


def model_of(tree: dict[str, Any], where: object) -> ModelConfig:
    """The model that a `config.json` of diffusers describes. Raises CheckpointError: it is none that we have."""
    try:
        theirs = DiffusersConfig.model_validate(tree)
        out = theirs.out_channels or theirs.in_channels
        if out not in (theirs.in_channels, 2 * theirs.in_channels):
            raise CheckpointError(f"{where}: out_channels={out} is neither once nor twice in_channels")
        return ModelConfig(
            input=InputConfig(
                channels=theirs.in_channels, frames=1, height=theirs.sample_size, width=theirs.sample_size
            ),
            patch_size=(1, theirs.patch_size, theirs.patch_size),
            hidden_size=theirs.num_attention_heads * theirs.attention_head_dim,
            depth=theirs.num_layers,
            num_heads=theirs.num_attention_heads,
            residual="adaln_zero",
            condition="class",
            num_classes=theirs.num_embeds_ada_norm,
            learned_variance=out == 2 * theirs.in_channels,
            timestep_spacing="diffusers",
        )
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise CheckpointError("\n  ".join([f"{where} describes no DiT that can be imported:", *lines])) from None
