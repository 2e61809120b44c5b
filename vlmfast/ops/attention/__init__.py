"""`attention`: softmax attention over sequences that are dense, or packed one after the other without padding."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import forced_backend, select
from vlmfast.errors import DTypeError, ShapeError
from vlmfast.ops import _check, _library
from vlmfast.ops._lazy import Lazy
from vlmfast.ops.attention import _cpu, _cuda, reference

__all__ = ["attention"]

IMPLS: dict[str, ModuleType] = {
    "cuda": _cuda,
    "triton": Lazy(f"{__name__}._triton"),
    "cpu": _cpu,
    "reference": reference,
}

TRITON_UP_TO = 128
"""The longest dense sequences that a GPU runs on our kernel rather than on PyTorch's. From the share of a tile that
short sequences fill in each, not from a measurement."""


def attention(
    query: Tensor,  # [B, H, T, K] or [tokens, H, K]
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,  # [B + 1]
    max_seqlen: int | None = None,
) -> Tensor:
    """Each token's mixture of the values of the tokens it looks at, head by head, in the shape of `query`.

    Equals, for one sequence and head with q, k, v [T, K]:
        s = scale * q @ k.T  [- inf above the diagonal if causal]
        s.softmax(-1) @ v

    Dense sequences [B, H, T, K] are all of one length. Packed ones lie one after the other in [tokens, H, K]: sequence
    b is rows cu_seqlens[b] to cu_seqlens[b + 1], looks at itself alone, and nothing is padded. Saves for the backward
    the arguments, the output and one float32 a token and head; nothing of T x T.

    Dense calls on the CPU, and on a GPU from `TRITON_UP_TO` tokens on, are calls of
    torch.nn.functional.scaled_dot_product_attention. Elsewhere second derivatives and forward mode are refused. On the
    CPU the fewer runs of neighbours of one length there are the better: sort sequences by length where order is free.

    Args:
        query, key, value: of one shape, dtype and device; float32, bfloat16, float16 or float64. Features that
            are not side by side in memory are copied.
        causal: token t looks at tokens 0 .. t of its sequence, not at all.
        scale: what scores are multiplied with; None: K ** -0.5.
        cu_seqlens: [B + 1] int32, 0 and then where each sequence ends, the last at the number of tokens. A sequence
            may be empty. The values are checked on the CPU, elsewhere under VLMFAST_DEBUG=1.
        max_seqlen: no sequence is longer. None: read from cu_seqlens, which on a GPU waits for the device.
    Returns:
        The shape and dtype of `query`.
    Raises:
        ShapeError: query is not [B, H, T, K], or with cu_seqlens [tokens, H, K]; key or value differs from it; a size
            is 0; cu_seqlens is not a vector of at least two entries; max_seqlen without cu_seqlens.
        DTypeError: query, key and value are not of one floating dtype; cu_seqlens is not int32.
        ValueError: the tensors are on several devices; cu_seqlens does not start at 0, falls, does not end at the
            number of tokens, or has a longer sequence than max_seqlen.
        BackendError: a forced backend cannot run the call.
    Source: Vaswani et al. 2017, eq. 1; packing as in FlashAttention's varlen functions (Dao 2023).
    """
    _check_arguments(query, key, value, cu_seqlens, max_seqlen)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    backend = _backend(query, cu_seqlens)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    return _attention(query, key, value, cu_seqlens, max_seqlen or 0, causal, scale, backend)[0]


def _backend(query: Tensor, cu_seqlens: Tensor | None) -> str:
    """Who runs the call: a key of IMPLS, or "sdpa" for PyTorch's own function."""
    name = select("attention", IMPLS, query.device, query, cu_seqlens)
    forced = forced_backend() is not None
    if cu_seqlens is not None or name == "triton":
        return name
    if name == "cuda" and not forced and query.shape[2] <= TRITON_UP_TO:
        return "sdpa" if IMPLS["triton"].unsupported(query) else "triton"
    return "reference" if name == "reference" and forced else "sdpa"


def _check_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> None:
    op, tensors = "attention", {"query": query, "key": key, "value": value}
    expected = "[B, H, T, K]" if cu_seqlens is None else "[tokens, H, K] with cu_seqlens"
    if query.dim() != (4 if cu_seqlens is None else 3):
        hint = ". Give cu_seqlens for packed sequences" if query.dim() == 3 else ""
        raise ShapeError(f"{op}: query must be {expected}; got {tuple(query.shape)}{hint}")
    if query.shape != key.shape or query.shape != value.shape:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ShapeError(f"{op}: query, key and value must have one shape {expected}; got {got}")
    if query.numel() == 0:
        raise ShapeError(f"{op}: query must have at least one of each of {expected}; got {tuple(query.shape)}")
    _check.floating(op, **tensors)
    if query.dtype != key.dtype or query.dtype != value.dtype:
        got = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise DTypeError(f"{op}: query, key and value must have one dtype; got {got}. Use .to(query.dtype)")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ShapeError(f"{op}: max_seqlen belongs to packed sequences; got {max_seqlen} without cu_seqlens")
        _check.same_device(op, **tensors)
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ShapeError(
            f"{op}: cu_seqlens must be [B + 1], 0 and then where each of B sequences ends; "
            f"got shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise DTypeError(f"{op}: cu_seqlens must be int32; got {cu_seqlens.dtype}. Use .int()")
    _check.same_device(op, **tensors, cu_seqlens=cu_seqlens)
    plain = type(cu_seqlens) is Tensor and not torch.compiler.is_compiling()  # has values to look at
    if plain and (cu_seqlens.device.type == "cpu" or _check.debugging()):
        _check_ends(cu_seqlens, len(query), max_seqlen)


def _check_ends(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> None:
    op, lengths = "attention", cu_seqlens.diff()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0; got {first}. Are these lengths? Use their running sum")
    if int(lengths.min()) < 0:
        b = int(lengths.argmin())
        raise ValueError(
            f"{op}: cu_seqlens must not fall; got {int(cu_seqlens[b])}, then {int(cu_seqlens[b + 1])} at entry {b + 1}"
        )
    if last != tokens:
        raise ValueError(f"{op}: cu_seqlens must end at the number of tokens, {tokens}; got {last}")
    if max_seqlen is not None and int(lengths.max()) > max_seqlen:
        raise ValueError(f"{op}: no sequence may be longer than max_seqlen={max_seqlen}; got {int(lengths.max())}")


@_library.op("attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return IMPLS[backend].forward(query, key, value, cu_seqlens, max_seqlen, causal, scale)


@_attention.register_fake
def _(query, key, value, cu_seqlens, max_seqlen, causal, scale, backend):
    return reference.like(query), reference.totals(query)


@_library.op("attention_backward")
def _attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return IMPLS[backend].backward(grad, query, key, value, out, lse, cu_seqlens, max_seqlen, causal, scale)


@_attention_backward.register_fake
def _(grad, query, key, value, out, lse, cu_seqlens, max_seqlen, causal, scale, backend):
    return reference.like(query), reference.like(query), reference.like(query)


def _setup_context(ctx, inputs, output):
    query, key, value, cu_seqlens, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    return *_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


_attention.register_autograd(_backward, setup_context=_setup_context)
