"""The stack of pre-norm blocks that both towers share."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmfast.layers.attention import Attention
from vlmfast.layers.mlp import Mlp
from vlmfast.layers.norm import LayerNorm


class Block(nn.Module):
    """One pre-norm residual block: attention between tokens, then a perceptron on each.

    Equals:
        x = x + attn(ln_1(x))
        x + mlp(ln_2(x))

    Args:
        width: C, features of a token.
        heads: attention heads.
        mlp_ratio: the perceptron's hidden features, as a multiple of C.
        activation: a key of `vlmfast.layers.ACTIVATIONS`.
        causal: whether token t sees only tokens 0 .. t.
        x: [B, T, C] floating.
    Returns: [B, T, C].
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, *, causal: bool = False) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal=causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`layers` blocks, one after the other.

    Args:
        layers: number of blocks.
        width, heads, mlp_ratio, activation, causal: as for `Block`.
        x: [B, T, C] floating.
    Returns: [B, T, C], before any final normalisation.

    `checkpointing = True` keeps only each block's input for the backward, which runs the block a second time.
    """

    def __init__(
        self, layers: int, width: int, heads: int, mlp_ratio: float, activation: str, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = False
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation, causal=causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
