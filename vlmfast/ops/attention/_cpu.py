"""Packed attention on PyTorch's CPU kernel: neighbours of one length are one dense call, and nothing is padded.

Dense attention is that kernel's own call, `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from vlmfast.ops.attention import reference

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """None, or why PyTorch's CPU kernel cannot run this call."""
    return None if query.device.type == "cpu" else f"its kernel runs on the CPU; a tensor is on {query.device}"


def forward(
    query: Tensor,  # [tokens, H, K]
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,  # [B + 1] int32
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [tokens, H, K] and the scores' log-sum-exp [tokens, H], float32 or wider."""
    out, lse = reference.like(query), reference.totals(query)
    for q, k, v, o, total in _runs(cu_seqlens, query, key, value, out, lse):
        result, sums = _forward(*_wide(q, k, v), 0.0, causal, scale=scale)
        o.copy_(result)
        total.copy_(sums)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [tokens, H, K] of query, key and value."""
    gradients = reference.like(query), reference.like(query), reference.like(query)
    for g, q, k, v, o, total, *into in _runs(cu_seqlens, grad, query, key, value, out, lse, *gradients):
        results = _backward(*_wide(g, q, k, v, o), total, 0.0, causal, scale=scale)
        for gradient, result in zip(into, results, strict=True):
            gradient.copy_(result)
    return gradients


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least: of short sequences in bfloat16, the kernel's backward takes twice the time."""
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


def _runs(cu_seqlens: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors as views [n, H, T, ...], for each run of n neighbours of one length T."""
    start = 0
    for length, run in groupby(stop - start for start, stop in pairwise(cu_seqlens.tolist())):
        stop = start + length * sum(1 for _ in run)
        if length:
            yield tuple(x[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for x in tensors)
        start = stop
