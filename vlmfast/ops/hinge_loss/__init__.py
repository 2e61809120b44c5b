"""`vse_loss`: the hinge losses of VSE and VSE++, without the [B, B] similarities."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vlmfast.backend import select
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops._unit import accumulator
from vlmfast.ops.hinge_loss import _cpu, reference

__all__ = ["vse_loss"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def vse_loss(
    image: Tensor,  # [B, D]
    text: Tensor,  # [B, D]
    margin: float = 0.2,
    *,
    hardest: bool = False,
    normalize: bool = True,
    precision: str | None = None,
    max_workspace: int | None = None,
) -> Tensor:
    """Sum over the batch of how far foreign pairs come within `margin` of the true ones, in both directions.

    Equals, without ever holding the [B, B] similarities:
        s = normalize(image) @ normalize(text).T
        rows = (margin + s - s.diag()[:, None]).clamp(min=0).fill_diagonal_(0)  # image i against text j
        columns = (margin + s - s.diag()).clamp(min=0).fill_diagonal_(0)        # text j against image i
        rows.sum() + columns.sum()                                              # hardest=False: VSE
        rows.amax(1).sum() + columns.amax(0).sum()                              # hardest=True: VSE++

    The reduction is the paper's: a sum, not a mean, so the gradient grows with the batch. Divide by B for a mean.
    A hinge that is exactly zero passes no gradient; of equally hard foreigners, the one of lowest index counts.
    The gradients are computed in the forward pass and kept for backward in float32: [B, D] for each side that needs
    one. Second derivatives and forward mode are refused.

    Args:
        image: [B, D] embeddings, any length > 0 (a zero row stays zero). float32, bfloat16 or float16; float64 runs
            on the reference. image and text may differ in dtype.
        text: [B, D], row i belongs to image i.
        margin: how much more similar a true pair must be than a foreign one, >= 0, in units of the similarity.
        hardest: count only the worst foreigner of each row and column (VSE++) instead of all (VSE).
        normalize: divide rows by their lengths first, clamped at 1e-12; False takes them as they are.
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
        max_workspace: bytes of gradient tiles that a GPU's call may hold at one time; None is 2**27, or
            VLMFAST_MAX_WORKSPACE.
    Returns:
        [] float32 (float64 for float64 embeddings); 0 for one pair, which has no foreigner.
    Raises:
        ShapeError: image and text differ in shape, are not matrices or are empty.
        DTypeError: a tensor is not floating.
        ValueError: margin is negative, or not finite in float32.
        BackendError: a forced backend cannot run the call.
    Source: Kiros et al. 2014, "Unifying visual-semantic embeddings", eq. 9; Faghri et al. 2018, "VSE++", eqs. 4 and 6.
        We clamp lengths at 1e-12; the papers do not.
    """
    op = "vse_loss"
    _check.is_matrix(op, image=image, text=text)
    _check.same_shape(op, image=image, text=text)
    _check.floating(op, image=image, text=text)
    _check.same_device(op, image=image, text=text)
    if not 0 <= margin <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: margin must be at least 0 and finite in float32; got {margin}")
    _check.sound_values(op, normalize, image=image, text=text)

    grad = torch.is_grad_enabled()
    need_image, need_text = grad and image.requires_grad, grad and text.requires_grad
    backend = select(op, IMPLS, image.device, image, text)
    limits = _limits.precision(op, precision), _limits.workspace(op, max_workspace)
    return _vse_loss(image, text, float(margin), hardest, normalize, need_image, need_text, *limits, backend)[0]


@_library.op("vse_loss")
def _vse_loss(
    image: Tensor,
    text: Tensor,
    margin: float,
    hardest: bool,
    normalize: bool,
    need_image: bool,
    need_text: bool,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_image, need_text)
    return IMPLS[backend].forward(image, text, margin, hardest, normalize, *needs, precision, workspace)


@_vse_loss.register_fake
def _(image, text, margin, hardest, normalize, need_image, need_text, *limits):
    loss = image.new_empty((), dtype=accumulator(image, text))
    return loss, loss.new_empty(image.shape if need_image else 0), loss.new_empty(text.shape if need_text else 0)


def _setup_context(ctx, inputs, output):
    image, text, _, _, _, *needs, _, _, _ = inputs
    _, *gradients = output
    ctx.needs = needs
    ctx.dtypes = image.dtype, text.dtype
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        raise RuntimeError("vse_loss: its gradient cannot be differentiated again; call without create_graph=True")
    dimage, dtext = ctx.saved_tensors
    need_image, need_text = ctx.needs
    return (
        (grad * dimage).to(ctx.dtypes[0]) if need_image else None,
        (grad * dtext).to(ctx.dtypes[1]) if need_text else None,
        *(None,) * 8,
    )


_vse_loss.register_autograd(_backward, setup_context=_setup_context)
