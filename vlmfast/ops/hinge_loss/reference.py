"""The definition of the hinge losses: plain PyTorch, some rows of the [B, B] similarities at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmfast.ops._unit import accumulator, unit_rows, unit_rows_backward

CHUNK = 2**20  # similarities held at once


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] and its gradients dx [B, D], dy [B, D]; those not needed are empty [0]."""
    acc = accumulator(x, y)
    unit_x, length_x = unit_rows(x, acc, normalize)
    unit_y, length_y = unit_rows(y, acc, normalize)

    loss, dx, dy = (_hardest if hardest else _sum)(unit_x, unit_y, margin, need_x or need_y)

    dx = unit_rows_backward(dx, unit_x, length_x, normalize) if need_x else dx.new_empty(0)
    dy = unit_rows_backward(dy, unit_y, length_y, normalize) if need_y else dy.new_empty(0)
    return loss, dx, dy


def _sum(x: Tensor, y: Tensor, margin: float, need: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Every violation counts. Each active hinge pulls with weight one on s_ij and on the positive that it holds."""
    positive = (x * y).sum(1)  # [B] s_ii
    loss, dx, dy = x.new_zeros(()), torch.zeros_like(x), torch.zeros_like(y)
    active = torch.zeros_like(positive)  # [B] the active hinges that hold s_ii
    for start, s in _similarities(x, y):
        rows = slice(start, start + len(s))
        row_cost = (margin + s - positive[rows, None]).clamp(min=0)  # image i against text j
        column_cost = (margin + s - positive).clamp(min=0)  # text j against image i
        for cost in (row_cost, column_cost):
            cost.diagonal(start).zero_()
            loss += cost.sum()
        if need:
            ds = (row_cost > 0).to(s.dtype) + (column_cost > 0).to(s.dtype)
            dx[rows] = ds @ y
            dy += ds.T @ x[rows]
            active[rows] += (row_cost > 0).sum(1)
            active += (column_cost > 0).sum(0)
    return loss, dx - active[:, None] * y, dy - active[:, None] * x


def _hardest(x: Tensor, y: Tensor, margin: float, need: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Only the worst violation of each row and of each column counts; among equals, the one of lowest index."""
    positive = (x * y).sum(1)  # [B] s_ii
    row_best, column_best = (torch.full_like(positive, -torch.inf) for _ in range(2))
    row_at, column_at = (torch.zeros(len(x), dtype=torch.int64, device=x.device) for _ in range(2))
    for start, s in _similarities(x, y):
        rows = slice(start, start + len(s))
        s.diagonal(start).fill_(-torch.inf)
        row_best[rows], row_at[rows] = s.max(1)  # of equal values, max gives the first
        best, at = s.max(0)
        better = ~(best <= column_best)  # true for NaN, so that it stays visible
        column_best = torch.where(better, best, column_best)
        column_at = torch.where(better, start + at, column_at)

    row_cost = (margin + row_best - positive).clamp(min=0)  # image i against its hardest text
    column_cost = (margin + column_best - positive).clamp(min=0)  # text j against its hardest image
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    if need:
        row_on, column_on = (row_cost > 0).to(x.dtype)[:, None], (column_cost > 0).to(x.dtype)[:, None]
        dx += row_on * y[row_at] - (row_on + column_on) * y
        dy += column_on * x[column_at] - (row_on + column_on) * x
        dx.index_add_(0, column_at, column_on * y)
        dy.index_add_(0, row_at, row_on * x)
    return row_cost.sum() + column_cost.sum(), dx, dy


def _similarities(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, [rows, B] similarities) for some rows at a time."""
    B = len(x)
    step = max(1, CHUNK // B)
    for start in range(0, B, step):
        yield start, x[start : start + step] @ y.T
