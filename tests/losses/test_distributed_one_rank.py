"""The losses over a group of one rank are the plain losses, through every transport; on a GPU over NCCL, too."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlmfast import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from vlmfast.distributed import gather_rows, row_counts
from vlmfast.errors import ShapeError
from vlmfast.losses.over_ranks import SIGLIP_TRANSPORTS, clip_loss_over_ranks, siglip_loss_over_ranks
from vlmfast.ops import _tiles
from vlmfast.ops.softmax_loss import IMPLS
from vlmfast.testing import pairs


@pytest.fixture(params=["gloo", "nccl"])
def one_rank(request, tmp_path):
    """torch.distributed with this process alone in it; the device that its backend is for."""
    if request.param == "nccl":
        if _tiles.INTERPRET or not torch.cuda.is_available():
            pytest.skip("NCCL needs a GPU")
        request.getfixturevalue("gpu")
    dist.init_process_group(request.param, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaves(scale=5.0):
    image, text, _ = pairs(9, 8)
    here = image.device
    scalars = torch.tensor([scale], device=here), torch.tensor(-3.0, device=here)
    return [v.requires_grad_() for v in (image, text, *scalars)]


def results(loss, inputs):
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize("name", ["gather", "ring"])
def test_one_rank_s_clip_loss_is_the_plain_one(one_rank, name):
    inputs = leaves()[:3]
    ours = results(lambda *v: clip_loss_over_ranks(*v, transport=name), inputs)
    for value, expected in zip(ours, results(clip_loss, inputs), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", SIGLIP_TRANSPORTS)
def test_one_rank_s_siglip_loss_is_the_plain_one(one_rank, name):
    inputs = leaves()
    ours = results(lambda *v: siglip_loss_over_ranks(*v, transport=name), inputs)
    for value, expected in zip(ours, results(siglip_loss, inputs), strict=True):
        torch.testing.assert_close(value, expected)


def test_one_rank_gathers_its_own_rows(one_rank):
    x = leaves()[0]
    assert torch.equal(gather_rows(x), x)
    assert row_counts(x) == [9]
    assert torch.equal(torch.autograd.grad(gather_rows(x, sizes=[9]).sum(), x)[0], torch.ones_like(x))
    with pytest.raises(ShapeError, match=r"gather_rows: sizes must hold the rows of each of 1 ranks, and 9 for rank 0"):
        gather_rows(x, sizes=[8])
    with pytest.raises(RuntimeError, match="gather_rows: its gradient cannot be differentiated again"):
        torch.autograd.grad(gather_rows(x).square().sum(), x, create_graph=True)


def test_refusals_with_a_group(one_rank):
    image, text, scale, bias = leaves()
    with pytest.raises(ShapeError, match=r"gather_rows: features must be a matrix \[rows, D\]; got shape \(9,\)"):
        gather_rows(image[:, 0])
    with pytest.raises(ShapeError, match="clip_loss_over_ranks: image and text must have one shape"):
        clip_loss_over_ranks(image, text[:8], scale)
    with pytest.raises(ShapeError, match=r"siglip_loss_over_ranks: logit_bias must hold one number.*\(2,\)"):
        siglip_loss_over_ranks(image, text, scale, torch.zeros(2))
    with pytest.raises(ValueError, match="transport must be 'auto', 'gather' or 'ring'; got 'shift'"):
        clip_loss_over_ranks(image, text, scale, transport="shift")
    with pytest.raises(ValueError, match="transport must be one of bidir, shift, reduce, gather; got 'ring'"):
        siglip_loss_over_ranks(image, text, scale, bias, transport="ring")


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_rows_are_normalised_where_asked(one_rank, loss):
    image, text, scale, bias = leaves()
    arguments = (scale,) if loss == "clip" else (scale, bias)
    over = {"clip": clip_loss_over_ranks, "siglip": siglip_loss_over_ranks}[loss]
    unit = over(F.normalize(image), F.normalize(text), *arguments, normalize=False)
    torch.testing.assert_close(over(image, text, *arguments), unit)
    assert not torch.isclose(over(image, text, *arguments, normalize=False), unit)


def test_a_module_alone_in_its_group_is_the_plain_loss(one_rank, monkeypatch):
    image, text, scale, bias = leaves()
    group = dist.group.WORLD
    monkeypatch.setattr("vlmfast.distributed._all_gather", None)  # nothing is sent
    expected = clip_loss(image, text, scale, normalize=False)
    assert torch.equal(ClipLoss(group=group)(image, text, scale), expected)
    expected = siglip_loss(image, text, scale, bias, normalize=False)
    assert torch.equal(SigLipLoss(group=group)(image, text, scale, bias), expected)


@pytest.mark.parametrize("loss", [clip_loss_over_ranks, siglip_loss_over_ranks, gather_rows])
def test_torch_compile_leaves_it_as_it_is(one_rank, loss):
    torch.compiler.reset()
    inputs = leaves()[: {clip_loss_over_ranks: 3, siglip_loss_over_ranks: 4, gather_rows: 1}[loss]]
    compiled = torch.compile(lambda *v: loss(*v), backend="aot_eager")
    assert torch.equal(compiled(*inputs), loss(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_counts_rows_without_a_pair(backend, dtype):
    """What the losses over ranks ask of it: a block in which no row has its pair, and every row counts all the same."""
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
