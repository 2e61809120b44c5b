"""The two-layer perceptron of a transformer block, and the activations that released models use."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.layers.linear import Linear


def quick_gelu(x: Tensor) -> Tensor:
    """`x` gated by a sigmoid, the activation of OpenAI's CLIP weights.

    Equals:
        x * (1.702 * x).sigmoid()

    Args:
        x: any shape, floating.
    Returns: the shape and dtype of `x`.
    Source: Hendrycks & Gimpel 2016, section 2, the sigmoid approximation of GELU.
    """
    return x * (1.702 * x).sigmoid()


# Weights load just as well into a model with the wrong activation, and silently lose accuracy: the config names it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """Two linear maps with an activation between them, on each token alone.

    Equals:
        c_proj(ACTIVATIONS[activation](c_fc(x)))

    Args:
        width: C, features of a token.
        hidden: features between the two maps.
        activation: a key of `ACTIVATIONS`.
        x: [..., C] floating.
    Returns: [..., C].
    Raises:
        ValueError: the activation is not a key of `ACTIVATIONS`.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"Mlp: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))

    def extra_repr(self) -> str:
        return self.activation
