"""vse_loss against vsepp's own code in float64, its kinks, its laws, its refusals, and what PyTorch does around it."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vlmfast import use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops.hinge_loss import IMPLS, _vse_loss, reference, vse_loss
from vlmfast.testing import SHAPES, Watch, assert_accurate, draw, pairs

LIMITS = ("ieee", 2**20)  # precision and workspace, which a GPU's kernels look at
hardness = pytest.mark.parametrize("hardest", [False, True], ids=["sum", "hardest"])


def vsepp(scores, margin=0.2, max_violation=False):
    """ContrastiveLoss.forward of vsepp's model.py, from its score matrix on."""
    diagonal = scores.diag().view(scores.size(0), 1)
    d1 = diagonal.expand_as(scores)
    d2 = diagonal.t().expand_as(scores)
    cost_s = (margin + scores - d1).clamp(min=0)
    cost_im = (margin + scores - d2).clamp(min=0)
    mask = torch.eye(scores.size(0)) > 0.5
    cost_s = cost_s.masked_fill(mask, 0)
    cost_im = cost_im.masked_fill(mask, 0)
    if max_violation:
        cost_s = cost_s.max(1)[0]
        cost_im = cost_im.max(0)[0]
    return cost_s.sum() + cost_im.sum()


def scores(image, text, normalize=True):
    return F.normalize(image) @ F.normalize(text).T if normalize else image @ text.T


def distance_from_kinks(s, margin, hardest):
    """How far the nearest hinge is from switching, or the nearest rival of a hardest foreigner from replacing it."""
    if len(s) == 1:
        return torch.inf
    own = torch.eye(len(s), dtype=torch.bool)
    gaps = []
    for side in (s, s.T):
        foreign = side.masked_fill(own, -torch.inf)
        if hardest:
            foreign = foreign.topk(min(2, len(s) - 1)).values
            gaps += [] if len(s) == 2 else [(foreign[:, 0] - foreign[:, 1]).min()]
            foreign = foreign[:, :1]
        gaps.append((margin + foreign - s.diag()[:, None]).abs().min())
    return min(gaps)


def smooth_pairs(B, D, margin=0.2, *, hardest, dtype=torch.float32, normalize=True):
    """Pairs whose hinges stay what they are under the rounding of float32, so that the gradient is one number."""
    for seed in range(100):
        image, text, _ = pairs(B, D, dtype=dtype, seed=seed)
        if distance_from_kinks(scores(image.double(), text.double(), normalize), margin, hardest) > 1e-6:
            return image, text
    raise AssertionError("no such pairs")


def exactly(image, text, margin, hardest, normalize):
    """Loss and gradients in float64, and how large the terms are that each is summed from."""
    image, text = (v.detach().double().requires_grad_() for v in (image, text))
    x, y = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
    s = x @ y.T
    loss = vsepp(s, margin, hardest)
    ds = torch.autograd.grad(loss, s, retain_graph=True)[0].abs()
    longest = max(1, x.norm(dim=1).max().item(), y.norm(dim=1).max().item())
    shrink = [v.detach().norm(dim=1, keepdim=True) if normalize else 1 for v in (image, text)]
    sizes = (longest * ds.sum(1, keepdim=True) / shrink[0], longest * ds.sum(0)[:, None] / shrink[1])
    return SimpleNamespace(
        loss=loss.detach(),
        size=loss.detach() + longest**2 * ds.sum(),
        gradients=torch.autograd.grad(loss, (image, text)),
        sizes=sizes,
    )


def check(image, text, margin=0.2, hardest=False, normalize=True):
    """Value and both gradients of the op, within rounding of float64 on the same inputs."""
    inputs = [v.detach().clone().requires_grad_() for v in (image, text)]
    loss = vse_loss(*inputs, margin, hardest=hardest, normalize=normalize)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    exact = exactly(image, text, margin, hardest, normalize)
    assert_accurate(loss, exact.loss, size=exact.size, name="loss")
    gradients = torch.autograd.grad(loss, inputs)
    for name, given, ours, truth, size in zip(
        ("d image", "d text"), inputs, gradients, exact.gradients, exact.sizes, strict=True
    ):
        assert ours.dtype == given.dtype
        assert_accurate(ours, truth, size=size, name=name)


