"""One step of training, as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.errors import VlmfastError

# (model, batch) -> scalars [] by name: the sum of those that end in "_loss" is minimised, the rest is reported.
LossFn = Callable[[nn.Module, Any], Mapping[str, Tensor]]

PRECISIONS = ("fp32", "amp_bf16")
MAX_LOG_SCALE = math.log(100)


class NonFiniteError(VlmfastError, FloatingPointError):
    """A loss or a gradient is infinite or not a number; the message names the step."""


def plain_step(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    step: int,
    precision: str = "fp32",
    grad_clip_norm: float | None = None,
) -> dict[str, float]:
    """The metrics of one step of training, which changes the model and the optimizer.

    Forward, loss, backward, clipping, optimizer, and logit_scale clamped to [1, 100] if the model has one. The values
    are read back from the device once, before the optimizer: a loss or gradient that is not finite never reaches the
    weights.

    Args:
        model: in training mode. A parameter `model.logit_scale`, if there is one, holds the logarithm.
        loss_fn: (model, batch) -> scalars by name; the sum of those whose name ends in "_loss" is minimised.
        batch: what loss_fn takes, on the model's device.
        optimizer: over the model's parameters.
        lr: learning rate of this step, set in every group.
        step: the number of this step, from 1, for the error.
        precision: "fp32", or "amp_bf16" for bfloat16 autocast around loss_fn.
        grad_clip_norm: longest gradient, all parameters together; None for no clipping.

    Returns:
        What loss_fn gave; "loss", the sum, if it gave more than one loss; "logit_scale" (the multiplier that this step
        used), "lr", and "grad_norm" (length of the gradient before clipping).

    Raises:
        NonFiniteError: the loss or the gradient is not finite.
        ValueError: loss_fn gave no "_loss", or precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"plain_step: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    parameters = list(model.parameters())
    logit_scale = getattr(model, "logit_scale", None)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
        scalars = dict(loss_fn(model, batch))
    losses = [value for name, value in scalars.items() if name.endswith("_loss")]
    if not losses:
        raise ValueError(f"plain_step: loss_fn must return at least one '..._loss'; got {sorted(scalars)}")
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)

    if len(losses) > 1:
        scalars["loss"] = loss
    if isinstance(logit_scale, nn.Parameter):
        scalars["logit_scale"] = logit_scale.detach().exp()
    metrics = _read({**scalars, "grad_norm": grad_norm})
    for name, value in metrics.items():
        if (name.endswith("loss") or name == "grad_norm") and not math.isfinite(value):
            raise NonFiniteError(
                f"train: step {step}: {name} is {value}. The weights are still those after step {step - 1}. "
                "Resume from the last checkpoint with a lower lr, a longer warm-up or grad_clip_norm"
            )

    if grad_clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if isinstance(logit_scale, nn.Parameter):
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOG_SCALE)
    return {**metrics, "lr": lr}


def _read(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The scalars' values, in one copy from the device."""
    values = torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
    return dict(zip(scalars, values.tolist(), strict=True))
