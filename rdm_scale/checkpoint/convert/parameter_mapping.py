"""Mapping of a DiT's parameters to their names and shapes in diffusers and in the files of the original DiT.

Both use other names for the parameters of `residual: adaln_zero`, order the rows of qkv as (q/k/v, head, channel)
instead of (head, q/k/v, channel), and store the patch embedding as a convolution. diffusers also stores q, k and v
separately, gives every block a copy of the timestep and class embeddings, and uses the copies of the first block for
the last layer. It spaces the timestep frequencies with i/127, the original with i/128.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_scale.checkpoint.model_source import parameter_shapes
from rdm_scale.config import ModelConfig
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.safetensors_folder import Shape

Transform = Callable[[Tensor], Tensor]
ExternalNames = dict[str, list[list[str]]]  # by this project's name: external names of each part, see ParameterMapping


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class ParameterMapping:
    """A parameter of this project's model and the external tensors that hold it.

    Attributes:
        shape: shape of the parameter.
        names: external names of each part. The parts are concatenated along dimension 0; all tensors of one part are
            copies of each other.
        export: changes the order of elements and the shape to the external ones, before the parameter is split.
        restore: inverse of `export`, up to a reshape to `shape`.
    """

    shape: Shape
    names: list[list[str]]
    export: Transform = _identity
    restore: Transform = _identity

    def external_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the external tensors, in the order of `to_external`."""
        return {name: tuple(t.shape) for name, t in self.to_external(torch.empty(self.shape, device="meta"))}

    def to_external(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Convert the parameter to its external tensors, by name."""
        for names, part in zip(self.names, self.export(parameter).chunk(len(self.names)), strict=True):
            for name in names:
                yield name, part

    def from_external(self, read: Callable[[str], Tensor]) -> Tensor:
        """Convert external tensors to the fp32 parameter.

        Args:
            read: returns the external tensor of a name.

        Raises:
            CheckpointError: copies of a part differ; their names are given.
        """
        parts = []
        for first, *copies in self.names:
            part = read(first)
            for name in copies:
                if not torch.equal(read(name), part):
                    raise CheckpointError(
                        f"{name} differs from {first}: this model embeds the condition once for all blocks, and cannot "
                        "import embedders that were trained separately"
                    )
            parts.append(part.float())
        return self.restore(parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)


Naming = Callable[[ModelConfig], ExternalNames]


def diffusers_names(config: ModelConfig) -> ExternalNames:
    """Names in diffusers' `DiTTransformer2DModel`, without `.weight` and `.bias`."""
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


def original_names(config: ModelConfig) -> ExternalNames:
    """Names in the files of the original DiT, without `.weight` and `.bias`."""
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
    return {name: [[external]] for name, external in names.items()}


def map_parameters(naming: Naming, config: ModelConfig) -> dict[str, ParameterMapping]:
    """Mapping of every parameter of an adaln_zero model to another naming, in the order of the parameters."""
    names = naming(config)
    found = {}
    for name, shape in parameter_shapes(config).items():
        stem, _, leaf = name.rpartition(".")
        external = [[f"{copy}.{leaf}" for copy in part] for part in names[stem]]
        found[name] = ParameterMapping(shape, external, *_transforms(stem, leaf, config))
    return found


def _transforms(stem: str, leaf: str, config: ModelConfig) -> tuple[Transform, Transform]:
    """`export` and `restore` of a parameter's mapping."""
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    if stem.endswith(".qkv"):
        return (
            lambda t: t.unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2),
            lambda t: t.unflatten(0, (3, heads, size)).transpose(0, 1).flatten(0, 2),
        )
    if stem == "patch_embed" and leaf == "weight":
        channels, (_, h, w) = config.input.channels, config.patch_size
        return lambda t: t.view(-1, channels, h, w), _identity
    return _identity, _identity
