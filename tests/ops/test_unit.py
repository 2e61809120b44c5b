"""Rows of length one, from the shortest to the longest numbers that a dtype has."""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.ops._unit import SHORTEST, unit_rows, unit_rows_backward


@pytest.mark.parametrize("length", [1e-11, 1, 1e18, 1e20, 1e30, 3e37, 8e37])
def test_no_length_overflows(length):
    """The square of 1e20 is beyond float32, and so is the sum of squares of 1e18; the direction is not."""
    direction = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    direction[:, 0] = 4
    x = length * direction
    unit, lengths = unit_rows(x, torch.float32, True)
    exact = x.double()
    torch.testing.assert_close(unit.double(), F.normalize(exact, dim=1), rtol=3e-7, atol=0)
    expected = exact.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lengths.double(), expected.where(expected < 3.4e38, torch.inf), rtol=3e-7, atol=0)
    grad = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    ours = unit_rows_backward(grad, unit, lengths, True)
    leaf = exact.requires_grad_()
    (theirs,) = torch.autograd.grad(F.normalize(leaf, dim=1), leaf, grad.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 / length + 2e-38)


def test_float64_has_its_own_range():
    x = torch.tensor([[3e200, 4e200]], dtype=torch.float64)
    torch.testing.assert_close(unit_rows(x, torch.float64, True)[0], torch.tensor([[0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("entry", [0.0, 1e-30, 3e-13, 0.9e-12])
def test_lengths_are_clamped_as_f_normalize_does(entry):
    """Also where no entry reaches 1e-12, and the length does."""
    x = torch.full((1, 100), entry)
    unit, length = unit_rows(x, torch.float32, True)
    torch.testing.assert_close(unit, F.normalize(x, dim=1))
    assert (length == torch.tensor(SHORTEST)) == (10 * entry <= SHORTEST)


def test_what_is_not_finite_stays():
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    unit, _ = unit_rows(x, torch.float32, True)
    assert unit.isfinite().all(1).tolist() == [False, False, True]
