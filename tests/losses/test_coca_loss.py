"""CoCaLoss in the place of open_clip's."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from vlmfast.errors import ShapeError
from vlmfast.losses.clip import ClipLoss
from vlmfast.losses.coca import CoCaLoss
from vlmfast.testing import draw, pairs


def inputs(B=9, T=5, V=11):
    """Normalised features, the captioner's logits and its labels, some of them padding, and the scale."""
    image, text, scale = pairs(B, 8)
    generator = torch.Generator().manual_seed(1)
    logits = draw(torch.randn, B, T, V, generator=generator)
    labels = draw(torch.randint, 0, V, (B, T), generator=generator)
    labels[0, 2:] = 0
    floats = [F.normalize(image, dim=1), F.normalize(text, dim=1), logits, scale]
    image, text, logits, scale = (v.requires_grad_() for v in floats)
    return image, text, logits, labels, scale


def open_clip_loss(image, text, logits, labels, scale, caption_weight, clip_weight, pad_id):
    """open_clip 3.3.0's, for one process, restated."""
    z, own = scale * image @ text.T, torch.arange(len(image))
    clip = clip_weight * (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
    return clip, caption_weight * F.cross_entropy(logits.permute(0, 2, 1), labels, ignore_index=pad_id)


@pytest.mark.parametrize("pad_id", [0, 3, -100])
@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.5, 3.0)])
def test_it_is_open_clip_s_loss(backend, weights, pad_id):
    arguments = inputs()
    leaves = [v for v in arguments if v.is_floating_point()]
    ours = CoCaLoss(*weights, pad_id=pad_id)(*arguments)
    theirs = open_clip_loss(*arguments, *weights, pad_id)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(sum(losses), leaves) for losses in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_dict_has_open_clip_s_names():
    arguments = inputs()
    loss = CoCaLoss(2.0, 1.0)
    both = loss(*arguments, output_dict=True)
    assert list(both) == ["contrastive_loss", "caption_loss"]
    assert list(both.values()) == list(loss(*arguments))


def test_no_weight_no_contrastive_loss():
    """open_clip gives an int64 zero then, and does not look at the features."""
    image, _, logits, labels, scale = inputs()
    contrastive, caption = CoCaLoss(2.0, 0.0)(None, None, logits, labels, scale)
    assert (contrastive.item(), contrastive.dtype, contrastive.requires_grad) == (0, torch.int64, False)
    assert caption.requires_grad
    _, caption = CoCaLoss(0.0, 1.0)(image, image, logits, labels, scale)
    assert caption.item() == 0


def test_another_caption_loss_is_obeyed():
    arguments = inputs()
    loss = CoCaLoss(1.0, 1.0)
    loss.caption_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = F.cross_entropy(arguments[2].flatten(0, 1), arguments[3].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss(*arguments)[1], expected)


def test_its_arguments_are_open_clip_s():
    assert issubclass(CoCaLoss, ClipLoss)
    loss = CoCaLoss(2.0, 1.0, 7, False, True, True, 0, 1, False)
    assert (loss.caption_loss.ignore_index, loss.gather_with_grad, loss.cache_labels) == (7, True, True)
    assert not list(loss.parameters())
    names = [
        *("caption_loss_weight", "clip_loss_weight", "pad_id", "local_loss", "gather_with_grad", "cache_labels"),
        *("rank", "world_size", "use_horovod"),
    ]
    assert list(inspect.signature(CoCaLoss).parameters)[: len(names)] == names
    names = ["image_features", "text_features", "logits", "labels", "logit_scale", "output_dict"]
    assert list(inspect.signature(loss.forward).parameters) == names


def test_equals_the_installed_open_clip(open_clip):
    arguments = inputs()
    for options in (
        {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0},
        {"caption_loss_weight": 1, "clip_loss_weight": 0},
    ):
        ours, theirs = CoCaLoss(**options)(*arguments), open_clip.CoCaLoss(**options)(*arguments)
        torch.testing.assert_close(ours, theirs)


def test_refusals():
    image, text, logits, labels, scale = inputs()
    with pytest.raises(ShapeError, match=r"image and text .*\(9, 8\).*\(8, 8\)"):
        CoCaLoss(1.0, 1.0)(image, text[:8], logits, labels, scale)
