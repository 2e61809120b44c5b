"""The sigmoid loss on csrc/cpu/sigmoid_loss.isa.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast._ext import C
from vlmfast.ops import _native
from vlmfast.ops._native import address


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the compiled kernels cannot run this call."""
    return _native.unsupported(x, y)


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    offset: int,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    need_scalars: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(loss [], dx [M, D] float32, dy, dscale [], dbias []) for an incoming gradient of 1; [0] for one not needed."""
    x, y = x.contiguous(), y.contiguous()
    # The gradients of the scalars are by-products of either embedding's.
    dx, dy = _native.gradients(x, y, need_x or (need_scalars and not need_y), need_y)
    arguments = (*_native.pair(x, y, normalize), offset, logit_scale.item(), logit_bias.item())
    numbers = C.sigmoid_loss(*arguments, address(dx), address(dy))
    loss, dscale, dbias = (torch.tensor(value, dtype=torch.float32) for value in numbers)
    return loss, dx if need_x else dx.new_empty(0), dy, dscale, dbias
