"""AdamW with open_clip's parameter groups: gains, biases, scalars and declared embeddings do not decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float = 0.2) -> list[dict[str, Any]]:
    """The model's trainable parameters in two groups, with and without weight decay.

    A parameter does not decay if it has at most one dimension (gains, biases, logit_scale), or if its module, or one
    that holds it, names it in `no_weight_decay()` (class and position embeddings).

    Args:
        model: any module; modules inside may have `no_weight_decay() -> set of names relative to themselves`.
        weight_decay: of the group that decays.

    Returns:
        Groups as torch.optim takes them, each with a "name"; a group without parameters is left out.

    Raises:
        ValueError: the model has no trainable parameter, or `no_weight_decay()` names one that does not exist.

    Source: open_clip `wd_param_groups`; Radford et al. 2021, section 2.5.
    """
    names = dict(model.named_parameters())
    spared = set()
    for path, module in model.named_modules():
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            spared |= {f"{path}.{name}" if path else name for name in declared()}
    if unknown := sorted(spared - names.keys()):
        raise ValueError(f"parameter_groups: no_weight_decay() names parameters that do not exist: {unknown}")
    decaying: list[nn.Parameter] = []
    still: list[nn.Parameter] = []
    for name, parameter in names.items():
        if parameter.requires_grad:
            (still if parameter.ndim <= 1 or name in spared else decaying).append(parameter)
    if not decaying and not still:
        raise ValueError("parameter_groups: the model has no trainable parameter")
    groups = [
        {"params": decaying, "weight_decay": weight_decay, "name": "decay"},
        {"params": still, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    *,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model, weight_decay)`, with the paper's settings for ViT towers.

    Args:
        model: any module.
        lr: learning rate until a schedule sets another.
        betas: decays of the two running means.
        eps: added to the denominator.
        weight_decay: of the parameters that decay.

    Returns:
        The optimizer, in torch's fused form.

    Raises:
        ValueError: the model has no trainable parameter.

    Source: Radford et al. 2021, table 19; open_clip `create_optimizer`.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)
