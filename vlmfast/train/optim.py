"""AdamW with open_clip's parameter groups: gains, biases, scalars and declared embeddings do not decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmfast.train.world import inner


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.2, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The model's trainable parameters in two groups, with and without weight decay; twice as many for each part.

    A parameter does not decay if it has at most one dimension (gains, biases, logit_scale), or if its module, or one
    that holds it, names it in `no_weight_decay()` (class and position embeddings).

    Args:
        model: any module; modules inside may have `no_weight_decay() -> set of names relative to themselves`.
        weight_decay: of the group that decays.
        lr_scales: name of a module inside -> what its parameters' learning rate is multiplied by at every step.

    Returns:
        Groups as torch.optim takes them, each with a "name", those of `lr_scales` with "lr_scale"; a group without
        parameters is left out.

    Raises:
        ValueError: the model has no trainable parameter, `no_weight_decay()` names what is not there, or
            `lr_scales` a part without trainable parameters.

    Source: open_clip `wd_param_groups`; Radford et al. 2021, section 2.5.
    """
    model = inner(model)
    names = dict(model.named_parameters())
    spared = set()
    for path, module in model.named_modules():
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            spared |= {f"{path}.{name}" if path else name for name in declared()}
    if unknown := sorted(spared - names.keys()):
        raise ValueError(f"parameter_groups: no_weight_decay() names parameters that do not exist: {unknown}")
    parts: dict[str, float] = {**(lr_scales or {}), "": 1.0}
    trained = [f"{name}." for name, parameter in names.items() if parameter.requires_grad]
    if absent := [part for part in parts if part and not any(name.startswith(f"{part}.") for name in trained)]:
        raise ValueError(f"parameter_groups: lr_scales names {absent}, in which the model trains no parameter")
    groups: list[dict[str, Any]] = []
    for part, scale in parts.items():
        rate = {"lr_scale": scale} if part else {}
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            groups.append({"params": [], "weight_decay": decay, "name": f"{part} {kind}".strip(), **rate})
    for name, parameter in names.items():
        if parameter.requires_grad:
            place = next(i for i, part in enumerate(parts) if not part or f"{name}.".startswith(f"{part}."))
            groups[2 * place + (parameter.ndim <= 1 or name in spared)]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ValueError("parameter_groups: the model has no trainable parameter")
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    *,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model, weight_decay, lr_scales)`, with the paper's settings for ViT towers.

    Args:
        model: any module.
        lr: learning rate until a schedule sets another.
        betas: decays of the two running means.
        eps: added to the denominator.
        weight_decay: of the parameters that decay.
        lr_scales: name of a module inside -> what the learning rate of its parameters is multiplied by.

    Returns:
        The optimizer, in torch's fused form.

    Raises:
        ValueError: as `parameter_groups`.

    Source: Radford et al. 2021, table 19; open_clip `create_optimizer`.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay, lr_scales), lr=lr, betas=betas, eps=eps, fused=True)
