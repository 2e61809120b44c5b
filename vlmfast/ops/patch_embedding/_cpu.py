"""The patch embedding on csrc/cpu/patch_embedding.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfast import _ext
from vlmfast._ext import C
from vlmfast.ops import _native
from vlmfast.ops._native import address
from vlmfast.ops.patch_embedding import reference
from vlmfast.ops.patch_embedding.reference import empty_tokens, pixel_gradient, write_class_token

FEW = 2**19
"""Pixels in a call below which PyTorch's own product is faster, unless bytes are multiplied as bytes."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(patches: Tensor, weight: Tensor) -> str | None:
    """None, or why the compiled kernels cannot run this call."""
    if _ext.C is None:
        return _ext.reason
    if patches.device.type != "cpu":
        return f"its kernels run on the CPU; a tensor is on {patches.device}"
    if patches.dtype not in (torch.uint8, *_FLOATS) or weight.dtype not in _FLOATS:
        return f"its kernels take uint8 pixels, float32, bfloat16 and float16; got {patches.dtype} and {weight.dtype}"
    return None


def forward(
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    bias: Tensor | None,
    class_token: Tensor | None,
    positions: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str,
) -> Tensor:
    """[B, L, D] tokens in the weight's dtype."""
    if _few(patches):
        return reference.forward(patches, weight, bias, class_token, positions, mean, std, precision)
    lead = class_token is not None
    tokens = empty_tokens(patches, weight, lead, torch.float32)
    pixels, w = _pixels(patches), _floats(weight)
    per_channel = _per_channel(mean, std)
    optional = [None if each is None else _floats(each) for each in (bias, positions)]
    C.patch_embedding_forward(
        *_call(pixels, per_channel, len(weight), lead), address(w), *map(address, optional), address(tokens)
    )
    if class_token is not None:
        write_class_token(tokens, class_token, positions)
    return tokens.to(weight.dtype)


def backward(
    grad: Tensor,  # [B, L, D]
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    mean: Sequence[float],
    std: Sequence[float],
    need_pixels: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients in the shapes of patches and weight; one not needed is empty [0]."""
    if _few(patches):
        return reference.backward(grad, patches, weight, mean, std, need_pixels, need_weight, precision)
    dpatches = pixel_gradient(grad, patches, weight, std) if need_pixels else patches.new_empty(0)
    if not need_weight:
        return dpatches, weight.new_empty(0)
    dweight = _native.empty(*weight.shape)
    pixels, g = _pixels(patches), _floats(grad)
    per_channel = _per_channel(mean, std)
    lead = grad.shape[1] - patches.shape[1:4].numel()
    C.patch_embedding_backward(*_call(pixels, per_channel, len(weight), lead), address(g), address(dweight))
    return dpatches, dweight.to(weight.dtype)


def _call(pixels: Tensor, per_channel: tuple[Tensor, Tensor], width: int, lead: int) -> tuple:
    """The leading arguments of both kernels. The caller keeps the tensors alive."""
    dtype = 3 if pixels.dtype == torch.uint8 else 0
    patches = pixels.data_ptr(), dtype, list(pixels.shape), list(pixels.stride()), *map(address, per_channel)
    return patches, width, int(lead), torch.get_num_threads()


def _few(patches: Tensor) -> bool:
    in_bytes = patches.dtype == torch.uint8 and C.isa() == "avx512_vnni"
    return not in_bytes and patches.numel() < FEW


def _pixels(patches: Tensor) -> Tensor:
    """uint8 as they lie, or float32."""
    return patches if patches.dtype == torch.uint8 else patches.float()


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _per_channel(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What a pixel is multiplied with, and what is added then: [C] each."""
    scale = torch.tensor([1 / s for s in std], dtype=torch.float32, device="cpu")
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device="cpu")
    return scale, shift
