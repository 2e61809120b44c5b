"""What the Triton kernels share: tiles of S = x yᵀ from the matrix unit, their configuration, and gradients from G.

Every op is one kernel over tiles of S: `products` computes the tile, a few lines of the op's own use it up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmfast.ops._configs import DESCRIPTORS, Config, case, choose, target
from vlmfast.ops._unit import SHORTEST

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    MISSING = ""
except ImportError as _error:

    class _Absent:
        """Kernels are defined all the same, and never run: `unsupported` says why."""

        constexpr = staticmethod(lambda value: value)

        @staticmethod
        def jit(function=None, **options):
            return function or (lambda function: function)

    triton = tl = _Absent  # type: ignore[assignment]
    MISSING = f"Triton cannot be imported ({_error}); run: pip install 'vlmfast[triton]'"

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors, one after the other, in numpy."""

EDGE = 16384
"""Rows and columns of S that one launch of a forward kernel reduces; bounds the partial results."""

STEP = 256
"""Blocks of S are multiples of this high and wide: of whole tiles."""

SUMS = 2**28
"""Bytes of float32 sums of y above which dx and dy are made one after the other, each a band at a time."""

LN2 = math.log(2)
LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(-3.0e38)  # the reference of an empty sum: below any other, and its difference to itself is 0


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the Triton kernels cannot take this pair of matrices."""
    if MISSING:
        return MISSING
    for tensor in (x, y):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its kernels take float32, bfloat16 and float16; a tensor is {tensor.dtype}"
        if tensor.device.type == "cpu" and not INTERPRET:
            return "its kernels run on a GPU; a tensor is on the cpu (TRITON_INTERPRET=1 runs them there, slowly)"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"its kernels run on a GPU; a tensor is on {tensor.device}"
    if x.device.type == "cuda" and not torch.version.hip:
        gpu = torch.cuda.get_device_properties(x.device)  # torch.compile knows it for a constant
        if gpu.major < 8:
            return f"its kernels need compute capability 8.0 or later; {gpu.name} has {gpu.major}.{gpu.minor}"
    return None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    config: Config | None = None,
    fuse: bool = True,
    **constants: Any,
) -> Any:
    """Runs a kernel on the device of its first argument, a tensor or a descriptor of one; returns it, compiled.

    fuse: a product that is added to something need not be rounded first.
    """
    device = getattr(args[0], "base", args[0]).device
    if config is not None:
        constants |= {"num_warps": config.warps, "num_stages": config.stages}
    if not fuse and device.type == "cuda":  # the interpreter fuses nothing, and knows no such option
        constants["enable_fp_fusion"] = False
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel[grid](*args, **constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# The pair of matrices, as kernels read it


@dataclass
class Pair:
    """x [M, D] and y [N, D], ready for `products`, with what its kernels are to be told."""

    x: Tensor  # as the caller has them, contiguous
    y: Tensor
    x_rows: Tensor  # [M, D], or [M, 2 Dp] with the bfloat16 parts of each row side by side
    y_rows: Tensor
    x_inverse: Tensor  # [M] float32, 1 / length, or 1 where rows are taken as they are
    y_inverse: Tensor
    x_power: Tensor | None  # [M] float32: what the caller's rows were multiplied with to be x; None: they are x
    y_power: Tensor | None
    normalize: bool
    split: bool  # rows are two bfloat16 parts
    gradient: torch.dtype  # of a tile of G
    config: Config
    constants: dict[str, Any]  # of `products`

    @property
    def operands(self) -> tuple:
        """The leading arguments of every kernel over tiles: x, y, and their inverse lengths."""
        x, y = self.x_rows, self.y_rows
        if self.constants["TMA"]:
            # Not their own strides: that of a single row may be anything.
            strides = [x.shape[1], 1]
            x = TensorDescriptor(x, list(x.shape), strides, [self.config.block_m, self.config.block_k])
            y = TensorDescriptor(y, list(y.shape), strides, [self.config.block_n, self.config.block_k])
        return x, y, self.x_inverse, self.y_inverse

    @property
    def folded(self) -> bool:
        """Whether a tile of G holds G_ij / (|x_i| |y_j|), so that x and y are multiplied as they came in, unrounded.

        float16 has no room for that: there the tile is G, and unit rows are rounded to float16.
        """
        return self.gradient != torch.float16

    def tiles_of(self, matrix: Tensor) -> Any:
        """A matrix like S, as a kernel writes tiles to it: by the copy unit, where rows go through it."""
        block = [self.config.block_m, self.config.block_n]
        return TensorDescriptor.from_tensor(matrix, block) if self.constants["TMA"] else matrix

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, the depth of one part of a row, and the distance between rows."""
        stride = self.x_rows.shape[1]
        return len(self.x), len(self.y), stride // 2 if self.split else stride, stride


