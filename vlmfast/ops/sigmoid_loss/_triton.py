"""The sigmoid loss as a Triton kernel over tiles of S: value and gradient in one pass, as no tile needs another's."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._tiles import LOG2E, cdiv, products, store_gradient, tile_at, tl, triton


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(x, y)


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
    """(loss [], dx [M, D] float32, dy, dscale [], dbias []) for an incoming gradient of 1; [0] for one not needed."""
    p = _tiles.pair(x, y, normalize, precision, kind="sigmoid")
    M, N = len(x), len(y)
    unit = 4096.0 if p.gradient == torch.float16 else 1.0  # sigmoids down to 1e-9 fit float16
    factor = logit_scale.float() / (M * unit)
    gradients = _tiles.Gradients(p, need_x, need_y, workspace, factor=factor) if need_x or need_y else None
    G = (
        gradients.workspace if gradients else (logit_scale, logit_scale, 0)
    )  # never written then, but an address is needed
    constants = {
        "GRADIENT": gradients is not None,
        "SCALARS": need_scalars,
        "UNIT": unit,
        **(gradients.constants if gradients else {"FOLD": False, "SPLIT": False}),
        **p.constants,
    }
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)  # of the loss, dz cos, and dz
    for block in gradients.blocks() if gradients else _tiles.blocks(M, N, _tiles.EDGE, _tiles.EDGE):
        tiles = cdiv(block[2], p.config.block_m) * cdiv(block[3], p.config.block_n)
        parts = torch.zeros(3, tiles, dtype=torch.float32, device=x.device)
        arguments = (*p.operands, logit_scale, logit_bias, parts, *G, *p.sizes, *block, offset, tiles)
        _tiles.launch(_sigmoid_tiles, (tiles,), *arguments, config=p.config, **constants)
        sums += parts.sum(1, dtype=torch.float64)
        if gradients:
            gradients.add(*block)

    dx, dy = (
        gradients.results() if gradients else (x.new_empty(0, dtype=torch.float32), y.new_empty(0, dtype=torch.float32))
    )
    loss, dscale, dbias = (value.clone() for value in (sums / M).float())
    return loss, dx, dy, dscale, dbias


@triton.jit(do_not_specialize=["M", "N", "rows", "cols", "offset", "tiles"])
def _sigmoid_tiles(
    x,
    y,
    x_inverse,
    y_inverse,
    scale,
    bias,
    parts,  # [3, tiles]
    G,
    G_low,
    G_stride,
    M,
    N,
    D,
    stride,
    row0,
    col0,
    rows,
    cols,
    offset,
    tiles,
    GRADIENT: tl.constexpr,
    SCALARS: tl.constexpr,
    UNIT: tl.constexpr,
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
    cosine = s * x_inv[:, None] * y_inv[None, :]
    z = cosine * tl.load(scale) + tl.load(bias)

    # u = -t z with t = 1 for a pair and -1 for strangers; the loss is softplus(u) = max(u, 0) + log(1 + exp(-|u|))
    pair = (m + offset)[:, None] == n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    u = tl.where(pair, -z, z)
    e = tl.exp2(-(tl.abs(u) * LOG2E))
    loss = tl.where(u > 0, u, 0.0) + _log_of_1_plus(e)
    at = parts + tl.program_id(0)
    tl.store(at, tl.sum(tl.where(inside, loss, 0.0)))

    if GRADIENT or SCALARS:
        # dz = -t sigmoid(u), and sigmoid(u) = 1 / (1 + e) or e / (1 + e)
        dz = tl.where(u > 0, 1.0, e) / (1 + e)
        dz = tl.where(pair, -dz, dz)
        if SCALARS:
            tl.store(at + tiles, tl.sum(tl.where(inside, dz * cosine, 0.0)))
            tl.store(at + 2 * tiles, tl.sum(tl.where(inside, dz, 0.0)))
        if GRADIENT:
            g = dz * UNIT
            if FOLD:
                g *= x_inv[:, None] * y_inv[None, :]
            store_gradient(g, G, G_low, i, j, rows, G_stride, SPLIT, TMA)


@triton.jit
def _log_of_1_plus(e):
    """log(1 + e) for e in [0, 1], near e where 1 + e would round it away."""
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5)))))
    return tl.where(e < 0.0625, series, tl.log2(1 + e) * 0.6931471805599453)
