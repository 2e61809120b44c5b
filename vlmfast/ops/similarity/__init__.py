"""Similarities of queries and items: the matrix, the best k of each row, and the rank of each row's positives."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vlmfast.backend import select
from vlmfast.errors import ShapeError
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops._unit import accumulator
from vlmfast.ops.similarity import _cpu, reference

__all__ = ["normalized_similarity", "rank_counts", "similarity_topk"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def normalized_similarity(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    *,
    normalize: bool = True,
    precision: str | None = None,
) -> Tensor:
    """The cosine of every query with every item.

    Equals:
        normalize(query) @ normalize(items).T

    Backward keeps the two inputs and recomputes their unit rows. Second derivatives and forward mode are refused.

    Args:
        query: [M, D] embeddings, any length > 0 (a zero row stays zero). float32, bfloat16 or float16; float64 runs
            on the reference. query and items may differ in dtype.
        items: [N, D].
        normalize: divide rows by their lengths first, clamped at 1e-12; False gives plain dot products.
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
    Returns:
        [M, N] float32 (float64 for float64 embeddings). Where only the best or a rank is wanted, `similarity_topk`
        and `rank_counts` do without this matrix.
    Raises:
        ShapeError: query or items is not a matrix or is empty, or their widths differ.
        DTypeError: a tensor is not floating.
        BackendError: a forced backend cannot run the call.
    Source: cosine similarity, as in Radford et al. 2021, Fig. 3.
    """
    backend = _checked("normalized_similarity", query, items, normalize)
    return _normalized_similarity(
        query, items, normalize, _limits.precision("normalized_similarity", precision), backend
    )


def similarity_topk(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    k: int,
    *,
    normalize: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items most similar to each query, best first.

    Equals, without ever holding the [M, N] similarities:
        s = normalize(query) @ normalize(items).T
        values, indices = s.sort(dim=1, descending=True, stable=True)
        values[:, :k], indices[:, :k]

    Items of equal similarity (the same float32 number) come in the order of their indices. The values carry no
    gradient; for one, gather the items and multiply.

    Args:
        query: [M, D] embeddings, any length > 0 (a zero row stays zero). float32, bfloat16 or float16; float64 runs
            on the reference. query and items may differ in dtype.
        items: [N, D].
        k: how many, from 1 to N.
        normalize: divide rows by their lengths first, clamped at 1e-12; False ranks by dot products.
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
    Returns:
        values [M, k] float32 (float64 for float64 embeddings), descending; indices [M, k] int64 into items.
    Raises:
        ShapeError: query or items is not a matrix or is empty, their widths differ, or k is not in [1, N].
        DTypeError: a tensor is not floating.
        BackendError: a forced backend cannot run the call.
    Source: exact search; the rule for ties is ours.
    """
    op = "similarity_topk"
    backend = _checked(op, query, items, normalize)
    if not 1 <= k <= items.shape[0]:
        raise ShapeError(f"{op}: k must be in [1, N = {items.shape[0]}], the number of items; got {k}")
    return _similarity_topk(query.detach(), items.detach(), k, normalize, _limits.precision(op, precision), backend)