@hardness
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_value_and_gradients(backend, B, D, dtype, hardest):
    margin = 0.1  # pairs match at 0.2: most foreigners are further away than that, some are not
    check(*smooth_pairs(B, D, margin, hardest=hardest, dtype=dtype), margin, hardest)


@hardness
@pytest.mark.parametrize("margin", [0.0, 0.05, 3.0], ids=["no margin", "few active", "all active"])
def test_margins(backend, margin, hardest):
    check(*smooth_pairs(65, 33, margin, hardest=hardest), margin, hardest)


@hardness
def test_value_and_gradients_of_rows_as_they_are(backend, hardest):
    check(*smooth_pairs(97, 20, hardest=hardest, normalize=False), hardest=hardest, normalize=False)


@hardness
def test_dtypes_may_differ(backend, hardest):
    image, text = smooth_pairs(65, 33, hardest=hardest, dtype=torch.bfloat16)
    check(image, text.float(), hardest=hardest)


@hardness
def test_gradients_are_those_of_finite_differences(hardest):
    image, text = (v.requires_grad_() for v in smooth_pairs(5, 3, hardest=hardest, dtype=torch.float64))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *v: vse_loss(*v, hardest=hardest), (image, text))
        ours = vse_loss(image, text, hardest=hardest)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, vsepp(scores(image, text), 0.2, hardest), rtol=1e-14, atol=0)


