"""The cross-entropy of a linear map on csrc/cpu/linear_cross_entropy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast._ext import C
from vlmfast.ops import _native
from vlmfast.ops._native import address


def unsupported(x: Tensor, w: Tensor) -> str | None:
    """None, or why the compiled kernels cannot run this call."""
    return _native.unsupported(x, w)


def forward(
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [M] int64 in [0, V)
    factor: Tensor,  # []
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(losses [M], lse [M], dx [M, D], dw [V, D], dbias [V]), the first two float64, the gradients float32.

    The gradients are those of factor * losses.sum(); one that is not needed is [0].
    """
    losses, lse = (_native.empty(len(x), dtype=torch.float64) for _ in range(2))
    weight = factor.float().expand(len(x)).contiguous()
    needs = need_x, need_w, need_bias
    gradients = _run(x, w, bias, labels, weight, label_smoothing, z_loss, *needs, workspace, losses, lse)
    return losses, lse, *gradients


def backward(
    grad: Tensor,  # [M]
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,  # [M] float64
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, D], dw [V, D], dbias [V]) of (grad * losses).sum(), float32; [0] for one not needed."""
    weight, lse = grad.float().contiguous(), lse.contiguous()
    needs = need_x, need_w, need_bias
    return _run(x, w, bias, labels, weight, label_smoothing, z_loss, *needs, workspace, None, lse)


def _run(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight: Tensor,  # [M] float32, of each row's loss
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    workspace: int,
    losses: Tensor | None,  # [M] to be filled, as lse; None where lse is known
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x, w, labels = x.contiguous(), w.contiguous(), labels.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    dx, dw = _native.gradients(x, w, need_x, need_w)
    dbias = _native.empty(len(w) if need_bias else 0)
    x_matrix, w_matrix, D, _, threads = _native.pair(x, w, False)
    options = (*map(address, (bias, labels, weight)), label_smoothing, z_loss, workspace, losses is None)
    C.linear_cross_entropy(x_matrix, w_matrix, D, threads, *options, *map(address, (losses, lse, dx, dw, dbias)))
    return dx, dw, dbias
