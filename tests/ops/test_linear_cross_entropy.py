"""linear_cross_entropy against its definition in float64, its laws, its refusals, and what PyTorch does around it."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vlmfast import _ext, use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops import linear_cross_entropy as family
from vlmfast.ops.linear_cross_entropy import IMPLS, linear_cross_entropy, reference
from vlmfast.testing import Watch, assert_accurate, draw

LIMITS = ("ieee", 2**18)  # precision and workspace


def head(M, V, D, *, dtype=torch.float32, supervised=0.6, spread=3.0, seed=0):
    """hidden [M, D], weight [V, D], bias [V] and labels [M]: logits of that standard deviation, some rows ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = draw(torch.randn, M, D, generator=generator)
    weight = draw(torch.randn, V, D, generator=generator) * (spread / D**0.5)
    bias = draw(torch.randn, V, generator=generator)
    labels = draw(torch.randint, V, (M,), generator=generator)
    ignored = draw(torch.rand, M, generator=generator) > supervised
    ignored[-1] = False
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels.masked_fill(ignored, -100)


def losses(hidden, weight, labels, bias=None, label_smoothing=0.0, z_loss=0.0):
    """The definition, a loss for each row, 0 where it is ignored."""
    z = F.linear(hidden, weight, bias)
    loss = F.cross_entropy(z, labels, label_smoothing=label_smoothing, reduction="none")
    return loss + z_loss * z.logsumexp(1) ** 2 * (labels != -100)


def definition(hidden, weight, labels, bias=None, reduction="mean", num_supervised=None, **options):
    loss = losses(hidden, weight, labels, bias, **options)
    if reduction == "none":
        return loss
    count = (labels != -100).sum().clamp_min(1) if num_supervised is None else num_supervised
    return loss.sum() / (count if reduction == "mean" else 1)