def rank_counts(
    query: Tensor,  # [M, D]
    items: Tensor,  # [N, D]
    positives: Tensor,  # [M] or [M, P]
    *,
    normalize: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How many items stand above each query's best positive, and how many wrong ones stand exactly beside it.

    Equals, without ever holding the [M, N] similarities, and without a sort:
        s = normalize(query) @ normalize(items).T
        best = s[i, positives[i]].max()                                              # for each query i
        above[i], ties[i] = (s[i] > best).sum(), (s[i, not in positives[i]] == best).sum()

    `above` is the optimistic rank, counted from 0; `above + ties` the pessimistic one; `above + ties / 2` the mean
    over all orders of equals. Equal means the same float32 number. A NaN counts as above whatever it is compared with:
    a broken model ranks last, not first.

    Args:
        query: [M, D] embeddings, any length > 0 (a zero row stays zero). float32, bfloat16 or float16; float64 runs
            on the reference. query and items may differ in dtype.
        items: [N, D].
        positives: [M] or [M, P] int64, the items that are right for each query, in [0, N); -1 fills up shorter lists.
            A query with none at all has every item above it.
        normalize: divide rows by their lengths first, clamped at 1e-12; False ranks by dot products.
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
    Returns:
        above [M] int64 and ties [M] int64; above + ties < N, but for NaN and queries without a positive.
    Raises:
        ShapeError: query or items is not a matrix or is empty, their widths differ, or positives is not [M] or [M, P].
        DTypeError: query or items is not floating, or positives is not int64.
        ValueError: a positive is not in [-1, N) (looked at on the CPU outside torch.compile; elsewhere under
            VLMFAST_DEBUG=1 only, else it counts as -1); under VLMFAST_DEBUG=1, a query has no positive.
        BackendError: a forced backend cannot run the call.
    Source: Faghri et al. 2018, "VSE++", section 4: the rank of an image's best caption. They leave ties to the sort.
    """
    op = "rank_counts"
    backend = _checked(op, query, items, normalize)
    if positives.dim() not in (1, 2) or positives.shape[0] != query.shape[0] or positives.numel() == 0:
        raise ShapeError(
            f"{op}: positives must be [M] or [M, P] with M = {query.shape[0]} queries; got {tuple(positives.shape)}"
        )
    _check.is_integer(op, positives=positives)
    _check.same_device(op, query=query, positives=positives)
    positives = _in_range(op, positives.reshape(query.shape[0], -1), items.shape[0])
    precision = _limits.precision(op, precision)
    return _rank_counts(query.detach(), items.detach(), positives, normalize, precision, backend)


def _in_range(op: str, positives: Tensor, N: int) -> Tensor:
    """The positives, with -1 for what no item has; values are looked at where that costs no device synchronisation."""
    if _check.debugging() or (positives.device.type == "cpu" and not torch.compiler.is_compiling()):
        low, high = (int(value) for value in positives.aminmax())
        if low < -1 or high >= N:
            raise ValueError(f"{op}: positives must be in [0, {N}), or -1 for none; got {low if low < -1 else high}")
    if _check.debugging() and bool((positives < 0).all(1).any()):
        row = int((positives < 0).all(1).nonzero()[0])
        raise ValueError(f"{op}: every query needs a positive; row {row} of positives holds only -1")
    return torch.where(positives < N, positives, -1)


def _checked(op: str, query: Tensor, items: Tensor, normalize: bool) -> str:
    """The backend that runs the call, once its embeddings have passed the checks."""
    _check.is_matrix(op, query=query, items=items)
    _check.same_width(op, query=query, items=items)
    _check.floating(op, query=query, items=items)
    _check.same_device(op, query=query, items=items)
    _check.sound_values(op, normalize, query=query, items=items)
    return select(op, IMPLS, query.device, query, items)


@_library.op("normalized_similarity")
def _normalized_similarity(query: Tensor, items: Tensor, normalize: bool, precision: str, backend: str) -> Tensor:
    return IMPLS[backend].forward(query, items, normalize, precision)


@_normalized_similarity.register_fake
def _(query, items, normalize, precision, backend):
    return query.new_empty(query.shape[0], items.shape[0], dtype=accumulator(query, items))


@_library.op("normalized_similarity_backward")
def _normalized_similarity_backward(
    grad: Tensor,  # [M, N]
    query: Tensor,
    items: Tensor,
    normalize: bool,
    need_query: bool,
    need_items: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # .sum() hands over a gradient whose strides are 0.
    return IMPLS[backend].backward(grad.contiguous(), query, items, normalize, need_query, need_items)


@_normalized_similarity_backward.register_fake
def _(grad, query, items, normalize, need_query, need_items, backend):
    return query.new_empty(query.shape if need_query else 0), items.new_empty(items.shape if need_items else 0)


def _setup_context(ctx, inputs, output):
    query, items, ctx.normalize, _, ctx.backend = inputs
    ctx.save_for_backward(query, items)


def _backward(ctx, grad):
    query, items = ctx.saved_tensors
    need_query, need_items, *_ = ctx.needs_input_grad
    dquery, ditems = _normalized_similarity_backward(
        grad, query, items, ctx.normalize, need_query, need_items, ctx.backend
    )
    return dquery if need_query else None, ditems if need_items else None, None, None, None


_normalized_similarity.register_autograd(_backward, setup_context=_setup_context)


@_library.op("similarity_topk")
def _similarity_topk(
    query: Tensor, items: Tensor, k: int, normalize: bool, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    return IMPLS[backend].topk(query, items, k, normalize, precision)


@_similarity_topk.register_fake
def _(query, items, k, normalize, precision, backend):
    values = query.new_empty(query.shape[0], k, dtype=accumulator(query, items))
    return values, torch.empty_like(values, dtype=torch.int64)


@_library.op("rank_counts")
def _rank_counts(
    query: Tensor, items: Tensor, positives: Tensor, normalize: bool, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    return IMPLS[backend].ranks(query, items, positives, normalize, precision)


@_rank_counts.register_fake
def _(query, items, positives, normalize, precision, backend):
    above = query.new_empty(query.shape[0], dtype=torch.int64)
    return above, torch.empty_like(above)
