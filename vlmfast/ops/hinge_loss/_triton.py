"""The hinge losses as Triton kernels over tiles of S: value and gradient in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import Pair, cdiv, products, store_gradient, tile_at, tl, triton
from vlmfast.ops._unit import unit_rows_backward

_GROUP = 32  # tiles whose hardest foreigners are compared at once


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(x, y)


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
    """(loss [], dx [B, D] float32, dy) for an incoming gradient of 1; [0] for one not needed."""
    p = _tiles.pair(x, y, normalize, precision, kind="hardest" if hardest else "hinge")
    positive = _tiles.paired_cosines(p, torch.arange(len(x), device=x.device))  # [B] s_ii
    if hardest:
        return _hardest(p, positive, margin, need_x, need_y)
    return _sum(p, positive, margin, need_x, need_y, workspace)


def _sum(
    p: Pair, positive: Tensor, margin: float, need_x: bool, need_y: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every violation counts. Each active hinge pulls with weight one on s_ij and on the positive that it holds."""
    B, device = len(positive), positive.device
    gradients = _tiles.Gradients(p, need_x, need_y, workspace) if need_x or need_y else None
    G = gradients.workspace if gradients else (positive, positive, 0)
    gradient = gradients.constants if gradients else {"FOLD": False, "SPLIT": False}
    constants = {"GRADIENT": gradients is not None, **gradient, **p.constants}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    active = torch.zeros_like(positive)  # [B] the active hinges that hold s_ii: whole numbers, exact in any order
    for block in gradients.blocks() if gradients else _tiles.blocks(B, B, _tiles.EDGE, _tiles.EDGE):
        row, column, rows, columns = block
        tiles_m, tiles_n = cdiv(rows, p.config.block_m), cdiv(columns, p.config.block_n)
        parts = positive.new_zeros(tiles_m * tiles_n)
        row_active, col_active = positive.new_empty(tiles_n, rows), positive.new_empty(tiles_m, columns)
        arguments = (*p.operands, positive, parts, row_active, col_active, *G, margin, *p.sizes, *block)
        _tiles.launch(_hinge_tiles, (tiles_m * tiles_n,), *arguments, config=p.config, **constants)
        loss += parts.sum(dtype=torch.float64)
        active[row : row + rows] += row_active.sum(0)
        active[column : column + columns] += col_active.sum(0)
        if gradients:
            gradients.add(*block)

    dx, dy = positive.new_empty(0), positive.new_empty(0)
    if gradients:
        # Each active hinge holds its positive as well; dx and dy are gradients of unit rows, or those over the length.
        x_turn, y_turn = active * p.x_inverse, active * p.y_inverse
        if p.folded:
            x_turn, y_turn = x_turn * p.y_inverse, y_turn * p.x_inverse
        if need_x:
            gradients.x.sums -= y_turn[:, None] * p.y
        if need_y:
            gradients.y.sums -= x_turn[:, None] * p.x
        dx, dy = gradients.results(positive.new_ones(()))
    return loss.float(), dx, dy


