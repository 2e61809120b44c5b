"""The softmax losses as Triton kernels over tiles of S (docs/backends.md tells the plan).

All exponents are base 2 of z log2(e). A sum of powers is kept as (reference, total), meaning 2^reference * total, with
whole references, so that rebasing it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import LOG2E, NONE, Pair, all_of, any_of, cdiv, products, store_gradient, tile_at, tl, triton

INDEX, OUT, IN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_FORMS = {"index": 0, "out": 1, "in": 2}
_PLANES = {"index": 2, "out": 3, "in": 4}  # numbers a partial result has: (reference, total) and the positives' part
_GROUP = 32  # tiles whose partial results are merged at once; a fixed order, whatever the blocks


def _kind(form: str, label_smoothing: float) -> str:
    """Whose tile a call takes: vectors of the positives and of the smoothing have registers of their own."""
    return "softmax" if form == "index" and label_smoothing == 0 else "positives"


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
    precision: str,
    keep: int,
) -> tuple[Tensor, ...]:
    """(loss [], row_lse [M], col_lse [N], row_pos_lse [M], col_pos_lse [N], kept); what a call has no use for is [0].

    The log-sum-exps are float64; kept is of at most `keep` bytes.
    """
    p = _tiles.pair(x, y, normalize, precision, kind=_kind(form, label_smoothing))
    kept = Kept.empty(p, keep if form == "index" else 0)
    # z of every row's positive; INDEX's pairs are mutual wherever columns count, so that they are the columns', too.
    positive = torch.zeros(len(x) if form == "index" else 0, dtype=torch.float32, device=x.device)
    rows = _Side(p.sizes[0], row_ids, row_weight, row_share, form, x.device)
    cols = _Side(p.sizes[1], col_ids, col_weight, col_share, form, x.device)
    _sum_tiles(p, logit_scale, rows, cols, positive, kept, form)
    if label_smoothing > 0:
        rows.mean, cols.mean = _mean_logits(p, logit_scale)
    parts = [rows.finish(positive, label_smoothing), cols.finish(positive, label_smoothing, gather=True)]
    loss = torch.cat(parts).sum().float()
    if len(kept.data):
        kept.positive.copy_(positive[: len(kept.data)])
    return loss, rows.lse, cols.lse, rows.positive_lse, cols.positive_lse, kept.data


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
    p = _tiles.pair(x, y, normalize, precision, kind=_kind(form, label_smoothing))
    factor = grad.float()
    if p.gradient == torch.float16:  # weights near 1 / N would leave its range: the largest becomes 2^12
        weights = [weight for weight in (row_weight, col_weight) if weight is not None]
        unit = 4096 / torch.stack([weight.amax() for weight in weights]).amax().clamp_min(1e-30)
        row_weight, col_weight = (None if weight is None else weight * unit for weight in (row_weight, col_weight))
        factor = factor / unit
    M, N, _, _ = p.sizes
    saved = Kept(p, kept)
    row_terms = _terms(row_lse, row_pos_lse, row_weight, row_share, form, label_smoothing, others=N)
    col_terms = _terms(col_lse, col_pos_lse, col_weight, col_share, form, label_smoothing, others=M)
    pulls = torch.empty(M if form == "index" else 0, dtype=torch.float32, device=x.device)
    if form == "index":
        sides: dict[str, Any] = {"ROWS": row_weight is not None, "COLS": col_weight is not None, "BLOCK": 128}
        _tiles.launch(_pulls, (cdiv(M, 128),), row_ids, row_terms, col_terms, pulls, M, N, **sides)
    vectors = (row_ids, row_terms, col_ids, col_terms, pulls)
    constants = {
        "ROWS": row_weight is not None,
        "COLS": col_weight is not None,
        "FORM": _FORMS[form],
        "SMOOTH": label_smoothing > 0,
        "KEPT": len(kept) > 0,
        **p.constants,
    }

    def sweep(need_x: bool, need_y: bool) -> _tiles.Gradients:
        gradients = _tiles.Gradients(p, need_x, need_y, workspace, (x.dtype, y.dtype), factor * logit_scale)
        for block in gradients.blocks():
            grid = (cdiv(block[2], p.config.block_m) * cdiv(block[3], p.config.block_n),)
            arguments = (*p.operands, logit_scale, *vectors, *saved.arguments, *gradients.workspace, *p.sizes, *block)
            options = {**gradients.constants, **constants}
            _tiles.launch(_gradient_tiles, grid, *arguments, config=p.config, fuse=False, **options)
            gradients.add(*block)
        return gradients

    apart = need_x and need_y and y.numel() * 4 > _tiles.SUMS
    # The gradient of the scale is a by-product of either embedding's.
    gradients = sweep(need_x or not need_y, need_y and not apart)
    dx, dy = gradients.results()
    dots = (gradients.y if need_y and not need_x else gradients.x).dots
    del gradients  # its workspace is the next one's
    if apart:
        _, dy = sweep(False, True).results()
    return dx if need_x else x.new_empty(0), dy if need_y else y.new_empty(0), factor * dots.sum()


class Kept:
    """What the backward need not compute again: 2^(z - reference) of the first rows of S, as the forward had it.

    A row of `data` holds its powers [N] in the dtype of gradient tiles, the reference of each tile that it crosses, and
    z of its positive in float32: p - 1 would be all rounding. A tile that one reference did not serve says NaN, and is
    computed again.
    """

    def __init__(self, p: Pair, data: Tensor) -> None:
        self.data = data  # [rows, bytes] uint8, or [0]
        if len(data) == 0:
            self.arguments: tuple = (p.x_inverse, 0, p.x_inverse, 0, 0)  # never read, but addresses are needed
            return
        first, _ = self._widths(p)
        powers, others = data[:, :first].view(p.gradient), data[:, first:].view(torch.float32)
        self.positive = others[:, cdiv(p.sizes[1], p.config.block_n)]  # [rows]
        powers = powers[:, : p.sizes[1]]
        self.arguments = (p.tiles_of(powers), powers.stride(0), others, others.stride(0), len(data))

    @classmethod
    def empty(cls, p: Pair, most: int) -> Kept:
        """Room for as many rows as `most` bytes hold; for none in float16, which has no room for small powers."""
        size = sum(cls._widths(p))
        rows = min(len(p.x), most // size // p.config.block_m * p.config.block_m)
        if p.split or p.gradient == torch.float16 or rows == 0:
            return cls(p, torch.empty(0, dtype=torch.uint8, device=p.x.device))
        return cls(p, torch.empty(rows, size, dtype=torch.uint8, device=p.x.device))

    @staticmethod
    def _widths(p: Pair) -> tuple[int, int]:
        """Bytes of a row's powers, and of the rest: 16 numbers at a time, so that one kernel is compiled for any N."""
        N = len(p.y)
        return cdiv(N * p.gradient.itemsize, 64) * 64, cdiv(4 * (cdiv(N, p.config.block_n) + 1), 64) * 64


