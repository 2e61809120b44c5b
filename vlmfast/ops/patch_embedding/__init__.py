"""`patch_embed`: pixels to tokens, with normalisation, class token and positions, from uint8 without a float image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import select
from vlmfast.errors import DTypeError, ShapeError
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops.patch_embedding import _cpu, reference

__all__ = ["interpolate_positions", "patch_embed"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def patch_embed(
    pixels: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [D, C, p, q]
    bias: Tensor | None = None,  # [D]
    *,
    class_token: Tensor | None = None,  # [D]
    positions: Tensor | None = None,  # [L, D]
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "nchw",
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    precision: str | None = None,
) -> Tensor:
    """One token a patch: a linear map of its normalised pixels, plus what a transformer wants to start from.

    Equals, without a float copy of the images:
        x = (pixels / 255 if pixels.dtype == torch.uint8 else pixels).sub(mean).div(std)        # one a channel
        tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
        tokens = torch.cat([class_token.expand(B, 1, -1), tokens], 1) + positions
        F.layer_norm(tokens, [D], *norm)

    For backward the pixels are kept as they came: a uint8 image takes a quarter of its float32 copy. Second
    derivatives and forward mode are refused. Under autocast the product and the tokens have autocast's dtype.

    Args:
        pixels: images [B, C, H, W] or, for a weight of 5 dimensions, videos [B, C, T, H, W]; or packed patches
            [N, C p q] or [N, C t p q], images of many sizes one after the other. uint8 in 0..255 (no gradient), or
            floating. Any strides.
        weight: [D, C, p, q] or [D, C, t, p, q], of a convolution whose stride is its size. float32, bfloat16 or
            float16; float64 runs on the reference.
        bias: [D].
        class_token: [D], put before the patches of every image; not for packed patches.
        positions: [L, D], added to the tokens of every image, the class token's first; [N, D] for packed patches.
            `interpolate_positions` resizes them to another grid.
        mean: C numbers for pixels in 0..1; None means 0.
        std: C numbers; None means 1.
        layout: "nchw", or "nhwc" for channels last: [B, H, W, C], [B, T, H, W, C], packed patches [N, t p q C].
        norm: (weight [D], bias [D] or None, eps) of a layer norm of the tokens, as CLIP has it.
        precision: how a GPU multiplies float32 weights: "bf16x3" (two bfloat16 parts each; None means this, or
            VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
    Returns:
        [B, L, D] in the weight's dtype, patches in reading order, time first; L is their number P, or 1 + P with a
        class token. [N, D] for packed patches.
    Raises:
        ShapeError: an argument has another shape than said, or an image is not whole patches.
        DTypeError: pixels are neither uint8 nor floating, or another tensor is not floating.
        ValueError: layout or precision is unknown, a std is not above 0, or tensors lie on several devices.
        BackendError: a forced backend cannot run the call.
    Source: Dosovitskiy et al. 2021, eq. 1; the time axis as in Wang et al. 2024, "Qwen2-VL", section 2.1.
    """
    op = "patch_embed"
    _check_weight(op, pixels, weight)
    tensors = {"bias": bias, "class_token": class_token, "positions": positions}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check.floating(op, weight=weight, **given)
    _check.same_device(op, pixels=pixels, weight=weight, **given)
    packed = pixels.dim() == 2
    patches = _patches(op, pixels, weight, layout)
    _check_additions(op, patches, weight, packed, bias, class_token, positions)
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
    C = weight.shape[1]
    means = _numbers(op, "mean", mean, C, 0.0, unit)
    stds = _numbers(op, "std", std, C, 1.0, unit)
    if not all(s > 0 for s in stds):
        raise ValueError(f"{op}: std must be above 0; got {std}")
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    weight = weight if weight.dim() == 5 else weight[:, :, None]
    backend = select(op, IMPLS, pixels.device, patches, weight)
    tokens = _patch_embed(
        patches, weight, bias, class_token, positions, means, stds, _limits.precision(op, precision), backend
    )
    if norm is not None:
        gain, offset, eps = norm
        offset = None if offset is None else offset.to(tokens.dtype)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], gain.to(tokens.dtype), offset, eps)
    return tokens[0] if packed else tokens


def interpolate_positions(
    positions: Tensor,  # [L, D]
    grid: tuple[int, int],
    *,
    old_grid: tuple[int, int] | None = None,
    class_token: bool = True,
    antialias: bool = True,
) -> Tensor:
    """Position embeddings for another grid of patches, by bicubic interpolation; the class token's stays as it is.

    Equals:
        old = positions[class_token:].T.unflatten(1, old_grid)[None]
        new = F.interpolate(old, grid, mode="bicubic", align_corners=False, antialias=antialias)[0].flatten(1).T
        torch.cat([positions[:class_token], new])

    Args:
        positions: [L, D], in reading order, the class token's first.
        grid: rows and columns of patches that are wanted.
        old_grid: rows and columns that `positions` are for; None means a square.
        class_token: whether the first position belongs to one.
        antialias: True as open_clip's `resize_pos_embed` does when it loads a checkpoint; False as the
            `interpolate_pos_encoding` of transformers does in the forward. They differ where the grid shrinks.
    Returns: [L', D] in the dtype of `positions`; the same tensor where the grid is the old one.
    Raises:
        ShapeError: positions is not a matrix, or not of the length that the old grid says.
    """
    op = "interpolate_positions"
    _check.is_matrix(op, positions=positions)
    count = len(positions) - class_token
    side = math.isqrt(count)
    rows, columns = old_grid or (side, side)
    if rows * columns != count:
        raise ShapeError(
            f"{op}: positions has {count} patches, which are no grid of {rows} x {columns}; give old_grid=(rows, "
            f"columns), and class_token={not class_token} if the first position is {'a patch' if class_token else ''}"
            f"{'' if class_token else 'the class token'}"
        )
    if (rows, columns) == tuple(grid):
        return positions
    old = positions[int(class_token) :].T.unflatten(1, (rows, columns))[None]
    old = old.to(torch.promote_types(old.dtype, torch.float32))
    new = F.interpolate(old, tuple(grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[: int(class_token)], new[0].flatten(1).T.to(positions.dtype)])


def _check_weight(op: str, pixels: Tensor, weight: Tensor) -> None:
    if weight.dim() not in (4, 5) or weight.numel() == 0:
        raise ShapeError(f"{op}: weight must be [D, C, p, q], or [D, C, t, p, q] for videos; got {tuple(weight.shape)}")
    if pixels.dtype != torch.uint8 and pixels.dtype not in _check.FLOATING:
        raise DTypeError(f"{op}: pixels must be uint8 in 0..255, or floating; got {pixels.dtype}. Use .to(torch.uint8)")


def _patches(op: str, pixels: Tensor, weight: Tensor, layout: str) -> Tensor:
    """A view [B, T/t, H/p, W/q, C, t, p, q] of the pixels; packed patches are one image [1, N, 1, 1, C, t, p, q]."""
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f"{op}: layout must be 'nchw' or 'nhwc'; got {layout!r}")
    last = layout == "nhwc"
    C, (t, p, q) = weight.shape[1], weight.shape[2:] if weight.dim() == 5 else (1, *weight.shape[2:])
    if pixels.dim() == 2:
        if pixels.shape[1] != C * t * p * q or len(pixels) == 0:
            raise ShapeError(
                f"{op}: packed patches must be [N, {C * t * p * q}], N >= 1, for a weight {tuple(weight.shape)}; "
                f"got {tuple(pixels.shape)}"
            )
        x = pixels.unflatten(1, (t, p, q, C)).movedim(4, 1) if last else pixels.unflatten(1, (C, t, p, q))
        return x[None, :, None, None]
    axes = {4: "H, W", 5: "T, H, W"}[weight.dim()]
    expected = f"[B, {axes}, {C}]" if last else f"[B, {C}, {axes}]"
    if pixels.dim() != weight.dim() or pixels.shape[-1 if last else 1] != C or pixels.numel() == 0:
        raise ShapeError(
            f"{op}: pixels must be {expected}, B >= 1, for a weight {tuple(weight.shape)} and layout {layout!r}, "
            f"or packed patches [N, {C * t * p * q}]; got {tuple(pixels.shape)}"
        )
    x = pixels.movedim(-1, 1) if last else pixels
    x = x[:, :, None] if x.dim() == 4 else x  # [B, C, T, H, W]
    T, H, W = x.shape[2:]
    if T % t or H % p or W % q:
        said, patch = (f"{H} x {W}", f"{p} x {q}")
        if weight.dim() == 5:
            said, patch = f"{T} x {said}", f"{t} x {patch}"
        raise ShapeError(
            f"{op}: an image of {said} is not whole patches of {patch}; resize or crop it to "
            f"{' x '.join(str(size // side * side or side) for size, side in _sides(weight, T, H, W))}, or pad it"
        )
    x = x.unflatten(4, (W // q, q)).unflatten(3, (H // p, p)).unflatten(2, (T // t, t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _sides(weight: Tensor, T: int, H: int, W: int) -> list[tuple[int, int]]:
    """(the image's, the patch's) along each axis that the weight has."""
    sizes = (T, H, W) if weight.dim() == 5 else (H, W)
    return list(zip(sizes, weight.shape[2:], strict=True))


def _check_additions(
    op: str,
    patches: Tensor,
    weight: Tensor,
    packed: bool,
    bias: Tensor | None,
    class_token: Tensor | None,
    positions: Tensor | None,
) -> None:
    D = weight.shape[0]
    for name, vector in (("bias", bias), ("class_token", class_token)):
        if vector is not None and vector.shape != (D,):
            raise ShapeError(f"{op}: {name} must be [{D}], one a feature of a token; got {tuple(vector.shape)}")
    if packed and class_token is not None:
        raise ShapeError(f"{op}: packed patches have no class token, as no image begins there; put it in afterwards")
    grid = patches.shape[1 if weight.dim() == 5 else 2 : 4]
    L = patches.shape[1:4].numel() + (class_token is not None)
    if positions is not None and positions.shape != (L, D):
        raise ShapeError(
            f"{op}: positions must be [{L}, {D}], one a token ({' x '.join(map(str, grid))} patches"
            f"{' and a class token' if class_token is not None else ''}); got {tuple(positions.shape)}. "
            f"interpolate_positions resizes them to another grid"
        )


def _numbers(op: str, name: str, values: Sequence[float] | None, C: int, default: float, unit: float) -> list[float]:
    """C numbers in the pixels' unit."""
    numbers = [default] * C if values is None else [float(value) for value in values]
    if len(numbers) != C:
        raise ShapeError(f"{op}: {name} must be {C} numbers, one a channel; got {len(numbers)}")
    return [unit * number for number in numbers]


@_library.op("patch_embed")
def _patch_embed(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_token: Tensor | None,
    positions: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str,
    backend: str,
) -> Tensor:
    return IMPLS[backend].forward(patches, weight, bias, class_token, positions, mean, std, precision)


@_patch_embed.register_fake
def _(patches, weight, bias, class_token, positions, mean, std, precision, backend):
    return reference.empty_tokens(patches, weight, class_token is not None, weight.dtype)


@_library.op("patch_embed_backward")
def _patch_embed_backward(
    grad: Tensor,  # [B, L, D]
    patches: Tensor,
    weight: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    need_pixels: bool,
    need_weight: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # .sum() hands over a gradient whose strides are 0.
    return IMPLS[backend].backward(grad.contiguous(), patches, weight, mean, std, need_pixels, need_weight, precision)


@_patch_embed_backward.register_fake
def _(grad, patches, weight, mean, std, need_pixels, need_weight, precision, backend):
    dpatches = torch.empty(patches.shape if need_pixels else 0, dtype=patches.dtype, device=patches.device)
    return dpatches, torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype, device=weight.device)


def _setup_context(ctx, inputs, output):
    patches, weight, bias, class_token, positions, ctx.mean, ctx.std, ctx.precision, ctx.backend = inputs
    ctx.dtypes = [None if each is None else each.dtype for each in (bias, class_token, positions)]
    ctx.save_for_backward(patches, weight)


def _backward(ctx, grad):
    patches, weight = ctx.saved_tensors
    need_pixels, need_weight, *need_additions = ctx.needs_input_grad[:5]
    dpatches = dweight = None
    if need_pixels or need_weight:
        dpatches, dweight = _patch_embed_backward(
            grad, patches, weight, ctx.mean, ctx.std, need_pixels, need_weight, ctx.precision, ctx.backend
        )
    additions: list[Tensor | None] = [None] * 3
    if any(need_additions):
        dpositions = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))  # [L, D]
        lead = ctx.dtypes[1] is not None
        # No two gradients in one memory: who adds to one, or scales it, would change the other.
        sums = (lambda: dpositions[int(lead) :].sum(0), lambda: dpositions[0].clone(), lambda: dpositions)
        additions = [
            value().to(dtype) if need else None
            for value, dtype, need in zip(sums, ctx.dtypes, need_additions, strict=True)
        ]
    return (
        dpatches if need_pixels else None,
        dweight if need_weight else None,
        *additions,
        *(None,) * 4,
    )


_patch_embed.register_autograd(_backward, setup_context=_setup_context)
