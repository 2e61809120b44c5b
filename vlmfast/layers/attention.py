"""Self-attention with the parameter names of nn.MultiheadAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import ShapeError
from vlmfast.ops.attention import attention


def take(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Some tokens of sequences [..., C]: [N, C], or all as they are.

    Args:
        x: [B, T, C], or packed sequences [tokens, C].
        tokens: [N] int64, numbered from 0 through all sequences; None: all.
    """
    return x if tokens is None else x.flatten(0, -2).index_select(0, tokens)


class Attention(nn.Module):
    """Each token's mixture of the tokens it may look at, in `heads` independent subspaces.

    Equals, for each head on its own K = C / heads features of each of q, k, v:
        q, k, v = (x @ in_proj_weight.T + in_proj_bias).chunk(3, -1)
        out_proj(softmax(q @ k.T / K**0.5 [- inf above the diagonal if causal]) @ v)

    Args:
        width: C, features of a token.
        heads: H, which divides C.
        causal: whether token t sees only tokens 0 .. t.
        x: [B, T, C] floating; or packed sequences [tokens, C], with
        cu_seqlens, max_seqlen: of `vlmfast.attention`.
        pooled: [N] int64, the only tokens whose outcome is wanted, numbered from 0 through all sequences; None: all.
    Returns: the shape of x, or [N, C] where `pooled` is given.
    Raises:
        ShapeError: heads does not divide width.
    Source: Vaswani et al. 2017, section 3.2. Initialised like nn.MultiheadAttention.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"Attention: width must be a multiple of heads; got width {width}, heads {heads}")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        if cu_seqlens is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
            mixed = attention(q, k, v, causal=self.causal).transpose(1, 2)
        else:
            q, k, v = qkv.unbind(1)  # each [tokens, H, K]
            mixed = attention(q, k, v, causal=self.causal, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return self.out_proj(take(mixed.flatten(-2), pooled))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"
