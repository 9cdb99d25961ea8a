"""Cost model: parameters, floating-point operations and bytes of a model, from its configuration alone.

The layout table, the choice of `keep_gathered`, the balance of pipeline stages and efficiency reports all use these
numbers. No model is built and no library is imported, so that a model of 100B parameters on thousands of ranks takes
milliseconds.

Symbols: S tokens of a sample, B samples, D hidden size, M MLP size, V adaLN outputs [B, D] of a block, W width of a
caption's tokens, P width of its pooled embedding.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rdm_scale.config import ModelConfig, RunConfig
from rdm_scale.config.model import TIMESTEP_FREQUENCIES
from rdm_scale.dtypes import FLOAT32, PRECISIONS


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a part of a model.

    Attributes:
        sharded: parameters that tensor parallelism shards.
        replicated: parameters that every tensor-parallel rank holds.
        tensors: number of parameter tensors.
    """

    sharded: int
    replicated: int
    tensors: int = 0

    def on_rank(self, tensor: int) -> int:
        """Parameters on one of `tensor` tensor-parallel ranks."""
        return self.sharded // tensor + self.replicated

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.sharded + other.sharded, self.replicated + other.replicated, self.tensors + other.tensors
        )

    @property
    def total(self) -> int:
        return self.sharded + self.replicated


NO_PARAMETERS = Parameters(0, 0)


def _branches(model: ModelConfig, block: int) -> int:
    """Number of residual branches of a block: attention, MLP, and, where the model has them, caption and long skip."""
    return 2 + _reads_text(model) + _skips(model, block)


def _reads_text(model: ModelConfig) -> bool:
    return model.condition == "text"


def _skips(model: ModelConfig, block: int) -> bool:
    return model.skip_source(block) is not None


def _modulations(model: ModelConfig, block: int) -> int:
    """V: for each residual branch shift, scale and, with a conditional gate, g."""
    return _branches(model, block) * (3 if model.gate_parts.conditional else 2)


def _outputs(model: ModelConfig) -> int:
    """Outputs of the head for each token."""
    return model.input.channels * (2 if model.learned_variance else 1) * math.prod(model.patch_size)


def block_parameters(model: ModelConfig, block: int = 0) -> Parameters:
    """Parameters of one block.

    Sharded: qkv 3 D^2 + 3 D, attention output D^2, MLP 2 D M + M, adaLN modulation V (D^2 + D); a long skip 2 D^2;
    attention to a caption q D^2 + D, kv 2 D (W + 1), output D^2. Replicated: for each residual branch its last layer's
    bias D and its gates; the scales of QK-norm.
    """
    D, M, V = model.hidden_size, model.mlp_size, _modulations(model, block)
    branches, skips = _branches(model, block), _skips(model, block)
    gates = [size for size in (model.gate_parts.a, model.gate_parts.b) if size]
    sharded = (3 * D * D + 3 * D) + D * D + (D * M + M) + M * D + skips * 2 * D * D + V * (D * D + D)
    text = _reads_text(model)
    sharded += text * ((D * D + D) + 2 * D * (model.text.width + 1) + D * D)
    norms = 2 * model.qk_norm * (1 + text)
    replicated = branches * (D + sum(gates)) + norms * model.head_size
    return Parameters(sharded, replicated, 10 + 2 * skips + 6 * text + branches * len(gates) + norms)


def blocks_parameters(model: ModelConfig, blocks: Iterable[int]) -> Parameters:
    """Parameters of several blocks."""
    return sum((block_parameters(model, block) for block in blocks), NO_PARAMETERS)


def embedding_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the embeddings: patches, timestep (two layers), classes and pooled caption (two layers).

    All are replicated. With p values of a patch: p D + D, 256 D + D + D^2 + D, (classes + 1) D, P D + D + D^2 + D.
    """
    D, patch = model.hidden_size, model.input.channels * math.prod(model.patch_size)
    classes = model.num_classes + 1 if model.condition == "class" else 0
    text = (model.text.pooled_width * D + D) + (D * D + D) if _reads_text(model) else 0
    replicated = (patch * D + D) + (TIMESTEP_FREQUENCIES * D + D) + (D * D + D) + classes * D + text
    return Parameters(0, replicated, 6 + (classes > 0) + 4 * (text > 0))


def head_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the head: adaLN modulation 2 (D^2 + D), sharded, and the last layer, D + 1 for each output."""
    D = model.hidden_size
    return Parameters(2 * (D * D + D), D * _outputs(model) + _outputs(model), 4)


