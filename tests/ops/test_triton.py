"""What the Triton kernels promise beside equalling the reference, which the tests of each op check."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from vlmfast import (
    clip_loss,
    info_nce_loss,
    normalized_similarity,
    rank_counts,
    siglip_loss,
    similarity_topk,
    use_backend,
    vse_loss,
)
from vlmfast.backend import explain
from vlmfast.ops import _limits, _tiles
from vlmfast.ops.similarity import _triton as similarity
from vlmfast.ops.softmax_loss import IMPLS, _triton
from vlmfast.testing import draw, pairs


def grouped(x, y, scale, **options):
    """Three queries and three keys a group, both ways."""
    ids = torch.arange(len(x), device=x.device) // 3
    return info_nce_loss(x, y, scale, query_ids=ids, key_ids=ids, directions="both", **options)


LOSSES = {
    "clip": clip_loss,
    "out": grouped,
    "in": partial(grouped, positives="in"),
    "siglip": lambda x, y, scale, **options: siglip_loss(x, y, scale, -2.0, **options),
    "vse": lambda x, y, scale, **options: vse_loss(x, y, 0.1, **options) + 0 * scale,
    "hardest": lambda x, y, scale, **options: vse_loss(x, y, 0.1, hardest=True, **options) + 0 * scale,
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
    """The copy unit of Hopper, or what the interpreter has for it: the same bits, at ragged ends, too."""
    pair, runs = _tiles.pair, []
    for tma in (False, True):

        def loading(*args, tma=tma, **options):
            p = pair(*args, **options)
            p.constants["TMA"] = tma
            return p

        monkeypatch.setattr(_tiles, "pair", loading)
        runs.append(gradients(clip_loss, *pairs(97, 36)))
    assert all(map(torch.equal, *runs))


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
    query, items = draw(torch.randint, -2, 3, (2, 700, 4), generator=torch.Generator().manual_seed(0)).float()
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


# On a GPU, with everything as it is shipped


@dataclass
class Mode:
    """A way to multiply, and what it may cost: the loss in units of max(loss, 1), gradients relative in L2."""

    dtype: torch.dtype
    precision: str
    loss: float
    gradient: float
    products: float = 0.0  # what S may be off by; a logit is off by scale times that


MODES = {
    "bfloat16": Mode(torch.bfloat16, "bf16x3", loss=1e-5, gradient=4e-3),
    "float16": Mode(torch.float16, "bf16x3", loss=1e-5, gradient=1e-3),
    "bf16x3": Mode(torch.float32, "bf16x3", loss=1e-5, gradient=1e-5, products=1e-7),
    "tf32": Mode(torch.float32, "tf32", loss=2e-3, gradient=2e-3),
}
every_mode = pytest.mark.parametrize("mode", MODES)
every_loss = pytest.mark.parametrize("loss", LOSSES)


# A hinge switches where its kink lies within the rounding of S, a hardest foreigner where its rival does: few do.
SWITCHED = {"vse": 5e-3, "hardest": 0.1}


def check(loss, mode, *inputs, floor=0.0, **limits):
    """Loss and gradients as near to float64 as the mode promises; `floor` in units of a row's largest gradient."""
    image, _, scale = inputs
    ours = gradients(partial(LOSSES[loss], precision=mode.precision, **limits), *inputs)
    exact = exactly(LOSSES[loss], *inputs)
    assert abs(ours[0].double() - exact[0]) <= mode.loss * exact[0].clamp_min(1)
    bound = max(mode.gradient + mode.products * float(scale), SWITCHED.get(loss, 0))
    least = floor * float(scale) / len(image) ** 0.5
    for value, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert (value.double() - truth).norm() <= bound * truth.norm() + least
    assert abs(ours[3].double() - exact[3]) <= bound * exact[3].abs().clamp_min(1)