class _Side:
    """The rows, or the columns, on their way to a loss."""

    def __init__(
        self, size: int, ids: Tensor, weight: Tensor | None, share: Tensor | None, form: str, device: torch.device
    ) -> None:
        self.ids, self.weight, self.share, self.form = ids, weight, share, form
        size = 0 if weight is None else size
        # The partial results of all tiles so far.
        self.state = torch.empty(_PLANES[form], size, dtype=torch.float32, device=device)
        self.mean: Tensor | None = None  # of each row's z, where labels are smoothed
        self.lse = torch.empty(size, dtype=torch.float64, device=device)
        self.positive_lse = torch.empty(size if form == "in" else 0, dtype=torch.float64, device=device)

    def finish(self, positive: Tensor, label_smoothing: float, gather: bool = False) -> Tensor:
        """Fills in the log-sum-exps; parts of sum_i weight_i (lse_i - pull_i), float64, to be added up.

        gather: `positive` is the other side's, and is found by the ids.
        """
        count = len(self.lse)
        parts = torch.empty(cdiv(count, 128), dtype=torch.float64, device=self.lse.device)
        if self.weight is None:
            return parts
        share, mean = (self.weight if v is None else v for v in (self.share, self.mean))  # never read if absent
        vectors = (self.state, positive, self.ids, self.weight, share, mean, self.lse, self.positive_lse, parts)
        constants: dict[str, Any] = {"FORM": _FORMS[self.form], "SMOOTH": self.mean is not None, "GATHER": gather}
        _tiles.launch(_finish, (len(parts),), *vectors, label_smoothing, count, len(positive), BLOCK=128, **constants)
        return parts