def model_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the full model."""
    return embedding_parameters(model) + blocks_parameters(model, range(model.depth)) + head_parameters(model)


def block_flops(model: ModelConfig, block: int = 0) -> int:
    """Floating-point operations of one block's forward on one sample; a multiply-add counts as two.

    2 S (4 D^2 + 2 D M) for qkv, attention output and MLP, 4 S K D for attention to K tokens each, 2 V D^2 for the
    modulation, and 4 S D^2 each for a long skip and for queries and output of attention to a caption. Keys, values and
    attention of a caption of N tokens, N (4 W + 4 S) D, are left out: N depends on the data.
    """
    S, D, M, V = model.tokens, model.hidden_size, model.mlp_size, _modulations(model, block)
    frames, rows, columns = model.grid
    keys = {"full": S, "spatial": rows * columns, "temporal": frames}[model.attention_scope(block)]  # of each token
    products = 4 * D * D + 2 * D * M + 2 * D * D * (_skips(model, block) + _reads_text(model))
    return 2 * S * products + 4 * S * keys * D + 2 * V * D * D


def blocks_flops(model: ModelConfig, blocks: Iterable[int]) -> int:
    """Floating-point operations of several blocks' forward on one sample."""
    return sum(block_flops(model, block) for block in blocks)


def embedding_flops(model: ModelConfig) -> int:
    """Floating-point operations of the embeddings on one sample.

    2 S p D for patches of p values, 2 (256 D + D^2) for the timestep.
    """
    S, D = model.tokens, model.hidden_size
    patch = model.input.channels * math.prod(model.patch_size)
    return 2 * S * patch * D + 2 * (TIMESTEP_FREQUENCIES * D + D * D)


def head_flops(model: ModelConfig) -> int:
    """Floating-point operations of the head on one sample: the last layer and 4 D^2 for the modulation."""
    return 2 * model.tokens * model.hidden_size * _outputs(model) + 4 * model.hidden_size**2


def model_flops(model: ModelConfig, size: Sequence[int] | None = None) -> int:
    """Floating-point operations of the forward on one sample; a training step takes three times as many.

    Args:
        size: of the sample's latents, (T, H, W); None: the configured one.
    """
    if size is not None:
        T, H, W = size
        sized = model.input.model_copy(update={"frames": T, "height": H, "width": W})
        model = model.model_copy(update={"input": sized})
    return embedding_flops(model) + blocks_flops(model, range(model.depth)) + head_flops(model)


def recomputed_flops(config: RunConfig) -> int:
    """Floating-point operations that activation checkpointing repeats in a step, for one sample.

    A forward of each block that is recomputed; `selective` repeats element-wise operations only, which do not count.
    """
    recomputed = [block for block in range(config.model.depth) if _policy(config, block) == "full"]
    return blocks_flops(config.model, recomputed)