def _hardest(p: Pair, positive: Tensor, margin: float, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Only the worst violation of each row and of each column counts; among equals, the one of lowest index."""
    B, device = len(positive), positive.device
    best = positive.new_full((2, B), -torch.inf)  # rows', then columns'
    at = torch.zeros(2, B, dtype=torch.int64, device=device)
    for block in _tiles.blocks(B, B, _tiles.EDGE, _tiles.EDGE):
        row, column, rows, columns = block
        tiles = cdiv(rows, p.config.block_m), cdiv(columns, p.config.block_n)
        row_best, col_best = best.new_empty(tiles[1], rows), best.new_empty(tiles[0], columns)
        row_at, col_at = (torch.empty_like(values, dtype=torch.int32) for values in (row_best, col_best))
        arguments = (*p.operands, row_best, row_at, col_best, col_at, *p.sizes, *block)
        _tiles.launch(_hardest_tiles, (tiles[0] * tiles[1],), *arguments, config=p.config, **p.constants)
        for side, start, values, indices in ((0, row, row_best, row_at), (1, column, col_best, col_at)):
            count = values.shape[1]
            arguments = (values, indices, best[side, start:], at[side, start:], len(values), count)
            _tiles.launch(_merge_best, (cdiv(count, 64),), *arguments, GROUP=_GROUP, BLOCK=64)

    cost = (margin + best - positive).clamp(min=0)  # each row's and each column's hardest hinge
    dx, dy = positive.new_empty(0), positive.new_empty(0)
    if need_x or need_y:
        row_on, column_on = (cost > 0).float()[:, :, None]
        (row_at, column_at), own = at, row_on + column_on
        x, y = p.x.float() * p.x_inverse[:, None], p.y.float() * p.y_inverse[:, None]
        if need_x:
            dx = row_on * y[row_at] - own * y
            dx = _to_rows(p, "x", _add_rows(dx, column_at, column_on * y), x)
        if need_y:
            dy = column_on * x[column_at] - own * x
            dy = _to_rows(p, "y", _add_rows(dy, row_at, row_on * x), y)
    return cost.sum(), dx, dy


def _add_rows(to: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """to[at] += rows, always in one order; index_put_ would have the host look whether all of `at` is in range."""
    return torch._index_put_impl_(to, (at,), rows, accumulate=True, unsafe=True)


def _to_rows(p: Pair, of: str, gradient: Tensor, unit: Tensor) -> Tensor:
    """The gradient of unit rows as that of the rows as they came in."""
    inverse, power = (p.x_inverse, p.x_power) if of == "x" else (p.y_inverse, p.y_power)
    gradient = unit_rows_backward(gradient, unit, 1 / inverse[:, None], p.normalize)
    return gradient if power is None else gradient * power[:, None]


@triton.jit(do_not_specialize=["margin", "M", "N", "rows", "cols"])
def _hinge_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    positive,
    parts,  # [tiles]
    row_active,  # [tiles_n, rows]
    col_active,  # [tiles_m, cols]
    G,
    G_low,
    G_stride,
    margin,
    M,
    N,
    D,
    stride,
    row0,
    col0,
    rows,
    cols,
    GRADIENT: tl.constexpr,
    FOLD: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i, j = tile_at(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N))
    m0, n0 = row0 + i * BLOCK_M, col0 + j * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    s = products(x, y, m0, n0, M, N, D, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    x_inv = tl.load(x_inverse + m, mask=m < M, other=0.0)
    y_inv = tl.load(y_inverse + n, mask=n < N, other=0.0)
    near = s * x_inv[:, None] * y_inv[None, :] + margin
    foreign = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] != n[None, :])

    # max(0, margin + s_ij - s_ii), image i against text j; max(0, margin + s_ij - s_jj), text j against image i
    row_cost = tl.where(foreign, near - tl.load(positive + m, mask=m < M, other=0.0)[:, None], 0.0)
    col_cost = tl.where(foreign, near - tl.load(positive + n, mask=n < N, other=0.0)[None, :], 0.0)
    row_on, col_on = tl.where(row_cost > 0, 1.0, 0.0), tl.where(col_cost > 0, 1.0, 0.0)
    cost = tl.where(row_cost <= 0, 0.0, row_cost) + tl.where(col_cost <= 0, 0.0, col_cost)  # a NaN stays
    tl.store(parts + tl.program_id(0), tl.sum(cost))
    if GRADIENT:
        tl.store(row_active + j.to(tl.int64) * rows + (m - row0), tl.sum(row_on, 1), mask=m < M)
        tl.store(col_active + i.to(tl.int64) * cols + (n - col0), tl.sum(col_on, 0), mask=n < N)
        g = row_on + col_on
        if FOLD:
            g *= x_inv[:, None] * y_inv[None, :]
        store_gradient(g, G, G_low, i, j, rows, G_stride, SPLIT, TMA)


@triton.jit(do_not_specialize=["M", "N", "rows", "cols"])
def _hardest_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    row_best,  # [tiles_n, rows]
    row_at,
    col_best,  # [tiles_m, cols]
    col_at,
    M,
    N,
    D,
    stride,
    row0,
    col0,
    rows,
    cols,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i, j = tile_at(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N))
    m0, n0 = row0 + i * BLOCK_M, col0 + j * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    s = products(x, y, m0, n0, M, N, D, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    s *= tl.load(x_inverse + m, mask=m < M, other=0.0)[:, None] * tl.load(y_inverse + n, mask=n < N, other=0.0)[None, :]
    s = tl.where(s != s, float("inf"), s)  # a NaN is the hardest; its own positive carries it into the loss
    foreign = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] != n[None, :])
    s = tl.where(foreign, s, float("-inf"))
    # The largest, and the lowest index that has it.
    best, other = tl.max(s, 1), tl.max(s, 0)
    at = tl.min(tl.where(s == best[:, None], n[None, :], 2147483647), 1)
    other_at = tl.min(tl.where(s == other[None, :], m[:, None], 2147483647), 0)
    to_row = j.to(tl.int64) * rows + (m - row0)
    to_col = i.to(tl.int64) * cols + (n - col0)
    tl.store(row_best + to_row, best, mask=m < M)
    tl.store(row_at + to_row, at, mask=m < M)
    tl.store(col_best + to_col, other, mask=n < N)
    tl.store(col_at + to_col, other_at, mask=n < N)


@triton.jit(do_not_specialize=["tiles", "count"])
def _merge_best(
    bests,  # [tiles, count]
    ats,
    best,
    at,
    tiles,
    count,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(best + r, mask=r < count, other=0.0)
    index = tl.load(at + r, mask=r < count, other=0)
    for first in range(0, tiles, GROUP):  # in the order of indices: the first of equals stays
        t = first + tl.arange(0, GROUP)
        inside = (t < tiles)[:, None] & (r < count)[None, :]
        where = t.to(tl.int64)[:, None] * count + r[None, :]
        news = tl.load(bests + where, mask=inside, other=float("-inf"))
        new = tl.max(news, 0)
        its = tl.where(news == new[None, :], tl.load(ats + where, mask=inside, other=2147483647), 2147483647)
        new_at = tl.min(its, 0).to(tl.int64)
        better = new > value
        value = tl.where(better, new, value)
        index = tl.where(better, new_at, index)
    tl.store(best + r, value, mask=r < count)
    tl.store(at + r, index, mask=r < count)
