"""A block of a larger matrix of logits, as vlmfast/losses/over_ranks.py hands it to the backends."""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.ops.softmax_loss import IMPLS
from vlmfast.testing import pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_pair_count_all_the_same(backend, dtype):
    """The pairs lie in other blocks: every row and column has its log-sum-exp, its loss and its gradient here."""
    impl = IMPLS[backend]
    image, text, scale = pairs(70, 20, dtype=dtype)
    M, N = 70, 33
    columns = text[:N].contiguous()
    device = image.device
    row_ids, col_ids = (torch.full((size,), -1, device=device) for size in (M, N))
    row_weight, col_weight = (torch.full((size,), 0.01, device=device) for size in (M, N))
    plan = (row_ids, col_ids, row_weight, col_weight, None, None, "index", 0.0, True)
    loss, row_lse, col_lse, *_ = impl.forward(image, columns, scale.to(device), *plan, "ieee", 0)

    x, y = (F.normalize(v.double(), dim=1).requires_grad_() for v in (image, columns))
    exact_scale = scale.double().to(device).requires_grad_()
    z = exact_scale * x @ y.T
    torch.testing.assert_close(row_lse, z.logsumexp(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(col_lse, z.logsumexp(0), rtol=1e-6, atol=1e-5)
    exact = 0.01 * (z.logsumexp(1).sum() + z.logsumexp(0).sum())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)

    # The log-sum-exps of a longer row: what other blocks of columns add.
    row_lse, col_lse = row_lse + 0.3, col_lse + 0.1
    weight = 0.01 * ((z - row_lse[:, None]).exp() + (z - col_lse).exp()).detach()
    raw = [v.double().requires_grad_() for v in (image, columns)]
    z = exact_scale * F.normalize(raw[0], dim=1) @ F.normalize(raw[1], dim=1).T
    expected = torch.autograd.grad((weight * z).sum(), [*raw, exact_scale])
    none = row_lse.new_empty(0)
    saved = (row_lse, col_lse, none, none, torch.empty(0, dtype=torch.uint8, device=device))
    grad = torch.ones((), device=device)
    found = impl.backward(grad, image, columns, scale.to(device), *plan, *saved, True, True, "ieee", 2**18)
    for value, truth in zip(found, expected, strict=True):
        size = float(truth.abs().max())
        rounding = 2e-2 if dtype == torch.bfloat16 and value.dim() else 1e-4
        torch.testing.assert_close(value.double(), truth, rtol=rounding, atol=rounding * size)
