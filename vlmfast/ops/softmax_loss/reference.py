"""Softmax losses over the rows and columns of one similarity matrix, in plain PyTorch: what every backend must equal.

The loss over columns is the loss over rows with the two sides swapped, so only the rows are written out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmfast.ops._unit import accumulator, unit_rows, unit_rows_backward

CHUNK = 256  # rows of the similarity matrix that exist at one time


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_ids: Tensor,  # [M] int64
    col_ids: Tensor,  # [N] int64
    row_weight: Tensor | None,  # [M]; None: no loss over rows
    col_weight: Tensor | None,  # [N]; None: no loss over columns
    row_share: Tensor | None,  # [M]; form "out": 1 / number of positives, 0 where there is none
    col_share: Tensor | None,  # [N]
    form: str,  # "index" | "out" | "in"
    label_smoothing: float,
    normalize: bool,
    precision: str,
    keep: int,  # bytes that may be kept for the backward
) -> tuple[Tensor, ...]:
    """(loss [], row_lse [M], col_lse [N], row_pos_lse [M], col_pos_lse [N], kept); what a call has no use for is [0].

    The log-sum-exps are float64: near 100 float32 has steps of 8e-6, and every softmax would be off by as much.
    """
    dtype = accumulator(x, y)
    (a, _), (b, _), scale = unit_rows(x, dtype, normalize), unit_rows(y, dtype, normalize), logit_scale.to(dtype)
    loss = a.new_zeros((), dtype=torch.float64)
    row_lse, col_lse, row_pos_lse, col_pos_lse = (loss.new_empty(0) for _ in range(4))
    if row_weight is not None:
        targets = (row_ids, col_ids, row_share, form, label_smoothing)
        over_rows, row_lse, row_pos_lse = _rows_forward(a, b, scale, row_weight, *targets)
        loss = loss + over_rows
    if col_weight is not None:
        targets = (col_ids, row_ids, col_share, form, label_smoothing)
        over_columns, col_lse, col_pos_lse = _rows_forward(b, a, scale, col_weight, *targets)
        loss = loss + over_columns
    return loss.to(dtype), row_lse, col_lse, row_pos_lse, col_pos_lse, x.new_empty(0, dtype=torch.uint8)


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
    dtype = accumulator(x, y)
    scale = logit_scale.to(dtype)
    (a, a_length), (b, b_length) = unit_rows(x, dtype, normalize), unit_rows(y, dtype, normalize)
    da, db, dscale = torch.zeros_like(a), torch.zeros_like(b), a.new_zeros(())
    if row_weight is not None:
        targets = (row_ids, col_ids, row_share, form, label_smoothing)
        _rows_backward(a, b, scale, row_weight, row_lse, row_pos_lse, *targets, da, db, dscale)
    if col_weight is not None:
        targets = (col_ids, row_ids, col_share, form, label_smoothing)
        _rows_backward(b, a, scale, col_weight, col_lse, col_pos_lse, *targets, db, da, dscale)
    dx = unit_rows_backward(grad * da, a, a_length, normalize).to(x.dtype) if need_x else x.new_empty(0)
    dy = unit_rows_backward(grad * db, b, b_length, normalize).to(y.dtype) if need_y else y.new_empty(0)
    return dx, dy, grad * dscale


def _rows_forward(
    a: Tensor,  # [M, D]
    b: Tensor,  # [N, D]
    scale: Tensor,
    weight: Tensor,  # [M]
    ids: Tensor,  # [M]
    other_ids: Tensor,  # [N]
    share: Tensor | None,
    form: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_i weight_i (lse_i - pull_i), lse [M], the positives' lse [M] or [0]), all float64."""
    lses, pulls = [], []
    for rows in _chunks(len(a)):
        z = scale * (a[rows] @ b.T)  # [C, N]
        positive = _positive(rows, ids, other_ids, form)
        lses.append(_logsumexp(z))
        if form == "in":
            # A row without a positive has weight 0: any finite number will do for its empty sum.
            pulls.append(_logsumexp(z.masked_fill(~positive, -torch.inf)).where(positive.any(1), 0))
        else:
            pulls.append((_target(positive, rows, share, label_smoothing, z.dtype) * z).sum(1, dtype=torch.float64))
    lse, pull = torch.cat(lses), torch.cat(pulls)
    return (weight * (lse - pull)).sum(), lse, pull if form == "in" else lse.new_empty(0)


def _rows_backward(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    weight: Tensor,
    lse: Tensor,
    pos_lse: Tensor,
    ids: Tensor,
    other_ids: Tensor,
    share: Tensor | None,
    form: str,
    label_smoothing: float,
    da: Tensor,  # added to, as db and dscale
    db: Tensor,
    dscale: Tensor,
) -> None:
    """Adds the gradients of sum_i weight_i (lse_i - pull_i): d/dz_ij = weight_i (softmax_ij - target_ij)."""
    for rows in _chunks(len(a)):
        cosine = a[rows] @ b.T  # [C, N]
        z = scale * cosine
        positive = _positive(rows, ids, other_ids, form)
        if form == "in":
            target = _softmax(z, pos_lse[rows]).where(positive, 0)
        else:
            target = _target(positive, rows, share, label_smoothing, z.dtype)
        dz = weight[rows, None] * (_softmax(z, lse[rows]) - target)
        da[rows] += scale * (dz @ b)
        db += scale * (dz.T @ a[rows])
        dscale += (dz * cosine).sum()


def _logsumexp(z: Tensor) -> Tensor:
    """z.logsumexp(1) in float64, of exponentials in z's dtype."""
    top = z.amax(1)
    return top.double() + torch.exp(z - top[:, None]).sum(1, dtype=torch.float64).log()


def _softmax(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse) in z's dtype, of a difference that is taken in float64."""
    return torch.exp((z - lse[:, None]).to(z.dtype))


def _positive(rows: slice, ids: Tensor, other_ids: Tensor, form: str) -> Tensor:
    """Which columns are positives of `rows`: a mask [C, N]."""
    if form == "index":
        other_ids = torch.arange(len(other_ids), device=ids.device)
    return ids[rows, None] == other_ids


def _target(positive: Tensor, rows: slice, share: Tensor | None, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """The distribution [C, N] that a row's softmax is pulled to: its positives alike, and the smoothing over all."""
    target = positive.to(dtype)
    if share is not None:
        target *= share[rows, None]
    return (1 - label_smoothing) * target + label_smoothing / positive.shape[1]


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
