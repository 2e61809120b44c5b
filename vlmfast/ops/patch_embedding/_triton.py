"""The patch embedding as Triton kernels: a matrix product whose one side is gathered from the images as they lie.

Pixels enter the matrix unit as they are: 0..255 are exact in bfloat16. Weights do too, unrounded: the sums of a channel
are brought to the next channel's scale in float32, and what the mean takes away is a part of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast.ops import _tiles
from vlmfast.ops._configs import Config
from vlmfast.ops._tiles import cdiv, tl, triton
from vlmfast.ops.patch_embedding.reference import empty_tokens, numbers, pixel_gradient, write_class_token

# Of the forward's tiles (patches, features, depth of a step), the backward's being (features, pixels, patches): for
# numbers of 16 bits, for those made of two, and for float32 itself. The compile gates say that they spill nothing; they
# have not been timed on a GPU.
CONFIGS = {
    "sm_80": (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 3), Config(64, 64, 32, 8, 3)),
    "sm_90": (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(64, 64, 32, 8, 4)),
    "sm_100": (Config(128, 128, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(64, 64, 32, 8, 4)),
    "gfx942": (Config(128, 64, 32, 4, 2), Config(64, 64, 32, 4, 2), Config(64, 64, 32, 4, 2)),
    "interpreter": (Config(64, 64, 64, 4, 1),) * 3,
}
_PROGRAMS = 512  # of the backward, at least, where there are patches enough
_PARTIAL_BYTES = 2**26  # of weight gradients that are yet to be added up


def unsupported(patches: Tensor, weight: Tensor) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return _tiles.unsupported(weight, weight if patches.dtype == torch.uint8 else patches)


def forward(
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    bias: Tensor | None,
    class_token: Tensor | None,
    positions: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str,
) -> Tensor:
    """[B, L, D] tokens in the weight's dtype."""
    call = _Call(patches, weight, class_token is not None, precision)
    D, config = len(weight), call.config
    scale, shift = _per_channel(mean, std, weight.device)
    weight = weight.contiguous()
    offset = (weight.flatten(2).sum(2, dtype=torch.float32) * shift).sum(1)  # [D]
    offset = offset if bias is None else offset + bias.float()
    ratio = scale / torch.cat([scale[1:], scale.new_ones(1)])  # from a channel's scale to the next one's, then to 1
    # The interpreter's stores to bfloat16 do not round.
    tokens = empty_tokens(patches, weight, call.lead, torch.float32 if call.constants["UPCAST"] else weight.dtype)
    places = offset if positions is None else positions.contiguous()
    grid = (cdiv(call.patches, config.block_m) * cdiv(D, config.block_n),)
    arguments = (patches, weight, offset, places, ratio, tokens, *call.sizes, *patches.stride())
    constants = {"POSITIONS": positions is not None, **call.constants}
    _tiles.launch(_tokens, grid, *arguments, config=config, **constants)
    if class_token is not None:
        write_class_token(tokens, class_token, positions)
    return tokens.to(weight.dtype)


