"""The stack of pre-norm blocks that both towers share."""

from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmfast.layers.attention import Attention, take
from vlmfast.layers.mlp import Mlp
from vlmfast.layers.norm import LayerNorm


class LayerScale(nn.Module):
    """Each feature times its own learned factor, which starts near zero so that a deep tower starts near the identity.

    Equals:
        x * gamma

    Args:
        width: C, features of a token.
        start: what every factor starts at.
        x: [..., C] floating.
    Returns: [..., C].
    Source: Touvron et al. 2021, section 2.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm residual block: attention between tokens, then a perceptron on each.

    Equals:
        x = x + ls_1(attn(ln_1(x)))
        x + ls_2(mlp(ln_2(x)))

    Args:
        width: C, features of a token.
        heads: attention heads.
        mlp_ratio: the perceptron's hidden features, as a multiple of C.
        activation: a key of `vlmfast.layers.ACTIVATIONS`.
        causal: whether token t sees only tokens 0 .. t.
        eps: of both normalisations.
        layer_scale: what `ls_1` and `ls_2` start at; None: there are none.
        x: [B, T, C] floating; or packed sequences [tokens, C], with
        cu_seqlens, max_seqlen: of `vlmfast.attention`.
        pooled: [N] int64, the only tokens whose outcome is wanted, numbered from 0 through all sequences; None: all.
    Returns: the shape of x, or [N, C] where `pooled` is given.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        *,
        causal: bool = False,
        eps: float = 1e-5,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal=causal)
        self.ls_1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ln_2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)
        self.ls_2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        x = take(x, pooled) + self.ls_1(self.attn(self.ln_1(x), cu_seqlens, max_seqlen, pooled))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """`layers` blocks, one after the other.

    Args:
        layers: number of blocks.
        width, heads, mlp_ratio, activation, causal, eps, layer_scale: as for `Block`.
        x: [B, T, C] floating; or packed sequences [tokens, C] of any lengths, with
        cu_seqlens, max_seqlen: of `vlmfast.attention`.
        pooled: [N] int64, the only tokens that the last block is to give, numbered from 0 through all sequences. Their
            keys and values are still all tokens', but its perceptron is spared all others. None: all.
        blocks: how many blocks run, from the first on; None: all.
    Returns: the shape of x, or [N, C] where `pooled` is given, before any final normalisation.

    `checkpointing = True` keeps only each block's input for the backward, which runs the block a second time.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        *,
        causal: bool = False,
        eps: float = 1e-5,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, activation, causal=causal, eps=eps, layer_scale=layer_scale)
            for _ in range(layers)
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        pooled: Tensor | None = None,
        blocks: int | None = None,
    ) -> Tensor:
        blocks = len(self.resblocks) if blocks is None else blocks
        for i, block in enumerate(islice(self.resblocks, blocks), 1):
            wanted = pooled if i == blocks else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cu_seqlens, max_seqlen, wanted, use_reentrant=False)
            else:
                x = block(x, cu_seqlens, max_seqlen, wanted)
        return x
