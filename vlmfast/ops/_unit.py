"""What the references share: the dtype they compute in, and rows of length one."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 1e-12  # lengths are clamped here, as torch.nn.functional.normalize does: a zero row stays zero


def accumulator(x: Tensor, y: Tensor) -> torch.dtype:
    """float64 if either tensor is, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def unit_rows(
    x: Tensor,  # [M, D]
    dtype: torch.dtype,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The rows [M, D] in `dtype` divided by their lengths, and those [M, 1]; as they are without `normalize`."""
    x = x.to(dtype).contiguous()  # and so all that is computed from them, as the ops' fakes say
    if not normalize:
        return x, x.new_ones(())
    # By its largest entry first: the square of a number above 1.8e19 overflows float32.
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_min(SHORTEST)
    x = x / largest
    # Below 1 only where `largest` was clamped: there 1 stands for SHORTEST.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1)
    return x / length, largest * length


def unit_rows_backward(
    grad: Tensor,  # [M, D] with respect to the unit rows
    unit: Tensor,  # [M, D]
    length: Tensor,  # [M, 1]
    normalize: bool,
) -> Tensor:
    """The gradient with respect to the rows as they came in: what points along a row cannot change its direction."""
    if not normalize:
        return grad
    along = (grad * unit).sum(1, keepdim=True) * unit
    return torch.where(length > SHORTEST, grad - along, grad) / length