def pair(x: Tensor, y: Tensor, normalize: bool, precision: str, kind: str) -> Pair:
    """Both sides in one dtype that the matrix unit multiplies, and their inverse lengths.

    kind: whose lines use the tiles up, one of _configs.KINDS.
    """
    x, y = x.contiguous(), y.contiguous()
    x_power = y_power = None
    if normalize:
        (x, x_power), (y, y_power) = _shortened(x), _shortened(y)
    x_inverse, y_inverse = (
        inverse_lengths(side) if normalize else torch.ones(len(side), dtype=torch.float32, device=x.device)
        for side in (x, y)
    )
    where = target(x.device)
    dtype = x.dtype if x.dtype == y.dtype else torch.float32
    split = dtype == torch.float32 and precision == "bf16x3"
    gradient = torch.bfloat16 if split else torch.float32 if precision == "ieee" else dtype
    # The copy unit of Hopper takes rows that start on 16 bytes; those of two parts are padded.
    aligned = split or not (x.shape[1] * dtype.itemsize % 16 or any(side.data_ptr() % 16 for side in (x, y)))
    tma = where in DESCRIPTORS and aligned
    config = choose(x.device, where, case(kind, dtype, precision, tma, x.shape[1]))
    x_rows, y_rows = (parts(side, config.block_k) if split else side.to(dtype) for side in (x, y))
    constants = {
        "TMA": tma,
        "PARTS": 3 if split else 1,
        "UPCAST": where == "interpreter",  # it multiplies the raw bits of bfloat16
        "PRECISION": "tf32" if precision == "tf32" and dtype == torch.float32 else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    sides = (x, y, x_rows, y_rows, x_inverse, y_inverse, x_power, y_power)
    return Pair(*sides, normalize, split, gradient, config, constants)


def _shortened(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(float32 rows divided by a power of two near their length where that is above 1, the factors [M]).

    A row of length 1e20 has no square in float32. Other dtypes stay as they are: float16 has no such lengths, and
    bfloat16 rows are read by the copy unit from where they lie.
    """
    if x.dtype != torch.float32:
        return x, None
    exponent = torch.frexp(x.abs().amax(1)).exponent.clamp(0, 126)  # of NaN and infinity: any will do
    power = torch.exp2(-exponent.float())
    return x * power[:, None], power


def parts(x: Tensor, block: int) -> Tensor:
    """[M, 2 Dp] bfloat16: x rounded, then what the rounding left, rounded; each padded with zeros to whole blocks."""
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block))
    high = x.to(torch.bfloat16)
    low = torch.where(high.isfinite(), x - high.float(), 0)  # infinity has no remainder
    return torch.cat([high, low.to(torch.bfloat16)], 1)


# Pieces of kernels


@triton.jit
def tile_at(pid, tiles_m, tiles_n):
    """The row and column of tile number `pid`: eight rows of tiles are walked column by column, for the L2 cache."""
    first = pid // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first, 8)
    within = pid % (8 * tiles_n)
    return first + within % height, within // height


@triton.jit
def load_rows(x, at, k, rows, D, stride):
    """[rows, k] numbers of a matrix, 0 outside it."""
    inside = (at < rows)[:, None] & (k < D)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0)


@triton.jit
def products(
    x,  # [M, stride], a pointer or a descriptor
    y,  # [N, stride]
    m0,
    n0,
    M,
    N,
    D,  # depth of one part
    stride,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32: rows m0 onwards of x times rows n0 onwards of y, 0 outside either."""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, PARTS * D, BLOCK_K):
        x_k, y_k = k, k
        if PARTS == 3:  # x = high | low: high·high, high·low, low·high; low·low is below what float32 keeps of a sum
            x_k = tl.where(k >= D, k - D, k)
            y_k = tl.where(k >= 2 * D, k - 2 * D, k)
        if TMA:
            a = x.load([m0, x_k])
            b = y.load([n0, y_k])
        else:
            a = load_rows(x, m0 + tl.arange(0, BLOCK_M), x_k + tl.arange(0, BLOCK_K), M, stride, stride)
            b = load_rows(y, n0 + tl.arange(0, BLOCK_N), y_k + tl.arange(0, BLOCK_K), N, stride, stride)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        s = tl.dot(a, b.T, s, input_precision=PRECISION)
    return s


@triton.jit
def all_of(condition):
    """Whether a vector of conditions is true throughout."""
    # As a matrix: on sm_100, Triton 3.7.1 fails to reduce a vector that was itself reduced from a tile.
    return tl.min(tl.where(condition, 1, 0)[None, :]) == 1


@triton.jit
def any_of(condition):
    """Whether a vector of conditions is true anywhere."""
    return tl.max(tl.where(condition, 1, 0)[None, :]) == 1


@triton.jit
def store_gradient(g, high, low, i, j, rows, stride, SPLIT: tl.constexpr, TMA: tl.constexpr):
    """Writes tile (i, j) of a block of G; with SPLIT as two bfloat16 parts, to `high` and `low`."""
    if TMA:  # it cuts off what lies outside the workspace; within it, nobody reads what lies outside the block
        top = g.to(high.dtype)
        high.store([i * g.shape[0], j * g.shape[1]], top)
        if SPLIT:
            low.store([i * g.shape[0], j * g.shape[1]], (g - top.to(tl.float32)).to(low.dtype))
    else:
        m, n = i * g.shape[0] + tl.arange(0, g.shape[0]), j * g.shape[1] + tl.arange(0, g.shape[1])
        at = m.to(tl.int64)[:, None] * stride + n[None, :]
        # Up to the stride, a multiple of 16: so 8 numbers are written at a time, the last of a row for nobody.
        inside = (m < rows)[:, None] & (n < stride)[None, :]
        top = g.to(high.dtype.element_ty)
        tl.store(high + at, top, mask=inside)
        if SPLIT:
            tl.store(low + at, (g - top.to(tl.float32)).to(low.dtype.element_ty), mask=inside)


# Kernels over rows


@triton.jit(do_not_specialize=["M"])
def _inverse_lengths(x, inverse, M, D, shortest, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    square = tl.zeros([BLOCK_M], tl.float32)
    small = tl.zeros([BLOCK_M], tl.float32)  # the square of the row over 2^64: that of a long row passes float32
    for k in range(0, D, BLOCK_K):
        a = load_rows(x, m, k + tl.arange(0, BLOCK_K), M, D, D).to(tl.float32)
        square += tl.sum(a * a, 1)
        a *= 5.421010862427522e-20
        small += tl.sum(a * a, 1)
    length = tl.where(square == float("inf"), tl.sqrt_rn(small) * 18446744073709551616.0, tl.sqrt_rn(square))
    length = tl.where(length < shortest, shortest, length)  # a NaN stays
    tl.store(inverse + m, tl.div_rn(1.0, length), mask=m < M)


def inverse_lengths(x: Tensor) -> Tensor:
    """[M] float32: 1 / the length of each row, clamped as in `unit_rows`."""
    M, D = x.shape
    inverse = torch.empty(M, dtype=torch.float32, device=x.device)
    launch(_inverse_lengths, (cdiv(M, 32),), x, inverse, M, D, SHORTEST, BLOCK_M=32, BLOCK_K=128)
    return inverse


@triton.jit(do_not_specialize=["M", "N"])
def _paired_cosines(
    x,
    y,
    x_inverse,
    y_inverse,
    ids,
    cosines,
    M,
    N,
    D,
    stride,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(ids + m, mask=m < M, other=-1)
    n = tl.where((n >= 0) & (n < N), n, N)  # N: nobody
    s = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        a = load_rows(x, m, at, M, D, stride).to(tl.float32)
        b = load_rows(y, n, at, N, D, stride).to(tl.float32)
        s += tl.sum(a * b, 1)
        if PARTS == 3:  # the same three products as in a tile, so that a pair's errors cancel against its tile's
            s += tl.sum(a * load_rows(y, n, at + D, N, 2 * D, stride).to(tl.float32), 1)
            s += tl.sum(load_rows(x, m, at + D, M, 2 * D, stride).to(tl.float32) * b, 1)
    s *= tl.load(x_inverse + m, mask=m < M, other=0.0) * tl.load(y_inverse + n, mask=n < N, other=0.0)
    tl.store(cosines + m, s, mask=m < M)


def paired_cosines(p: Pair, ids: Tensor, swap: bool = False) -> Tensor:
    """[M] float32: each x_i with y_ids[i], 0 where there is no such row; with `swap` each y_j with x_ids[j]."""
    x, y, x_inverse, y_inverse = p.x_rows, p.y_rows, p.x_inverse, p.y_inverse
    M, N, D, stride = p.sizes
    if swap:
        x, y, x_inverse, y_inverse, M, N = y, x, y_inverse, x_inverse, N, M
    cosines = torch.empty(M, dtype=torch.float32, device=x.device)
    constants: dict[str, Any] = {"PARTS": p.constants["PARTS"], "BLOCK_M": 32, "BLOCK_K": 64}
    arguments = (x, y, x_inverse, y_inverse, ids, cosines, M, N, D, stride)
    launch(_paired_cosines, (cdiv(M, 32),), *arguments, **constants)
    return cosines


@triton.jit(do_not_specialize=["M"])
def _to_rows(
    T,  # [M, D] float32
    x,
    inverse,
    factor,  # [] float32
    dx,
    dots,  # [M] float32
    M,
    D,
    FOLDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inv = tl.load(inverse + m, mask=m < M, other=0.0)
    turn = tl.zeros([BLOCK_M], tl.float32) + 1.0 if FOLDED else inv
    along = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        a = load_rows(x, m, at, M, D, D).to(tl.float32)
        along += tl.sum(load_rows(T, m, at, M, D, D) * turn[:, None] * a, 1)
    tl.store(dots + m, along, mask=m < M)

    # dx = factor (t - <t, x> x / |x|²): what points along a row cannot change its direction
    radial = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZE:
        radial = tl.where(inv < 1e12, along * inv * inv, 0.0)  # lengths that were clamped are no lengths
        radial = tl.where(inv != inv, inv, radial)
    by = tl.load(factor)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        a = load_rows(x, m, at, M, D, D).to(tl.float32)
        t = load_rows(T, m, at, M, D, D) * turn[:, None]
        d = by * (t - radial[:, None] * a)
        inside = (m < M)[:, None] & (at < D)[None, :]
        tl.store(dx + m.to(tl.int64)[:, None] * D + at[None, :], d.to(dx.dtype.element_ty), mask=inside)


# Gradients from tiles of G = dL/dS


def blocks(M: int, N: int, height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, first column, rows, columns) of each block of a matrix, in the order of reading."""
    for row in range(0, M, height):
        for column in range(0, N, width):
            yield row, column, min(height, M - row), min(width, N - column)


class Gradients:
    """dx and dy from S's gradient G, a block at a time: `for block in gradients.blocks(): fill .G; .add(block)`."""

    def __init__(
        self,
        p: Pair,
        need_x: bool,
        need_y: bool,
        workspace: int,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        factor: Tensor | None = None,
        whole_rows: bool = False,
    ) -> None:
        """factor: [] float32, of dx and dy; where it is known from the start, one side is done a band at a time.

        whole_rows: a block is as wide as S, and STEP rows high at least.
        """
        self.pair, self.need_x, self.need_y, self.factor = p, need_x, need_y, factor
        M, N, _, _ = p.sizes
        # The block that fits the workspace: square, but as wide as the matrix is when that is less high.
        numbers = workspace // (4 if p.split else p.gradient.itemsize)
        side = max(STEP, math.isqrt(numbers) // STEP * STEP)
        self.height = min(M, side)
        self.width = min(N, max(side, numbers // self.height // STEP * STEP))
        self.height = min(M, max(self.height, numbers // self.width // STEP * STEP))
        if whole_rows:
            self.width, self.height = N, min(M, max(STEP, numbers // N // STEP * STEP))
        planes = 2 if p.split else 1
        self.stride = cdiv(self.width, 16) * 16  # rows start on whole words, however many columns there are
        self.G = torch.empty(planes, self.height, self.stride, dtype=p.gradient, device=p.x.device)
        # A band of rows has all its sums when the blocks beside each other are through, one of columns for those below.
        bands = factor is not None
        self.x = _Sums(p, "x", M if need_x else 0, self.height if bands else M, dtypes[0])
        self.y = _Sums(p, "y", N if need_y else 0, self.width if bands and not need_x else N, dtypes[1])

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """The blocks of S, in a fixed order: sums over them are repeatable."""
        M, N, _, _ = self.pair.sizes
        if self.need_x:
            yield from blocks(M, N, self.height, self.width)
        else:
            for column, row, columns, rows in blocks(N, M, self.width, self.height):
                yield row, column, rows, columns

    @property
    def workspace(self) -> tuple:
        """The arguments that `store_gradient` needs: G, or its two parts, and the distance between rows."""
        return *map(self.pair.tiles_of, (self.G[0], self.G[-1])), self.stride

    @property
    def constants(self) -> dict[str, Any]:
        """Of kernels that fill G."""
        return {"FOLD": self.pair.folded, "SPLIT": self.pair.split}

    def add(self, row: int, column: int, rows: int, columns: int) -> None:
        """dx += G y and dy += Gᵀ x for the block that G holds."""
        M, N, _, _ = self.pair.sizes
        G = list(self.G[:, :rows, :columns])
        if self.need_x:
            self.x.add(G, self.y.rows(column, columns), row, fresh=column == 0)
            if self.x.banded and column + columns == N:
                self.x.finish(self.factor, row, rows)
        if self.need_y:
            self.y.add([g.T for g in G], self.x.rows(row, rows), column, fresh=row == 0)
            if self.y.banded and row + rows == M:
                self.y.finish(self.factor, column, columns)

    def results(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(dx [M, D], dy [N, D]) in their dtypes, times the factor; [0] for one that is not needed."""
        factor = self.factor if factor is None else factor
        for side in (self.x, self.y):
            if not side.banded and len(side.sums):
                side.finish(factor, 0, len(side.sums))
        return (
            self.x.out.to(self.x.dtype) if self.need_x else self.x.out.new_empty(0),
            self.y.out.to(self.y.dtype) if self.need_y else self.y.out.new_empty(0),
        )


class _Sums:
    """One side of `Gradients`: the sums of its rows over all blocks, and what becomes of them."""

    def __init__(self, p: Pair, of: str, rows: int, held: int, dtype: torch.dtype) -> None:
        """rows: 0 if its gradient is not needed; held: how many of them have their sums at one time."""
        self.pair, self.dtype = p, dtype
        self.side, self.operands, self.inverse, self.power = (
            (p.x, p.x_rows, p.x_inverse, p.x_power) if of == "x" else (p.y, p.y_rows, p.y_inverse, p.y_power)
        )
        D, device = self.side.shape[1], self.side.device
        self.sums = torch.empty(min(rows, held), D, dtype=torch.float32, device=device)
        self.banded = held < rows
        # The interpreter's stores to bfloat16 do not round: there the results are rounded at the end.
        stored = torch.float32 if p.constants["UPCAST"] else dtype
        in_place = stored == torch.float32 and not self.banded
        self.out = self.sums if in_place else torch.empty(rows, D, dtype=stored, device=device)
        # Dot products of each sum with its row, before the factor: both sides' add up to Σ_ij G_ij cos_ij.
        self.dots = torch.empty(rows, dtype=torch.float32, device=device)

    @cached_property
    def factors(self) -> tuple[Tensor, ...]:
        """The rows [M, D] that the other side's G is multiplied with; two parts of each if G is in two parts."""
        p, D = self.pair, self.side.shape[1]
        if p.split:
            return self.operands[:, :D], self.operands[:, self.operands.shape[1] // 2 :][:, :D]
        if p.folded or not p.normalize:
            return (self.side.to(p.gradient),)
        return ((self.side * self.inverse[:, None]).to(p.gradient),)

    def rows(self, start: int, count: int) -> list[Tensor]:
        """Some of the factors' rows."""
        return [factor[start : start + count] for factor in self.factors]

    def add(self, G: list[Tensor], others: list[Tensor], start: int, fresh: bool) -> None:
        """The sums of the rows from `start` take in G times the others' rows."""
        first = 0 if self.banded else start
        _accumulate(self.sums[first : first + len(G[0])], G, others, fresh)

    def finish(self, factor: Tensor | None, start: int, count: int) -> None:
        """From the finished sums of some rows to gradients of these rows as they came in."""
        p, here = self.pair, slice(start, start + count)
        constants: dict[str, Any] = {"FOLDED": p.folded, "NORMALIZE": p.normalize, "BLOCK_M": 32, "BLOCK_K": 64}
        sums, out = self.sums[:count] if self.banded else self.sums[here], self.out[here]
        arguments = (sums, self.side[here], self.inverse[here], factor, out, self.dots[here], *sums.shape)
        launch(_to_rows, (cdiv(count, 32),), *arguments, **constants)
        if self.power is not None:
            out *= self.power[here, None]


def _accumulate(out: Tensor, left: list[Tensor], right: list[Tensor], fresh: bool) -> None:
    """out = left @ right, or out += it unless `fresh`, in float32; of two parts each, all but low times low."""
    for a, b in [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < 2]:
        beta = 0 if fresh else 1
        if a.dtype == torch.float32 or a.device.type == "cpu":
            torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
        fresh = False
