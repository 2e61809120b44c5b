"""Layer and root-mean-square normalisation with float32 statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LayerNorm(nn.LayerNorm):
    """Rows of `x` with mean 0 and variance 1, times `weight`, plus `bias`; computed in float32 or wider.

    Equals:
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * weight + bias

    Args:
        x: [..., C], any floating dtype; bfloat16 and float16 are widened to float32 and rounded once, at the end.
    Returns: [..., C] in the dtype of `x`.
    Source: Ba et al. 2016; eps 1e-5 and the float32 statistics as in OpenAI's CLIP.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RmsNorm(nn.Module):
    """Rows of `x` with a root mean square of 1, times `weight`; computed in float32 or wider.

    Equals:
        x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    Args:
        width: C, features of a token.
        eps: added to the mean square.
        x: [..., C], any floating dtype; bfloat16 and float16 are widened to float32 and rounded once, at the end.
    Returns: [..., C] in the dtype of `x`.
    Source: Zhang & Sennrich 2019, eq. 4. Hugging Face's rounds to the dtype of `x` before `weight`, too. While training
        on the CPU, second derivatives are refused.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        rows, weight = x.to(wide), self.weight.to(wide)
        if x.device.type != "cpu":
            return F.rms_norm(rows, weight.shape, weight, self.eps).to(x.dtype)
        if torch.is_grad_enabled():
            return _RmsNorm.apply(rows, weight, self.eps).to(x.dtype)
        return (rows * _scale(rows, self.eps)).mul_(weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row, [..., 1]."""
    # In place: for the few rows of a step of decoding, what counts is how many tensors are made.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """The norm with its gradient from layer_norm's kernel: PyTorch has none of its own for this one on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):  # one around the backward would round the sums
            shift = grad @ weight / len(weight)
        # With a mean of 0 layer_norm's gradient is ours, but for the mean of grad * weight that it takes off each row.
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        return dx.addcmul_(scale, shift[..., None]), dweight, None
