"""The definition of similarity, its top k and its ranks: plain PyTorch, some queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmfast.ops._unit import accumulator, unit_rows, unit_rows_backward

CHUNK = 2**20  # similarities held at once by topk and ranks


def unsupported(query: Tensor, items: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


def forward(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    normalize: bool,
    precision: str,
) -> Tensor:
    """[M, N] similarities."""
    acc = accumulator(query, items)
    return unit_rows(query, acc, normalize)[0] @ unit_rows(items, acc, normalize)[0].T


def backward(
    grad: Tensor,  # [M, N]
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    normalize: bool,
    need_query: bool,
    need_items: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients [M, D] and [N, D]; one not needed is empty [0]."""
    acc = accumulator(query, items)
    q, q_length = unit_rows(query, acc, normalize)
    v, v_length = unit_rows(items, acc, normalize)
    dquery, ditems = query.new_empty(0), items.new_empty(0)
    if need_query:
        dquery = unit_rows_backward(grad @ v, q, q_length, normalize).to(query.dtype)
    if need_items:
        ditems = unit_rows_backward(grad.T @ q, v, v_length, normalize).to(items.dtype)
    return dquery, ditems


def topk(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    k: int,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Values [M, k] in descending order and the items [M, k] they belong to; among equals, the lower index first."""
    values, indices = [], []
    for _, s in _similarities(query, items, normalize):
        best, at = s.sort(dim=1, descending=True, stable=True)
        values.append(best[:, :k].clone())  # a view would keep all N alive
        indices.append(at[:, :k].clone())
    return torch.cat(values), torch.cat(indices)


def ranks(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    positives: Tensor,  # [M, P] int64, -1: none
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """[M] items above the best positive, and [M] items beside it that are no positives themselves."""
    above, ties = [], []
    for rows, s in _similarities(query, items, normalize):
        # -1 marks the extra last column, which no item has.
        column = torch.where(positives[rows] < 0, len(items), positives[rows])
        positive = s.new_zeros(len(s), len(items) + 1, dtype=torch.bool).scatter_(1, column, True)[:, :-1]
        best = s.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        above.append((~(s <= best)).sum(1))  # true for NaN: a broken model ranks last, not first
        ties.append(((s == best) & ~positive).sum(1))
    return torch.cat(above), torch.cat(ties)


def _similarities(query: Tensor, items: Tensor, normalize: bool) -> Iterator[tuple[slice, Tensor]]:
    """(slice of queries, their [rows, N] similarities) for some queries at a time."""
    acc = accumulator(query, items)
    q, v = unit_rows(query, acc, normalize)[0], unit_rows(items, acc, normalize)[0]
    step = max(1, CHUNK // len(v))
    for start in range(0, len(q), step):
        yield slice(start, start + step), q[start : start + step] @ v.T
