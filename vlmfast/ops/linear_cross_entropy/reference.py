"""The definition of the cross-entropy of a linear map: plain PyTorch, some rows of the [M, V] logits at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmfast.ops._unit import accumulator

CHUNK = 2**20  # logits held at once


def unsupported(x: Tensor, w: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


def forward(
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [M] int64 in [0, V)
    factor: Tensor,  # []
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, ...]:
    """(losses [M], lse [M], dx [M, D], dw [V, D], dbias [V]), the first two float64.

    The gradients are those of factor * losses.sum(), in the dtype of the sums; one that is not needed is [0].
    """
    V, losses, lses = len(w), [], []
    sums = _Sums(x, w, need_x, need_w, need_bias)
    for rows, z in _logits(x, w, bias):  # [rows, V]
        top = z.amax(1)
        lse = top.double() + torch.exp(z - top[:, None]).sum(1, dtype=torch.float64).log()
        own = z.gather(1, labels[rows, None])[:, 0]
        target = (1 - label_smoothing) * own + label_smoothing / V * z.sum(1)
        losses.append(lse - target + z_loss * lse**2)
        lses.append(lse)
        # Rows are not coupled, so the gradient needs no second pass: d loss / d z is known here.
        if need_x or need_w or need_bias:
            sums.add(rows, _dz(z, lse, labels[rows], factor.to(z.dtype), label_smoothing, z_loss))
    return torch.cat(losses), torch.cat(lses), *sums.results


def backward(
    grad: Tensor,  # [M]
    x: Tensor,  # [M, D]
    w: Tensor,  # [V, D]
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,  # [M] float64
    label_smoothing: float,
    z_loss: float,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, D], dw [V, D], dbias [V]) of (grad * losses).sum(), in the dtype of the sums; [0] for one not needed."""
    sums = _Sums(x, w, need_x, need_w, need_bias)
    for rows, z in _logits(x, w, bias):
        sums.add(rows, _dz(z, lse[rows], labels[rows], grad[rows, None].to(z.dtype), label_smoothing, z_loss))
    return sums.results


def _logits(x: Tensor, w: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows, and their logits; all rows in turn."""
    dtype = accumulator(x, w)
    w = w.to(dtype)
    count = max(1, CHUNK // len(w))
    for start in range(0, len(x), count):
        z = x[start : start + count].to(dtype) @ w.T
        yield slice(start, start + count), z if bias is None else z + bias.to(dtype)


def _dz(z: Tensor, lse: Tensor, labels: Tensor, weight: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """weight times d loss / d z [rows, V]: (1 + 2 z_loss lse) softmax - target, where d lse / d z is the softmax."""
    rise = (1 + 2 * z_loss * lse).to(z.dtype)
    dz = rise[:, None] * torch.exp((z - lse[:, None]).to(z.dtype)) - label_smoothing / z.shape[1]
    return weight * dz.scatter_add(1, labels[:, None], torch.full_like(dz[:, :1], label_smoothing - 1))


class _Sums:
    """The gradients while they are added up."""

    def __init__(self, x: Tensor, w: Tensor, need_x: bool, need_w: bool, need_bias: bool) -> None:
        dtype = accumulator(x, w)
        self.x, self.w = x.to(dtype), w.to(dtype)
        self.dx, self.dw, self.dbias = (
            torch.zeros(shape if need else 0, dtype=dtype, device=x.device)
            for shape, need in ((x.shape, need_x), (w.shape, need_w), (w.shape[:1], need_bias))
        )

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.dx.numel():
            self.dx[rows] = dz @ self.w
        if self.dw.numel():
            self.dw += dz.T @ self.x[rows]
        if self.dbias.numel():
            self.dbias += dz.sum(0)

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dx, self.dw, self.dbias
