"""`siglip_loss`: the pairwise sigmoid loss, without the [M, N] logits."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vlmfast.backend import select
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops._unit import accumulator
from vlmfast.ops.sigmoid_loss import _cpu, reference

__all__ = ["siglip_loss"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def siglip_loss(
    image: Tensor,  # [M, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor | float,  # []
    logit_bias: Tensor | float,  # []
    *,
    offset: int | None = 0,
    normalize: bool = True,
    precision: str | None = None,
    max_workspace: int | None = None,
) -> Tensor:
    """Mean over images of the binary cross-entropies of "is this text mine", asked of every text, in nats.

    Equals, without ever holding the [M, N] logits:
        z = logit_scale * normalize(image) @ normalize(text).T + logit_bias
        t = 2.0 * (arange(M)[:, None] + offset == arange(N)) - 1
        -logsigmoid(t * z).sum() / M
    Blocks of rows and columns that cover a batch, each with its offset, sum to its loss once weighted by their rows.

    The gradients are computed in the forward pass, where rows and columns are not coupled, and kept for backward in
    float32: one [rows, D] for each side that needs one. Second derivatives and forward mode are refused.

    Args:
        image: [M, D] embeddings, any length > 0 (a zero row stays zero). float32, bfloat16 or float16; float64 runs
            on the reference. image and text may differ in dtype.
        text: [N, D].
        logit_scale: [] or [1], the multiplier itself (1 / temperature), not its log; or a number.
        logit_bias: [] or [1], added to every logit; or a number.
        offset: text i + offset belongs to image i, and none does where that is outside [0, N); None: no text belongs
            to any image.
        normalize: divide rows by their lengths first, clamped at 1e-12; False takes them as they are.
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
        max_workspace: bytes of gradient tiles that a GPU's call may hold at one time; None is 2**27, or
            VLMFAST_MAX_WORKSPACE.
    Returns:
        [] float32 (float64 for float64 embeddings): the sum over all pairs divided by M, not by M·N.
    Raises:
        ShapeError: image and text differ in width, are not matrices or are empty; scale or bias is not one number.
        DTypeError: a tensor is not floating.
        BackendError: a forced backend cannot run the call.
    Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training", eq. 1 and Algorithm 1. We clamp lengths
        at 1e-12; the paper does not.
    """
    op = "siglip_loss"
    _check.is_matrix(op, image=image, text=text)
    _check.same_width(op, image=image, text=text)
    _check.floating(op, image=image, text=text)
    scale = _number(op, "logit_scale", logit_scale, image, text)
    bias = _number(op, "logit_bias", logit_bias, image, text)
    _check.same_device(op, image=image, text=text, logit_scale=scale, logit_bias=bias)
    _check.sound_values(op, normalize, image=image, text=text, logit_scale=scale, logit_bias=bias)

    M, N = image.shape[0], text.shape[0]
    # Past either end there is no pair, however far: so kernels may count in int32.
    offset = N if offset is None else max(-M, min(offset, N))
    grad = torch.is_grad_enabled()
    need_image, need_text = grad and image.requires_grad, grad and text.requires_grad
    need_scalars = grad and (scale.requires_grad or bias.requires_grad)
    backend = select(op, IMPLS, image.device, image, text)
    needs = (need_image, need_text, need_scalars)
    limits = _limits.precision(op, precision), _limits.workspace(op, max_workspace)
    return _siglip_loss(image, text, scale, bias, offset, normalize, *needs, *limits, backend)[0]


def _number(op: str, name: str, value: Tensor | float, image: Tensor, text: Tensor) -> Tensor:
    """The scale or bias as a [] tensor of the dtype of the loss; autograd reshapes its gradient back."""
    acc = accumulator(image, text)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=acc, device=image.device)
    _check.is_scalar(op, **{name: value})
    _check.floating(op, **{name: value})
    return value.to(acc).reshape(())


@_library.op("siglip_loss")
def _siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    need_scalars: bool,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_image, need_text, need_scalars)
    return IMPLS[backend].forward(image, text, logit_scale, logit_bias, offset, normalize, *needs, precision, workspace)


@_siglip_loss.register_fake
def _(image, text, logit_scale, logit_bias, offset, normalize, need_image, need_text, need_scalars, *limits):
    number = image.new_empty((), dtype=accumulator(image, text))
    dimage = number.new_empty(image.shape if need_image else 0)
    dtext = number.new_empty(text.shape if need_text else 0)
    return number, dimage, dtext, torch.empty_like(number), torch.empty_like(number)


def _setup_context(ctx, inputs, output):
    image, text, _, _, _, _, *needs, _, _, _ = inputs
    _, *gradients = output
    ctx.needs = needs
    ctx.dtypes = image.dtype, text.dtype
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        raise RuntimeError("siglip_loss: its gradient cannot be differentiated again; call without create_graph=True")
    dimage, dtext, dscale, dbias = ctx.saved_tensors
    need_image, need_text, need_scalars = ctx.needs
    return (
        (grad * dimage).to(ctx.dtypes[0]) if need_image else None,
        (grad * dtext).to(ctx.dtypes[1]) if need_text else None,
        grad * dscale if need_scalars else None,
        grad * dbias if need_scalars else None,
        *(None,) * 8,
    )


_siglip_loss.register_autograd(_backward, setup_context=_setup_context)
