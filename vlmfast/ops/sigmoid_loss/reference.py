"""The definition of the sigmoid loss: plain PyTorch, some rows of the [M, N] logits at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops._unit import accumulator, unit_rows, unit_rows_backward

CHUNK = 2**20  # logits held at once


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] and its gradients dx [M, D], dy [N, D], dscale [], dbias []; those not needed are empty [0] or zero."""
    acc = accumulator(x, y)
    unit_x, length_x = unit_rows(x, acc, normalize)
    unit_y, length_y = unit_rows(y, acc, normalize)
    scale, bias = logit_scale.to(acc), logit_bias.to(acc)
    M, N = len(x), len(y)

    loss, dscale, dbias = (unit_x.new_zeros(()) for _ in range(3))
    dx, dy = (u.new_zeros(u.shape if need else 0) for u, need in ((unit_x, need_x), (unit_y, need_y)))
    for rows in torch.arange(M).split(max(1, CHUNK // N)):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        s = unit_x[start:stop] @ unit_y.T  # [rows, N]
        t = torch.full_like(s, -1)
        t.diagonal(start + offset).fill_(1)  # +1 for a pair, -1 for all else
        z = scale * s + bias
        loss -= F.logsigmoid(t * z).sum() / M
        # Rows and columns are not coupled, so the gradient needs no second pass: d loss / d z is known here.
        if need_x or need_y or need_scalars:
            dz = -t * torch.sigmoid(-t * z) / M
            dscale += (dz * s).sum()
            dbias += dz.sum()
            if need_x:
                dx[start:stop] = scale * (dz @ unit_y)
            if need_y:
                dy += scale * (dz.T @ unit_x[start:stop])

    if need_x:
        dx = unit_rows_backward(dx, unit_x, length_x, normalize)
    if need_y:
        dy = unit_rows_backward(dy, unit_y, length_y, normalize)
    return loss, dx, dy, dscale, dbias
