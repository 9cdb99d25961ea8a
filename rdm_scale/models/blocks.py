"""Transformer blocks: gated residual branches (self-attention and MLP at least) with adaLN modulation.

Shapes: S tokens, B samples, D hidden size, N caption tokens, H attention heads, d channels of a head.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.conditions import TextCondition
from rdm_scale.config import AttentionScope, ModelConfig
from rdm_scale.models.embeddings import apply_rope
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.layers import LayerFactory

NORM_EPS = 1e-6


class Conditioning(NamedTuple):
    """Inputs of every block beside the hidden states."""

    embedding: Tensor  # [B, D]: timestep embedding plus that of the label or the pooled caption
    grid: tuple[int, int, int]  # tokens along T, H and W
    text: TextCondition | None = None
    rope: Tensor | None = None  # [2, S, d / 2]: cosines and sines, for rotary positions


class Modulation(NamedTuple):
    """Modulation parameters of a residual branch: [B, D], or broadcastable to it."""

    shift: Tensor  # in the branch's dtype
    scale: Tensor
    beta: Tensor  # in the residual stream's dtype
    alpha: Tensor | None  # None: 1


def modulated_norm(z: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without affine parameters, then x * (1 + scale) + shift.

    Computed in the dtype of z, returned in the dtype of `shift_BD`.
    """
    x = F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)
    return (x * (1 + scale_BD.to(x.dtype)) + shift_BD.to(x.dtype)).to(shift_BD.dtype)


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm over the last dimension, computed in fp32 and returned in the dtype of x."""
    return F.rms_norm(x.float(), x.shape[-1:], scale.float(), NORM_EPS).to(x.dtype)


class QueryKeyNorm(nn.Module):
    """RMS norm of queries and keys [..., d] with learned scales, which all heads share.

    See arXiv 2302.05442, section 2; as RMS norm in arXiv 2403.03206.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.sum_gradients_over_heads = layers.sum_gradients_over_heads
        self.q_scale = nn.Parameter(torch.empty(config.head_size))
        self.k_scale = nn.Parameter(torch.empty(config.head_size))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_scale, k_scale = self.sum_gradients_over_heads([self.q_scale, self.k_scale])
        return _rms_norm(q, q_scale), _rms_norm(k, k_scale)


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v for q, k, v [..., tokens, d].

    A module of its own, so that selective activation checkpointing can keep its output.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class BranchFunction(nn.Module):
    """Base class of F in a residual branch z + alpha * F(x; c) + beta, x being the normalized, modulated hidden states.

    The last layer leaves its bias out of F (`LayerFactory.row`); the gate adds it as a part of beta.
    """

    last_layer: str  # name of the attribute that holds it

    @property
    def last_bias(self) -> Tensor:
        """Bias [D] of the last layer."""
        bias: Tensor = getattr(self, self.last_layer).bias
        return bias

    def forward(self, x_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Attention(BranchFunction):
    """Multi-head self-attention: full, spatial or temporal.

    A token attends to all tokens, to those of its frame, or to those at its position in all frames. The rows of the qkv
    weight are ordered (head, q/k/v, channel), so that a contiguous slice of them holds entire heads.
    """

    last_layer = "out"

    def __init__(self, config: ModelConfig, layers: LayerFactory, scope: AttentionScope) -> None:
        super().__init__()
        self.scope = scope
        self.head_size = config.head_size
        self.qkv = layers.column(config.hidden_size, 3 * config.hidden_size)
        self.attend = DotProductAttention()
        self.out = layers.row(config.hidden_size, config.hidden_size)
        self.norm = QueryKeyNorm(config, layers) if config.qk_norm else None

    def forward(self, x_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x_SBD)
        S, B, width = qkv.shape  # width: of this rank's heads
        frames = 1 if self.scope == "full" else conditioning.grid[0]
        qkv = qkv.view(frames, S // frames, B * width // (3 * self.head_size), 3, self.head_size)
        # [group, sample and head, token, channel]: the tokens of a group attend to each other.
        order = (1, 2, 0, 3) if self.scope == "temporal" else (0, 2, 1, 3)
        q, k, v = qkv.unbind(3)
        if self.norm is not None:
            q, k = self.norm(q, k)
        if conditioning.rope is not None:
            rope = conditioning.rope.view(2, frames, S // frames, 1, -1)
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        heads = self.attend(*(x.permute(order) for x in (q, k, v)))
        back = (2, 0, 1, 3) if self.scope == "temporal" else (0, 2, 1, 3)
        return self.out(heads.permute(back).reshape(S, B, -1))


class CrossAttention(BranchFunction):
    """Multi-head attention from all tokens to those of the caption.

    Caption tokens are layer-normalized first, because text encoders differ in scale.
    """

    last_layer = "out"

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = layers.column(config.hidden_size, config.hidden_size)
        self.kv = layers.column(config.text.width, 2 * config.hidden_size, replicated_input=True)
        self.attend = DotProductAttention()
        self.out = layers.row(config.hidden_size, config.hidden_size)
        self.norm = QueryKeyNorm(config, layers) if config.qk_norm else None

    def forward(self, x_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        assert conditioning.text is not None
        tokens_BND = conditioning.text.tokens
        text = F.layer_norm(tokens_BND.float(), tokens_BND.shape[-1:], eps=NORM_EPS).to(x_SBD.dtype)
        q, kv = self.q(x_SBD), self.kv(text)
        q = q.unflatten(2, (-1, self.head_size))
        k, v = kv.unflatten(2, (-1, 2, self.head_size)).unbind(3)
        if self.norm is not None:
            q, k = self.norm(q, k)
        heads_BHSd = self.attend(
            q.permute(1, 2, 0, 3), k.transpose(1, 2), v.transpose(1, 2), conditioning.text.mask[:, None, None]
        )
        return self.out(heads_BHSd.permute(2, 0, 1, 3).flatten(2))


class Mlp(BranchFunction):
    """Two linear layers with the tanh approximation of GELU between them."""

    last_layer = "down"

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.up = layers.column(config.hidden_size, config.mlp_size)
        self.down = layers.row(config.mlp_size, config.hidden_size)

    def forward(self, x_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class LongSkip(BranchFunction):
    """Linear layer over [x; norm(skip)], skip being the output of an earlier block (U-ViT, arXiv 2209.12152).

    In U-ViT the layer's output replaces the hidden states; here it is a residual branch.
    """

    last_layer = "join"

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.split_features = layers.split_features
        self.join = layers.row(2 * config.hidden_size, config.hidden_size)

    def forward(self, x_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        assert skip_SBD is not None
        normed_SBD = F.layer_norm(skip_SBD, skip_SBD.shape[-1:], eps=NORM_EPS).to(x_SBD.dtype)
        return self.join(self.split_features(torch.cat([x_SBD, normed_SBD], dim=-1)))


class ResidualBranch(nn.Module):
    """Residual branch with its gate: z + alpha * F(modulated_norm(z); c) + beta (the mrs-unit of Neural-RDM).

    `modulation_parameters` computes what is the same for all tokens, `forward` works on the tokens. Under sequence
    parallelism the gradients of the former's output are summed over the ranks, which hold different tokens.
    """

    def __init__(self, function: BranchFunction, gate: ResidualGate) -> None:
        super().__init__()
        self.branch = function
        self.gate = gate

    @property
    def num_modulations(self) -> int:
        """Number of adaLN outputs [B, D] that the branch takes: shift, scale and, if the gate is conditional, g."""
        return 3 if self.gate.conditional else 2

    def modulation_parameters(self, modulation_BD: Sequence[Tensor], dtype: torch.dtype) -> Modulation:
        """Modulation parameters from the branch's adaLN outputs; alpha and beta in `dtype`."""
        shift_BD, scale_BD, *g_BD = modulation_BD
        alpha, beta = self.gate(g_BD[0] if g_BD else None, self.branch.last_bias, dtype)
        return Modulation(shift_BD, scale_BD, beta, alpha)

    def forward(
        self, z_SBD: Tensor, conditioning: Conditioning, modulation: Modulation, skip_SBD: Tensor | None = None
    ) -> Tensor:
        x_SBD = modulated_norm(z_SBD, modulation.shift, modulation.scale)
        update_SBD = self.branch(x_SBD, conditioning, skip_SBD).to(z_SBD.dtype)
        alpha = modulation.alpha
        z_SBD = z_SBD + update_SBD if alpha is None else torch.addcmul(z_SBD, alpha, update_SBD)
        return z_SBD + modulation.beta


class Block(nn.Module):
    """Residual branches in sequence: long skip, self-attention, attention to the caption, MLP.

    Blocks in the second half of a u stack have the long skip, and models with text the attention to the caption.
    `modulation`, the adaLN layer, maps the conditioning embedding to (shift, scale[, g]) of each branch.

    Attributes:
        function: what `forward` calls with the block and its inputs. Activation checkpointing and compilation replace
            it by functions that compute the same as `run` (parallel/recompute.py, parallel/compile.py).
        kind: words for the structure; blocks of a model that share it differ in their parameters only.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, number: int) -> None:
        super().__init__()

        def gated(function: BranchFunction) -> ResidualBranch:
            return ResidualBranch(function, ResidualGate(config))

        self.skip = gated(LongSkip(config, layers)) if config.skip_source(number) is not None else None
        self.attention = gated(Attention(config, layers, config.attention_scope(number)))
        self.cross_attention = gated(CrossAttention(config, layers)) if config.condition == "text" else None
        self.mlp = gated(Mlp(config, layers))
        self.sum_gradients_over_tokens = layers.sum_gradients_over_tokens
        self.width = config.hidden_size
        modulations = sum(branch.num_modulations for branch in self.branches())
        self.modulation = layers.gathered(self.width, modulations * self.width)
        self.function: BlockFunction = Block.run
        self.kind = f"{self.attention.branch.scope} attention" + ", long skip" * (self.skip is not None)

    def branches(self) -> list[ResidualBranch]:
        """Residual branches in the order of their execution."""
        branches = (self.skip, self.attention, self.cross_attention, self.mlp)
        return [branch for branch in branches if branch is not None]

    def forward(self, z_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        return self.function(self, z_SBD, conditioning, skip_SBD)

    def run(self, z_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
        """Forward as it is, neither checkpointed nor compiled."""
        modulations = self.modulation_parameters(conditioning.embedding, z_SBD.dtype)
        for branch, modulation in zip(self.branches(), modulations, strict=True):
            z_SBD = branch(z_SBD, conditioning, modulation, skip_SBD if branch is self.skip else None)
        return z_SBD

    def modulation_parameters(self, embedding_BD: Tensor, dtype: torch.dtype) -> list[Modulation]:
        """Modulation parameters of each branch (adaLN: SiLU and one linear layer); alpha and beta in `dtype`."""
        outputs = iter(self.modulation(F.silu(embedding_BD)).split(self.width, dim=-1))
        modulations = [
            branch.modulation_parameters([*islice(outputs, branch.num_modulations)], dtype)
            for branch in self.branches()
        ]
        # One all-reduce for the gradients of all of them.
        tensors = [tensor for modulation in modulations for tensor in modulation if tensor is not None]
        summed = iter(self.sum_gradients_over_tokens(tensors))
        return [
            Modulation(next(summed), next(summed), next(summed), None if given.alpha is None else next(summed))
            for given in modulations
        ]


BlockFunction = Callable[[Block, Tensor, Conditioning, Tensor | None], Tensor]
