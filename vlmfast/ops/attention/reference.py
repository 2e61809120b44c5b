"""The definition of attention: plain PyTorch, one sequence at a time, with the whole matrix of its scores."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def unsupported(query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """None: the reference runs every call."""
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
    """Output in the query's shape, and the scores' log-sum-exp [B, H, T] or [tokens, H], in float32 or wider."""
    out, lse = like(query), totals(query)
    for q, k, v, o, total in _sequences(cu_seqlens, query, key, value, out, lse[..., None]):
        s = _scores(q, k, causal, scale)
        total.copy_(s.logsumexp(-1, keepdim=True))
        o.copy_(s.softmax(-1) @ v.to(s.dtype))
    return out, lse


def backward(
    grad: Tensor,  # of the output, as all below
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
    gradients = like(query), like(query), like(query)
    for g, q, k, v, total, dq, dk, dv in _sequences(cu_seqlens, grad, query, key, value, lse[..., None], *gradients):
        p = (_scores(q, k, causal, scale) - total).exp()  # [..., T, T]
        q, k, v, g = (x.to(p.dtype) for x in (q, k, v, g))
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq.copy_(ds @ k)
        dk.copy_(ds.mT @ q)
        dv.copy_(p.mT @ g)
    return gradients


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def like(query: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the query's shape in which a token's heads lie side by side."""
    if query.dim() == 3:
        return query.new_empty(query.shape, dtype=dtype)
    return query.new_empty(query.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def totals(query: Tensor) -> Tensor:
    """An empty tensor for the log-sum-exp of each token and head, laid out as `like`."""
    return like(query[..., :1], _wide(query)).squeeze(-1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """scale q kᵀ [..., T, T], -inf where a token does not look."""
    wide = _wide(q)
    s = scale * (q.to(wide) @ k.to(wide).mT)
    later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(later, -torch.inf) if causal else s


def _sequences(cu_seqlens: Tensor | None, *tensors: Tensor):
    """The tensors as views [..., T, K]: all sequences at once if they are dense, else one after the other."""
    if cu_seqlens is None:
        yield tensors
        return
    for start, stop in pairwise(cu_seqlens.tolist()):
        if stop > start:
            yield tuple(x[start:stop].transpose(0, 1) for x in tensors)
