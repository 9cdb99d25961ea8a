"""What a model costs: parameters, floating-point operations and bytes, from its configuration alone.

The one source of these numbers for the layout table, the choice of `keep_gathered`, the balance of pipeline stages and
reports of efficiency. Nothing is built and no library is imported, so that 100B parameters on thousands of ranks are
counted in a moment. Widths: D stream, M MLP, S tokens, B samples, V modulation vectors of a block.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rdm_scale.config import ModelConfig, RunConfig
from rdm_scale.config.model import TIMESTEP_FREQUENCIES
from rdm_scale.dtypes import FLOAT32, PRECISIONS


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of some part of a model: what tensor parallelism cuts, and what every rank has whole."""

    cut: int
    whole: int
    tensors: int = 0

    def on_rank(self, tensor: int) -> int:
        return self.cut // tensor + self.whole

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.cut + other.cut, self.whole + other.whole, self.tensors + other.tensors)

    @property
    def total(self) -> int:
        return self.cut + self.whole


NOTHING = Parameters(0, 0)


def _gate(model: ModelConfig) -> tuple[list[int], bool]:
    """Sizes of a gate's parameters, and whether it takes a vector of the condition."""
    width = model.hidden_size
    rdm = width if model.gate.per_channel else 1
    return {
        "plain": ([], False),
        "rezero": ([1], False),
        "layerscale": ([width], False),
        "adaln_zero": ([], True),
        "neural_rdm": ([rdm, rdm], model.gate.conditional),
    }[model.residual]


def _units(model: ModelConfig, block: int) -> int:
    """Residual units of a block: attention, MLP, attention to text and, in the latter half of a u stack, a skip."""
    return 2 + _reads_text(model) + _skips(model, block)


def _reads_text(model: ModelConfig) -> bool:
    return model.condition == "text"


def _skips(model: ModelConfig, block: int) -> bool:
    return model.skip_source(block) is not None


def _modulations(model: ModelConfig, block: int) -> int:
    """Vectors [B, D] of the condition that a block takes."""
    return _units(model, block) * (3 if _gate(model)[1] else 2)


def _outputs(model: ModelConfig) -> int:
    return model.input.channels * (2 if model.learned_variance else 1) * math.prod(model.patch_size)


def block_parameters(model: ModelConfig, block: int = 0) -> Parameters:
    """Of one block."""
    D, M, V = model.hidden_size, model.mlp_size, _modulations(model, block)
    gates, units, skips = _gate(model)[0], _units(model, block), _skips(model, block)
    cut = (3 * D * D + 3 * D) + D * D + (D * M + M) + M * D + skips * 2 * D * D + V * (D * D + D)
    text = _reads_text(model)
    cut += text * ((D * D + D) + 2 * D * (model.text.width + 1) + D * D)
    norms = 2 * model.qk_norm * (1 + text)
    whole = units * (D + sum(gates)) + norms * model.head_size
    return Parameters(cut, whole, 10 + 2 * skips + 6 * text + units * len(gates) + norms)


def blocks_parameters(model: ModelConfig, blocks: Iterable[int]) -> Parameters:
    """Of some blocks."""
    return sum((block_parameters(model, block) for block in blocks), NOTHING)


def embedding_parameters(model: ModelConfig) -> Parameters:
    """Of what turns latents, timesteps and classes into tokens and the condition."""
    D, patch = model.hidden_size, model.input.channels * math.prod(model.patch_size)
    classes = model.num_classes + 1 if model.condition == "class" else 0
    text = (model.text.pooled_width * D + D) + (D * D + D) if _reads_text(model) else 0
    whole = (patch * D + D) + (TIMESTEP_FREQUENCIES * D + D) + (D * D + D) + classes * D + text
    return Parameters(0, whole, 6 + (classes > 0) + 4 * (text > 0))


def head_parameters(model: ModelConfig) -> Parameters:
    """Of the last modulation and layer."""
    D = model.hidden_size
    return Parameters(2 * (D * D + D), D * _outputs(model) + _outputs(model), 4)


def model_parameters(model: ModelConfig) -> Parameters:
    return embedding_parameters(model) + blocks_parameters(model, range(model.depth)) + head_parameters(model)


def block_flops(model: ModelConfig, block: int = 0) -> int:
    """Floating-point operations of one block's forward on one sample, two for a product and a sum. What a caption
    adds grows with its length, which is the data's, and is left out: keys, values and attention to N tokens are
    N (4 W + 4 S) D, W the encoder's width, against 4 S D D of the queries and output, which are counted."""
    S, D, M, V = model.tokens, model.hidden_size, model.mlp_size, _modulations(model, block)
    frames, rows, columns = model.grid
    seen = {"full": S, "spatial": rows * columns, "temporal": frames}[model.attention_scope(block)]  # by each token
    products = 4 * D * D + 2 * D * M + 2 * D * D * (_skips(model, block) + _reads_text(model))
    return 2 * S * products + 4 * S * seen * D + 2 * V * D * D