@every_mode
@every_loss
@pytest.mark.parametrize(("N", "D"), [(1000, 512), (4097, 640), (1000, 768)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("match", [0.2, 1.0], ids=["weak", "solved"])
def test_value_and_gradients_of_every_mode(gpu, mode, loss, N, D, scale, match):
    mode = MODES[mode]
    inputs = pairs(N, D, dtype=mode.dtype, scale=scale, match=match)
    # Solved: p - 1 is a difference of float32 numbers near 1 (docs/numerics.md, "Saturated softmaxes").
    floor = 16 * torch.finfo(torch.float32).eps if match == 1 else 0
    check(loss, mode, *inputs, floor=floor)


@pytest.mark.parametrize("max_workspace", [0, 2**22, 2**30])
@pytest.mark.parametrize("mode", ["bfloat16", "bf16x3"])
@pytest.mark.parametrize("loss", ["clip", "out", "siglip"])
def test_any_workspace_is_near_enough(gpu, loss, mode, max_workspace):
    """From one block of 256 × 256 at a time up to all of S kept from the forward."""
    mode = MODES[mode]
    check(loss, mode, *pairs(4097, 512, dtype=mode.dtype), max_workspace=max_workspace)


@every_mode
@every_loss
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden_in_any_mode(gpu, mode, loss, wrong):
    mode = MODES[mode]
    image, text, scale = pairs(1000, 512, dtype=mode.dtype)
    image[-1, -1] = wrong
    value, dimage, *_ = gradients(partial(LOSSES[loss], precision=mode.precision), image, text, scale)
    assert not value.isfinite()
    assert not dimage.isfinite().all()


@every_loss
def test_the_same_bits_twice_and_on_another_stream(gpu, loss):
    inputs = pairs(4097, 512, dtype=torch.bfloat16)
    expected = gradients(LOSSES[loss], *inputs)
    assert all(map(torch.equal, gradients(LOSSES[loss], *inputs), expected))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        ours = gradients(LOSSES[loss], *inputs)
    torch.cuda.current_stream().wait_stream(other)
    assert all(map(torch.equal, ours, expected))


@every_loss
def test_a_captured_graph_replays_the_same_bits(gpu, loss):
    """Forward and backward in one CUDA graph, replayed for other pairs."""
    inputs = pairs(1000, 512, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(LOSSES[loss], *inputs)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = gradients(LOSSES[loss], *inputs)
    for value, new in zip(inputs, pairs(1000, 512, dtype=torch.bfloat16, scale=30.0, seed=1), strict=True):
        value.copy_(new)
    graph.replay()
    assert all(map(torch.equal, ours, gradients(LOSSES[loss], *inputs)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_gpu(gpu):
    image, text, scale = pairs(1000, 512, dtype=torch.bfloat16)
    items = torch.arange(1000)

    def everything():
        for call in LOSSES.values():
            gradients(call, image, text, scale)
        info_nce_loss(image, text, scale, items)
        similarity_topk(image, text, 5)
        similarity_topk(image, text, 100)
        rank_counts(image, text, items)
        normalized_similarity(image, text)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_memory_grows_with_the_batch_and_not_its_square(gpu, loss):
    extra = []
    for B in (8192, 16384):
        inputs = [tensor.requires_grad_() for tensor in pairs(B, 512, dtype=torch.bfloat16)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(LOSSES[loss](*inputs), inputs)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] <= 2.1 * extra[0]
    assert extra[1] <= 0.5e9


@pytest.mark.parametrize("loss", ["clip", "siglip", "vse"])
def test_more_similarities_than_an_int32_counts(gpu, loss):
    """(k) 70 000² = 4.9e9 of them."""
    mode = MODES["bfloat16"]
    check(loss, mode, *pairs(70_000, 16, dtype=mode.dtype, scale=5.0))


def test_more_numbers_in_a_matrix_than_an_int32_counts(gpu):
    """5 000 000 rows of 512 are 2.56e9 numbers: the last rows are found, and get the gradient that first rows get."""
    generator = torch.Generator("cuda").manual_seed(0)
    items = torch.randn(5_000_000, 512, generator=generator, dtype=torch.bfloat16)
    assert items.numel() > 2**31
    query = torch.randn(64, 512, generator=generator, dtype=torch.bfloat16)
    last = torch.arange(len(items) - 64, len(items))
    items[last] = query + items[last] / 2

    values, indices = similarity_topk(query, items, 3)
    assert torch.equal(indices[:, 0], last)
    cosines = torch.cosine_similarity(query[:, None].double(), items[indices].double(), dim=2)
    torch.testing.assert_close(values.double(), cosines, rtol=0, atol=1e-5)
    above, ties = rank_counts(query, items, last)
    assert not above.any()
    assert not ties.any()

    ends = []
    for flipped in (False, True):
        x, y = (query.flip(0), items.flip(0)) if flipped else (query, items)
        loss = info_nce_loss(x, y.requires_grad_(), 20.0, offset=0 if flipped else len(y) - 64)
        (gradient,) = torch.autograd.grad(loss, y)
        ends.append((loss.detach(), gradient[:1000].flip(0) if flipped else gradient[-1000:].clone()))
        del x, y, gradient
    (loss, tail), (again, head) = ends
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert relative(tail, head.double()) < 4e-3
