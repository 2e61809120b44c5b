"""The gated perceptron of Llama's blocks."""

from __future__ import annotations

from torch import Tensor, nn

from vlmfast.layers.linear import Linear
from vlmfast.layers.mlp import ACTIVATIONS


class GatedMlp(nn.Module):
    """Two linear maps of each token, one of which, activated, gates the other, and a third back to its width.

    Equals:
        down_proj(ACTIVATIONS[activation](gate_proj(x)) * up_proj(x))

    Args:
        width: C, features of a token.
        hidden: features between the maps.
        activation: a key of `ACTIVATIONS`; "silu" makes it SwiGLU.
        bias: whether the maps add one.
        x: [..., C] floating.
    Returns: [..., C].
    Raises:
        ValueError: the activation is not a key of `ACTIVATIONS`.
    Source: Shazeer 2020, eq. 6.
    """

    def __init__(self, width: int, hidden: int, activation: str = "silu", *, bias: bool = False) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"GatedMlp: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))

    def extra_repr(self) -> str:
        return self.activation
