"""Dense attention on PyTorch's GPU kernels: flash, cuDNN or memory-efficient, as PyTorch's own dispatch chooses."""

from __future__ import annotations

from torch import Tensor


def unsupported(query: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """None, or why scaled_dot_product_attention cannot run this call."""
    if query.device.type != "cuda":
        return f"its kernels run on a GPU; a tensor is on {query.device}"
    return None if cu_seqlens is None else "scaled_dot_product_attention takes no packed sequences"
