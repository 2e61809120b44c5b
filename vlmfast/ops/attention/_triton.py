"""Attention for short sequences as Triton kernels: no tile is wider than the sequence and the head ask for.

A head of up to 128 tokens is one tile of one program, forward and backward. Up to 288 tokens a row of scores still fits
one program, and its softmax is one pass. Longer rows, and packed sequences of very different lengths, are walked block
by block. Heads of 72 features are computed as 64 + 16, rows of 257 keys as nine tiles of 32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast.ops import _limits, _tiles
from vlmfast.ops._configs import Config
from vlmfast.ops._tiles import LOG2E, cdiv, tl, triton
from vlmfast.ops.attention import reference


class Plan(NamedTuple):
    """How heads of up to some width are computed on a GPU."""

    one_pass: int  # keys whose scores fit one program
    whole: int  # tokens of a head whose gradients fit one program: 64 or 128
    ahead: bool  # programs take several short heads each, and fetch one while the last is computed
    forward: Config  # of longer heads: rows that a program owns, and keys that it walks at a time
    backward: Config  # likewise; for the gradients of keys it owns keys and walks rows


# Target -> bytes of a number -> (widest head, plan). benchmarks/compile_gates.py says that they spill nothing; they
# have not been timed on a GPU.
PLANS: dict[str, dict[int, tuple[tuple[int, Plan], ...]]] = {
    "sm_80": {
        2: (
            (64, Plan(192, 128, False, Config(128, 64, 0, 8, 2), Config(64, 64, 0, 8, 2))),
            (80, Plan(128, 128, False, Config(128, 64, 0, 8, 2), Config(32, 32, 0, 4, 2))),
            (128, Plan(64, 64, False, Config(128, 64, 0, 8, 2), Config(64, 64, 0, 8, 2))),
        ),
        4: ((64, Plan(0, 0, False, Config(64, 32, 0, 8, 1), Config(32, 32, 0, 4, 1))),),
    },
    "sm_90": {
        2: (
            (64, Plan(288, 128, True, Config(128, 64, 0, 8, 2), Config(64, 64, 0, 4, 2))),
            (80, Plan(256, 128, True, Config(128, 64, 0, 8, 2), Config(64, 64, 0, 4, 2))),
            (128, Plan(64, 128, True, Config(128, 64, 0, 8, 2), Config(64, 64, 0, 8, 2))),
        ),
        4: ((64, Plan(0, 0, False, Config(64, 32, 0, 4, 1), Config(64, 32, 0, 8, 1))),),
    },
    "gfx942": {
        2: (
            (64, Plan(256, 64, False, Config(128, 64, 0, 8, 1), Config(64, 64, 0, 8, 1))),
            (128, Plan(128, 64, False, Config(128, 64, 0, 8, 1), Config(32, 32, 0, 4, 1))),
        ),
        4: ((64, Plan(0, 0, False, Config(64, 32, 0, 4, 1), Config(32, 32, 0, 4, 1))),),
    },
}
PLANS["sm_100"] = PLANS["sm_90"]
PLANS["interpreter"] = {2: PLANS["sm_90"][2], 4: PLANS["sm_90"][2]}
WIDEST = {2: 128, 4: 64}  # bytes of a number -> features of the widest head, on every target
WHOLE_PACKED = 64  # packed heads are one tile up to here; few of them are as long as the longest


def unsupported(query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    reason = _tiles.unsupported(query, query)
    if reason is not None:
        return reason
    widest = WIDEST[query.dtype.itemsize]
    if query.shape[-1] > widest:
        return f"its kernels take {query.dtype} heads of up to {widest} features; got {query.shape[-1]}"
    return None


def forward(
    query: Tensor,  # [B, H, T, K], or packed [tokens, H, K]
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,  # [B + 1] int32
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output in the query's shape, and the scores' log-sum-exp [B, H, T] or [tokens, H] float32."""
    c = _Call(query, key, value, cu_seqlens, max_seqlen, causal)
    out, lse = c.like(), reference.totals(query)
    arguments = (*c.operands, out, lse, *c.sizes, scale)
    if c.longest <= (min(WHOLE_PACKED, c.plan.one_pass) if c.packed else c.plan.one_pass):
        rows = 128 if 64 < c.longest <= 128 else 64
        keys = 64 if -c.longest % 64 < 32 else 32
        heads = (4 if c.longest <= 64 else 2 if c.longest <= 128 else 1) if c.plan.ahead else 1
        config = Config(rows, keys, 0, rows // 16, 2 if heads > 1 else 1)
        constants = c.constants(config, {"HEADS": heads, "TILES": cdiv(c.longest, keys)})
        grid = (cdiv(c.heads, heads), cdiv(c.longest, rows))
        _tiles.launch(_forward_rows, grid, *arguments, config=config, **constants)
    else:
        config = c.plan.forward
        if c.packed and config.block_m == 128:
            config = config._replace(block_m=64, warps=4)
        grid = (c.heads, cdiv(c.longest, config.block_m))
        _tiles.launch(_forward_blocks, grid, *arguments, config=config, **c.constants(config))
    return out.to(query.dtype), lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    c = _Call(query, key, value, cu_seqlens, max_seqlen, causal)
    grad = c.like(query.dtype).copy_(grad) if grad.stride() != out.stride() else grad
    dq, dk, dv = c.like(), c.like(), c.like()
    if c.longest <= (min(WHOLE_PACKED, c.plan.whole) if c.packed else c.plan.whole):
        side = 64 if c.longest <= 64 else 128
        heads = 2 if c.plan.ahead and side == 64 else 1
        config = Config(side, side, 0, side // 16, heads)
        arguments = (*c.operands, grad, lse, dq, dk, dv, *c.sizes, scale)
        constants = c.constants(config, {"HEADS": heads})
        _tiles.launch(_backward_whole, (cdiv(c.heads, heads),), *arguments, config=config, **constants)
    else:
        config = c.plan.backward
        grid = (c.heads, cdiv(c.longest, config.block_m))
        arguments = (*c.operands, out, grad, lse)
        _tiles.launch(_backward_queries, grid, *arguments, dq, *c.sizes, scale, config=config, **c.constants(config))
        config = config._replace(block_m=config.block_n, block_n=config.block_m)
        _tiles.launch(_backward_keys, grid, *arguments, dk, dv, *c.sizes, scale, config=config, **c.constants(config))
    return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


def _two_powers(n: int) -> tuple[int, int]:
    """Two powers of two from 16 on, whose sum is at or just above n; the second may be 0. 72: 64 and 16; 64: 64, 0."""
    first = max(16, 1 << (n.bit_length() - 1))
    rest = max(0, n - first)
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * first, 0) if second == first else (first, second)


class _Call:
    """The tensors of a call as kernels read them: one layout for query, key and value, another for all that is made."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool
    ) -> None:
        self.packed = cu_seqlens is not None
        self.causal, self.shape, self.dtype = causal, query.shape, query.dtype
        if query.stride() != key.stride() or query.stride() != value.stride():
            query, key, value = (reference.like(x).copy_(x) for x in (query, key, value))
        self.query = query
        if cu_seqlens is None:
            B, H, self.longest, _ = query.shape
            strides = query.stride()[:3]
        else:
            B, H = len(cu_seqlens) - 1, query.shape[1]
            self.longest = max_seqlen or int(cu_seqlens.diff().max())
            strides = (0, query.stride(1), query.stride(0))
        self.heads = B * H
        # Without packing the kernels never look at cu_seqlens, but an address is needed.
        self.operands = (query, key, value, query if cu_seqlens is None else cu_seqlens)
        # Strides in units of 16 bytes where they are multiples of it: the compiler then knows that rows start there.
        unit = 1 if any(stride % 8 for stride in strides) else 8
        self.sizes = (self.heads, H, self.longest, *(stride // unit for stride in strides))
        where = _tiles.target(query.device)
        self.upcast = where == "interpreter"
        self.plan = next(plan for width, plan in PLANS[where][query.dtype.itemsize] if query.shape[-1] <= width)
        K = query.shape[-1]
        first, second = _two_powers(K)
        self._constants: dict[str, Any] = {
            "K": K,
            "D0": first,
            "D1": second,
            "UNIT": unit,
            "PACKED": self.packed,
            "CAUSAL": causal,
            "UPCAST": self.upcast,
            "PRECISION": _limits.PRECISION if query.dtype == torch.float32 else "ieee",
        }

    def constants(self, config: Config, more: dict[str, int] | None = None) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {**self._constants, **(more or {}), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def like(self, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor for a result; the interpreter's stores to bfloat16 do not round."""
        return reference.like(self.query, torch.float32 if self.upcast and dtype is None else self.dtype)


# Pieces of kernels. A tile of a head's features is two, D0 and D1 wide; D1 may be 0, and then the second is the first.


@triton.jit
def _sequence(head, cu_seqlens, H, T, by_b, by_h, by_t, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Of a head: its first token, length, where its first row lies, which of a token's heads it is, a row's stride."""
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    by_b, by_h, by_t = by_b * UNIT, by_h * UNIT, by_t * UNIT
    if PACKED:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        length = tl.load(cu_seqlens + b + 1) - start.to(tl.int32)
        base = start * by_t + h * by_h
    else:
        start = b * T
        length = T
        base = b * by_b + h * by_h
    return start, length, base, h, by_t


@triton.jit
def _tile(x, at, length, stride, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `at` of a head [length, K], in two parts, 0 outside it."""
    rows = x + at.to(tl.int64)[:, None] * stride
    k = tl.arange(0, D0)
    first = tl.load(rows + k[None, :], mask=(at < length)[:, None] & (k < K)[None, :], other=0.0)
    second = first
    if D1:
        k = D0 + tl.arange(0, D1)
        second = tl.load(rows + k[None, :], mask=(at < length)[:, None] & (k < K)[None, :], other=0.0)
    if UPCAST:
        first = first.to(tl.float32)
        second = second.to(tl.float32)
    return first, second


@triton.jit
def _store(x, at, length, stride, a, b, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Writes what `_tile` reads."""
    rows = x + at.to(tl.int64)[:, None] * stride
    k = tl.arange(0, D0)
    tl.store(rows + k[None, :], a.to(x.dtype.element_ty), mask=(at < length)[:, None] & (k < K)[None, :])
    if D1:
        k = D0 + tl.arange(0, D1)
        tl.store(rows + k[None, :], b.to(x.dtype.element_ty), mask=(at < length)[:, None] & (k < K)[None, :])


@triton.jit
def _dot(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over the features of a head."""
    s = tl.dot(a0, b0.T, input_precision=PRECISION)
    if D1:
        s = tl.dot(a1, b1.T, s, input_precision=PRECISION)
    return s


@triton.jit
def _mix(p, v0, v1, o0, o1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """o + p v, with p rounded to the dtype of v."""
    p = p.to(v0.dtype)
    o0 = tl.dot(p, v0, o0, input_precision=PRECISION)
    if D1:
        o1 = tl.dot(p, v1, o1, input_precision=PRECISION)
    return o0, o1


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    a = tl.zeros([ROWS, D0], tl.float32)
    b = a
    if D1:
        b = tl.zeros([ROWS, D1], tl.float32)
    return a, b


@triton.jit
def _looks(m, n, length, CAUSAL: tl.constexpr):
    """Whether token m of a sequence looks at token n; where m is past the end, at all tokens."""
    inside = (n < length)[None, :]
    if CAUSAL:
        inside = inside & (n[None, :] <= m[:, None])
    return inside


# Forward


@triton.jit(do_not_specialize=["heads", "T"])
def _forward_rows(
    q,
    k,
    v,
    cu_seqlens,
    out,
    lse,
    heads,
    H,
    T,
    by_b,
    by_h,
    by_t,
    scale,
    K: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    for i in range(HEADS):
        head = tl.minimum(tl.program_id(0) * HEADS + i, heads - 1)  # the last head may be computed twice
        start, length, base, h, row = _sequence(head, cu_seqlens, H, T, by_b, by_h, by_t, UNIT, PACKED)
        q0, q1 = _tile(q + base, m, length, row, K, D0, D1, UPCAST)
        scores = ()
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for j in tl.static_range(TILES):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            k0, k1 = _tile(k + base, n, length, row, K, D0, D1, UPCAST)
            s = _dot(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
            if PACKED or CAUSAL or j == TILES - 1:  # else there is nothing to hide in this tile
                s = tl.where(_looks(m, n, length, CAUSAL), s, float("-inf"))
            top = tl.maximum(top, tl.max(s, 1))
            scores = scores + (s,)  # type: ignore[assignment]  # noqa: RUF005
        total = tl.zeros([BLOCK_M], tl.float32)
        o0, o1 = _zeros(BLOCK_M, D0, D1)
        for j in tl.static_range(TILES):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            p = tl.exp2(scores[j] - top[:, None])
            total += tl.sum(p, 1)
            v0, v1 = _tile(v + base, n, length, row, K, D0, D1, UPCAST)
            o0, o1 = _mix(p, v0, v1, o0, o1, D1, PRECISION)
        at = start * H + h
        _store(out + at * K, m, length, H * K, o0 / total[:, None], o1 / total[:, None], K, D0, D1)
        tl.store(lse + at + m.to(tl.int64) * H, (top + tl.log2(total)) * 0.6931471805599453, mask=m < length)


@triton.jit(do_not_specialize=["heads", "T"])
def _forward_blocks(
    q,
    k,
    v,
    cu_seqlens,
    out,
    lse,
    heads,
    H,
    T,
    by_b,
    by_h,
    by_t,
    scale,
    K: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, length, base, h, row = _sequence(tl.program_id(0), cu_seqlens, H, T, by_b, by_h, by_t, UNIT, PACKED)
    m0 = tl.program_id(1) * BLOCK_M
    if m0 < length:
        m = m0 + tl.arange(0, BLOCK_M)
        q0, q1 = _tile(q + base, m, length, row, K, D0, D1, UPCAST)
        o0, o1 = _zeros(BLOCK_M, D0, D1)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum(length, m0 + BLOCK_M)
        for n0 in range(0, end, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            k0, k1 = _tile(k + base, n, length, row, K, D0, D1, UPCAST)
            s = _dot(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
            s = tl.where(_looks(m, n, length, CAUSAL), s, float("-inf"))
            # Online softmax (Milakov & Gimelshein 2018, Alg. 3): rescale the running sum when the maximum moves.
            new_top = tl.maximum(top, tl.max(s, 1))
            rescale = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * rescale + tl.sum(p, 1)
            o0 = o0 * rescale[:, None]
            if D1:
                o1 = o1 * rescale[:, None]
            v0, v1 = _tile(v + base, n, length, row, K, D0, D1, UPCAST)
            o0, o1 = _mix(p, v0, v1, o0, o1, D1, PRECISION)
            top = new_top
        at = start * H + h
        _store(out + at * K, m, length, H * K, o0 / total[:, None], o1 / total[:, None], K, D0, D1)
        tl.store(lse + at + m.to(tl.int64) * H, (top + tl.log2(total)) * 0.6931471805599453, mask=m < length)


# Backward: p = exp(s - lse), dv = pᵀ g, dp = g vᵀ, ds = p (dp - Σ_n p dp), dq = scale ds k, dk = scale dsᵀ q


@triton.jit(do_not_specialize=["heads", "T"])
def _backward_whole(
    q,
    k,
    v,
    cu_seqlens,
    g,
    lse,
    dq,
    dk,
    dv,
    heads,
    H,
    T,
    by_b,
    by_h,
    by_t,
    scale,
    K: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    for i in range(HEADS):
        head = tl.minimum(tl.program_id(0) * HEADS + i, heads - 1)
        start, length, base, h, row = _sequence(head, cu_seqlens, H, T, by_b, by_h, by_t, UNIT, PACKED)
        at = start * H + h
        q0, q1 = _tile(q + base, m, length, row, K, D0, D1, UPCAST)
        k0, k1 = _tile(k + base, m, length, row, K, D0, D1, UPCAST)
        s = _dot(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
        sums = tl.load(lse + at + m.to(tl.int64) * H, mask=m < length, other=0.0)
        p = tl.where(_looks(m, m, length, CAUSAL), tl.exp2(s - (sums * LOG2E)[:, None]), 0.0)
        g0, g1 = _tile(g + at * K, m, length, H * K, K, D0, D1, UPCAST)
        d0, d1 = _zeros(BLOCK_N, D0, D1)
        d0, d1 = _mix(p.to(g0.dtype).T, g0, g1, d0, d1, D1, PRECISION)
        _store(dv + at * K, m, length, H * K, d0, d1, K, D0, D1)

        v0, v1 = _tile(v + base, m, length, row, K, D0, D1, UPCAST)
        dp = _dot(g0, g1, v0, v1, D1, PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q0.dtype)
        d0, d1 = _zeros(BLOCK_M, D0, D1)
        d0, d1 = _mix(ds, k0, k1, d0, d1, D1, PRECISION)
        _store(dq + at * K, m, length, H * K, d0, d1, K, D0, D1)
        d0, d1 = _zeros(BLOCK_N, D0, D1)
        d0, d1 = _mix(ds.T, q0, q1, d0, d1, D1, PRECISION)
        _store(dk + at * K, m, length, H * K, d0, d1, K, D0, D1)


@triton.jit
def _along(o0, o1, g0, g1, D1: tl.constexpr):
    """Σ_n p dp of each row, which is <o, g>."""
    along = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1:
        along += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    return along


@triton.jit(do_not_specialize=["heads", "T"])
def _backward_keys(
    q,
    k,
    v,
    cu_seqlens,
    out,
    g,
    lse,
    dk,
    dv,
    heads,
    H,
    T,
    by_b,
    by_h,
    by_t,
    scale,
    K: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, length, base, h, row = _sequence(tl.program_id(0), cu_seqlens, H, T, by_b, by_h, by_t, UNIT, PACKED)
    n0 = tl.program_id(1) * BLOCK_N
    if n0 < length:
        at = start * H + h
        n = n0 + tl.arange(0, BLOCK_N)
        k0, k1 = _tile(k + base, n, length, row, K, D0, D1, UPCAST)
        v0, v1 = _tile(v + base, n, length, row, K, D0, D1, UPCAST)
        dk0, dk1 = _zeros(BLOCK_N, D0, D1)
        dv0, dv1 = _zeros(BLOCK_N, D0, D1)
        first = 0
        if CAUSAL:
            first = n0 // BLOCK_M * BLOCK_M
        for m0 in range(first, length, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            q0, q1 = _tile(q + base, m, length, row, K, D0, D1, UPCAST)
            sums = tl.load(lse + at + m.to(tl.int64) * H, mask=m < length, other=0.0)
            s = _dot(k0, k1, q0, q1, D1, PRECISION) * (scale * LOG2E)  # [BLOCK_N, BLOCK_M]
            p = tl.exp2(s - (sums * LOG2E)[None, :])
            if CAUSAL:
                p = tl.where(n[:, None] <= m[None, :], p, 0.0)
            g0, g1 = _tile(g + at * K, m, length, H * K, K, D0, D1, UPCAST)
            dv0, dv1 = _mix(p, g0, g1, dv0, dv1, D1, PRECISION)
            o0, o1 = _tile(out + at * K, m, length, H * K, K, D0, D1, UPCAST)
            dp = _dot(v0, v1, g0, g1, D1, PRECISION)
            ds = p * (dp - _along(o0, o1, g0, g1, D1)[None, :]) * scale
            dk0, dk1 = _mix(ds, q0, q1, dk0, dk1, D1, PRECISION)
        _store(dk + at * K, n, length, H * K, dk0, dk1, K, D0, D1)
        _store(dv + at * K, n, length, H * K, dv0, dv1, K, D0, D1)


@triton.jit(do_not_specialize=["heads", "T"])
def _backward_queries(
    q,
    k,
    v,
    cu_seqlens,
    out,
    g,
    lse,
    dq,
    heads,
    H,
    T,
    by_b,
    by_h,
    by_t,
    scale,
    K: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, length, base, h, row = _sequence(tl.program_id(0), cu_seqlens, H, T, by_b, by_h, by_t, UNIT, PACKED)
    m0 = tl.program_id(1) * BLOCK_M
    if m0 < length:
        at = start * H + h
        m = m0 + tl.arange(0, BLOCK_M)
        q0, q1 = _tile(q + base, m, length, row, K, D0, D1, UPCAST)
        g0, g1 = _tile(g + at * K, m, length, H * K, K, D0, D1, UPCAST)
        o0, o1 = _tile(out + at * K, m, length, H * K, K, D0, D1, UPCAST)
        along = _along(o0, o1, g0, g1, D1)
        sums = tl.load(lse + at + m.to(tl.int64) * H, mask=m < length, other=0.0) * LOG2E
        dq0, dq1 = _zeros(BLOCK_M, D0, D1)
        end = length
        if CAUSAL:
            end = tl.minimum(length, m0 + BLOCK_M)
        for n0 in range(0, end, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            k0, k1 = _tile(k + base, n, length, row, K, D0, D1, UPCAST)
            s = _dot(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
            p = tl.where(_looks(m, n, length, CAUSAL), tl.exp2(s - sums[:, None]), 0.0)
            v0, v1 = _tile(v + base, n, length, row, K, D0, D1, UPCAST)
            dp = _dot(g0, g1, v0, v1, D1, PRECISION)
            dq0, dq1 = _mix(p * (dp - along[:, None]) * scale, k0, k1, dq0, dq1, D1, PRECISION)
        _store(dq + at * K, m, length, H * K, dq0, dq1, K, D0, D1)
