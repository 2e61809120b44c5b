"""What every `_cpu.py` needs to hand tensors to the compiled kernels: a reason why not, addresses, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast import _ext

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(x: Tensor, y: Tensor) -> str | None:
    """None, or why the compiled kernels cannot take this pair of matrices."""
    if _ext.C is None:
        return _ext.reason
    for tensor in (x, y):
        if tensor.device.type != "cpu":
            return f"its kernels run on the CPU; a tensor is on {tensor.device}"
        if tensor.dtype not in _CODES:
            return f"its kernels take float32, bfloat16 and float16; a tensor is {tensor.dtype}"
    return None


def pair(x: Tensor, y: Tensor, normalize: bool) -> tuple:
    """The leading arguments of every kernel. The caller keeps x [M, D] and y [N, D], contiguous, alive."""
    return _matrix(x), _matrix(y), x.shape[1], normalize, torch.get_num_threads()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.shape[0], _CODES[x.dtype]


def address(x: Tensor | None) -> int:
    """Where a tensor's data lie; 0 for what is absent or empty."""
    return 0 if x is None else x.data_ptr()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor for the kernels to fill, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def gradients(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised float32 gradients; [0] for the one that is not needed."""
    return empty(*(x.shape if need_x else (0,))), empty(*(y.shape if need_y else (0,)))