def exactly(hidden, weight, labels, bias, grad, label_smoothing=0.0, z_loss=0.0, **options):
    """Loss and gradients in float64, and how large the terms are that each is summed from."""
    inputs = [v if v is None else v.detach().double().requires_grad_() for v in (hidden, weight, bias)]
    options |= {"label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = definition(inputs[0], inputs[1], labels, inputs[2], **options)
    grad = torch.ones_like(loss) if grad is None else grad.double()
    gradients = torch.autograd.grad(loss, [v for v in inputs if v is not None], grad)
    with torch.no_grad():
        x, w, b = inputs
        on = labels != -100
        z = F.linear(x, w, b)
        lse = z.logsumexp(1)
        if loss.dim() == 0:  # what each row's loss is multiplied with
            count = options.get("num_supervised") or on.sum().clamp_min(1)
            grad = grad / (count if options.get("reduction", "mean") == "mean" else 1)
        rise = 1 + 2 * z_loss * lse.abs()
        target = (1 - label_smoothing) * F.one_hot(labels.clamp_min(0), len(w)) + label_smoothing / len(w)
        mass = (grad.abs() * on * torch.ones_like(lse))[:, None] * (rise[:, None] * z.softmax(1) + target)
        longest_x, longest_w = (v[rows].norm(dim=1).max() for v, rows in ((x, on), (w, slice(None))) if len(v[rows]))
        cond = longest_x * longest_w + (0 if b is None else b.abs().max())
        shares = rise * on * (1 if loss.dim() else grad)
        sizes = [longest_w * mass.sum(1, keepdim=True), longest_x * mass.sum(0)[:, None], mass.sum(0)]
    return SimpleNamespace(
        loss=loss.detach(), size=shares if loss.dim() else shares.sum(), cond=cond, gradients=gradients, sizes=sizes
    )


def check(hidden, weight, labels, bias=None, grad=None, max_workspace=None, **options):
    """Value and every gradient of the op, within rounding of float64 on the same inputs."""
    leaves = [v.detach().clone().requires_grad_() for v in (hidden, weight, bias) if v is not None]
    loss = linear_cross_entropy(*leaves[:2], labels, *leaves[2:], max_workspace=max_workspace, **options)
    assert loss.dtype == torch.float32
    exact = exactly(hidden, weight, labels, bias, grad, **options)
    assert_accurate(loss, exact.loss, size=exact.size, cond=exact.cond, name="loss")
    gradients = torch.autograd.grad(loss, leaves, grad)
    names = ("d hidden", "d weight", "d bias")
    for name, leaf, ours, truth, size in zip(names, leaves, gradients, exact.gradients, exact.sizes, strict=False):
        assert ours.dtype == leaf.dtype
        assert_accurate(ours, truth, size=size, cond=exact.cond, name=name)


# (M, V, D): alone | two | on a tile of 12 x 384 | over it, ragged | several of everything | more rows than tokens
SHAPES = [(1, 1, 1), (2, 3, 2), (12, 384, 32), (13, 385, 33), (97, 800, 40), (300, 50, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(backend, shape, dtype):
    hidden, weight, bias, labels = head(*shape, dtype=dtype)
    check(hidden, weight, labels, bias)
    check(hidden, weight, labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("max_workspace", [0, 2**16, None])
def test_chunks_and_reductions(backend, reduction, max_workspace):
    hidden, weight, bias, labels = head(270, 400, 16)
    grad = None if reduction != "none" else draw(torch.randn, 270, generator=torch.Generator().manual_seed(1))
    check(hidden, weight, labels, bias, grad, max_workspace=max_workspace, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4)])
def test_smoothing_and_z_loss(backend, reduction, label_smoothing, z_loss):
    hidden, weight, bias, labels = head(70, 450, 24)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    grad = torch.linspace(-1, 2, 70) if reduction == "none" else None
    check(hidden, weight, labels, bias, grad, **options)
    check(hidden, weight, labels, None, grad, **options)


@pytest.mark.parametrize("supervised", [0.0, 0.15, 1.0], ids=["one", "few", "all"])
def test_any_share_of_supervised_rows(backend, supervised):
    hidden, weight, bias, labels = head(64, 90, 12, supervised=supervised)
    assert (labels != -100).sum() == {0.0: 1, 0.15: 8, 1.0: 64}[supervised]
    check(hidden, weight, labels, bias)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_supervised_rows_all_is_zero(backend, reduction):
    hidden, weight, bias, labels = head(9, 7, 5)
    leaves = [v.requires_grad_() for v in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias, reduction=reduction)
    assert not loss.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_are_not_looked_at(backend, reduction):
    hidden, weight, bias, labels = head(40, 30, 8)
    expected = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    hidden[labels == -100] = torch.nan
    leaves = [v.requires_grad_() for v in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][labels == -100].any()
    assert gradients[0][labels != -100].all()


def test_another_ignore_index(backend):
    hidden, weight, bias, labels = head(40, 30, 8)
    expected = linear_cross_entropy(hidden, weight, labels, bias)
    zero = labels.masked_fill(labels == -100, 0)
    ours = linear_cross_entropy(hidden, weight, zero, bias, ignore_index=0)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels.masked_fill(labels == 0, -100), bias), ours)
    assert torch.equal(
        linear_cross_entropy(hidden, weight, labels.masked_fill(labels == -100, -1), bias, ignore_index=-1), expected
    )


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_micro_batches_sum_to_the_batch(backend, kind):
    """Each divided by the supervised rows of all: the loss and every gradient add up, however uneven they are."""
    hidden, weight, bias, labels = head(90, 50, 12)
    leaves = [v.requires_grad_() for v in (hidden, weight, bias)]
    whole = linear_cross_entropy(hidden, weight, labels, bias)
    count = kind(int((labels != -100).sum()))
    parts = (slice(0, 7), slice(7, 80), slice(80, 90))
    loss = sum(linear_cross_entropy(hidden[s], weight, labels[s], bias, num_supervised=count) for s in parts)
    torch.testing.assert_close(loss, whole, rtol=2e-6, atol=0)
    for ours, truth in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=1e-6)


