"""The cross-entropy of a linear map as Triton kernels: some rows at a time, whose powers become gradients in place.

A tile of logits is stored once, as 2^(z - reference) with a whole reference for each of its rows; when all tiles of a
row have told its log-sum-exp, a pass over the workspace makes dL/dz of it, and torch multiplies. Exponents are base 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import LN2, LOG2E, NONE, any_of, cdiv, products, store_gradient, tile_at, tl, triton

_ROWS = 4096  # at one time where no gradient is needed
_POWER = 4096.0  # what powers are multiplied with in float16: they reach down to 2^-36 then


def unsupported(x: Tensor, w: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(x, w)


def forward(
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [M] int64 in [0, V)
    factor: Tensor,  # []
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(losses [M], lse [M], dx [M, D], dw [V, D], dbias [V]), the first two float64, the gradients float32.

    The gradients are those of factor * losses.sum(); one that is not needed is [0].
    """
    weight = factor.float().expand(len(x))
    needs = need_x, need_w, need_bias
    return _run(x, w, bias, labels, weight, None, label_smoothing, z_loss, *needs, precision, workspace)


def backward(
    grad: Tensor,  # [M]
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,  # [M] float64
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(dx [M, D], dw [V, D], dbias [V]) of (grad * losses).sum(), float32; [0] for one not needed."""
    needs = need_x, need_w, need_bias
    return _run(x, w, bias, labels, grad.float(), lse, label_smoothing, z_loss, *needs, precision, workspace)


def _run(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight: Tensor,  # [M] float32, of each row's loss
    known: Tensor | None,  # lse [M] float64
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """What `backward` returns where the log-sum-exps are known, else what `forward` does."""
    p = _tiles.pair(x, w, False, precision, kind="vocabulary")
    M, V, D, stride = p.sizes
    needed = need_x or need_w or need_bias
    gradients = _tiles.Gradients(p, need_x, need_w, workspace, whole_rows=True) if needed else None
    height = gradients.height if gradients else min(M, _ROWS)
    half = p.gradient == torch.float16
    unit = 1024 / weight.abs().amax().clamp_min(1e-30) if half else torch.ones_like(weight[0])
    dbias = torch.zeros(V if need_bias else 0, dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.float().contiguous()
    labels = labels.contiguous()
    mean = _mean_logits(x, w, bias) if label_smoothing > 0 and known is None else None

    tiles = cdiv(V, p.config.block_n)
    references, totals = torch.empty(2, tiles, height, dtype=torch.float32, device=x.device)
    target = torch.empty(M, dtype=torch.float32, device=x.device)  # the label's z
    losses, lse = [], []
    G = gradients.workspace if gradients else (target, target, 0)  # never written then, but an address is needed
    constants: dict[str, Any] = {
        "BIAS": bias is not None,
        "GRADIENT": needed,
        "POWER": _POWER if half else 1.0,
        "SPLIT": p.split,
        **p.constants,
    }
    for row in range(0, M, height):
        rows = min(height, M - row)
        here = slice(row, row + rows)
        arguments = (*p.operands[:2], target if bias is None else bias, labels, references, totals, target, *G)
        programs = cdiv(rows, p.config.block_m) * tiles
        sizes = (M, V, D, stride, row, rows, height)
        # One z for the sum and for the label: a label that is all of a row's sum has p = 1.
        _tiles.launch(_power_tiles, (programs,), *arguments, *sizes, config=p.config, fuse=False, **constants)
        if known is None:
            means = None if mean is None else mean[here]
            loss, sums = _close(references[:, :rows], totals[:, :rows], target[here], means, label_smoothing)
            losses.append(loss + z_loss * sums**2)
            lse.append(sums)
        if gradients is None:
            continue
        sums = lse[-1] if known is None else known[here]
        terms = _terms(sums, target[here], weight[here] * unit, V, label_smoothing, z_loss)
        operands = (gradients.G[0], gradients.G[-1], gradients.stride, references, labels[here], terms)
        options: dict[str, Any] = {"POWER": constants["POWER"], "SPLIT": p.split, "BLOCK_M": 32}
        _tiles.launch(
            _to_gradients, (cdiv(rows, 32), tiles), *operands, rows, V, height, BLOCK_N=p.config.block_n, **options
        )
        gradients.add(row, 0, rows, V)
        if need_bias:
            dbias += gradients.G[:, :rows, :V].sum((0, 1), dtype=torch.float32)

    dx = gradients.x.sums if gradients and need_x else torch.empty_like(weight[:0])
    dw = gradients.y.sums if gradients and need_w else torch.empty_like(weight[:0])
    if half:
        dx, dw, dbias = dx / unit, dw / unit, dbias / unit
    return (dx, dw, dbias) if known is not None else (torch.cat(losses), torch.cat(lse), dx, dw, dbias)


def _mean_logits(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The mean z of each row [M]: one dot product with the mean row of w."""
    mean = (x.float() @ w.mean(0, dtype=torch.float32)) * LOG2E.value
    return mean if bias is None else mean + bias.mean() * LOG2E.value


def _close(
    references: Tensor,  # [tiles, rows]
    totals: Tensor,
    target: Tensor,  # [rows]
    mean: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(cross-entropies [rows], lse [rows]), float64, from what the tiles say of their rows."""
    top = references.amax(0)
    total = (totals.double() * torch.exp2(references - top)).sum(0).log2()
    pull = target.double()
    if mean is not None:
        pull = (1 - label_smoothing) * pull + label_smoothing * mean
    top = top.double()
    return (top - pull + total) * LN2, (top + total) * LN2


def _terms(
    lse: Tensor, target: Tensor, weight: Tensor, V: int, label_smoothing: float, z_loss: float
) -> Tensor:  # [4, rows] float32
    """What `_to_gradients` needs of each row: weight p = 2^(z - whole) factor; that at the label; what all lose."""
    lse2 = lse / LN2
    whole, rise = lse2.floor(), 2 * z_loss * lse
    everyone = label_smoothing / V
    # p - 1 in float64: near p = 1 it would be all rounding.
    own = (1 + rise) * torch.expm1((target - lse2) * LN2) + rise + label_smoothing - everyone
    factor = (1 + rise) * torch.exp2(whole - lse2)
    return torch.stack([whole, weight * factor, weight * own, weight * everyone]).float()


@triton.jit(do_not_specialize=["M", "V", "row0", "rows", "height"])
def _power_tiles(
    x,
    w,
    bias,  # [V] float32
    labels,  # [M]
    references,  # [tiles, height]
    totals,
    target,  # [M]
    G,  # [height, G_stride], to be filled with powers
    G_low,
    G_stride,
    M,
    V,
    D,
    stride,
    row0,  # the rows that this launch computes
    rows,
    height,
    BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i, j = tile_at(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(V, BLOCK_N))
    m0, n0 = row0 + i * BLOCK_M, j * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    z = products(x, w, m0, n0, M, V, D, stride, TMA, PARTS, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        z += tl.load(bias + n, mask=n < V, other=0.0)[None, :]
    z = tl.where((m < M)[:, None] & (n < V)[None, :], z * LOG2E, float("-inf"))

    mine = tl.load(labels + m, mask=m < M, other=-1).to(tl.int32) - n0
    here = (mine >= 0) & (mine < BLOCK_N)
    if any_of(here):  # few tiles hold any
        own = tl.sum(tl.where(mine[:, None] == tl.arange(0, BLOCK_N)[None, :], z, 0.0), 1)
        tl.store(target + m, own, mask=here & (m < M))

    reference = tl.ceil(tl.max(tl.where(z > NONE, z, NONE), 1))  # of numbers: a NaN shows in the sum
    power = tl.exp2(z - reference[:, None])
    at = tl.cast(j, tl.int64) * height + (m - row0)
    tl.store(references + at, reference, mask=m < M)
    tl.store(totals + at, tl.sum(power, 1), mask=m < M)
    if GRADIENT:
        store_gradient(power * POWER, G, G_low, i, j, rows, G_stride, SPLIT, TMA)


@triton.jit(do_not_specialize=["rows", "V", "height"])
def _to_gradients(
    G,  # [rows, G_stride]: powers, to become dL/dz
    G_low,
    G_stride,
    references,  # [tiles, height]
    labels,  # [rows]
    terms,  # [4, rows], as `_terms` has them
    rows,
    V,
    height,
    POWER: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    at = m.to(tl.int64)[:, None] * G_stride + n[None, :]
    inside = (m < rows)[:, None] & (n < V)[None, :]
    power = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        power += tl.load(G_low + at, mask=inside, other=0.0).to(tl.float32)
    reference = tl.load(references + tl.cast(j, tl.int64) * height + m, mask=m < rows, other=0.0)
    whole = tl.load(terms + m, mask=m < rows, other=0.0)
    factor = tl.load(terms + rows + m, mask=m < rows, other=0.0) * tl.exp2(reference - whole) / POWER
    own = tl.load(terms + 2 * rows + m, mask=m < rows, other=0.0)
    everyone = tl.load(terms + 3 * rows + m, mask=m < rows, other=0.0)
    label = tl.load(labels + m, mask=m < rows, other=-1).to(tl.int32)
    g = tl.where(label[:, None] == n[None, :], own[:, None], power * factor[:, None] - everyone[:, None])
    store_gradient(g, G, G_low, i, j, rows, G_stride, SPLIT, False)