def test_hardest_is_the_sum_of_the_top_violations_on_a_thousand_matrices(backend):
    """With unit rows for text the similarities are the image itself, and so is the gradient."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(1000):
        B = 2 + trial % 7
        s = draw(torch.randn, B, B, generator=generator).requires_grad_()
        loss = vse_loss(s, torch.eye(B), hardest=True, normalize=False)
        rows, columns = (0.2 + s - s.diag()[:, None]).clamp(min=0), (0.2 + s - s.diag()).clamp(min=0)
        own = torch.eye(B, dtype=torch.bool)
        expected = rows.masked_fill(own, 0).amax(1).sum() + columns.masked_fill(own, 0).amax(0).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        if distance_from_kinks(s.detach(), 0.2, True) > 1e-6:
            gradient = torch.autograd.grad(vsepp(s, 0.2, True), s)[0]
            assert torch.equal(torch.autograd.grad(loss, s)[0], gradient)


@hardness
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_a_hinge_that_is_exactly_zero_passes_no_gradient(backend, margin, hardest):
    """Whole numbers: many hinges are exactly zero, and the hardest foreigners have twins in other tiles."""
    generator = torch.Generator().manual_seed(0)
    image, text = draw(torch.randint, -1, 2, (2, 200, 5), generator=generator).float()
    x = image.clone().requires_grad_()
    loss = vse_loss(x, text, margin, hardest=hardest, normalize=False)
    s = image @ text.T
    strangers = ~torch.eye(200, dtype=torch.bool)
    by_row, by_column = (margin + s - s.diag()[:, None]), (margin + s - s.diag())
    assert (by_row[strangers] == 0).any()
    if hardest:  # only the first of the largest stays
        for cost, axis in ((by_row, 1), (by_column, 0)):
            first = cost.masked_fill(~strangers, -torch.inf).max(axis, keepdim=True).indices
            keep = torch.zeros_like(strangers).scatter_(axis, first, True)
            cost[~keep] = 0
    by_row, by_column = (cost.clamp(min=0) * strangers for cost in (by_row, by_column))
    assert loss.item() == (by_row.sum() + by_column.sum()).item()
    ds = (by_row > 0).float() + (by_column > 0).float()
    ds -= torch.diag((by_row > 0).sum(1) + (by_column > 0).sum(0))
    assert torch.equal(torch.autograd.grad(loss, x)[0], ds @ text)


@hardness
def test_one_pair_has_no_foreigner(backend, hardest):
    image, text, _ = (v.requires_grad_() for v in pairs(1, 9))
    loss = vse_loss(image, text, hardest=hardest)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, (image, text))[0].any()


@hardness
def test_twins_cost_the_margin(backend, hardest):
    """B copies of one pair: every foreigner is exactly as near as the own one."""
    pair = torch.tensor([[3.0, 4.0]]).expand(70, -1)
    hinges = 2 * 70 * (1 if hardest else 69)
    assert vse_loss(pair, pair, 0.5, hardest=hardest).item() == pytest.approx(0.5 * hinges, rel=1e-5)


@hardness
def test_a_solved_batch_costs_nothing(backend, hardest):
    x = torch.eye(66).requires_grad_()
    loss = vse_loss(x, torch.eye(66), 0.9, hardest=hardest)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, x)[0].any()


@hardness
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["image", "text"])
@pytest.mark.parametrize("row", [0, 69])
def test_what_is_not_finite_is_not_hidden(backend, hardest, value, side, row):
    sides = list(pairs(70, 5)[:2])
    sides[side][row, 2] = value
    loss = vse_loss(*(v.requires_grad_() for v in sides), hardest=hardest)
    assert loss.isnan()
    assert torch.autograd.grad(loss, sides[side])[0].isnan().any()


@hardness
def test_the_order_of_pairs_does_not_matter(backend, hardest):
    image, text = smooth_pairs(65, 33, hardest=hardest)
    order = draw(torch.randperm, 65, generator=torch.Generator().manual_seed(0))
    a, b = vse_loss(image, text, hardest=hardest), vse_loss(image[order], text[order], hardest=hardest)
    torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


@hardness
def test_swapping_the_sides_swaps_the_gradients(backend, hardest):
    image, text = (v.requires_grad_() for v in smooth_pairs(65, 33, hardest=hardest))
    a, b = vse_loss(image, text, hardest=hardest), vse_loss(text, image, hardest=hardest)
    torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
    for p, q in zip(torch.autograd.grad(a, (image, text)), torch.autograd.grad(b, (image, text)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@hardness
def test_longer_embeddings_change_nothing_and_gradients_stand_upright(backend, hardest):
    image, text = smooth_pairs(65, 33, hardest=hardest)
    image.requires_grad_()
    loss = vse_loss(image, text, hardest=hardest)
    torch.testing.assert_close(vse_loss(3 * image, text / 7, hardest=hardest), loss, rtol=5e-6, atol=0)
    torch.testing.assert_close(vse_loss(1e20 * image, 1e30 * text, hardest=hardest), loss, rtol=5e-6, atol=0)
    gradient = torch.autograd.grad(loss, image)[0]
    assert ((gradient * image).sum(1) / image.norm(dim=1) / gradient.norm()).abs().max() < 1e-6


def test_zero_rows_stay_zero(backend):
    image, text, _ = pairs(9, 5)
    image[4] = 0
    torch.testing.assert_close(vse_loss(image, text), vsepp(scores(image, text)))


@hardness
@pytest.mark.parametrize("view", ["transposed", "every other", "offset"])
def test_views(backend, view, hardest):
    image, text = smooth_pairs(64, 32, hardest=hardest)
    image = {
        "transposed": image.T.contiguous().T,
        "every other": torch.stack([image, text], 2).reshape(64, 64)[:, ::2],
        "offset": torch.cat([text[:1], image])[1:],
    }[view]
    check(image, text, hardest=hardest)


def test_a_gradient_of_stride_zero(backend):
    image, text, _ = pairs(9, 5)
    image.requires_grad_()
    loss = vse_loss(image, text)
    once = torch.autograd.grad(loss, image, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss.expand(3).sum(), image)[0], 3 * once)


def test_only_what_is_needed_is_computed(backend, monkeypatch):
    needs = []
    forward = IMPLS[backend].forward

    def spy(*args):
        needs.append(args[5:7])
        return forward(*args)

    monkeypatch.setattr(IMPLS[backend], "forward", spy)
    image, text, _ = pairs(9, 5)
    vse_loss(image, text.requires_grad_())
    vse_loss(image.requires_grad_(), text.detach())
    with torch.no_grad():
        assert not vse_loss(image, text).requires_grad
    assert needs == [(False, True), (True, False), (False, False)]


@hardness
@pytest.mark.parametrize("need", [True, False])
def test_nothing_of_the_size_of_the_similarities_is_held(backend, hardest, need, scratch_below):
    image, text, _ = pairs(1200, 8)
    with Watch(1200 * 1200), scratch_below(1200 * 1200):
        loss, *_ = IMPLS[backend].forward(image, text, 0.2, hardest, True, need, need, *LIMITS)
    torch.testing.assert_close(loss, vsepp(scores(image, text), 0.2, hardest), rtol=1e-5, atol=0)


def test_nothing_of_the_size_of_the_similarities_is_saved(backend):
    image, text, _ = (v.requires_grad_() for v in pairs(65, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        vse_loss(image, text)
    assert sum(saved) <= 2 * 65 * 8


@hardness
def test_the_reference_is_the_same_in_any_chunks(monkeypatch, hardest):
    """Whole numbers: exact in any order, and with ties from chunk to chunk."""
    image, text = draw(torch.randint, -1, 2, (2, 65, 5), generator=torch.Generator().manual_seed(0)).float()
    args = (image, text, 1.0, hardest, False, True, True, *LIMITS)
    whole = reference.forward(*args)
    for chunk in (1, 65 * 7, 65 * 64):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        assert all(torch.equal(a, b) for a, b in zip(reference.forward(*args), whole, strict=True))


@hardness
def test_the_same_bits_twice(backend, hardest):
    image, text, _ = (v.requires_grad_() for v in pairs(97, 33))
    runs = [torch.autograd.grad(vse_loss(image, text, hardest=hardest), (image, text)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backends_have_the_signatures_of_the_reference():
    for impl in IMPLS.values():
        for name in ("unsupported", "forward"):
            ours, its = (inspect.signature(getattr(module, name)) for module in (impl, reference))
            assert ours.parameters == its.parameters


def test_autocast_changes_nothing(backend):
    image, text, _ = (v.requires_grad_() for v in pairs(33, 20))
    plain = vse_loss(image, text)
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        ours = vse_loss(image, text)
        gradient = torch.autograd.grad(ours, image)[0]
    assert torch.equal(ours, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain, image)[0])


def test_opcheck(backend):
    image, text, _ = (v.requires_grad_() for v in pairs(5, 3))
    torch.library.opcheck(_vse_loss.overload, (image, text, 0.2, False, True, True, True, *LIMITS, backend))
    arguments = (image.detach().half(), text, 0.2, True, False, False, True, *LIMITS, backend)
    torch.library.opcheck(_vse_loss.overload, arguments)


@hardness
def test_compiled_equals_eager(backend, hardest):
    image, text, _ = (v.requires_grad_() for v in pairs(33, 20))
    compiled = torch.compile(vse_loss, fullgraph=True, backend="aot_eager")
    losses = [f(image, text, 0.1, hardest=hardest) for f in (vse_loss, compiled)]
    assert torch.equal(*losses)
    eager, ours = (torch.autograd.grad(loss, (image, text)) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))


def test_second_derivatives_are_refused(backend):
    image, text, _ = (v.requires_grad_() for v in pairs(5, 3))
    with pytest.raises(RuntimeError, match="vse_loss: its gradient cannot be differentiated again"):
        torch.autograd.grad(vse_loss(image, text), image, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: vse_loss(x, text))(image.detach())


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, torch.ones(5, 3)), ShapeError, r"vse_loss: image and text .* \(4, 3\).* \(5, 3\)"),
        ((X[0], X), ShapeError, r"vse_loss: image must be a matrix \[rows, D\]; got shape \(3,\)"),
        ((X, X[:, :0]), ShapeError, r"vse_loss: text must have at least one row .* \(4, 0\)"),
        ((X, X.int()), DTypeError, r"vse_loss: text must be float32.* got torch.int32"),
        ((X, X, -0.1), ValueError, r"vse_loss: margin must be at least 0 and finite in float32; got -0.1"),
        ((X, X, 1e300), ValueError, r"vse_loss: margin must be at least 0 and finite in float32; got 1e\+300"),
        ((X, X, float("nan")), ValueError, r"vse_loss: margin must be at least 0 and finite in float32; got nan"),
        ((X, X.to("meta")), ValueError, r"vse_loss: all tensors must be on one device.*text on meta"),
    ],
)
def test_refusals(args, error, message):
    with pytest.raises(error, match=message):
        vse_loss(*args)


def test_a_forced_backend_that_does_not_exist_is_refused():
    with use_backend("triton"), pytest.raises(BackendError, match="vse_loss: backend 'triton' cannot run this call"):
        vse_loss(X, X)


def test_values_are_checked_when_debugging(monkeypatch):
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="text row 3 is all zeros"):
        vse_loss(X, torch.cat([X[:3], 0 * X[:1]]))
