"""The softmax losses as Triton kernels over tiles of S (docs/backends.md tells the plan).

All exponents are base 2 of z log2(e). A sum of powers is kept as (reference, total), meaning 2^reference * total, with
whole references, so that rebasing it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import LN2, LOG2E, NONE, Pair, all_of, cdiv, products, store_gradient, tile_at, tl, triton

INDEX, OUT, IN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_FORMS = {"index": 0, "out": 1, "in": 2}
_PLANES = {"index": 2, "out": 3, "in": 4}  # numbers a partial result has: (reference, total) and the positives' part
_GROUP = 32  # tiles whose partial results are merged at once; a fixed order, whatever the blocks


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(x, y)


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
) -> tuple[Tensor, ...]:
    """(loss [], row_lse [M], col_lse [N], row_pos_lse [M], col_pos_lse [N]); what a call has no use for is [0]."""
    p = _tiles.pair(x, y, normalize, kind="softmax" if form == "index" else "positives")
    rows, cols = _sums(p, logit_scale, row_ids, col_ids, row_weight is not None, col_weight is not None, form)
    loss = torch.zeros((), device=x.device)
    row_lse, col_lse, row_pos_lse, col_pos_lse = (torch.empty(0, device=x.device) for _ in range(4))
    if row_weight is not None:
        part, row_lse, row_pos_lse = _side_loss(
            p, logit_scale, rows, row_ids, row_weight, row_share, form, label_smoothing, swap=False
        )
        loss = loss + part
    if col_weight is not None:
        part, col_lse, col_pos_lse = _side_loss(
            p, logit_scale, cols, col_ids, col_weight, col_share, form, label_smoothing, swap=True
        )
        loss = loss + part
    return loss, row_lse, col_lse, row_pos_lse, col_pos_lse


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
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, ...]:
    """(dx [M, D] in x's dtype, dy [N, D] in y's, dscale []); an embedding gradient that is not needed is [0]."""
    p = _tiles.pair(x, y, normalize, kind="softmax" if form == "index" else "positives")
    # The gradient of the scale is a by-product of either embedding's.
    gradients = _tiles.Gradients(p, need_x or not need_y, need_y)
    factor = grad.float()
    if p.gradient == torch.float16:  # weights near 1 / N would leave its range: the largest becomes 2^12
        weights = [weight for weight in (row_weight, col_weight) if weight is not None]
        unit = 4096 / torch.stack([weight.amax() for weight in weights]).amax().clamp_min(1e-30)
        row_weight, col_weight = (None if weight is None else weight * unit for weight in (row_weight, col_weight))
        factor = factor / unit
    vectors = (
        row_ids,
        row_weight,
        row_share,
        row_lse,
        row_pos_lse,
        col_ids,
        col_weight,
        col_share,
        col_lse,
        col_pos_lse,
    )
    constants = {
        "ROWS": row_weight is not None,
        "COLS": col_weight is not None,
        "FORM": _FORMS[form],
        "SMOOTH": label_smoothing > 0,
        **gradients.constants,
        **p.constants,
    }
    # An absent vector is never read, but needs an address.
    pointers = [logit_scale if vector is None else vector for vector in vectors]
    for block in gradients.blocks():
        grid = (cdiv(block[2], p.config.block_m) * cdiv(block[3], p.config.block_n),)
        arguments = (*p.operands, logit_scale, *pointers, *gradients.workspace, label_smoothing, *p.sizes, *block)
        _tiles.launch(_gradient_tiles, grid, *arguments, config=p.config, **constants)
        gradients.add(*block)

    dx, dy, dots = x.new_empty(0), y.new_empty(0), factor
    if need_y:
        dy, dots = gradients.rows("y", factor * logit_scale, y.dtype)
    if gradients.need_x:
        dx, dots = gradients.rows("x", factor * logit_scale, x.dtype)
    return dx if need_x else x.new_empty(0), dy, factor * dots.sum()


def _sums(
    p: Pair, logit_scale: Tensor, row_ids: Tensor, col_ids: Tensor, rows: bool, cols: bool, form: str
) -> tuple[Tensor, Tensor]:
    """(reference, total, and the positives' part) of every row [planes, M] and every column [planes, N]."""
    planes, device = _PLANES[form], p.x.device
    states = [
        torch.empty(planes, size if here else 0, device=device)
        for size, here in ((p.sizes[0], rows), (p.sizes[1], cols))
    ]
    edge = _tiles.EDGE
    most = [min(edge, size) for size in p.sizes[:2]]
    tiles = cdiv(most[0], p.config.block_m), cdiv(most[1], p.config.block_n)
    row_parts = torch.empty(planes, tiles[1], most[0] if rows else 0, device=device)
    col_parts = torch.empty(planes, tiles[0], most[1] if cols else 0, device=device)
    constants = {"ROWS": rows, "COLS": cols, "FORM": _FORMS[form], **p.constants}
    for block in _tiles.blocks(*p.sizes[:2], edge, edge):
        row, column, height, width = block
        here = cdiv(height, p.config.block_m), cdiv(width, p.config.block_n)
        arguments = (*p.operands, logit_scale, row_ids, col_ids, row_parts, col_parts, *p.sizes, *block, *most, *tiles)
        _tiles.launch(_tile_sums, (here[0] * here[1],), *arguments, config=p.config, **constants)
        if rows:
            _merge_into(states[0], row_parts, row, height, here[1], fresh=column == 0)
        if cols:
            _merge_into(states[1], col_parts, column, width, here[0], fresh=row == 0)
    return states[0], states[1]


def _merge_into(state: Tensor, parts: Tensor, start: int, count: int, tiles: int, fresh: bool) -> None:
    """The state of `count` rows (columns) from `start` on takes in the partial results of `tiles` tiles."""
    planes, most_tiles, most = parts.shape
    arguments = (parts, state, tiles, start, count, state.shape[1], most, most_tiles * most)
    constants: dict[str, Any] = {"FRESH": fresh, "PLANES": planes, "GROUP": _GROUP, "BLOCK": 64}
    _tiles.launch(_merge, (cdiv(count, 64),), *arguments, **constants)


def _side_loss(
    p: Pair,
    logit_scale: Tensor,
    state: Tensor,  # [planes, M]
    ids: Tensor,  # [M]
    weight: Tensor,
    share: Tensor | None,
    form: str,
    label_smoothing: float,
    swap: bool,  # the columns' loss, as the rows' of the transposed
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_i weight_i (lse_i - pull_i), lse [M], the positives' lse [M] or [0])."""
    lse = (state[0] + state[1].log2()) * LN2
    if form == "in":
        # A row without a positive has weight 0: any finite number will do for its empty sum.
        pull = torch.where(state[3] == 0, 0, (state[2] + state[3].log2()) * LN2)
        return (weight * (lse - pull)).sum(), lse, pull
    if form == "out":
        assert share is not None
        pull = share * state[2] * LN2
    else:
        pull = logit_scale * _tiles.paired_cosines(p, ids, swap)
    if label_smoothing > 0:
        # The mean of a row's logits is one dot product, with the mean of the other side's rows.
        sides = [(p.x, p.x_inverse), (p.y, p.y_inverse)]
        (own, inverse), (other, other_inverse) = reversed(sides) if swap else sides
        mean = (other.float() * other_inverse[:, None]).mean(0)
        pull = (1 - label_smoothing) * pull + label_smoothing * logit_scale * inverse * (own.float() @ mean)
    return (weight * (lse - pull)).sum(), lse, lse.new_empty(0)


@triton.jit(do_not_specialize=["M", "N", "row0", "col0", "rows", "cols", "row_most", "col_most", "tiles_m", "tiles_n"])
def _tile_sums(
    x,
    y,
    x_inverse,
    y_inverse,
    scale,
    row_ids,
    col_ids,
    row_parts,  # [planes, tiles_n, row_most]
    col_parts,  # [planes, tiles_m, col_most]
    M,
    N,
    D,
    stride,
    row0,  # the block of S that this launch reduces
    col0,
    rows,
    cols,
    row_most,
    col_most,
    tiles_m,
    tiles_n,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FORM: tl.constexpr,
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
    inside = (m < M)[:, None] & (n < N)[None, :]
    by_row = tl.load(x_inverse + m, mask=m < M, other=0.0) * (tl.load(scale) * LOG2E)
    by_col = tl.load(y_inverse + n, mask=n < N, other=0.0)
    z = tl.where(inside, s * by_row[:, None] * by_col[None, :], float("-inf"))

    # One reference for the tile and one power an element, which serves the row's sum and the column's.
    top = tl.max(z)
    reference = tl.where(top > NONE, tl.ceil(top), NONE)
    e = tl.exp2(z - reference)
    row_total, col_total = tl.sum(e, 1), tl.sum(e, 0)
    row_ref, col_ref = tl.zeros([BLOCK_M], tl.float32) + reference, tl.zeros([BLOCK_N], tl.float32) + reference
    # A total of at least 2^-60 has lost only what was below 2^-126. Others say that the reference did not serve them.
    served = all_of((row_total >= 8.7e-19) | (m >= M)) & all_of((col_total >= 8.7e-19) | (n >= N))
    match = inside
    row_pos = row_total
    col_pos = col_total
    row_pos_ref = row_ref
    col_pos_ref = col_ref
    if FORM != INDEX:
        match = inside & (
            tl.load(row_ids + m, mask=m < M, other=0)[:, None] == tl.load(col_ids + n, mask=n < N, other=0)[None, :]
        )
        weighed = z if FORM == OUT else e
        row_pos, col_pos = tl.sum(tl.where(match, weighed, 0.0), 1), tl.sum(tl.where(match, weighed, 0.0), 0)
    if FORM == IN:
        positive = tl.where(match, z, float("-inf"))
        row_top, col_top = tl.max(positive, 1), tl.max(positive, 0)
        near = reference - 60
        served &= all_of((row_top >= near) | (row_top == float("-inf")))
        served &= all_of((col_top >= near) | (col_top == float("-inf")))

    if not served:
        if ROWS:
            row_ref = _reference(tl.max(z, 1))
            row_total = tl.sum(tl.exp2(z - row_ref[:, None]), 1)
        if COLS:
            col_ref = _reference(tl.max(z, 0))
            col_total = tl.sum(tl.exp2(z - col_ref[None, :]), 0)
        if FORM == IN:
            positive = tl.where(match, z, float("-inf"))
            row_pos_ref, col_pos_ref = _reference(tl.max(positive, 1)), _reference(tl.max(positive, 0))
            row_pos = tl.sum(tl.exp2(positive - row_pos_ref[:, None]), 1)
            col_pos = tl.sum(tl.exp2(positive - col_pos_ref[None, :]), 0)

    if ROWS:
        at = row_parts + j.to(tl.int64) * row_most + (m - row0)
        _store_part(at, tiles_n.to(tl.int64) * row_most, row_ref, row_total, row_pos_ref, row_pos, m < M, FORM)
    if COLS:
        at = col_parts + i.to(tl.int64) * col_most + (n - col0)
        _store_part(at, tiles_m.to(tl.int64) * col_most, col_ref, col_total, col_pos_ref, col_pos, n < N, FORM)


@triton.jit
def _reference(top):
    """The whole power of two that a sum with this largest exponent is counted in."""
    return tl.where(top > NONE, tl.ceil(top), NONE)


@triton.jit
def _store_part(at, plane, ref, total, pos_ref, pos, mask, FORM: tl.constexpr):
    tl.store(at, ref, mask=mask)
    tl.store(at + plane, total, mask=mask)
    if FORM == OUT:
        tl.store(at + 2 * plane, pos, mask=mask)
    if FORM == IN:
        tl.store(at + 2 * plane, pos_ref, mask=mask)
        tl.store(at + 3 * plane, pos, mask=mask)


@triton.jit(do_not_specialize=["tiles", "start", "count", "size", "stride"])
def _merge(
    parts,  # [PLANES, tiles, stride]
    state,  # [PLANES, size]
    tiles,
    start,
    count,
    size,
    stride,
    plane,  # numbers between two planes of parts
    FRESH: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = state + start + r
    _merge_sums(parts, at, size, tiles, r, count, stride, plane, FRESH, GROUP, BLOCK)
    if PLANES == 4:
        _merge_sums(
            parts + 2 * tl.cast(plane, tl.int64),
            at + 2 * tl.cast(size, tl.int64),
            size,
            tiles,
            r,
            count,
            stride,
            plane,
            FRESH,
            GROUP,
            BLOCK,
        )
    if PLANES == 3:
        at += 2 * tl.cast(size, tl.int64)
        total = tl.zeros([BLOCK], tl.float32)
        if not FRESH:
            total = tl.load(at, mask=r < count, other=0.0)
        for first in range(0, tiles, GROUP):
            t = first + tl.arange(0, GROUP)
            inside = (t < tiles)[:, None] & (r < count)[None, :]
            where = parts + 2 * tl.cast(plane, tl.int64) + t.to(tl.int64)[:, None] * stride + r[None, :]
            total += tl.sum(tl.load(where, mask=inside, other=0.0), 0)
        tl.store(at, total, mask=r < count)


@triton.jit
def _merge_sums(
    parts, at, size, tiles, r, count, stride, plane, FRESH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """(reference, total) at `at` and `at + size` takes in those of every tile, GROUP at a time."""
    ref = tl.zeros([BLOCK], tl.float32) + NONE
    total = tl.zeros([BLOCK], tl.float32)
    if not FRESH:
        ref = tl.load(at, mask=r < count, other=NONE)
        total = tl.load(at + size, mask=r < count, other=0.0)
    for first in range(0, tiles, GROUP):
        t = first + tl.arange(0, GROUP)
        inside = (t < tiles)[:, None] & (r < count)[None, :]
        where = parts + t.to(tl.int64)[:, None] * stride + r[None, :]
        refs = tl.load(where, mask=inside, other=NONE)
        totals = tl.load(where + plane, mask=inside, other=0.0)
        # (r, t) + (r', t') = (R, t 2^(r - R) + t' 2^(r' - R)) with R the larger reference
        new = tl.maximum(ref, tl.max(refs, 0))
        total = total * tl.exp2(ref - new) + tl.sum(totals * tl.exp2(refs - new[None, :]), 0)
        ref = new
    tl.store(at, ref, mask=r < count)
    tl.store(at + size, total, mask=r < count)


@triton.jit(do_not_specialize=["G_stride", "G_plane", "smoothing", "M", "N", "row0", "col0", "rows", "cols"])
def _gradient_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    scale,
    row_ids,
    row_weight,
    row_share,
    row_lse,
    row_pos_lse,
    col_ids,
    col_weight,
    col_share,
    col_lse,
    col_pos_lse,
    G,  # [1 or 2, height, G_stride]
    G_stride,
    G_plane,
    smoothing,
    M,
    N,
    D,
    stride,
    row0,  # the block of S that this launch fills G with
    col0,
    rows,
    cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
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
    z = s * (x_inv * (tl.load(scale) * LOG2E))[:, None] * y_inv[None, :]

    # The least and the largest log-sum-exp of the tile.
    least, most = float("inf"), float("-inf")
    if ROWS:
        w = tl.load(row_weight + m, mask=m < M, other=0.0)
        row_l = tl.load(row_lse + m, mask=m < M, other=0.0) * LOG2E
        least = tl.min(tl.where(m < M, row_l, float("inf")), 0)
        most = tl.max(tl.where(m < M, row_l, float("-inf")), 0)
    if COLS:
        v = tl.load(col_weight + n, mask=n < N, other=0.0)
        col_l = tl.load(col_lse + n, mask=n < N, other=0.0) * LOG2E
        least = tl.minimum(least, tl.min(tl.where(n < N, col_l, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(n < N, col_l, float("-inf")), 0))

    g = z
    if most - least < 100:
        # w_i p_ij + v_j p'_ij = 2^(z - least) (w_i 2^(least - lse_i) + v_j 2^(least - lse'_j)): one power an element
        if ROWS and COLS:
            g = tl.exp2(z - least) * ((w * tl.exp2(least - row_l))[:, None] + (v * tl.exp2(least - col_l))[None, :])
        elif ROWS:
            g = tl.exp2(z - least) * (w * tl.exp2(least - row_l))[:, None]
        else:
            g = tl.exp2(z - least) * (v * tl.exp2(least - col_l))[None, :]
    else:
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ROWS:
            g += tl.exp2(z - row_l[:, None]) * w[:, None]
        if COLS:
            g += tl.exp2(z - col_l[None, :]) * v[None, :]

    # p - 1 where p is near 1: subtracted in float32, before anything is rounded further.
    if FORM == INDEX:
        if ROWS:
            mine = tl.load(row_ids + m, mask=m < M, other=-1).to(tl.int32)  # below N; few tiles hold any
            if tl.max(tl.where((mine >= n0) & (mine < n0 + BLOCK_N), 1, 0), 0) == 1:
                g -= tl.where(mine[:, None] == n[None, :], ((1 - smoothing) * w)[:, None], 0.0)
        if COLS:
            yours = tl.load(col_ids + n, mask=n < N, other=-1).to(tl.int32)
            if tl.max(tl.where((yours >= m0) & (yours < m0 + BLOCK_M), 1, 0), 0) == 1:
                g -= tl.where(yours[None, :] == m[:, None], ((1 - smoothing) * v)[None, :], 0.0)
    else:
        mine = tl.load(row_ids + m, mask=m < M, other=-1)
        yours = tl.load(col_ids + n, mask=n < N, other=-1)
        match = mine[:, None] == yours[None, :]
        if ROWS:
            if FORM == OUT:
                share = tl.load(row_share + m, mask=m < M, other=0.0)
                g -= tl.where(match, ((1 - smoothing) * w * share)[:, None], 0.0)
            else:
                positive = tl.load(row_pos_lse + m, mask=m < M, other=0.0) * LOG2E
                g -= tl.where(match, tl.exp2(z - positive[:, None]) * w[:, None], 0.0)
        if COLS:
            if FORM == OUT:
                share = tl.load(col_share + n, mask=n < N, other=0.0)
                g -= tl.where(match, ((1 - smoothing) * v * share)[None, :], 0.0)
            else:
                positive = tl.load(col_pos_lse + n, mask=n < N, other=0.0) * LOG2E
                g -= tl.where(match, tl.exp2(z - positive[None, :]) * v[None, :], 0.0)
    if SMOOTH:
        if ROWS:
            g -= (w * (smoothing / N))[:, None]
        if COLS:
            g -= (v * (smoothing / M))[None, :]
    if FOLD:
        g *= x_inv[:, None] * y_inv[None, :]
    store_gradient(g, G, m - row0, n - col0, rows, cols, G_stride, G_plane, SPLIT)
