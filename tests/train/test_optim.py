"""The two parameter groups, against open_clip's rule stated anew."""

import pytest
import torch
from standin import Towers
from torch import nn

from vlmfast.train import adamw, parameter_groups


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = Towers()
        self.head = nn.Linear(6, 3)
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.tied = self.head


def spared_by_open_clip(model):
    """Names without decay: at most one dimension, or declared by a module, relative to it."""
    declared = set()
    for path, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            declared |= {f"{path}.{name}".lstrip(".") for name in module.no_weight_decay()}
    return {name for name, p in model.named_parameters() if p.ndim <= 1 or name in declared}


@pytest.mark.parametrize("build", [Towers, Nested])
def test_groups_are_open_clips(build):
    model = build()
    groups = parameter_groups(model, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    got = {group["name"]: (group["weight_decay"], {names[p] for p in group["params"]}) for group in groups}
    spared = {name for name in spared_by_open_clip(model) if not name.startswith("frozen")}
    rest = {name for name in names.values() if not name.startswith("frozen")} - spared
    assert got == {"decay": (0.1, rest), "no_decay": (0.0, spared)}
    assert sum(len(group["params"]) for group in groups) == len(spared) + len(rest), "each parameter once"


def test_the_groups_of_the_small_towers_by_name():
    model = Towers()
    decaying = set(parameter_groups(model)[0]["params"])
    assert decaying == {model.x[0].weight, model.x[3].weight, model.y[0].weight, model.y[2].weight}


def test_only_decaying_parameters_shrink_without_gradient():
    model = Towers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.5, weight_decay=0.2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    spared = spared_by_open_clip(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if name in spared else 0.9))


def test_defaults_are_those_of_the_paper():
    group = adamw(Towers()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-4, (0.9, 0.98), 1e-6, 0.2)


def test_refusals():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.GELU())
    model = Towers()
    model.no_weight_decay = lambda: {"positional_embeding"}
    with pytest.raises(ValueError, match=r"do not exist: \['positional_embeding'\]"):
        parameter_groups(model)
