"""The hinge losses on csrc/cpu/hinge_loss.isa.cpp."""

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
    x: Tensor,  # [B, D]
    y: Tensor,  # [B, D]
    margin: float,
    hardest: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(loss [], dx [B, D] float32, dy) for an incoming gradient of 1; [0] for one not needed."""
    x, y = x.contiguous(), y.contiguous()
    dx, dy = _native.gradients(x, y, need_x, need_y)
    loss = C.hinge_loss(*_native.pair(x, y, normalize), margin, hardest, address(dx), address(dy))
    return torch.tensor(loss, dtype=torch.float32), dx, dy
