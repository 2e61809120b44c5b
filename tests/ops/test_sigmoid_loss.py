"""siglip_loss against its definition in float64, its laws, its refusals, and what PyTorch does around it."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vlmfast import use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops.sigmoid_loss import IMPLS, _siglip_loss, reference, siglip_loss
from vlmfast.testing import SHAPES, Watch, assert_accurate, draw, pairs

LIMITS = ("ieee", 2**20)  # precision and workspace, which a GPU's kernels look at
BIAS = -2.0  # with the scale of pairs(), a logit of mixed signs: no side of the sigmoid is flat


def signs(image, text, offset, dtype=torch.float64):
    """+1 where a text belongs to an image, -1 for all else."""
    columns = len(text) if offset is None else torch.arange(len(image))[:, None] + offset
    return 2 * (columns == torch.arange(len(text))).to(dtype) - 1


def definition(image, text, scale, bias, normalize=True, offset=0):
    if normalize:
        image, text = F.normalize(image), F.normalize(text)
    z = scale * image @ text.T + bias
    return -F.logsigmoid(signs(image, text, offset, z.dtype) * z).sum() / len(z)


def exactly(image, text, scale, bias, normalize=True, offset=0):
    """Loss and gradients in float64, and how large the terms are that each is summed from."""
    image, text, scale, bias = (v.detach().double().requires_grad_() for v in (image, text, scale, bias))
    loss = definition(image, text, scale, bias, normalize, offset)
    gradients = torch.autograd.grad(loss, (image, text, scale, bias))
    with torch.no_grad():
        x, y = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
        s = x @ y.T
        dz = ((scale * s + bias).sigmoid() - (signs(image, text, offset) + 1) / 2).abs() / len(s)
        longest = 1 if normalize else max(x.norm(dim=1).max(), y.norm(dim=1).max())
        shrink = [v.norm(dim=1, keepdim=True) if normalize else 1 for v in (image, text)]
        cond = (scale * longest**2 + bias.abs()).item()
        sizes = (
            scale * longest * dz.sum(1, keepdim=True) / shrink[0],
            scale * longest * dz.sum(0)[:, None] / shrink[1],
            (dz * s.abs()).sum() + dz.sum() / len(s),
            dz.sum(),
        )
    return SimpleNamespace(loss=loss.detach(), gradients=gradients, sizes=sizes, cond=cond)


def check(image, text, scale, bias, normalize=True, offset=0):
    """Value and every gradient of the op, within rounding of float64 on the same inputs."""
    inputs = [v.detach().clone().requires_grad_() for v in (image, text, scale, bias)]
    loss = siglip_loss(*inputs, normalize=normalize, offset=offset)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    exact = exactly(image, text, scale, bias, normalize, offset)
    assert_accurate(loss, exact.loss, size=exact.loss, cond=exact.cond, name="loss")
    gradients = torch.autograd.grad(loss, inputs)
    names = ("d image", "d text", "d scale", "d bias")
    for name, given, ours, truth, size in zip(names, inputs, gradients, exact.gradients, exact.sizes, strict=True):
        assert ours.dtype == given.dtype
        assert_accurate(ours, truth, size=size, cond=exact.cond, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_value_and_gradients(backend, B, D, dtype):
    image, text, scale = pairs(B, D, dtype=dtype)
    check(image, text, scale, torch.tensor(BIAS))


@pytest.mark.parametrize(("B", "D"), [(1, 1), (65, 33), (97, 100)])
def test_value_and_gradients_of_rows_as_they_are(backend, B, D):
    image, text, scale = pairs(B, D, scale=4.0)
    check(image, text, scale, torch.tensor(BIAS), normalize=False)


# (M, N, offset): wider, higher | pairs partly below, partly above | wholly outside, just and by far | a single row
RECTANGLES = [
    (65, 130, 0),
    (130, 65, 0),
    (65, 130, 65),
    (97, 64, -50),
    (64, 97, 60),
    (33, 40, 40),
    (33, 40, -33),
    (33, 40, 2**40),
    (33, 40, None),
    (65, 65, None),
    (1, 130, 129),
    (257, 1, -256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "N", "offset"), RECTANGLES)
def test_rows_and_columns_of_other_numbers(backend, M, N, offset, dtype):
    image, text, scale = pairs(max(M, N), 20, dtype=dtype)
    check(image[:M], text[:N], scale, torch.tensor(BIAS), offset=offset)


@pytest.mark.parametrize("offset", [-385, -7, 0, 200, 600])
def test_rectangles_of_several_tiles(backend, offset):
    image, text, scale = pairs(770, 8)
    check(image[:400], text, scale, torch.tensor(BIAS), offset=offset)


def test_blocks_sum_to_the_whole(backend):
    """Uneven blocks of rows and columns, as ranks hold them: the loss and every gradient are sums over blocks."""
    image, text, scale = pairs(97, 20)
    inputs = [v.requires_grad_() for v in (image, text, scale, torch.tensor(BIAS))]
    whole = siglip_loss(*inputs)
    bounds = [0, 30, 31, 97]
    blocks = [slice(*each) for each in itertools.pairwise(bounds)]
    loss = sum(
        len(image[rows]) / 97 * siglip_loss(image[rows], text[columns], *inputs[2:], offset=rows.start - columns.start)
        for rows in blocks
        for columns in blocks
    )
    torch.testing.assert_close(loss, whole, rtol=2e-6, atol=0)
    for ours, truth in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=1e-6)


def test_without_pairs_all_is_negative(backend):
    """A pair's own logit counts like a stranger's: softplus(z) instead of softplus(-z)."""
    x = torch.tensor([[1.0], [-1.0]])
    assert siglip_loss(x, x, 1e4, 0.0, normalize=False, offset=None).item() == 1e4


def test_dtypes_may_differ(backend):
    image, text, scale = pairs(65, 33)
    check(image.bfloat16(), text, scale, torch.tensor(BIAS))
    check(image, text.half(), scale, torch.tensor(BIAS))


def test_gradients_are_those_of_finite_differences():
    image, text, scale = pairs(5, 3, dtype=torch.float64)
    inputs = [v.double().requires_grad_() for v in (image, text, scale, torch.tensor([BIAS]))]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(siglip_loss, inputs)
        assert torch.autograd.gradcheck(lambda *v: siglip_loss(*v, normalize=False), inputs)


def test_float64_is_exact_to_float64():
    image, text, scale = (v.double() for v in pairs(65, 33))
    with use_backend("reference"):
        ours = siglip_loss(image, text, scale, BIAS)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, definition(image, text, scale, BIAS), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("B", "bias", "expected"), [(4, -10.0, 10.00018160), (4, 0.0, 2.77258872), (512, -2.71, 35.69138625)]
)
def test_zero_features(backend, B, bias, expected):
    """(B - 1) softplus(bias) + softplus(-bias), whatever the scale."""
    zeros = torch.zeros(B, 7, requires_grad=True)
    loss = siglip_loss(zeros, zeros, 100.0, bias)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(loss, zeros)[0].isfinite().all()


def test_equals_open_clip_and_transformers(backend):
    image, text, scale = pairs(33, 20)
    image, text, bias = F.normalize(image), F.normalize(text), torch.tensor([BIAS])
    logits = scale * image @ text.T + bias
    labels = -torch.ones(33, 33) + 2 * torch.eye(33)
    open_clip = -F.logsigmoid(labels * logits).sum() / image.shape[0]
    log_likelihood = F.logsigmoid((-torch.ones(33, 33) + 2 * torch.eye(33)) * logits.T)
    transformers = (-log_likelihood.sum(dim=-1)).mean()
    ours = siglip_loss(image, text, scale, bias, normalize=False)
    torch.testing.assert_close(ours, open_clip, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours, transformers, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_and_bias_get_gradients_as_they_came(backend, shape, dtype):
    image, text, scale = pairs(9, 5)
    scale = torch.full(shape, 8.0, dtype=dtype, requires_grad=True)
    bias = torch.full(shape, BIAS, dtype=dtype, requires_grad=True)
    siglip_loss(image, text, scale, bias).backward()
    exact = exactly(image, text, torch.tensor(8.0), torch.tensor(BIAS))
    for number, truth in ((scale, exact.gradients[2]), (bias, exact.gradients[3])):
        assert (number.grad.shape, number.grad.dtype) == (shape, dtype)
        torch.testing.assert_close(number.grad.reshape(()).double(), truth, rtol=5e-3, atol=1e-6)


def test_numbers_will_do(backend):
    image, text, scale = pairs(9, 5)
    assert siglip_loss(image, text, scale.item(), -2) == siglip_loss(image, text, scale, torch.tensor(-2.0))


@pytest.mark.parametrize("match", [0.0, 1.0], ids=["strangers", "copies"])
@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_saturated(backend, match, bias):
    """Logits of +-100: the exponential of one overflows float32."""
    image, text, scale = pairs(97, 8, scale=100.0, match=match)
    check(image, text, scale, torch.tensor(bias))


def test_logits_beyond_the_exponential(backend):
    x = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = siglip_loss(x, -x, 1e4, 0.0, normalize=False)  # pairs at -1e4, strangers at +1e4: every term costs 1e4
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["image", "text", "scale", "bias"])
def test_what_is_not_finite_is_not_hidden(backend, value, where):
    image, text, scale = pairs(70, 5)
    inputs = {"image": image, "text": text, "scale": scale, "bias": torch.tensor(BIAS)}
    inputs[where].view(-1)[-1] = value
    inputs["image"].requires_grad_()
    loss = siglip_loss(*inputs.values())
    assert not loss.isfinite()
    if value != value:
        assert not torch.autograd.grad(loss, inputs["image"])[0].isfinite().all()


def test_duplicates(backend):
    """The same pair many times over: each is a stranger to its twins."""
    image, text, scale = pairs(1, 12)
    check(image.expand(66, -1), text.expand(66, -1), scale, torch.tensor(BIAS))


def test_zero_rows_stay_zero(backend):
    image, text, scale = pairs(9, 5)
    image[4] = 0
    loss = siglip_loss(image, text, scale, BIAS)
    torch.testing.assert_close(loss, definition(image, text, scale, BIAS))


def test_the_order_of_pairs_does_not_matter(backend):
    image, text, scale = pairs(65, 33)
    order = draw(torch.randperm, 65, generator=torch.Generator().manual_seed(0))
    a, b = siglip_loss(image, text, scale, BIAS), siglip_loss(image[order], text[order], scale, BIAS)
    torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


def test_swapping_the_sides_swaps_the_gradients(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(65, 33))
    a, b = siglip_loss(image, text, scale, BIAS), siglip_loss(text, image, scale, BIAS)
    torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
    for p, q in zip(torch.autograd.grad(a, (image, text)), torch.autograd.grad(b, (image, text)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_longer_embeddings_change_nothing_and_gradients_stand_upright(backend):
    image, text, scale = pairs(65, 33)
    image.requires_grad_()
    loss = siglip_loss(image, text, scale, BIAS)
    torch.testing.assert_close(siglip_loss(3 * image, text / 7, scale, BIAS), loss, rtol=5e-6, atol=0)
    torch.testing.assert_close(siglip_loss(1e20 * image, 1e30 * text, scale, BIAS), loss, rtol=5e-6, atol=0)
    gradient = torch.autograd.grad(loss, image)[0]
    along = (gradient * image).sum(1) / image.norm(dim=1) / gradient.norm()
    assert along.abs().max() < 1e-6


@pytest.mark.parametrize("view", ["transposed", "every other", "offset", "expanded"])
def test_views(backend, view):
    image, text, scale = pairs(64, 32)
    image = {
        "transposed": image.T.contiguous().T,
        "every other": torch.stack([image, text], 2).reshape(64, 64)[:, ::2],
        "offset": torch.cat([text[:1], image])[1:],
        "expanded": image[:1].expand(64, -1),
    }[view]
    check(image, text, scale, torch.tensor(BIAS))


def test_a_gradient_of_stride_zero(backend):
    image, text, scale = pairs(9, 5)
    image.requires_grad_()
    loss = siglip_loss(image, text, scale, BIAS)
    once = torch.autograd.grad(loss, image, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss.expand(3).sum(), image)[0], 3 * once)


def test_only_what_is_needed_is_computed(backend, monkeypatch):
    needs = []
    forward = IMPLS[backend].forward

    def spy(*args):
        needs.append(args[6:9])
        return forward(*args)

    monkeypatch.setattr(IMPLS[backend], "forward", spy)
    image, text, scale = pairs(9, 5)
    bias = torch.tensor(BIAS)
    siglip_loss(image, text.requires_grad_(), scale, bias)
    siglip_loss(image, text.detach(), scale, bias.requires_grad_())
    with torch.no_grad():
        assert not siglip_loss(image.requires_grad_(), text, scale, bias).requires_grad
    assert needs == [(False, True, False), (False, False, True), (False, False, False)]


@pytest.mark.parametrize("need", [True, False])
def test_nothing_of_the_size_of_the_logits_is_held(backend, need, scratch_below):
    image, text, scale = pairs(1200, 8)
    with Watch(1200 * 1200), scratch_below(1200 * 1200):
        loss, *_ = IMPLS[backend].forward(image, text, scale, torch.tensor(BIAS), 0, True, need, need, need, *LIMITS)
    torch.testing.assert_close(loss, definition(image, text, scale, BIAS), rtol=5e-6, atol=0)


def test_nothing_of_the_size_of_the_logits_is_saved(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(65, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        siglip_loss(image, text, scale, BIAS)
    assert sum(saved) <= 2 * 65 * 8 + 2


def test_the_reference_is_the_same_in_any_chunks(monkeypatch):
    image, text, scale = pairs(65, 33, dtype=torch.float64)
    args = (image, text, scale.double(), torch.tensor(BIAS).double(), 0, True, True, True, True, *LIMITS)
    whole = reference.forward(*args)
    for chunk in (1, 65 * 7, 65 * 64):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        for ours, exact in zip(reference.forward(*args), whole, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-15)


def test_the_same_bits_twice(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(97, 33))
    runs = [torch.autograd.grad(siglip_loss(image, text, scale, BIAS), (image, text, scale)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backends_have_the_signatures_of_the_reference():
    for impl in IMPLS.values():
        for name in ("unsupported", "forward"):
            ours, its = (inspect.signature(getattr(module, name)) for module in (impl, reference))
            assert ours.parameters == its.parameters


def test_autocast_changes_nothing(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(33, 20))
    plain = siglip_loss(image, text, scale, BIAS)
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        ours = siglip_loss(image, text, scale, BIAS)
        gradient = torch.autograd.grad(ours, image)[0]
    assert torch.equal(ours, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain, image)[0])


def test_opcheck(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(5, 3))
    bias = torch.tensor(BIAS, requires_grad=True)
    torch.library.opcheck(
        _siglip_loss.overload, (image, text, scale, bias, 0, True, True, True, True, *LIMITS, backend)
    )
    needs = (False, True, False)
    arguments = (image.detach().half()[1:], text, scale.detach(), bias.detach(), 1, False, *needs, *LIMITS, backend)
    torch.library.opcheck(_siglip_loss.overload, arguments)


@pytest.mark.parametrize("offset", [3, None])
def test_compiled_with_any_numbers_of_rows_and_columns(backend, offset):
    compiled = torch.compile(siglip_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    image, text, scale = pairs(40, 20)
    for M, N in ((12, 33), (40, 21)):
        inputs = (image[:M].clone().requires_grad_(), text[:N], scale, BIAS)
        losses = siglip_loss(*inputs, offset=offset), compiled(*inputs, offset=offset)
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss, inputs[0])[0] for loss in losses))


def test_compiled_equals_eager(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(33, 20))
    bias = torch.full((1,), BIAS, requires_grad=True)
    compiled = torch.compile(siglip_loss, fullgraph=True, backend="aot_eager")
    losses = siglip_loss(image, text, scale, bias), compiled(image, text, scale, bias)
    assert torch.equal(*losses)
    eager, ours = (torch.autograd.grad(loss, (image, text, scale, bias)) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(image, text, scale, bias), losses[0])


def test_second_derivatives_are_refused(backend):
    image, text, scale = (v.requires_grad_() for v in pairs(5, 3))
    with pytest.raises(RuntimeError, match="siglip_loss: its gradient cannot be differentiated again"):
        torch.autograd.grad(siglip_loss(image, text, scale, BIAS), image, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: siglip_loss(x, text, scale, BIAS))(image.detach())


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, torch.ones(4, 2), 1.0, 0.0), ShapeError, r"siglip_loss: image and text .* \(4, 3\).* \(4, 2\)"),
        ((X, torch.ones(5, 2), 1.0, 0.0), ShapeError, r"siglip_loss: image and text .* \(4, 3\).* \(5, 2\)"),
        ((X[0], X, 1.0, 0.0), ShapeError, r"siglip_loss: image must be a matrix \[rows, D\]; got shape \(3,\)"),
        ((X, X[:0], 1.0, 0.0), ShapeError, r"siglip_loss: text must have at least one row .* \(0, 3\)"),
        ((X.int(), X, 1.0, 0.0), DTypeError, r"siglip_loss: image must be float32.* got torch.int32"),
        ((X, X, torch.ones(2), 0.0), ShapeError, r"siglip_loss: logit_scale must hold one number.* \(2,\)"),
        ((X, X, 1.0, torch.ones(1, 1)), ShapeError, r"siglip_loss: logit_bias must hold one number.* \(1, 1\)"),
        ((X, X, torch.tensor(1), 0.0), DTypeError, r"siglip_loss: logit_scale must be float32.* got torch.int64"),
        ((X, X.to("meta"), 1.0, 0.0), ValueError, r"siglip_loss: all tensors must be on one device.*text on meta"),
    ],
)
def test_refusals(args, error, message):
    with pytest.raises(error, match=message):
        siglip_loss(*args)


def test_a_forced_backend_that_does_not_exist_is_refused():
    with use_backend("cuda"), pytest.raises(BackendError, match="siglip_loss: backend 'cuda' cannot run this call"):
        siglip_loss(X, X, 1.0, 0.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), r"image must be finite; got nan at \(2, 1\)"), (0.0, "image row 2 is all zeros")],
)
def test_values_are_checked_when_debugging(monkeypatch, value, message):
    image = X.clone()
    image[2] = torch.tensor([0.0, value, 0.0])
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        siglip_loss(image, X, 1.0, 0.0)
