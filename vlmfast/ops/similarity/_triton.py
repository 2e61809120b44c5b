"""Similarities, their top k and their ranks as Triton kernels over tiles of S."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import Pair, cdiv, products, tile_at, tl, triton

# The gradient comes with a dense [M, N] matrix: two plain products, which PyTorch's own are right for.
from vlmfast.ops.similarity.reference import backward

__all__ = ["backward", "forward", "ranks", "topk", "unsupported"]

EMPTY = tl.constexpr(-(2**31))  # the key of nothing: below that of any float
NOBODY = tl.constexpr(2**31 - 1)
_LIST = 64  # the longest list of best items that a program keeps
_PROGRAMS = 512  # at least, where there are tiles enough: a few for each multiprocessor
_SORTED = 2**24  # similarities that are sorted at one time where k is larger than that


def unsupported(query: Tensor, items: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(query, items)


def forward(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    normalize: bool,
    precision: str,
) -> Tensor:
    """[M, N] similarities."""
    p = _tiles.pair(query, items, normalize, precision, kind="matrix")
    M, N, _, _ = p.sizes
    out = torch.empty(M, N, dtype=torch.float32, device=query.device)
    tiles = cdiv(M, p.config.block_m) * cdiv(N, p.config.block_n)
    _tiles.launch(_matrix_tiles, (tiles,), *p.operands, out, *p.sizes, config=p.config, **p.constants)
    return out


def topk(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    k: int,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Values [M, k] in descending order and the items [M, k] they belong to; among equals, the lower index first."""
    if k > _LIST:
        return _sorted_topk(query, items, k, normalize, precision)
    p = _tiles.pair(query, items, normalize, precision, kind="topk")
    M, _, _, _ = p.sizes
    splits, span = _splits(p)
    length = max(2, 1 << (k - 1).bit_length())
    keys = torch.empty(M, splits, length, dtype=torch.int32, device=query.device)
    at = torch.empty_like(keys)
    arguments = (*p.operands, keys, at, *p.sizes, splits, span)
    _tiles.launch(_best_of_rows, _grid(p, splits), *arguments, config=p.config, LIST=length, **p.constants)
    # By index, then stably by key: equals come in the order of their indices.
    at, order = at.flatten(1).long().sort(1)
    keys, order = keys.flatten(1).gather(1, order).sort(dim=1, descending=True, stable=True)
    keys = keys[:, :k]
    values = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)
    return values, at.gather(1, order[:, :k])


