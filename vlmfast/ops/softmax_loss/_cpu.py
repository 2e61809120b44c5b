"""The softmax losses on csrc/cpu/softmax_loss.isa.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast._ext import C
from vlmfast.ops import _native
from vlmfast.ops._native import address

_FORMS = {"index": 0, "out": 1, "in": 2}


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the compiled kernels cannot run this call."""
    return _native.unsupported(x, y)


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_ids: Tensor,  # [M] int64
    col_ids: Tensor,  # [N] int64
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_share: Tensor | None,
    col_share: Tensor | None,
    form: str,
    label_smoothing: float,
    normalize: bool,
    precision: str,
    keep: int,  # bytes that may be kept for the backward
) -> tuple[Tensor, ...]:
    """(loss [], row_lse [M], col_lse [N], row_pos_lse [M], col_pos_lse [N], kept); what has no use is [0].

    kept: S [M, N] as bytes, where the backward is spared from computing it again.
    """
    x, y = x.contiguous(), y.contiguous()
    M = 0 if row_weight is None else len(x)
    N = 0 if col_weight is None else len(y)
    sizes = (M, N, M, N) if form == "in" else (M, N, 0, 0)
    lses = [_native.empty(size, dtype=torch.float64) for size in sizes]
    ids = _compact(row_ids, col_ids, form)
    rows = tuple(map(address, (ids[0], row_weight, row_share, lses[0], lses[2])))
    cols = tuple(map(address, (ids[1], col_weight, col_share, lses[1], lses[3])))
    kept = _native.empty(*_kept_shape(x, y, keep))
    options = (logit_scale.item(), label_smoothing, _FORMS[form], address(kept))
    loss = C.softmax_loss_forward(*_native.pair(x, y, normalize), rows, cols, *options)
    return torch.tensor(loss, dtype=torch.float32), *lses, kept.view(torch.uint8)


def backward(
    grad: Tensor,  # []
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_share: Tensor | None,
    col_share: Tensor | None,
    form: str,
    label_smoothing: float,
    normalize: bool,
    row_lse: Tensor,
    col_lse: Tensor,
    row_pos_lse: Tensor,
    col_pos_lse: Tensor,
    kept: Tensor,
    need_x: bool,
    need_y: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(dx [M, D] in x's dtype, dy [N, D] in y's, dscale []); an embedding gradient that is not needed is [0]."""
    x, y = x.contiguous(), y.contiguous()
    # The gradient of the scale is a by-product of either embedding's.
    dx, dy = _native.gradients(x, y, need_x or not need_y, need_y)
    ids = _compact(row_ids, col_ids, form)
    rows = tuple(map(address, (ids[0], row_weight, row_share, row_lse, row_pos_lse)))
    cols = tuple(map(address, (ids[1], col_weight, col_share, col_lse, col_pos_lse)))
    options = (logit_scale.item(), label_smoothing, _FORMS[form], address(kept), grad.item(), address(dx), address(dy))
    dscale = C.softmax_loss_backward(*_native.pair(x, y, normalize), rows, cols, *options)
    dx = dx.to(x.dtype) if need_x else x.new_empty(0)
    return dx, dy.to(y.dtype), torch.tensor(dscale, dtype=torch.float32)


def _kept_shape(x: Tensor, y: Tensor, keep: int) -> tuple[int, ...]:
    """That of S [M, N] where it is no larger than the embeddings: 6 MND flops instead of 8, and memory is linear."""
    M, N, D = len(x), len(y), x.shape[1]
    return (M, N) if M * N <= (M + N) * D and keep >= 4 * M * N else (0,)


def _compact(row_ids: Tensor, col_ids: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The ids as int32: indices as they are, group ids by the rank of their value."""
    if form != "index":
        ranks = torch.cat([row_ids, col_ids]).unique(return_inverse=True)[1]
        row_ids, col_ids = ranks[: len(row_ids)], ranks[len(row_ids) :]
    return row_ids.to(torch.int32), col_ids.to(torch.int32)
