"""SigLipLoss in the place of open_clip's: its formula, its surface, its refusals."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from vlmfast import SigLipLoss
from vlmfast.errors import BackendError, ShapeError
from vlmfast.testing import Watch, pairs


def features(B=33, D=20, dtype=torch.float32):
    """What open_clip's model hands to its loss: unit rows, the scale after exp, and a bias."""
    image, text, scale = pairs(B, D)
    image, text = (F.normalize(v).to(dtype).requires_grad_() for v in (image, text))
    return image, text, scale.requires_grad_(), torch.tensor(-3.0, requires_grad=True)


def open_clip_loss(image_features, text_features, logit_scale, logit_bias):
    """SigLipLoss._loss of open_clip's loss.py, its two helpers written in."""
    logits = logit_scale * image_features @ text_features.T
    logits = logits + logit_bias
    num_logits = image_features.shape[0]
    labels = -torch.ones((num_logits, num_logits), dtype=image_features.dtype)
    labels = 2 * torch.eye(num_logits, dtype=image_features.dtype) + labels
    return -F.logsigmoid(labels * logits).sum() / image_features.shape[0]


def test_equals_open_clip_with_every_gradient(backend):
    inputs = features()
    ours, theirs = SigLipLoss()(*inputs), open_clip_loss(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_takes_features_as_given(backend):
    image, text, scale, bias = features()
    torch.testing.assert_close(SigLipLoss()(2 * image, text, scale, bias), open_clip_loss(2 * image, text, scale, bias))


def test_constructor_and_forward_have_open_clips_signatures():
    defaults = {name: p.default for name, p in inspect.signature(SigLipLoss).parameters.items()}
    theirs = {"cache_labels": False, "rank": 0, "world_size": 1, "dist_impl": None, "chunk_size": 0}
    assert list(defaults.items()) == [*theirs.items(), ("group", None), ("uneven", False)]
    names = ["self", "image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
    assert list(inspect.signature(SigLipLoss.forward).parameters) == names
    assert list(inspect.signature(SigLipLoss.get_logits).parameters) == names[:-1]
    loss = SigLipLoss(cache_labels=True, rank=0, world_size=1, chunk_size=512)
    assert (loss.cache_labels, loss.rank, loss.world_size, loss.dist_impl, loss.chunk_size) == (
        True,
        0,
        1,
        "bidir",
        512,
    )
    assert (loss.prev_num_logits, loss.labels) == (0, {})


def test_output_dict(backend):
    image, text, scale, bias = features()
    result = SigLipLoss()(
        image_features=image, text_features=text, logit_scale=scale, logit_bias=bias, output_dict=True
    )
    assert list(result) == ["contrastive_loss"]
    assert torch.equal(result["contrastive_loss"], SigLipLoss()(image, text, scale, bias))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_and_bias_get_gradients_of_their_shape(backend, shape):
    image, text, scale, bias = features()
    scale, bias = (v.detach().reshape(shape).requires_grad_() for v in (scale, bias))
    SigLipLoss()(image, text, scale, bias).backward()
    assert scale.grad.shape == bias.grad.shape == shape
    assert scale.grad.abs() > 0
    assert bias.grad.abs() > 0


def test_no_bias_is_a_bias_of_zero(backend):
    image, text, scale, _ = features()
    assert torch.equal(SigLipLoss()(image, text, scale, None), SigLipLoss()(image, text, scale, torch.tensor(0.0)))


def test_ground_truth_and_logits(backend):
    image, text, scale, bias = features(4)
    loss = SigLipLoss()
    signs = loss.get_ground_truth(image.device, torch.bfloat16, 4)
    assert signs.dtype == torch.bfloat16
    assert torch.equal(signs, 2 * torch.eye(4, dtype=torch.bfloat16) - 1)
    assert (loss.get_ground_truth(image.device, torch.float32, 4, negative_only=True) == -1).all()
    logits = loss.get_logits(image, text, scale, bias)
    torch.testing.assert_close(logits, scale * image @ text.T + bias)
    torch.testing.assert_close(loss.get_logits(image, text, scale), scale * image @ text.T)


def test_a_subclass_with_its_own_logits_is_obeyed(backend):
    class Doubled(SigLipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            return 2 * super().get_logits(image_features, text_features, logit_scale, logit_bias)

    class Friends(SigLipLoss):
        def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
            return torch.ones(num_logits, num_logits, device=device, dtype=dtype)

    image, text, scale, bias = features()
    torch.testing.assert_close(Doubled()(image, text, scale, bias), open_clip_loss(image, text, 2 * scale, 2 * bias))
    expected = -F.logsigmoid(scale * image @ text.T + bias).sum() / 33
    torch.testing.assert_close(Friends()(image, text, scale, bias), expected)


def open_clip_block_loss(image_features, text_features, logit_scale, logit_bias):
    """SigLipLoss._loss of open_clip with negative_only=True: features of another rank, none of which is a partner."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    labels = -torch.ones(len(image_features), len(image_features), dtype=image_features.dtype)
    return -F.logsigmoid(labels * logits).sum() / image_features.shape[0]


def test_the_loss_of_a_block_as_open_clips_trainers_call_it(backend):
    inputs = features()
    loss = SigLipLoss()
    assert torch.equal(loss._loss(*inputs), loss(*inputs))
    ours, theirs = loss._loss(*inputs, negative_only=True), open_clip_block_loss(*inputs)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)
    names = ["self", "image_features", "text_features", "logit_scale", "logit_bias", "negative_only"]
    parameters = inspect.signature(SigLipLoss._loss).parameters
    assert list(parameters) == names
    assert (parameters["logit_bias"].default, parameters["negative_only"].default) == (None, False)


def test_a_subclass_with_its_own_loss_is_obeyed(backend):
    class Halved(SigLipLoss):
        def _loss(self, image_features, text_features, logit_scale, logit_bias=None, negative_only=False):
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only) / 2

    inputs = features()
    assert torch.equal(Halved()(*inputs), SigLipLoss()(*inputs) / 2)
    assert torch.equal(Halved()(*inputs, output_dict=True)["contrastive_loss"], SigLipLoss()(*inputs) / 2)


def test_a_subclass_s_logits_keep_their_dtype(backend):
    class Same(SigLipLoss):
        def get_logits(self, *arguments):
            return super().get_logits(*arguments)

    image, text, scale, bias = features(dtype=torch.bfloat16)
    assert SigLipLoss()(image, text, scale, bias).dtype == torch.float32
    assert Same()(image, text, scale, bias).dtype == torch.bfloat16


def test_nothing_of_the_size_of_the_logits_is_held(backend):
    image, text, scale, bias = features(1200, 8)
    with Watch(1200 * 1200):
        SigLipLoss()(image, text, scale, bias).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_closer_to_float64_than_eager_mixed_precision(backend, dtype):
    """Under autocast open_clip's logits are rounded to 16 bits; ours are not."""
    image, text, _, _ = features(257, 64, dtype)
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    exact = open_clip_loss(*(v.double() for v in (image, text, scale, bias)))
    with torch.autocast(image.device.type, dtype=dtype):
        theirs = open_clip_loss(image, text, scale, bias)
        ours = SigLipLoss()(image, text, scale, bias)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) < abs(theirs - exact) / 10
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_compiles_whole(backend):
    inputs = features()
    loss = SigLipLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*inputs, output_dict=True)["contrastive_loss"], loss(*inputs)
    assert torch.equal(ours, eager)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(eager, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
def test_every_dist_impl_is_known(dist_impl):
    assert SigLipLoss(dist_impl=dist_impl).dist_impl == dist_impl


def test_refusals():
    with pytest.raises(ValueError, match=r"SigLipLoss: dist_impl must be None, 'bidir'.*got 'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match=r"SigLipLoss: chunk_size must be 0 .* got -1"):
        SigLipLoss(chunk_size=-1)
    image, text, scale, bias = features()
    with pytest.raises(ShapeError, match=r"SigLipLoss: image_features and text.*\(33, 20\).*\(32, 20\)"):
        SigLipLoss()(image, text[:32], scale, bias)
    with pytest.raises(BackendError, match=r"torch\.distributed has no process group"):
        SigLipLoss(world_size=2)(image, text, scale, bias)


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_patched_method_is_obeyed(monkeypatch, where):
    (image, text, scale), loss = pairs(33, 20), SigLipLoss()
    expected = -F.logsigmoid(-scale * image @ text.T).sum() / 33
    target = loss if where == "instance" else SigLipLoss
    monkeypatch.setattr(target, "get_ground_truth", lambda *_, **__: -torch.ones(33, 33))
    torch.testing.assert_close(loss(image, text, scale, None), expected)
