"""What the Triton kernels promise beside equalling the reference, which the tests of each op check."""

from types import SimpleNamespace

import pytest
import torch

from vlmfast import clip_loss, info_nce_loss, rank_counts, siglip_loss, similarity_topk, use_backend, vse_loss
from vlmfast.backend import explain
from vlmfast.ops import _limits, _tiles
from vlmfast.ops.similarity import _triton as similarity
from vlmfast.ops.softmax_loss import IMPLS, _triton
from vlmfast.testing import pairs

LOSSES = {
    "clip": clip_loss,
    "siglip": lambda x, y, scale: siglip_loss(x, y, scale, -2.0),
    "vse": lambda x, y, scale: vse_loss(x, y, 0.1) + 0 * scale,
    "hardest": lambda x, y, scale: vse_loss(x, y, 0.1, hardest=True) + 0 * scale,
}


def gradients(call, *inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def exactly(call, *inputs):
    with use_backend("reference"):
        return gradients(call, *(tensor.double() for tensor in inputs))


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"), [(torch.float16, "bf16x3", 1e-3), (torch.float32, "bf16x3", 2e-4)]
)
def test_gradient_tiles_of_the_matrix_unit_s_dtype(triton_backend, monkeypatch, loss, dtype, precision, bound):
    """What runs on a GPU: G in float16, in range by its unit; and float32 as two bfloat16 parts, which the interpreter
    cuts off instead of rounding, hence 2^-14 and not 2^-16."""
    monkeypatch.setattr(_limits, "PRECISION", precision)
    image, text, scale = pairs(150, 40, dtype=dtype)
    ours, exact = gradients(LOSSES[loss], image, text, scale), exactly(LOSSES[loss], image, text, scale)
    assert ours[0] == pytest.approx(float(exact[0]), rel=1e-4)
    for value, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert relative(value, truth) < bound


@pytest.mark.parametrize("weights", [1.0, 1e-6])
def test_float16_gradient_tiles_stay_in_range(triton_backend, monkeypatch, weights):
    """Weights of 1 / N and incoming gradients far below 1 must not push G out of float16."""
    monkeypatch.setattr(_limits, "PRECISION", "bf16x3")
    image, text, scale = pairs(150, 40)
    image, text = (1e-3 * image).half(), (30 * text).half()  # lengths are folded into no float16
    call = lambda *inputs: weights * clip_loss(*inputs)  # noqa: E731
    ours, exact = gradients(call, image, text, scale), exactly(call, image, text, scale)
    if weights == 1:
        assert relative(ours[1], exact[1]) < 1e-3
    assert relative(ours[3], exact[3]) < 1e-3


def test_descriptors_load_what_pointers_do(triton_backend, monkeypatch):
    """The copy unit of Hopper, as the interpreter has it: the same bits, at ragged ends, too."""
    pair = _tiles.pair

    def with_descriptors(*args, **options):
        p = pair(*args, **options)
        p.constants["TMA"] = True
        return p

    inputs = pairs(97, 36)
    expected = gradients(clip_loss, *inputs)
    monkeypatch.setattr(_tiles, "pair", with_descriptors)
    assert all(map(torch.equal, gradients(clip_loss, *inputs), expected))


@pytest.mark.parametrize("workspace", [2**10, 2**16, 2**27])
def test_the_workspace_changes_only_the_order_of_sums(triton_backend, monkeypatch, workspace):
    inputs = pairs(300, 16)
    expected = gradients(clip_loss, *inputs)
    monkeypatch.setattr(_limits, "MAX_WORKSPACE", workspace)
    ours = gradients(clip_loss, *inputs)
    assert torch.equal(ours[0], expected[0])
    for value, other in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positives", ["index", "out", "in"])
def test_the_forward_s_blocks_change_no_bit(triton_backend, monkeypatch, positives):
    """Partial results are merged a group of tiles at a time, in order; blocks are whole groups."""
    monkeypatch.setattr(_triton, "_GROUP", 1)
    ids = torch.arange(600) // 2
    ways = {} if positives == "index" else {"query_ids": ids, "key_ids": ids, "positives": positives}
    inputs = pairs(600, 16)
    expected = info_nce_loss(*inputs, directions="both", **ways)
    monkeypatch.setattr(_tiles, "EDGE", 2**14)
    assert torch.equal(info_nce_loss(*inputs, directions="both", **ways), expected)


@pytest.mark.parametrize("k", [2, 8])
def test_one_program_walks_many_tiles(triton_backend, monkeypatch, k):
    """A full list gives up its later equals first; k is the list's length, so that it shows."""
    monkeypatch.setattr(similarity, "_PROGRAMS", 1)
    query, items = torch.randint(-2, 3, (2, 700, 4), generator=torch.Generator().manual_seed(0)).float()
    query = query[:70]
    s = query @ items.T
    best, at = s.sort(dim=1, descending=True, stable=True)
    values, indices = similarity_topk(query, items, k, normalize=False)
    assert torch.equal(values, best[:, :k])
    assert torch.equal(indices, at[:, :k])
    above, ties = rank_counts(query, items, torch.arange(70), normalize=False)
    own = s.diagonal()[:, None]
    assert torch.equal(above, (s > own).sum(1))
    assert torch.equal(ties, (s == own).sum(1) - 1)


def test_a_tensor_on_the_cpu_is_refused_in_words():
    if _tiles.INTERPRET:
        pytest.skip("the interpreter runs on the CPU")
    x = torch.ones(2, 3)
    why = explain(IMPLS, x, x)["triton"]
    assert "Triton cannot be imported" in why or "its kernels run on a GPU; a tensor is on the cpu" in why


def test_a_dtype_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(_tiles, "MISSING", "")
    x = torch.ones(2, 3, dtype=torch.float64)
    assert "a tensor is torch.float64" in explain(IMPLS, x, x)["triton"]


def test_a_gpu_too_old_is_refused_in_words(monkeypatch):
    class OnGpu:
        dtype, device = torch.float32, torch.device("cuda")

    monkeypatch.setattr(_tiles, "MISSING", "")
    t4 = SimpleNamespace(name="a T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: t4)
    why = _tiles.unsupported(OnGpu(), OnGpu())
    assert why == "its kernels need compute capability 8.0 or later; a T4 has 7.5"