def test_equals_transformers(backend, transformers):
    """With the shift that transformers does itself: row i predicts token i + 1."""
    hidden, weight, _, labels = head(60, 40, 12)
    tokens = labels.reshape(3, 20)
    logits = F.linear(hidden, weight).reshape(3, 20, 40)
    loss_of = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:].reshape(-1)
    for count in (None, torch.tensor(77)):
        theirs = loss_of(logits, tokens, 40, num_items_in_batch=count)
        ours = linear_cross_entropy(hidden, weight, shifted, num_supervised=count)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.05}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_those_of_finite_differences(reduction, options):
    hidden, weight, bias, labels = head(5, 6, 3, supervised=0.7)
    inputs = [v.double().requires_grad_() for v in (hidden, weight, bias)]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b: linear_cross_entropy(x, w, labels, b, reduction=reduction, **options), inputs
        )


def test_float64_is_exact_to_float64():
    hidden, weight, bias, labels = (v.double() if v.is_floating_point() else v for v in head(65, 70, 12))
    with use_backend("reference"):
        ours = linear_cross_entropy(hidden, weight, labels, bias)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, definition(hidden, weight, labels, bias), rtol=1e-14, atol=0)


def test_dtypes_may_differ(backend):
    hidden, weight, bias, labels = head(33, 40, 12)
    check(hidden.bfloat16(), weight, labels, bias)
    check(hidden, weight.half(), labels, bias.bfloat16())


def test_equal_logits_cost_the_logarithm_of_the_vocabulary(backend):
    hidden = torch.zeros(5, 7, requires_grad=True)
    weight = torch.ones(1000, 7, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(5))
    assert loss.item() == pytest.approx(6.907755279, rel=1e-6)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


def test_laws(backend):
    """The order of rows and that of tokens do not matter, nor does a constant on all logits; each dz sums to 0."""
    hidden, weight, bias, labels = head(65, 90, 12)
    bias.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    rows, tokens = (draw(torch.randperm, n, generator=torch.Generator().manual_seed(n)) for n in (65, 90))
    there = torch.where(labels < 0, labels, tokens.argsort()[labels.clamp_min(0)])
    for other in (
        linear_cross_entropy(hidden[rows], weight, labels[rows], bias),
        linear_cross_entropy(hidden, weight[tokens], there, bias[tokens]),
        linear_cross_entropy(hidden, weight, labels, bias + 3),
    ):
        torch.testing.assert_close(other, loss, rtol=3e-6, atol=0)
    assert torch.autograd.grad(loss, bias)[0].sum().abs() < 1e-6


@pytest.mark.parametrize("sign", [1, -1], ids=["solved", "hopeless"])
def test_saturated(backend, sign):
    """Logits of about +-100: p is 1 to the last bit, or the exponential of the label's underflows."""
    hidden, weight, bias, _ = head(50, 400, 16, spread=0.1)
    labels = torch.arange(50)
    weight[:50] = sign * 100 * hidden / hidden.norm(dim=1, keepdim=True) ** 2
    check(hidden, weight, labels, bias)


def test_logits_beyond_the_exponential(backend):
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), reduction="none")
    assert loss.tolist() == [2e4, 2e4]
    assert torch.autograd.grad(loss.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_what_is_not_finite_is_not_hidden(backend, value, where):
    inputs = dict(zip(("hidden", "weight", "bias", "labels"), head(70, 400, 5, supervised=1.0), strict=True))
    inputs[where].view(-1)[-1] = value
    inputs["hidden"].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, inputs["hidden"])[0].isfinite().all()


@pytest.mark.parametrize("view", ["transposed", "every other", "offset", "expanded"])
def test_views(backend, view):
    hidden, weight, bias, labels = head(64, 48, 32)
    hidden = {
        "transposed": hidden.T.contiguous().T,
        "every other": torch.stack([hidden, hidden + 1], 2).reshape(64, 64)[:, ::2],
        "offset": torch.cat([hidden[:1], hidden])[1:],
        "expanded": hidden[:1].expand(64, -1),
    }[view]
    weight, bias = weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0]
    labels = torch.stack([labels, labels], 1)[:, 1]
    check(hidden, weight, labels, bias)
    check(hidden, weight, labels, bias, torch.ones(()).expand(64), reduction="none")


