"""The tolerances themselves: no false alarm for the reference, and no planted fault gets past them."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from vlmfast import clip_loss, use_backend
from vlmfast.testing import SHAPES, Watch, assert_accurate, pairs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALIVE = [(63, 64), (65, 33), (97, 100), (257, 3)]  # of SHAPES: gradients far from zero for every seed, and quick


def loss_and_gradients(image, text, scale, normalize=True):
    """[loss, d image, d text, d scale] by the reference."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (image, text, scale)]
    with use_backend("reference"):
        loss = clip_loss(*leaves, normalize=normalize)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@cache
def case(B, D, dtype, seed):
    """Rounded inputs, loss and gradients of the same in float64, and the natural size of each."""
    inputs = pairs(B, D, dtype=dtype, seed=seed)
    *sides, scale = inputs
    sizes = [scale / B / side.double().norm(dim=1).min() for side in sides]
    return inputs, loss_and_gradients(*(tensor.double() for tensor in inputs)), [1.0, *sizes, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_the_reference_raises_no_false_alarm(B, D, dtype):
    for seed in range(3):
        inputs, exact, sizes = case(B, D, dtype, seed)
        for ours, truth, size in zip(loss_and_gradients(*inputs), exact, sizes, strict=True):
            assert_accurate(ours, truth, size=size, cond=inputs[-1])


def gain(image, text, scale, gradient):
    """Everything 1 % too long."""
    return 1.01 * gradient


def unwritten_last_row(image, text, scale, gradient):
    """A buffer that keeps the zeros it was made of."""
    return torch.cat([gradient[:-1], torch.zeros_like(gradient[:1])])


def poisoned_last_row(image, text, scale, gradient):
    """A buffer from torch.empty, which the suite fills with NaN."""
    written = torch.empty_like(gradient)
    written[:-1] = gradient[:-1]
    return written


def dropped_last_pair(image, text, scale, gradient):
    """A loop that ends one pair early."""
    shorter = loss_and_gradients(image[:-1].double(), text[:-1].double(), scale.double())[1]
    return torch.cat([shorter, torch.zeros_like(shorter[:1])])


def unprojected(image, text, scale, gradient):
    """1 % of the radial part that normalisation takes away."""
    unit, length = F.normalize(image.double(), dim=1), image.double().norm(dim=1, keepdim=True)
    raw = loss_and_gradients(unit, F.normalize(text.double(), dim=1), scale.double(), normalize=False)[1]
    return gradient + 0.01 * (raw * unit).sum(1, keepdim=True) * unit / length


@pytest.mark.parametrize("fault", [gain, unwritten_last_row, poisoned_last_row, dropped_last_pair, unprojected])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), ALIVE)
def test_a_planted_fault_in_a_gradient_is_caught(B, D, dtype, fault):
    for seed in range(3):
        inputs, exact, sizes = case(B, D, dtype, seed)
        wrong = fault(*inputs, exact[1]).to(dtype)
        with pytest.raises(AssertionError, match=r"elements are wrong|share a gain"):
            assert_accurate(wrong, exact[1], size=sizes[1], cond=inputs[-1])


@pytest.mark.parametrize(("B", "D"), ALIVE)
def test_a_planted_fault_in_a_number_is_caught(B, D):
    (image, text, scale), (loss, _, _, dscale), _ = case(B, D, torch.float32, 0)
    shorter = loss_and_gradients(image[:-1], text[:-1], scale)
    for name, wrong, exact in [
        ("loss of 1 % more", 1.01 * loss, loss),
        ("loss without the last pair", shorter[0], loss),
        ("scale's gradient of 1 % more", 1.01 * dscale, dscale),
    ]:
        with pytest.raises(AssertionError, match=name):
            assert_accurate(wrong.float(), exact, cond=scale, name=name)


def test_a_gain_within_every_element_s_tolerance_is_caught():
    """bfloat16 lets each element be 0.8 % off, but not all of them to the same side."""
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_accurate(exact.bfloat16(), exact)
    with pytest.raises(AssertionError, match=r"share a gain of \+0\.00"):
        assert_accurate((1.003 * exact).bfloat16(), exact)


def test_what_is_compared_must_have_one_shape():
    with pytest.raises(AssertionError, match=r"shape \(3,\), expected \(3, 1\)"):
        assert_accurate(torch.zeros(3), torch.zeros(3, 1))


def test_what_nobody_wrote_is_nan():
    x = torch.zeros(2, dtype=torch.float16)
    for memory in (torch.empty(3), torch.empty_like(x), x.new_empty(4), torch.empty_strided((2, 2), (2, 1))):
        assert memory.isnan().all()


def test_watch_sees_a_matrix_of_logits():
    x = torch.zeros(8, 3)
    with Watch(64) as watch:
        x @ x[:7].T
    assert watch.largest == 56
    with pytest.raises(AssertionError, match=r"mm.* returned \(8, 8\): 64 elements"), Watch(64):
        x @ x.T