def ranks(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    positives: Tensor,  # [M, P] int64, -1: none
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(items above each query's best positive [M], other items equal to it [M])."""
    p = _tiles.pair(query, items, normalize, precision, kind="ranks")
    M, _, _, _ = p.sizes
    positives = positives.sort(1).values
    own = torch.stack([_scores_of(p, column) for column in positives.unbind(1)], 1)  # [M, P]
    own = torch.where(positives < 0, -torch.inf, own)
    best = own.amax(1)

    splits, span = _splits(p)
    above, ties = (torch.empty(splits, M, dtype=torch.int32, device=query.device) for _ in range(2))
    arguments = (*p.operands, best, above, ties, *p.sizes, span)
    _tiles.launch(_counts_of_rows, _grid(p, splits), *arguments, config=p.config, **p.constants)
    again = torch.zeros_like(positives, dtype=torch.bool)
    again[:, 1:] = positives[:, 1:] == positives[:, :-1]
    positive_ties = ((own == best[:, None]) & (positives >= 0) & ~again).sum(1)
    return above.sum(0), ties.sum(0) - positive_ties


def _sorted_topk(query: Tensor, items: Tensor, k: int, normalize: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Some whole rows of S at a time, sorted."""
    values, indices = [], []
    for rows in query.split(max(1, _SORTED // len(items))):
        best, at = forward(rows, items, normalize, precision).sort(dim=1, descending=True, stable=True)
        values.append(best[:, :k].clone())  # a view would keep all N alive
        indices.append(at[:, :k].clone())
    return torch.cat(values), torch.cat(indices)


def _splits(p: Pair) -> tuple[int, int]:
    """(programs that share a band of rows, columns that each of them walks)."""
    M, N, _, _ = p.sizes
    tiles = cdiv(N, p.config.block_n)
    span = cdiv(tiles, min(tiles, cdiv(_PROGRAMS, cdiv(M, p.config.block_m)))) * p.config.block_n
    return cdiv(N, span), span


def _grid(p: Pair, splits: int) -> tuple[int, int]:
    return cdiv(len(p.x), p.config.block_m), splits


def _scores_of(p: Pair, items: Tensor) -> Tensor:
    """[M] similarities of each query to one item, to the bit those of its tile; of any item where it is below 0."""
    items = items.clamp(min=0)
    one = Pair(**{**vars(p), "y_rows": p.y_rows[items], "y_inverse": p.y_inverse[items]})
    M, _, D, stride = p.sizes
    scores = torch.empty(M, dtype=torch.float32, device=p.x.device)
    arguments = (*one.operands, scores, M, M, D, stride)
    _tiles.launch(_diagonal, (cdiv(M, p.config.block_m),), *arguments, config=p.config, **p.constants)
    return scores


@triton.jit
def _similarities(
    x,
    y,
    x_inverse,
    y_inverse,
    m0,
    n0,
    M,
    N,
    D,
    stride,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of similarities: the same operations in the same order everywhere, so that equal items are equal bits."""
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    s = products(x, y, m0, n0, M, N, D, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    s *= tl.load(x_inverse + m, mask=m < M, other=0.0)[:, None]
    return s * tl.load(y_inverse + n, mask=n < N, other=0.0)[None, :]


@triton.jit(do_not_specialize=["M", "N"])
def _matrix_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    out,
    M,
    N,
    D,
    stride,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i, j = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m0, n0 = i * BLOCK_M, j * BLOCK_N
    s = _similarities(
        x, y, x_inverse, y_inverse, m0, n0, M, N, D, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], s, mask=inside)


@triton.jit(do_not_specialize=["M", "N"])
def _diagonal(
    x,
    y,
    x_inverse,
    y_inverse,
    scores,
    M,
    N,
    D,
    stride,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    score = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(m0, m0 + BLOCK_M, BLOCK_N):
        s = _similarities(
            x,
            y,
            x_inverse,
            y_inverse,
            m0,
            n0,
            M,
            N,
            D,
            stride,
            TMA,
            PARTS,
            UPCAST,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        n = n0 + tl.arange(0, BLOCK_N)
        score += tl.sum(tl.where(m[:, None] == n[None, :], s, 0.0), 1)
    tl.store(scores + m, score, mask=m < M)


@triton.jit(do_not_specialize=["M", "N", "span"])
def _counts_of_rows(
    x,
    y,
    x_inverse,
    y_inverse,
    best,
    above,  # [splits, M] int32
    ties,
    M,
    N,
    D,
    stride,
    span,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m0, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    m = m0 + tl.arange(0, BLOCK_M)
    rival = tl.load(best + m, mask=m < M, other=0.0)[:, None]
    higher, equal = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32)
    for n0 in range(split * span, tl.minimum(split * span + span, N), BLOCK_N):
        s = _similarities(
            x,
            y,
            x_inverse,
            y_inverse,
            m0,
            n0,
            M,
            N,
            D,
            stride,
            TMA,
            PARTS,
            UPCAST,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        inside = (n0 + tl.arange(0, BLOCK_N) < N)[None, :]
        higher += tl.sum(tl.where(s <= rival, 0, tl.where(inside, 1, 0)), 1)  # a NaN counts as above
        equal += tl.sum(tl.where((s == rival) & inside, 1, 0), 1)
    at = split.to(tl.int64) * M + m
    tl.store(above + at, higher, mask=m < M)
    tl.store(ties + at, equal, mask=m < M)


@triton.jit(do_not_specialize=["M", "N", "splits", "span"])
def _best_of_rows(
    x,
    y,
    x_inverse,
    y_inverse,
    keys,  # [M, splits, LIST] int32
    at,
    M,
    N,
    D,
    stride,
    splits,
    span,
    LIST: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m0, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    m, slot = m0 + tl.arange(0, BLOCK_M), tl.arange(0, LIST)
    best = tl.zeros([BLOCK_M, LIST], tl.int32) + EMPTY
    who = tl.zeros([BLOCK_M, LIST], tl.int32) - slot[None, :] + NOBODY  # empty slots differ, to be filled in turn
    least = tl.zeros([BLOCK_M], tl.int32) + EMPTY  # of the list
    for n0 in range(split * span, tl.minimum(split * span + span, N), BLOCK_N):
        s = _similarities(
            x,
            y,
            x_inverse,
            y_inverse,
            m0,
            n0,
            M,
            N,
            D,
            stride,
            TMA,
            PARTS,
            UPCAST,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        n = n0 + tl.arange(0, BLOCK_N)
        # Whole numbers in the order of the floats, NaN the highest; + 0.0 makes -0 equal to 0.
        key = tl.where(s != s, float("nan"), s + 0.0).to(tl.int32, bitcast=True)
        key = tl.where(s != s, 0x7FC00000, tl.where(key < 0, key ^ 0x7FFFFFFF, key))
        key = tl.where((m < M)[:, None] & (n < N)[None, :], key, EMPTY)
        # Most tiles have nothing above the least of a full list. Else each row's best takes the least one's place.
        while tl.max(tl.where(key > least[:, None], 1, 0)) == 1:
            top = tl.max(key, 1)
            top_at = tl.min(tl.where(key == top[:, None], n[None, :], NOBODY), 1)
            lowest = best == least[:, None]
            last = tl.max(tl.where(lowest, who, -1), 1)  # of equals, the later one leaves
            there = lowest & (who == last[:, None]) & (top > least)[:, None]
            best = tl.where(there, top[:, None], best)
            who = tl.where(there, top_at[:, None], who)
            least = tl.min(best, 1)
            key = tl.where(n[None, :] == top_at[:, None], EMPTY, key)
    to = (m.to(tl.int64)[:, None] * splits + split) * LIST + slot[None, :]
    tl.store(keys + to, best, mask=(m < M)[:, None])
    tl.store(at + to, who, mask=(m < M)[:, None])