def _mean_logits(p: Pair, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The mean z of each row [M] and of each column [N]: one dot product each, with the mean of the other side."""
    x, y = p.x.float() * p.x_inverse[:, None], p.y.float() * p.y_inverse[:, None]
    scale2 = logit_scale * LOG2E.value
    return scale2 * (x @ y.mean(0)), scale2 * (y @ x.mean(0))


def _sum_tiles(p: Pair, logit_scale: Tensor, rows: _Side, cols: _Side, positive: Tensor, kept: Kept, form: str) -> None:
    """The states of both sides: what all tiles of S together say of every row and every column."""
    M, N, _, _ = p.sizes
    most = min(_tiles.EDGE, M), min(_tiles.EDGE, N)
    tiles = cdiv(most[0], p.config.block_m), cdiv(most[1], p.config.block_n)
    row_parts = rows.state.new_empty(_PLANES[form], tiles[1], most[0] if rows.weight is not None else 0)
    col_parts = cols.state.new_empty(_PLANES[form], tiles[0], most[1] if cols.weight is not None else 0)
    constants = {
        "ROWS": rows.weight is not None,
        "COLS": cols.weight is not None,
        "FORM": _FORMS[form],
        "KEPT": len(kept.data) > 0,
        **p.constants,
    }
    ids = (rows.ids, cols.ids, positive)
    for block in _tiles.blocks(M, N, _tiles.EDGE, _tiles.EDGE):
        row, column, height, width = block
        here = cdiv(height, p.config.block_m), cdiv(width, p.config.block_n)
        arguments = (*p.operands, logit_scale, *ids, row_parts, col_parts, *kept.arguments, *p.sizes, *block)
        # One z for the sums, the positives and the gradient: p = 1 where nothing else is in a sum.
        _tiles.launch(
            _tile_sums, (here[0] * here[1],), *arguments, *most, *tiles, config=p.config, fuse=False, **constants
        )
        if rows.weight is not None:
            _merge_into(rows.state, row_parts, row, height, here[1], fresh=column == 0)
        if cols.weight is not None:
            _merge_into(cols.state, col_parts, column, width, here[0], fresh=row == 0)


def _merge_into(state: Tensor, parts: Tensor, start: int, count: int, tiles: int, fresh: bool) -> None:
    """The state of `count` rows (columns) from `start` on takes in the partial results of `tiles` tiles."""
    planes, most_tiles, most = parts.shape
    arguments = (parts, state, tiles, start, count, state.shape[1], most, most_tiles * most)
    constants: dict[str, Any] = {"FRESH": fresh, "PLANES": planes, "GROUP": _GROUP, "BLOCK": 64}
    _tiles.launch(_merge, (cdiv(count, 64),), *arguments, **constants)


def _terms(
    lse: Tensor,  # [M] float64
    positive_lse: Tensor,
    weight: Tensor | None,
    share: Tensor | None,
    form: str,
    label_smoothing: float,
    others: int,
) -> Tensor:
    """[5, M] float32: what `_gradient_tiles` needs of each row, as `_side_terms` lays it out."""
    if weight is None:
        return lse
    terms = torch.empty(5, len(lse), dtype=torch.float32, device=lse.device)
    share = weight if share is None else share  # never read if absent
    arguments = (lse, positive_lse, weight, share, terms, label_smoothing, others, len(lse))
    _tiles.launch(_side_terms, (cdiv(len(lse), 128),), *arguments, FORM=_FORMS[form], BLOCK=128)
    return terms


@triton.jit(do_not_specialize=["kept_rows", "M", "N", "rows", "cols", "row_most", "col_most", "tiles_m", "tiles_n"])
def _tile_sums(
    x,
    y,
    x_inverse,
    y_inverse,
    scale,
    row_ids,
    col_ids,
    positive,  # INDEX: [M] float32, z of each row's positive
    row_parts,  # [planes, tiles_n, row_most]
    col_parts,  # [planes, tiles_m, col_most]
    powers,  # KEPT: [kept_rows, powers_stride]
    powers_stride,
    others,  # [kept_rows, others_stride] float32
    others_stride,
    kept_rows,
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
    KEPT: tl.constexpr,
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

    if FORM == INDEX:  # z of the positives, to the bit that the sums have; few tiles hold any
        mine = tl.load(row_ids + m, mask=m < M, other=-1).to(tl.int32) - n0
        here = (mine >= 0) & (mine < BLOCK_N)
        if any_of(here):
            own = tl.sum(tl.where(mine[:, None] == tl.arange(0, BLOCK_N)[None, :], z, 0.0), 1)
            tl.store(positive + m, own, mask=here & (m < M))

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
        among = tl.where(match, z, float("-inf"))
        row_top, col_top = tl.max(among, 1), tl.max(among, 0)
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
            among = tl.where(match, z, float("-inf"))
            row_pos_ref, col_pos_ref = _reference(tl.max(among, 1)), _reference(tl.max(among, 0))
            row_pos = tl.sum(tl.exp2(among - row_pos_ref[:, None]), 1)
            col_pos = tl.sum(tl.exp2(among - col_pos_ref[None, :]), 0)

    if KEPT:
        saved = m < kept_rows
        to_row = m.to(tl.int64)
        if TMA:
            powers.store([m0, n0], e.to(powers.dtype))
        else:
            at = powers + to_row[:, None] * powers_stride + n[None, :]
            tl.store(at, e.to(powers.dtype.element_ty), mask=saved[:, None] & inside)
        said = tl.zeros([BLOCK_M], tl.float32) + tl.where(served, reference, float("nan"))
        tl.store(others + to_row * others_stride + n0 // BLOCK_N, said, mask=saved)
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


@triton.jit(do_not_specialize=["tiles", "start", "count", "size", "stride", "plane"])
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


@triton.jit(do_not_specialize=["smoothing", "count", "positives"])
def _finish(
    state,  # [planes, count]
    positive,  # INDEX: float32, of each row here, or of each of the other side's (GATHER)
    ids,
    weight,
    share,
    mean,
    lse,  # [count] float64, to be filled, as
    positive_lse,
    parts,  # [programs] float64
    smoothing,
    count,
    positives,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < count
    plane = tl.cast(count, tl.int64)
    own = _log2_sum(state + r, plane, here)
    if FORM == INDEX:
        # log2 of 2^z as the sums hold it, rounding and all: where a positive is nearly its whole row's sum, own - pull
        # is 0, and so are loss and gradient. A row without a positive has weight 0.
        at = r
        if GATHER:
            at = tl.load(ids + r, mask=here, other=-1)
        z = tl.load(positive + at, mask=here & (at >= 0) & (at < positives), other=0.0)
        whole = tl.floor(z)
        pull = whole.to(tl.float64) + tl.log2(tl.exp2(z - whole).to(tl.float64))
    elif FORM == OUT:
        total = tl.load(state + 2 * plane + r, mask=here, other=0.0).to(tl.float64)
        pull = tl.load(share + r, mask=here, other=0.0) * total
    else:
        pull = _log2_sum(state + 2 * plane + r, plane, here)
        tl.store(positive_lse + r, pull * 0.6931471805599453, mask=here)
    if SMOOTH:
        pull = (1 - smoothing) * pull + smoothing * tl.load(mean + r, mask=here, other=0.0)
    tl.store(lse + r, own * 0.6931471805599453, mask=here)
    part = tl.load(weight + r, mask=here, other=0.0) * ((own - pull) * 0.6931471805599453)
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(here, part, 0.0), 0))


@triton.jit
def _log2_sum(at, plane, here):
    """log2 of (reference, total), float64; 0 for an empty sum: its weight is 0, and any finite number will do."""
    total = tl.load(at + plane, mask=here, other=1.0).to(tl.float64)
    return tl.where(total == 0, 0.0, tl.load(at, mask=here, other=0.0).to(tl.float64) + tl.log2(total))


@triton.jit(do_not_specialize=["smoothing", "others", "count"])
def _side_terms(
    lse,  # [count] float64
    positive_lse,
    weight,
    share,
    terms,  # [5, count] float32
    smoothing,
    others,
    count,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < count
    plane = tl.cast(count, tl.int64)
    w = tl.load(weight + r, mask=here, other=0.0).to(tl.float64)
    # w p = 2^(z - reference) factor, with a whole reference: a log-sum-exp in float32 would be off by 4e-6 near 100
    own = tl.load(lse + r, mask=here, other=0.0) * 1.4426950408889634
    reference = tl.floor(own)
    factor = w * tl.exp2(reference - own)
    tl.store(terms + r, reference.to(tl.float32), mask=here)
    tl.store(terms + plane + r, factor.to(tl.float32), mask=here)
    if FORM == IN:
        # At a positive w (p - r) = w p (1 - 2^gap), where r is its softmax among the positives alone; where they are
        # too small a part of the row for that, r has a power of its own.
        positive = tl.load(positive_lse + r, mask=here, other=0.0) * 1.4426950408889634
        gap = own - positive
        near = gap < 60
        its = tl.floor(positive)
        tl.store(terms + 2 * plane + r, (factor * tl.where(near, _one_less_power(gap), 1.0)).to(tl.float32), mask=here)
        tl.store(terms + 3 * plane + r, its.to(tl.float32), mask=here)
        apart = tl.where(near, 0.0, w * tl.exp2(its - positive))
        tl.store(terms + 4 * plane + r, apart.to(tl.float32), mask=here)
    else:
        target = (1 - smoothing) * w
        if FORM == OUT:
            target *= tl.load(share + r, mask=here, other=0.0)
        tl.store(terms + 2 * plane + r, target.to(tl.float32), mask=here)
        tl.store(terms + 3 * plane + r, (smoothing * w / others).to(tl.float32), mask=here)


@triton.jit(do_not_specialize=["M", "N"])
def _pulls(row_ids, row_terms, col_terms, pulls, M, N, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """What the positive of each row is pulled by: the row's part, and that of the column it lies in."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(row_ids + m, mask=m < M, other=-1)
    pull = tl.zeros([BLOCK], tl.float32)
    if ROWS:
        pull += tl.load(row_terms + 2 * tl.cast(M, tl.int64) + m, mask=m < M, other=0.0)
    if COLS:
        pull += tl.load(col_terms + 2 * tl.cast(N, tl.int64) + n, mask=(m < M) & (n >= 0) & (n < N), other=0.0)
    tl.store(pulls + m, pull, mask=m < M)


@triton.jit
def _one_less_power(gap):
    """1 - 2^gap for a gap >= 0, float64, also where it is near 0."""
    x = gap * 0.6931471805599453
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4)))  # to x^5 / 120 at x < 2^-10
    return -tl.where(x < 0.0009765625, series, tl.exp2(gap) - 1)