def backward(
    grad: Tensor,  # [B, L, D]
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    mean: Sequence[float],
    std: Sequence[float],
    need_pixels: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients in the shapes of patches and weight; one not needed is empty [0]."""
    dpatches = pixel_gradient(grad, patches, weight, std) if need_pixels else patches.new_empty(0)
    if not need_weight:
        return dpatches, weight.new_empty(0)
    lead = grad.shape[1] - patches.shape[1:4].numel()
    call = _Call(patches, weight, bool(lead), precision)
    D, K, config = len(weight), weight[0].numel(), call.config
    tiles = cdiv(D, config.block_m) * cdiv(K, config.block_n)
    splits = min(cdiv(_PROGRAMS, tiles), max(1, _PARTIAL_BYTES // (4 * D * K)), cdiv(call.patches, 256))
    span = cdiv(cdiv(call.patches, splits), config.block_k) * config.block_k
    partial = torch.empty(splits, D, K, dtype=torch.float32, device=grad.device)
    arguments = (patches, grad, partial, *call.sizes, span, *patches.stride())
    _tiles.launch(_weight_gradients, (tiles, splits), *arguments, config=config, **call.constants)
    # In the order of the patches, whatever the order of the programs.
    dweight = partial.sum(0).view(D, weight.shape[1], -1)
    scale, shift = _per_channel(mean, std, grad.device)
    total = grad[:, lead:].sum((0, 1), dtype=torch.float32)
    dweight = dweight * scale[:, None] + (total[:, None] * shift)[:, :, None]
    return dpatches, dweight.view(weight.shape).to(weight.dtype)


class _Parts(NamedTuple):
    """How a product is made: its numbers' dtype, and how many of them add up to a pixel and to a weight."""

    dtype: torch.dtype
    pixel: int
    weight: int


def _parts(pixels: torch.dtype, weight: torch.dtype, precision: str) -> _Parts:
    """Numbers of 16 bits as they are; float32 as the precision says."""
    exact = weight if pixels == torch.uint8 else pixels
    if exact == weight and weight != torch.float32:
        return _Parts(weight, 1, 1)
    if precision == "bf16x3":
        whole = (torch.uint8, torch.bfloat16)
        return _Parts(torch.bfloat16, 1 if pixels in whole else 2, 1 if weight in whole else 2)
    return _Parts(torch.float32, 1, 1)


class _Call:
    """What both kernels are told of the images, the weight and the way to multiply."""

    def __init__(self, patches: Tensor, weight: Tensor, lead: bool, precision: str) -> None:
        B, T, H, W, C, t, p, q = patches.shape
        where = _tiles.target(weight.device)
        parts = _parts(patches.dtype, weight.dtype, precision)
        config = CONFIGS[where][2 if parts.dtype == torch.float32 else max(parts.pixel, parts.weight) - 1]
        self.config, self.lead, self.patches = config, lead, B * T * H * W
        self.sizes = (self.patches, len(weight), T * H * W, H, W, int(lead))
        self.constants: dict[str, Any] = {
            "C": C,
            "PT": t,
            "PH": p,
            "PW": q,
            "MULTIPLY": {torch.float32: tl.float32, torch.float16: tl.float16}.get(parts.dtype, tl.bfloat16),
            "PIXEL_PARTS": parts.pixel,
            "WEIGHT_PARTS": parts.weight,
            "UPCAST": where == "interpreter",  # it multiplies the raw bits of bfloat16
            "PRECISION": "tf32" if precision == "tf32" and parts.dtype == torch.float32 else "ieee",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        }


def _per_channel(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """What a pixel is multiplied with, and what is added then: [C] each."""
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return numbers(scale, torch.float32, device), numbers(shift, torch.float32, device)


# Pieces of kernels


@triton.jit
def _multiply(a, b, s, MULTIPLY: tl.constexpr, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, UPCAST: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """s + a b for tiles of any dtype, each as one number of MULTIPLY or as two; low times low is left out."""
    a_high, b_high = a.to(tl.float32).to(MULTIPLY), b.to(tl.float32).to(MULTIPLY)
    if A_PARTS == 2:
        a_low = (a.to(tl.float32) - a_high.to(tl.float32)).to(MULTIPLY)
        s = _dot(a_low, b_high, s, UPCAST, PRECISION)
    if B_PARTS == 2:
        b_low = (b.to(tl.float32) - b_high.to(tl.float32)).to(MULTIPLY)
        s = _dot(a_high, b_low, s, UPCAST, PRECISION)
    return _dot(a_high, b_high, s, UPCAST, PRECISION)


@triton.jit
def _dot(a, b, s, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, s, input_precision=PRECISION)


@triton.jit
def _place(n, P, GH, GW, sb, st, sh, sw):
    """Where patch n's first pixel lies."""
    q = n % P
    image, time = (n // P).to(tl.int64), (q // (GH * GW)).to(tl.int64)
    return image * sb + time * st + (q // GW % GH).to(tl.int64) * sh + (q % GW).to(tl.int64) * sw


@triton.jit
def _within(k, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, sc, sf, si, sj):
    """Where pixel k of a patch lies, from its first."""
    channel, frame = (k // (PT * PH * PW)).to(tl.int64), (k // (PH * PW) % PT).to(tl.int64)
    return channel * sc + frame * sf + (k // PW % PH).to(tl.int64) * si + (k % PW).to(tl.int64) * sj


# Kernels


@triton.jit(do_not_specialize=["N", "P", "GH", "GW"])
def _tokens(
    x,  # patches, as strides say
    w,  # [D, K]
    offset,  # [D]
    positions,  # [lead + P, D]
    ratio,  # [C]
    tokens,  # [images, lead + P, D]
    N,
    D,
    P,
    GH,
    GW,
    lead,
    sb,
    st,
    sh,
    sw,
    sc,
    sf,
    si,
    sj,
    POSITIONS: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    MULTIPLY: tl.constexpr,
    PIXEL_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DEPTH: tl.constexpr = PT * PH * PW
    i, j = _tiles.tile_at(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(D, BLOCK_N))
    n, d = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    patch = x + _place(n, P, GH, GW, sb, st, sh, sw)
    row = w + d.to(tl.int64) * (C * DEPTH)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(C):
        for k0 in range(0, DEPTH, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            at = patch[:, None] + _within(c * DEPTH + k, PT, PH, PW, sc, sf, si, sj)[None, :]
            a = tl.load(at, mask=(n < N)[:, None] & (k < DEPTH)[None, :], other=0)
            b = tl.load(
                row[None, :] + (c * DEPTH + k)[:, None], mask=(d < D)[None, :] & (k < DEPTH)[:, None], other=0.0
            )
            s = _multiply(a, b, s, MULTIPLY, PIXEL_PARTS, WEIGHT_PARTS, UPCAST, PRECISION)
        s *= tl.load(ratio + c)
    s += tl.load(offset + d, mask=d < D, other=0.0)[None, :]
    token = n // P * (lead + P) + lead + n % P
    inside = (n < N)[:, None] & (d < D)[None, :]
    if POSITIONS:
        place = (lead + n % P).to(tl.int64)[:, None] * D + d[None, :]
        s += tl.load(positions + place, mask=inside, other=0.0).to(tl.float32)
    to = tokens + token.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, s.to(tokens.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "P", "GH", "GW", "span"])
def _weight_gradients(
    x,  # patches, as strides say
    grad,  # [images, lead + P, D]
    partial,  # [splits, D, K]
    N,
    D,
    P,
    GH,
    GW,
    lead,
    span,  # patches of a split
    sb,
    st,
    sh,
    sw,
    sc,
    sf,
    si,
    sj,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    MULTIPLY: tl.constexpr,
    PIXEL_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PT * PH * PW
    i, j = _tiles.tile_at(tl.program_id(0), tl.cdiv(D, BLOCK_M), tl.cdiv(K, BLOCK_N))
    split = tl.program_id(1)
    d, k = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = x + _within(k, PT, PH, PW, sc, sf, si, sj)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n0 in range(split * span, tl.minimum(split * span + span, N), BLOCK_K):
        n = n0 + tl.arange(0, BLOCK_K)
        token = (n // P * (lead + P) + lead + n % P).to(tl.int64)
        a = tl.load(grad + token[None, :] * D + d[:, None], mask=(d < D)[:, None] & (n < N)[None, :], other=0.0)
        at = pixel[None, :] + _place(n, P, GH, GW, sb, st, sh, sw)[:, None]
        b = tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        s = _multiply(a, b, s, MULTIPLY, WEIGHT_PARTS, PIXEL_PARTS, UPCAST, PRECISION)
    to = partial + (split.to(tl.int64) * D + d)[:, None] * K + k[None, :]
    tl.store(to, s, mask=(d < D)[:, None] & (k < K)[None, :])
