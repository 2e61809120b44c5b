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
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SIGLIP_TRANSPORTS)
def test_one_rank_s_siglip_loss_is_the_plain_one(one_rank, name):
    inputs = leaves()
    ours = results(lambda *v: siglip_loss_over_ranks(*v, transport=name), inputs)
    for value, expected in zip(ours, results(siglip_loss, inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


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
    torch.testing.assert_close(over(image, text, *arguments), unit, rtol=1e-4, atol=0)
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