def block_activation_bytes(config: RunConfig, samples: int, policy: str, block: int = 0) -> float:
    """Bytes that one block saves in its forward for its backward, on one tensor-parallel rank.

    A multiple of S B D elements of r bytes (residual stream) or c bytes (branches):

    - `full` saves the block's input: r.
    - `selective` saves the block's input and the outputs of matrix products: r + 2 c, of the tokens of this rank, and
      (4 + M / D) c, sharded. A long skip adds c; attention to a caption adds c and, sharded, 2 c.
    - `none` saves, of the tokens of this rank, the inputs, normalized inputs and ungated outputs of both branches (6 r)
      and the modulated inputs (2 c); and, sharded, q, k, v, the attention output and its copy in token order (5 c) and
      the MLP's hidden layer before and after GELU (2 M / D c). A long skip adds its input, that normalized, its output
      (3 r) and, sharded, its concatenated input (2 c). Attention to a caption is a third branch (3 r + c) with,
      sharded, q, its output and the copy of that (3 c); its keys and values are left out.

    Sequence parallelism divides the tokens of a rank by the tensor-parallel size. `_query_key_bytes` adds to `none`.
    """
    model, train, parallel = config.model, config.train, config.parallel
    r, c = PRECISIONS[train.residual_dtype].bytes, PRECISIONS[train.precision].bytes
    elements = model.tokens * samples * model.hidden_size
    token_ranks = parallel.tensor if parallel.sequence else 1
    ratio, skips, text = model.mlp_size / model.hidden_size, _skips(model, block), _reads_text(model)
    if policy == "full":
        return elements * r / token_ranks
    if policy == "selective":
        by_tokens, sharded = r + (2 + skips + text) * c, (4 + 2 * text + ratio) * c
        return elements * (by_tokens / token_ranks + sharded / parallel.tensor)
    by_tokens = (6 + 3 * skips + 3 * text) * r + (2 + text) * c
    sharded = (5 + 2 * ratio + 2 * skips + 3 * text) * c + _query_key_bytes(config, c)
    return elements * (by_tokens / token_ranks + sharded / parallel.tensor)


def _query_key_bytes(config: RunConfig, c: int) -> int:
    """Extra bytes saved for backward by QK-norm or RoPE, for each element of the hidden states.

    With either, attention saves queries and keys of its own (2 c). QK-norm saves its input and its output before the
    scales, of both, in fp32: 16 bytes, or 8 if the branch computes in fp32 and its input is saved already.
    """
    model = config.model
    copies = model.qk_norm or model.positions == "rotary"
    return 2 * c * copies + model.qk_norm * (8 if c == FLOAT32.bytes else 16)


def blocks_activation_bytes(config: RunConfig, samples: int, blocks: Iterable[int]) -> float:
    """Bytes that successive blocks save under the policy of `parallel.recompute`."""
    return sum(block_activation_bytes(config, samples, _policy(config, nth), block) for nth, block in enumerate(blocks))


def _policy(config: RunConfig, nth: int) -> str:
    """Policy of `parallel.recompute` for the nth block of a chunk: none, selective or full."""
    policy, _, every = config.parallel.recompute.partition("_")
    return policy if policy != "every" else "none" if nth % int(every) else "full"


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's model state at the end of a step's last backward."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 master weights, exp_avg and exp_avg_sq
    ema: int  # EMA weights
    host: int = 0  # of host memory: gradients, optimizer and EMA under parallel.offload, beside the total

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.ema


def state_bytes(config: RunConfig, parameters: int, shards: int, keep_gathered: bool) -> StateBytes:
    """Bytes of the state of `parameters` parameters of a model replica's rank, sharded over `shards` ranks.

    With c bytes of the compute dtype: parameters c, gradients 4, optimizer 12 and EMA 4 each. ZeRO shards optimizer and
    EMA from stage 1, gradients from stage 2, parameters in stage 3. `keep_gathered` (stage 3) adds the unsharded
    parameters and gradients. `parallel.offload` moves optimizer and EMA, and one more copy of the sharded gradients, to
    the host.
    """
    stage, compute = config.parallel.zero_stage, PRECISIONS[config.train.precision].bytes
    shard = math.ceil(parameters / shards)
    optimizer = shard if stage else parameters
    held = shard if stage == 3 else parameters
    gradients = shard if stage >= 2 else parameters
    gathered = parameters if keep_gathered and stage == 3 and shards > 1 else 0  # of one rank the shard is everything
    parameters_held, gradients_held = compute * (held + gathered), 4 * (gradients + gathered)
    if config.parallel.offload == "optimizer":
        return StateBytes(parameters_held, gradients_held, optimizer=0, ema=0, host=20 * shard)
    return StateBytes(
        parameters=parameters_held,
        gradients=gradients_held,
        optimizer=12 * optimizer,
        ema=4 * optimizer,
    )
