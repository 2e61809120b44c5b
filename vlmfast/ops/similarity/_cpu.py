"""Similarities, their top k and their ranks on csrc/cpu/similarity.isa.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast._ext import C
from vlmfast.ops import _native
from vlmfast.ops._native import address

# The gradient comes with a dense [M, N] matrix: two plain products, which PyTorch's own are right for.
from vlmfast.ops.similarity.reference import backward

__all__ = ["backward", "forward", "ranks", "topk", "unsupported"]


def unsupported(query: Tensor, items: Tensor) -> str | None:
    """None, or why the compiled kernels cannot run this call."""
    return _native.unsupported(query, items)


def forward(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    normalize: bool,
    precision: str,
) -> Tensor:
    """[M, N] similarities."""
    query, items = query.contiguous(), items.contiguous()
    out = _native.empty(len(query), len(items))
    C.similarity(*_native.pair(query, items, normalize), address(out))
    return out


def topk(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    k: int,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Values [M, k] in descending order and the items [M, k] they belong to; among equals, the lower index first."""
    query, items = query.contiguous(), items.contiguous()
    values, indices = _native.empty(len(query), k), _native.empty(len(query), k, dtype=torch.int64)
    C.similarity_topk(*_native.pair(query, items, normalize), k, address(values), address(indices))
    return values, indices


def ranks(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    positives: Tensor,  # [M, P] int64
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(items above each query's best positive [M], other items equal to it [M])."""
    query, items, positives = query.contiguous(), items.contiguous(), positives.contiguous()
    above, ties = (_native.empty(len(query), dtype=torch.int64) for _ in range(2))
    arguments = (address(positives), positives.shape[1], address(above), address(ties))
    C.rank_counts(*_native.pair(query, items, normalize), *arguments)
    return above, ties