def test_the_incoming_gradient_is_multiplied_in(backend):
    hidden, weight, bias, labels = head(9, 8, 5)
    leaves = [v.requires_grad_() for v in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for ours, one in zip(torch.autograd.grad(loss.expand(3).sum(), leaves, retain_graph=True), once, strict=True):
        torch.testing.assert_close(ours, 3 * one)
    for _ in range(2):  # into .grad, where the first gradient may lie in memory that the second must not change
        loss.backward(retain_graph=True)
    for leaf, one in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * one)


def test_only_what_is_needed_is_computed(backend, monkeypatch):
    needs = []
    forward = IMPLS[backend].forward

    def spy(*args):
        needs.append(args[7:10])
        return forward(*args)

    monkeypatch.setattr(IMPLS[backend], "forward", spy)
    hidden, weight, bias, labels = head(9, 8, 5)
    weight.requires_grad_()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
        assert torch.autograd.grad(loss.sum(), weight)[0].any()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, bias).requires_grad
    linear_cross_entropy(hidden.requires_grad_(), weight.detach(), labels, bias).backward()
    assert hidden.grad.any()
    assert needs == [(False, True, False), (False,) * 3, (False,) * 3, (True, False, False)]


@pytest.mark.parametrize("need", [True, False])
def test_no_logits_of_all_rows_are_held(backend, need, scratch_below, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**16)
    M, V = 1200, 300
    hidden, weight, bias, labels = head(M, V, 8, supervised=1.0)
    factor = torch.tensor(1 / M)
    with Watch(M * V), scratch_below(M * V):
        loss, *_ = IMPLS[backend].forward(hidden, weight, bias, labels, factor, 0.1, 0.0, need, need, need, *LIMITS)
    exact = losses(hidden, weight, labels, bias, label_smoothing=0.1)
    torch.testing.assert_close(loss.float(), exact, rtol=1e-5, atol=1e-5)


def test_scratch_memory_does_not_grow_with_the_rows(cpu_backend):
    peaks = []
    for M in (700, 2800):
        hidden, weight, bias, labels = head(M, 1500, 8)
        weight.requires_grad_()
        _ext.C.scratch_peak(True)
        linear_cross_entropy(hidden, weight, labels, bias, max_workspace=2**19)
        peaks.append(_ext.C.scratch_peak(True))
    assert 2**18 < peaks[1] <= 1.1 * peaks[0]
    assert peaks[1] < 2**20


