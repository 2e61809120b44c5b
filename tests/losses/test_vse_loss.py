"""VseLoss: vsepp's ContrastiveLoss as a module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmfast import VseLoss, vse_loss
from vlmfast.errors import ShapeError
from vlmfast.testing import pairs


class ContrastiveLoss(nn.Module):
    """vsepp's, model.py, for cosines."""

    def __init__(self, margin=0, max_violation=False):
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def forward(self, im, s):
        scores = im.mm(s.t())
        diagonal = scores.diag().view(im.size(0), 1)
        d1 = diagonal.expand_as(scores)
        d2 = diagonal.t().expand_as(scores)
        cost_s = (self.margin + scores - d1).clamp(min=0)
        cost_im = (self.margin + scores - d2).clamp(min=0)
        mask = torch.eye(scores.size(0)) > 0.5
        cost_s = cost_s.masked_fill(mask, 0)
        cost_im = cost_im.masked_fill(mask, 0)
        if self.max_violation:
            cost_s = cost_s.max(1)[0]
            cost_im = cost_im.max(0)[0]
        return cost_s.sum() + cost_im.sum()


@pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_vsepp_with_every_gradient(backend, hardest, normalize):
    image, text, _ = (v.requires_grad_() for v in pairs(33, 20))
    theirs = ContrastiveLoss(0.3, hardest)(*((F.normalize(v) if normalize else v) for v in (image, text)))
    ours = VseLoss(0.3, hardest, normalize)(image, text)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (image, text)), torch.autograd.grad(theirs, (image, text)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_reduction_is_a_sum_unless_a_mean_is_asked_for(backend):
    image, text, _ = pairs(33, 20)
    total = vse_loss(image, text)
    assert torch.equal(VseLoss()(image, text), total)
    assert torch.equal(VseLoss(reduction="mean")(image, text), total / 33)


def test_settings_are_shown():
    assert repr(VseLoss(0.1, hardest=True)) == "VseLoss(margin=0.1, hardest=True, normalize=True, reduction='sum')"


def test_compiles_whole(backend):
    image, text, _ = (v.requires_grad_() for v in pairs(33, 20))
    loss = VseLoss(reduction="mean")
    ours, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(image, text), loss(image, text)
    assert torch.equal(ours, eager)
    assert torch.equal(torch.autograd.grad(ours, image)[0], torch.autograd.grad(eager, image)[0])


def test_refusals():
    with pytest.raises(ValueError, match="VseLoss: reduction must be 'sum' or 'mean'; got 'none'"):
        VseLoss(reduction="none")
    with pytest.raises(ValueError, match="vse_loss: margin must be at least 0 and finite in float32; got -1"):
        VseLoss(margin=-1)(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"vse_loss: image and text .*\(2, 2\).*\(3, 2\)"):
        VseLoss()(torch.ones(2, 2), torch.ones(3, 2))
