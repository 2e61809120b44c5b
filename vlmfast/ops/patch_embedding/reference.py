"""The definition of the patch embedding: plain PyTorch, some patches at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmfast.ops._unit import accumulator

CHUNK = 2**22  # pixels that exist as floats at one time


def unsupported(patches: Tensor, weight: Tensor) -> str | None:
    """None: the reference runs every call."""
    return None


def forward(
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    bias: Tensor | None,  # [D]
    class_token: Tensor | None,  # [D]
    positions: Tensor | None,  # [L, D], L = P or 1 + P
    mean: Sequence[float],  # [C], in the pixels' unit
    std: Sequence[float],
    precision: str,
) -> Tensor:
    """[B, L, D] tokens in the weight's dtype."""
    acc, lead = accumulator(patches, weight), class_token is not None
    tokens = empty_tokens(patches, weight, lead, weight.dtype)
    w = weight.to(acc).flatten(1).T
    for images, rows, x in _normalized(patches, mean, std, acc):
        y = x @ w
        if bias is not None:
            y += bias.to(acc)
        if positions is not None:
            y += positions[lead:][rows].to(acc)
        tokens[images, lead:][:, rows] = y.to(weight.dtype)
    if class_token is not None:
        write_class_token(tokens, class_token, positions)
    return tokens


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
    acc, lead = accumulator(patches, weight), grad.shape[1] - patches.shape[1:4].numel()
    dpatches = pixel_gradient(grad, patches, weight, std) if need_pixels else patches.new_empty(0)
    if not need_weight:
        return dpatches, weight.new_empty(0)
    dweight = weight.new_zeros(weight[0].numel(), len(weight), dtype=acc)
    for images, rows, x in _normalized(patches, mean, std, acc):
        dweight += x.flatten(0, 1).T @ grad[images, lead:][:, rows].to(acc).flatten(0, 1)
    return dpatches, dweight.T.reshape(weight.shape).to(weight.dtype)


def pixel_gradient(
    grad: Tensor,  # [B, L, D]
    patches: Tensor,  # [B, T/t, H/p, W/q, C, t, p, q]
    weight: Tensor,  # [D, C, t, p, q]
    std: Sequence[float],
) -> Tensor:
    """The gradient of the pixels, in the shape of `patches`: one plain product, which PyTorch's own is right for."""
    acc, B, P = accumulator(patches, weight), len(patches), patches.shape[1:4].numel()
    w = (weight.to(acc) / numbers(std, acc, weight.device)[:, None, None, None]).flatten(1)
    step = max(1, CHUNK // (P * w.shape[1]))
    dpatches = torch.empty(patches.shape, dtype=patches.dtype, device=patches.device)
    for b in range(0, B, step):
        dx = grad[b : b + step, grad.shape[1] - P :].to(acc) @ w
        dpatches[b : b + step] = dx.view(-1, *patches.shape[1:])
    return dpatches


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)], without a copy from the host, which a CUDA graph could not capture."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def empty_tokens(patches: Tensor, weight: Tensor, lead: bool, dtype: torch.dtype) -> Tensor:
    """Uninitialised tokens [B, L, D]."""
    return weight.new_empty(len(patches), patches.shape[1:4].numel() + lead, len(weight), dtype=dtype)


def write_class_token(tokens: Tensor, class_token: Tensor, positions: Tensor | None) -> None:
    """Fills the first token of every image."""
    acc = torch.promote_types(tokens.dtype, torch.float32)
    first = class_token.to(acc) if positions is None else class_token.to(acc) + positions[0].to(acc)
    tokens[:, 0] = first.to(tokens.dtype)


def _normalized(
    patches: Tensor, mean: Sequence[float], std: Sequence[float], acc: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(images, patches of each, their pixels [images, patches, C t p q] normalised) for some at a time."""
    B, depth = patches.shape[:2]
    row, K = patches.shape[2:4].numel(), patches.shape[4:].numel()
    m, s = (numbers(each, acc, patches.device)[:, None, None, None] for each in (mean, std))
    images = max(1, CHUNK // (depth * row * K))
    rows = depth if images > 1 else max(1, CHUNK // (row * K))
    for b in range(0, B, images):
        for t in range(0, depth, rows):
            x = (patches[b : b + images, t : t + rows].to(acc) - m) / s
            yield slice(b, b + images), slice(t * row, (t + rows) * row), x.flatten(4).flatten(1, 3)