@triton.jit(do_not_specialize=["kept_rows", "M", "N", "rows", "cols"])
def _gradient_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    scale,
    row_ids,
    row_terms,  # [5, M], as `_side_terms` has them
    col_ids,
    col_terms,  # [5, N]
    pulls,  # INDEX: [M] float32, what each row's positive is pulled by, from both sides
    powers,  # KEPT: as in `_tile_sums`, and with them z of the positives
    powers_stride,
    others,
    others_stride,
    kept_rows,
    G,  # [height, G_stride]
    G_low,
    G_stride,
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
    KEPT: tl.constexpr,
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
    row_at, col_at = row_terms + m, col_terms + n
    row_plane, col_plane = tl.cast(M, tl.int64), tl.cast(N, tl.int64)

    # w p = 2^(z - ref) factor; with the least of all references, one power serves the row and the column.
    least, most = float("inf"), float("-inf")
    if ROWS:
        row_ref = tl.load(row_at, mask=m < M, other=0.0)
        least = tl.min(tl.where(m < M, row_ref, float("inf")), 0)
        most = tl.max(tl.where(m < M, row_ref, float("-inf")), 0)
    if COLS:
        col_ref = tl.load(col_at, mask=n < N, other=0.0)
        least = tl.minimum(least, tl.min(tl.where(n < N, col_ref, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(n < N, col_ref, float("-inf")), 0))
    one_power = most - least < 100

    depth = D
    if KEPT:
        to_row = m.to(tl.int64)
        kept_ref = tl.load(others + to_row * others_stride + n0 // BLOCK_N, mask=m < kept_rows, other=float("nan"))
        kept = one_power & all_of((kept_ref == kept_ref) | (m >= M))
        depth = tl.where(kept, 0, D)  # nothing to multiply
    s = products(x, y, m0, n0, M, N, depth, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    x_inv = tl.load(x_inverse + m, mask=m < M, other=0.0)
    y_inv = tl.load(y_inverse + n, mask=n < N, other=0.0)
    z = s * (x_inv * (tl.load(scale) * LOG2E))[:, None] * y_inv[None, :]

    if ROWS:  # once more: the references of before the products would have kept their registers all along
        row_ref = tl.load(row_at, mask=m < M, other=0.0)
    if COLS:
        col_ref = tl.load(col_at, mask=n < N, other=0.0)

    match = m < M
    if FORM != INDEX:
        mine = tl.load(row_ids + m, mask=m < M, other=-1)
        yours = tl.load(col_ids + n, mask=n < N, other=-1)
        match = mine[:, None] == yours[None, :]

    g = z
    if one_power:
        power = tl.exp2(z - least)
        if KEPT and kept:
            if TMA:
                power = powers.load([m0, n0]).to(tl.float32)
            else:
                at = powers + to_row[:, None] * powers_stride + n[None, :]
                power = tl.load(at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            power *= tl.exp2(kept_ref - least)[:, None]
            positive = tl.load(others + to_row * others_stride + tl.cdiv(N, BLOCK_N), mask=m < M, other=0.0)
            own = tl.load(row_ids + m, mask=m < M, other=-1).to(tl.int32) - n0
            its = tl.exp2(positive - least)
            power = tl.where(own[:, None] == tl.arange(0, BLOCK_N)[None, :], its[:, None], power)
        if ROWS and COLS:
            g = power * (
                _factor(row_at, row_plane, m < M, least - row_ref, match, 1, FORM)
                + _factor(col_at, col_plane, n < N, least - col_ref, match, 0, FORM)
            )
        elif ROWS:
            g = power * _factor(row_at, row_plane, m < M, least - row_ref, match, 1, FORM)
        else:
            g = power * _factor(col_at, col_plane, n < N, least - col_ref, match, 0, FORM)
    else:
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ROWS:
            g += tl.exp2(z - row_ref[:, None]) * _factor(row_at, row_plane, m < M, 0 * row_ref, match, 1, FORM)
        if COLS:
            g += tl.exp2(z - col_ref[None, :]) * _factor(col_at, col_plane, n < N, 0 * col_ref, match, 0, FORM)

    # What a positive is pulled to: subtracted in float32, before anything is rounded further.
    if FORM == INDEX:  # few tiles hold any
        mine = tl.load(row_ids + m, mask=m < M, other=-1).to(tl.int32) - n0
        if any_of((mine >= 0) & (mine < BLOCK_N)):
            pull = tl.load(pulls + m, mask=m < M, other=0.0)
            g -= tl.where(mine[:, None] == tl.arange(0, BLOCK_N)[None, :], pull[:, None], 0.0)
    elif FORM == OUT:
        if ROWS:
            g -= tl.where(match, tl.load(row_at + 2 * row_plane, mask=m < M, other=0.0)[:, None], 0.0)
        if COLS:
            g -= tl.where(match, tl.load(col_at + 2 * col_plane, mask=n < N, other=0.0)[None, :], 0.0)
    else:  # where it is not part of the factor already
        if ROWS:
            apart = tl.load(row_at + 4 * row_plane, mask=m < M, other=0.0)
            if any_of(apart > 0):
                its = tl.load(row_at + 3 * row_plane, mask=m < M, other=0.0)
                g -= tl.where(match, tl.exp2(z - its[:, None]) * apart[:, None], 0.0)
        if COLS:
            apart = tl.load(col_at + 4 * col_plane, mask=n < N, other=0.0)
            if any_of(apart > 0):
                its = tl.load(col_at + 3 * col_plane, mask=n < N, other=0.0)
                g -= tl.where(match, tl.exp2(z - its[None, :]) * apart[None, :], 0.0)
    if SMOOTH:
        if ROWS:
            g -= tl.load(row_at + 3 * row_plane, mask=m < M, other=0.0)[:, None]
        if COLS:
            g -= tl.load(col_at + 3 * col_plane, mask=n < N, other=0.0)[None, :]
    if FOLD:
        g *= x_inv[:, None] * y_inv[None, :]
    store_gradient(g, G, G_low, i, j, rows, G_stride, SPLIT, TMA)


@triton.jit
def _factor(at, plane, here, shift, match, axis: tl.constexpr, FORM: tl.constexpr):
    """2^shift times what 2^(z - ref) is multiplied with for w p, as a matrix; of IN's positives w p less its pull."""
    factor = tl.expand_dims(tl.load(at + plane, mask=here, other=0.0) * tl.exp2(shift), axis)
    if FORM == IN:
        matched = tl.expand_dims(tl.load(at + 2 * plane, mask=here, other=0.0) * tl.exp2(shift), axis)
        factor = tl.where(match, matched, factor)
    return factor