def blocks_flops(model: ModelConfig, blocks: Iterable[int]) -> int:
    """Of some blocks."""
    return sum(block_flops(model, block) for block in blocks)


def embedding_flops(model: ModelConfig) -> int:
    S, D = model.tokens, model.hidden_size
    patch = model.input.channels * math.prod(model.patch_size)
    return 2 * S * patch * D + 2 * (TIMESTEP_FREQUENCIES * D + D * D)


def head_flops(model: ModelConfig) -> int:
    return 2 * model.tokens * model.hidden_size * _outputs(model) + 4 * model.hidden_size**2


def model_flops(model: ModelConfig) -> int:
    """Of the whole forward on one sample; a training step takes three times as many."""
    return embedding_flops(model) + blocks_flops(model, range(model.depth)) + head_flops(model)


def block_activation_bytes(config: RunConfig, samples: int, policy: str, block: int = 0) -> float:
    """Bytes that one block keeps from its forward for its backward, on one tensor-parallel rank.

    Counted in streams of S x B x D elements, r of the stream's type and c of the branches'. Whole unless sequence
    parallelism splits the tokens: both units' inputs, normed inputs and outputs before the gate (6 r), both modulated
    inputs (2 c). Cut by tensor parallelism: q, k, v, the heads' output and its copy in token order (5 c), the MLP's
    hidden layer before and after GELU (2 M / D c). A long skip has its input, that normed, its output (3 r)
    and, cut, both parts joined (2 c); attention to a caption is a third unit (3 r, 1 c) with, cut, q, the heads' output
    and its copy (3 c), its keys and values apart. `selective` keeps the products' outputs only, and the block's input.
    """
    model, train, parallel = config.model, config.train, config.parallel
    r, c = PRECISIONS[train.residual_dtype].bytes, PRECISIONS[train.precision].bytes
    stream = model.tokens * samples * model.hidden_size
    tokens = parallel.tensor if parallel.sequence else 1
    ratio, skips, text = model.mlp_size / model.hidden_size, _skips(model, block), _reads_text(model)
    if policy == "full":
        return stream * r / tokens
    if policy == "selective":
        return stream * ((r + (2 + skips + text) * c) / tokens + (4 + 2 * text + ratio) * c / parallel.tensor)
    whole = (6 + 3 * skips + 3 * text) * r + (2 + text) * c
    cut = (5 + 2 * ratio + 2 * skips + 3 * text) * c + _turned_bytes(config, c)
    return stream * (whole / tokens + cut / parallel.tensor)


def _turned_bytes(config: RunConfig, c: int) -> int:
    """Of queries and keys that are not those of the product any more, for each element of the stream: what attention
    takes (2 c) and, of a norm, what it read and what it made before its scales, in fp32 where that is another type."""
    model = config.model
    turned = model.qk_norm or model.positions == "rotary"
    return 2 * c * turned + model.qk_norm * (8 if c == FLOAT32.bytes else 16)


def blocks_activation_bytes(config: RunConfig, samples: int, blocks: Iterable[int]) -> float:
    """Bytes that successive blocks keep under the configured recompute policy."""
    policy, every = config.parallel.recompute, 1
    if policy.startswith("every_"):
        policy, every = "full", int(policy.removeprefix("every_"))
    return sum(
        block_activation_bytes(config, samples, "none" if nth % every else policy, block)
        for nth, block in enumerate(blocks)
    )


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank, at the end of a step's last backward."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments
    average: int  # of the weights (EMA)

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average


def state_bytes(config: RunConfig, parameters: int, data: int, keep_gathered: bool) -> StateBytes:
    """What `parameters` parameters on a rank take there, with `data` data-parallel ranks."""
    stage, compute = config.parallel.zero_stage, PRECISIONS[config.train.precision].bytes
    share = math.ceil(parameters / data)
    sharded = share if stage else parameters
    held = share if stage == 3 else parameters
    gradients = share if stage >= 2 else parameters
    gathered = parameters if keep_gathered and stage == 3 and data > 1 else 0  # one rank's share is the whole
    return StateBytes(
        parameters=compute * (held + gathered),
        gradients=4 * (gradients + gathered),
        optimizer=12 * sharded,
        average=4 * sharded,
    )