def test_no_logits_are_saved(backend):
    hidden, weight, bias, labels = (v.requires_grad_() if v.is_floating_point() else v for v in head(65, 90, 8))
    saved = []
    for reduction in ("mean", "none"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    assert sum(saved) <= 2 * (65 * 8 + 90 * 8 + 90 + 65)


def test_the_reference_is_the_same_in_any_chunks(monkeypatch):
    hidden, weight, bias, labels = (v.double() if v.is_floating_point() else v for v in head(65, 33, 7, supervised=1))
    args = (hidden, weight, bias, labels, torch.tensor(0.1).double(), 0.1, 0.01, True, True, True, *LIMITS)
    whole = reference.forward(*args)
    for chunk in (1, 33 * 7, 33 * 64):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        for ours, exact in zip(reference.forward(*args), whole, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def gradients(*inputs, labels, **options):
    leaves = [v.detach().requires_grad_() for v in inputs]
    loss = linear_cross_entropy(*leaves[:2], labels, *leaves[2:], **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def test_the_same_bits_twice(backend):
    *inputs, labels = head(97, 500, 33)
    for reduction in ("mean", "none"):
        runs = [gradients(*inputs, labels=labels, reduction=reduction) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_same_bits_on_any_number_of_threads(cpu_backend):
    *inputs, labels = head(120, 2000, 100, supervised=1.0)
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            runs.append(gradients(*inputs, labels=labels, max_workspace=2**18))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_instruction_set(cpu_backend):
    hidden, weight, bias, labels = head(61, 801, 21)
    grad = torch.linspace(-1, 1, 61)
    try:
        for name in _ext.C.isas():
            _ext.C.force_isa(name)
            check(hidden, weight, labels, bias, label_smoothing=0.1)
            check(hidden, weight.bfloat16(), labels, bias, grad, reduction="none", max_workspace=0)
    finally:
        _ext.C.force_isa(None)


def test_triton_gradients_in_float16_and_in_two_parts(triton_backend):
    """What runs on a GPU: powers and gradients in float16, in range by their units; and float32 in two parts, which
    the interpreter cuts off instead of rounding, hence 2^-14 and not 2^-16."""
    for dtype, bound in ((torch.float16, 1e-3), (torch.float32, 2e-4)):
        hidden, weight, bias, labels = head(150, 300, 40, dtype=dtype)
        ours = gradients(hidden, weight, bias, labels=labels, precision="bf16x3", z_loss=1e-3)
        with use_backend("reference"):
            exact = gradients(hidden.double(), weight.double(), bias.double(), labels=labels, z_loss=1e-3)
        assert ours[0] == pytest.approx(float(exact[0]), rel=1e-4)
        for value, truth in zip(ours[1:], exact[1:], strict=True):
            assert (value - truth).norm() < bound * truth.norm()


def test_backends_have_the_signatures_of_the_reference():
    for impl in IMPLS.values():
        for name in ("unsupported", "forward", "backward"):
            ours, its = (inspect.signature(getattr(module, name)) for module in (impl, reference))
            assert ours.parameters == its.parameters


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_factors_alone(backend, reduction):
    """Products of bfloat16 numbers, as of F.linear; but the weight's gradient is never rounded to it."""
    hidden, weight, bias, labels = head(33, 40, 12)
    expected = gradients(hidden.bfloat16(), weight.bfloat16().float(), bias, labels=labels, reduction=reduction)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        ours = gradients(hidden, weight, bias, labels=labels, reduction=reduction)
    assert [v.dtype for v in ours] == [torch.float32] * 4
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-5, atol=1e-7)


def test_opcheck(backend):
    hidden, weight, bias, labels = (v.requires_grad_() if v.is_floating_point() else v for v in head(5, 6, 3))
    plan, limits = (-100, 0.1, 0.01, None), (*LIMITS, backend)
    factor = torch.tensor(0.5)
    check_op = torch.library.opcheck
    check_op(family._loss.overload, (hidden, weight, bias, labels, factor, *plan, True, True, True, *limits))
    few = (hidden.detach().half(), weight, None, labels, factor, *plan, False, True, False, *limits)
    check_op(family._loss.overload, few)
    check_op(family._losses.overload, (hidden, weight, bias, labels, *plan, *limits))
    lse = torch.ones(5, dtype=torch.float64)
    saved = (torch.ones(5), hidden.detach(), weight.detach(), None, labels, lse)
    check_op(family._losses_backward.overload, (*saved, *plan, True, False, False, *limits))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(backend, reduction):
    def call(hidden, weight, labels, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)

    torch.compiler.reset()  # what the backends before compiled counts towards a limit
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    hidden, weight, bias, labels = head(40, 50, 12)
    weight.requires_grad_()
    bias.requires_grad_()
    for M in (12, 40):
        leaves = (hidden[-M:].clone().requires_grad_(), weight, bias)
        both = [fn(leaves[0], weight, labels[-M:], bias) for fn in (call, compiled)]
        assert torch.equal(*both)
        eager, ours = (torch.autograd.grad(loss.sum(), leaves) for loss in both)
        assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(leaves[0], weight, labels[-M:], bias), both[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(backend, reduction):
    hidden, weight, _, labels = head(5, 6, 3)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="linear_cross_entropy: its gradient cannot be differentiated again"):
        torch.autograd.grad(loss, hidden, create_graph=True)


X, W, Y = torch.ones(4, 3), torch.ones(5, 3), torch.tensor([0, 4, -100, 2])


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X[0], W, Y), {}, ShapeError, r"linear_cross_entropy: hidden must be a matrix .* \(3,\)"),
        ((X, W[:0], Y), {}, ShapeError, r"weight must have at least one row .* \(0, 3\)"),
        ((X, W[:, :2], Y), {}, ShapeError, r"hidden and weight must have one embedding width .* \(4, 3\).* \(5, 2\)"),
        ((X, W, Y[:3]), {}, ShapeError, r"labels must be \[4\], one entry a row; got \(3,\)"),
        ((X, W, Y, torch.ones(4)), {}, ShapeError, r"bias must be \[5\], one entry a token; got \(4,\)"),
        ((X.int(), W, Y), {}, DTypeError, r"hidden must be float32.* got torch.int32"),
        ((X, W, Y.int()), {}, DTypeError, r"labels must be int64; got torch.int32"),
        ((X, W.to("meta"), Y), {}, ValueError, r"all tensors must be on one device.*weight on meta"),
        (
            (X, W, Y + 1),
            {},
            ValueError,
            r"labels must be in \[0, 5\) or ignore_index \(-100\); got 5 in row 1, one of 2",
        ),
        ((X, W, Y), {"ignore_index": -1}, ValueError, r"ignore_index \(-1\); got -100 in row 2, one of 1"),
        ((X, W, Y), {"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ((X, W, Y), {"z_loss": -0.1}, ValueError, "z_loss must be at least 0; got -0.1"),
        ((X, W, Y), {"reduction": "batchmean"}, ValueError, "reduction must be .*; got 'batchmean'"),
        ((X, W, Y), {"reduction": "sum", "num_supervised": 3}, ValueError, "num_supervised is what 'mean' divides by"),
        ((X, W, Y), {"num_supervised": -1}, ValueError, "num_supervised must be at least 0; got -1"),
        ((X, W, Y), {"num_supervised": Y}, ShapeError, r"num_supervised must hold one number.* \(4,\)"),
        ((X, W, Y), {"precision": "half"}, ValueError, "precision must be one of .*; got 'half'"),
        ((X, W, Y), {"max_workspace": -1}, ValueError, "max_workspace must be a number of bytes, at least 0; got -1"),
    ],
)
def test_refusals(args, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*args, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wrong_labels_are_refused_wherever_they_lie(backend, reduction):
    hidden, weight, _, labels = head(9, 7, 5)
    labels[4] = 7
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\).* got 7 in row 4"):
        linear_cross_entropy(hidden, weight, labels, reduction=reduction)


def test_a_forced_backend_that_does_not_exist_is_refused():
    with use_backend("cuda"), pytest.raises(BackendError, match="linear_cross_entropy: backend 'cuda' cannot run"):
        linear_cross_entropy(X, W, Y)


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [(torch.bfloat16, "bf16x3", 4e-3), (torch.float16, "bf16x3", 1e-3), (torch.float32, "bf16x3", 1e-5)],
)
def test_value_and_gradients_as_shipped(gpu, dtype, precision, bound):
    """On a GPU: several chunks, ragged tiles, and rows on 16 bytes and off them."""
    for M, V, D in ((1000, 32000, 512), (777, 5001, 100)):
        hidden, weight, bias, labels = head(M, V, D, dtype=dtype)
        options = {"labels": labels, "label_smoothing": 0.1, "z_loss": 1e-4}
        ours = gradients(hidden, weight, bias, precision=precision, max_workspace=2**25, **options)
        with use_backend("reference"):
            exact = gradients(hidden.double(), weight.double(), bias.double(), **options)
        assert abs(ours[0] - exact[0]) <= 1e-5 * exact[0]
        for value, truth in zip(ours[1:], exact[1:], strict=True):
            assert (value.double() - truth).norm() <= bound * truth.norm()


def test_memory_does_not_grow_with_rows_times_vocabulary(gpu):
    extra = []
    for M in (4096, 16384):
        hidden, weight, _, labels = head(M, 65536, 256, dtype=torch.bfloat16)
        hidden.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, labels).backward()
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] <= extra[0] + 6 * 4 * 16384 * 256
