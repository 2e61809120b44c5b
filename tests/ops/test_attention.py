"""attention against its definition in float64, dense and packed, its laws, its refusals, and who runs which call."""

import inspect
import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from vlmfast import use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops import attention as module
from vlmfast.ops.attention import IMPLS, _attention, _attention_backward, _triton, attention, reference
from vlmfast.testing import Watch, assert_accurate

# (B, H, T, K): alone | under, on, over a tile of 16, 64 and 128 keys | the rows of scores that fit, and that do not
SHAPES = [(1, 1, 1, 8), (2, 3, 17, 20), (1, 2, 64, 32), (1, 2, 65, 16), (2, 1, 77, 24), (1, 2, 129, 8), (1, 1, 300, 12)]
# Lengths of packed sequences: one | runs of equal ones, of one token, of none | around a tile | longer than one
LENGTHS = [(1,), (5, 5, 1, 0, 19, 1), (0, 64, 3, 63), (70, 0, 129, 2)]
WIDTHS = [1, 16, 40, 64, 72, 80, 96, 104, 128]


def inputs(*shape, dtype=torch.float32, seed=0):
    """Query, key, value, and a gradient of the output, with scores of a few units: no softmax is flat or certain."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(4, *shape, generator=generator, dtype=torch.float64, device="cpu")
    return [x.to(dtype).to(torch.get_default_device()) for x in (2 * made[0], *made[1:])]


def ends(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def scores(q, k, causal, scale=None):
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf) if causal else s


def definition(q, k, v, causal, cu_seqlens=None, scale=None):
    if cu_seqlens is None:
        return scores(q, k, causal, scale).softmax(-1) @ v
    parts = [x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)]
    apart = [definition(*(x.transpose(0, 1) for x in one), causal, None, scale) for one in zip(*parts, strict=True)]
    return torch.cat([x.transpose(0, 1) for x in apart])


def check(q, k, v, g, causal, cu_seqlens=None, scale=None):
    """Value and every gradient, within rounding of float64 on the same inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = attention(*leaves, causal=causal, scale=scale, cu_seqlens=cu_seqlens)
    assert (ours.shape, ours.dtype) == (q.shape, q.dtype)
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = definition(*exact_leaves, causal, cu_seqlens, scale)
    gradients = torch.autograd.grad(exact, exact_leaves, g.double())

    # A weight p is off by |s| eps of float32, and rounded to the values' dtype; a score's gradient is p (dp - mean dp).
    wide = [x.double() for x in (q, k, v, g)]
    largest = [float(x.abs().max()) for x in wide]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    norms = [float(x.norm(dim=-1).max()) for x in wide]
    options = {"acc": torch.float32, "cond": max(1.0, scale * norms[0] * norms[1])}
    if q.dtype != torch.float32:
        options = {"acc": q.dtype}
    tokens = q.shape[-2] if cu_seqlens is None else int(cu_seqlens.diff().max())
    columns = min(tokens, 8.0)  # weights that a token gets, summed over those that look at it
    dp = 2 * norms[2] * norms[3]
    sizes = (scale * dp * largest[1], scale * dp * largest[0] * columns, largest[3] * columns)
    assert_accurate(ours, exact, size=largest[2], name="out", **options)
    for name, value, truth, size in zip(
        ("d query", "d key", "d value"), torch.autograd.grad(ours, leaves, g), gradients, sizes, strict=True
    ):
        assert value.dtype == q.dtype
        assert_accurate(value, truth, size=size, name=name, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(backend, shape, causal):
    check(*inputs(*shape), causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 17, 20), (1, 2, 77, 16)], ids=str)
def test_low_precision(backend, shape, dtype):
    check(*inputs(*shape, dtype=dtype), causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_sequences(backend, lengths, causal):
    check(*inputs(sum(lengths), 2, 12), causal, ends(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_sequences_in_low_precision(backend, dtype):
    check(*inputs(31, 3, 24, dtype=dtype), True, ends((5, 5, 1, 0, 19, 1)))


@pytest.mark.parametrize("K", WIDTHS)
def test_every_width_of_heads(backend, K):
    check(*inputs(1, 2, 18, K, dtype=torch.bfloat16), causal=False)


def test_a_scale(backend):
    check(*inputs(1, 2, 9, 8), causal=False, scale=0.7)


def test_certain_softmaxes_stay_finite(backend):
    """Scores of hundreds: exponentials under the largest vanish, none overflows."""
    q, k, v, g = inputs(1, 2, 70, 8)
    leaves = [x.requires_grad_() for x in (100 * q, k, v)]
    out = attention(*leaves, scale=1.0)
    exact = definition(*(x.detach().double() for x in leaves), False, scale=1.0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, leaves, g))


def test_gradients_are_those_of_finite_differences():
    q, k, v, _ = inputs(7, 2, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dense = [x.unflatten(0, (1, 7)).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with use_backend("reference"):
        for causal in (False, True):
            assert torch.autograd.gradcheck(
                lambda *x, causal=causal: attention(*x, causal=causal, cu_seqlens=ends((3, 0, 4))), leaves
            )
            assert torch.autograd.gradcheck(lambda *x, causal=causal: attention(*x, causal=causal), dense)


# Layouts.


def packed_qkv(lengths=(5, 5, 1, 19), H=2, K=12):
    """Query, key and value as they come from one projection, and a gradient."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(sum(lengths), 4, H, K, generator=generator, device="cpu").to(torch.get_default_device())
    return (*qkv.unbind(1), ends(lengths))


def test_views_of_one_projection(backend):
    q, k, v, g, cu_seqlens = packed_qkv()
    check(q, k, v, g, True, cu_seqlens)
    check(*(x.unflatten(0, (2, 15)).transpose(1, 2) for x in (q, k, v, g)), True)


def test_odd_strides(backend):
    """Layouts that differ, features that are not side by side, and a gradient that is one number."""
    q, k, v, _ = inputs(2, 2, 9, 8)
    q, v = q.transpose(1, 2).contiguous().transpose(1, 2), v.mT.contiguous().mT
    one = torch.ones(()).expand(q.shape)
    check(q, k, v, one, False)
    q, k, v, g, cu_seqlens = packed_qkv()
    check(q.mT.contiguous().mT, k, v.contiguous(), torch.ones(()).expand(g.shape), False, cu_seqlens)


def test_dense_sequences_are_packed_ones_of_one_length(backend):
    q, k, v, _ = inputs(3, 2, 9, 8)
    dense = attention(q, k, v, causal=True)
    packed = attention(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), causal=True, cu_seqlens=ends((9, 9, 9)))
    torch.testing.assert_close(packed.unflatten(0, (3, 9)).transpose(1, 2), dense, rtol=1e-6, atol=1e-6)


# Laws.


def test_sequences_do_not_see_one_another(backend):
    """Not even a NaN, forward or backward."""
    q, k, v, g, cu_seqlens = packed_qkv((5, 7, 4))
    out, gradients = [], []
    for poison in (0.0, math.nan):
        leaves = [x.clone() for x in (q, k, v)]
        for x in leaves:
            x[5:12] += poison
            x.requires_grad_()
        out.append(attention(*leaves, cu_seqlens=cu_seqlens))
        gradients.append(torch.autograd.grad(out[-1], leaves, g))
    for before, after in ((out[0], out[1]), *zip(*gradients, strict=True)):
        assert torch.equal(before[:5], after[:5])
        assert torch.equal(before[12:], after[12:])
        assert after[5:12].isnan().all()


def test_nothing_later_is_seen(backend):
    q, k, v, _ = inputs(1, 2, 70, 8)
    before = attention(q, k, v, causal=True)
    k, v = k.clone(), v.clone()
    k[:, :, 40:] = v[:, :, 40:] = 7.0
    after = attention(q, k, v, causal=True)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_order_of_sequences_is_free(backend):
    q, k, v, _, cu_seqlens = packed_qkv((5, 5, 1, 19))
    turned = [torch.cat([x[11:], x[:11]]) for x in (q, k, v)]
    expected = attention(q, k, v, cu_seqlens=cu_seqlens)
    ours = attention(*turned, cu_seqlens=ends((19, 5, 5, 1)))
    torch.testing.assert_close(ours, torch.cat([expected[11:], expected[:11]]), rtol=1e-6, atol=1e-6)


def test_equal_values_are_what_comes_out(backend):
    """Weights add up to 1."""
    q, k, _, _ = inputs(1, 2, 20, 8)
    out = attention(q, k, torch.ones_like(q))
    torch.testing.assert_close(out, torch.ones_like(q), rtol=1e-6, atol=1e-6)


def test_bits_repeat(backend):
    q, k, v, g, cu_seqlens = packed_qkv()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    runs = []
    for _ in range(2):
        out = attention(*leaves, cu_seqlens=cu_seqlens, causal=True)
        runs.append([out, *torch.autograd.grad(out, leaves, g)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_max_seqlen_changes_nothing(backend):
    q, k, v, _, cu_seqlens = packed_qkv()
    expected = attention(q, k, v, cu_seqlens=cu_seqlens)
    for longest in (19, 40):
        assert torch.equal(attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=longest), expected)


def test_no_matrix_of_scores_is_held(backend):
    if backend == "reference":
        pytest.skip("the reference holds one sequence's scores")
    q, k, v, g = inputs(300, 1, 8)
    arguments = (ends((300,)), 300, False, 1.0)
    with Watch(300 * 300):
        out, lse = IMPLS[backend].forward(q, k, v, *arguments)
        IMPLS[backend].backward(g, q, k, v, out, lse, *arguments)


def test_the_triton_plan_s_other_tiles(triton_backend, monkeypatch):
    """Heads of a width or number type whose tiles differ from those of the tests above."""
    for plans in ({2: 4, 4: 4}, {2: 2, 4: 2}):
        for target in ("sm_80", "gfx942"):
            monkeypatch.setitem(
                _triton.PLANS, "interpreter", {size: _triton.PLANS[target][of] for size, of in plans.items()}
            )
            check(*inputs(1, 1, 77, 8), causal=True)
            check(*inputs(70, 1, 8), False, ends((50, 20)))
    monkeypatch.setattr(_triton, "WHOLE_PACKED", 0)
    check(*inputs(70, 1, 8), True, ends((50, 20)))


# torch's machinery.


def test_opcheck(backend):
    q, k, v, g, cu_seqlens = packed_qkv()
    rest = (cu_seqlens, 19, True, 0.3, backend)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_attention.overload, (*leaves, *rest), test_utils=tests)
    out, lse = _attention(q, k, v, *rest)
    torch.library.opcheck(_attention_backward.overload, (g, q, k, v, out, lse, *rest), test_utils=tests[:2])
    if backend != "cpu":  # its dense calls are SDPA's
        q, k, v, g = inputs(2, 3, 5, 4)
        out, lse = _attention(q, k, v, None, 0, True, 0.3, backend)
        torch.library.opcheck(_attention.overload, (q, k, v, None, 0, True, 0.3, backend), test_utils=tests[:2])
        arguments = (g, q, k, v, out, lse, None, 0, True, 0.3, backend)
        torch.library.opcheck(_attention_backward.overload, arguments, test_utils=tests[:2])


def test_compiled_equals_eager(backend):
    q, k, v, g, cu_seqlens = packed_qkv()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, cu: attention(q, k, v, causal=True, cu_seqlens=cu), fullgraph=True, backend="aot_eager"
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = []
    for call in (compiled, lambda q, k, v, cu: attention(q, k, v, causal=True, cu_seqlens=cu)):
        out = call(*leaves, cu_seqlens)
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_autocast_dtypes_stay(backend):
    """The op runs in the dtype that the projection gave it."""
    q, k, v, _, cu_seqlens = packed_qkv()
    with torch.autocast(q.device.type, torch.bfloat16):
        assert attention(q, k, v, cu_seqlens=cu_seqlens).dtype == torch.float32


# Who runs it.


def test_backends_are_alike():
    for name in ("forward", "backward"):
        expected = list(inspect.signature(getattr(reference, name)).parameters)
        for backend in ("cpu", "triton"):
            assert list(inspect.signature(getattr(IMPLS[backend], name)).parameters) == expected
    for backend in IMPLS.values():
        assert list(inspect.signature(backend.unsupported).parameters) == ["query", "cu_seqlens"]


def test_dense_calls_on_the_cpu_are_sdpas(monkeypatch):
    q, k, v, _ = inputs(2, 3, 5, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    for impl in ("cpu", "reference"):
        monkeypatch.setattr(IMPLS[impl], "forward", None)
    assert torch.equal(attention(q, k, v, causal=True, scale=0.3), expected)


@pytest.mark.parametrize(
    ("tokens", "triton", "packed", "forced", "expected"),
    [
        (50, None, False, None, "triton"),
        (module.TRITON_UP_TO, None, False, None, "triton"),
        (module.TRITON_UP_TO + 1, None, False, None, "sdpa"),
        (50, "too old", False, None, "sdpa"),
        (50, None, False, "cuda", "sdpa"),
        (50, None, False, "reference", "reference"),
        (50, None, True, None, "triton"),
        (50, "too old", True, None, "reference"),
    ],
)
def test_who_runs_a_call_on_a_gpu(monkeypatch, tokens, triton, packed, forced, expected):
    class Triton:
        unsupported = staticmethod(lambda query, cu_seqlens=None: triton)

    class OnGpu:
        device, shape = torch.device("cuda"), (50, 3, 64) if packed else (2, 3, tokens, 64)

    monkeypatch.setitem(IMPLS, "triton", Triton)
    monkeypatch.setattr(module, "forced_backend", lambda: forced)
    monkeypatch.setattr("vlmfast.backend.forced_backend", lambda: forced)
    assert module._backend(OnGpu(), ends((50,)) if packed else None) == expected


def test_backends_refuse_in_words():
    q = torch.ones(1, 1, 2, 3)
    with use_backend("cuda"), pytest.raises(BackendError, match="run on a GPU; a tensor is on cpu"):
        attention(q, q, q)
    packed = torch.ones(2, 1, 3)
    with use_backend("cuda"), pytest.raises(BackendError, match="'cuda' cannot run this call"):
        attention(packed, packed, packed, cu_seqlens=ends((2,)))


def test_triton_refuses_wide_heads(triton_backend):
    q = torch.ones(1, 1, 2, 129, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="bfloat16 heads of up to 128 features; got 129"):
        attention(q, q, q)


@pytest.mark.parametrize(
    ("shapes", "cu_seqlens", "message"),
    [
        ([(2, 3, 4)] * 3, None, r"query must be \[B, H, T, K\]; got \(2, 3, 4\)\. Give cu_seqlens"),
        ([(1, 2, 3, 4)] * 3, (3,), r"query must be \[tokens, H, K\] with cu_seqlens; got \(1, 2, 3, 4\)"),
        ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)], None, r"one shape \[B, H, T, K\]; got query .*key \(1, 2, 5, 4\)"),
        ([(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 5)], None, r"value \(1, 2, 3, 5\)"),
        ([(1, 2, 0, 4)] * 3, None, r"at least one of each of \[B, H, T, K\]; got \(1, 2, 0, 4\)"),
        ([(0, 2, 4)] * 3, (0,), r"at least one of each of \[tokens, H, K\]"),
    ],
)
def test_shapes_that_do_not_fit(shapes, cu_seqlens, message):
    with pytest.raises(ShapeError, match="attention: .*" + message):
        attention(*map(torch.ones, shapes), cu_seqlens=cu_seqlens and ends(cu_seqlens))


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 4]), DTypeError, r"must be int32; got torch.int64\. Use \.int\(\)"),
        (torch.tensor([[0, 4]], dtype=torch.int32), ShapeError, r"must be \[B \+ 1\].*got shape \(1, 2\)"),
        (torch.tensor([4], dtype=torch.int32), ShapeError, r"must be \[B \+ 1\].*got shape \(1,\)"),
        (torch.tensor([1, 4], dtype=torch.int32), ValueError, r"must start at 0; got 1\. Are these lengths"),
        (torch.tensor([0, 3], dtype=torch.int32), ValueError, r"must end at the number of tokens, 4; got 3"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), ValueError, r"must not fall; got 3, then 2 at entry 2"),
    ],
)
def test_cu_seqlens_that_do_not_fit(cu_seqlens, error, message):
    q = torch.ones(4, 1, 2)
    with pytest.raises(error, match="attention: cu_seqlens " + message):
        attention(q, q, q, cu_seqlens=cu_seqlens)


def test_other_refusals():
    q = torch.ones(4, 1, 2)
    with pytest.raises(ValueError, match="longer than max_seqlen=3; got 4"):
        attention(q, q, q, cu_seqlens=ends((4,)), max_seqlen=3)
    with pytest.raises(ShapeError, match="max_seqlen belongs to packed sequences; got 4"):
        attention(q[None], q[None], q[None], max_seqlen=4)
    with pytest.raises(DTypeError, match=r"one dtype; got query torch.float32, key torch.bfloat16"):
        attention(q, q.bfloat16(), q, cu_seqlens=ends((4,)))
    with pytest.raises(DTypeError, match=r"query must be float32, bfloat16, float16 or float64; got torch.int64"):
        attention(q.long(), q.long(), q.long(), cu_seqlens=ends((4,)))
    with pytest.raises(ValueError, match=r"must be on one device; got .*cu_seqlens on meta"):
        attention(q, q, q, cu_seqlens=ends((4,)).to("meta"))


def test_ends_elsewhere_are_looked_at_when_debugging(monkeypatch):
    """On a GPU a look would wait for it; a meta tensor stands for one here, and its values cannot be had."""
    looked = []
    monkeypatch.setattr(module, "_check_ends", lambda *_: looked.append(1))
    q, cu_seqlens = torch.ones(4, 1, 2, device="meta"), ends((4,)).to("meta")
    attention(q, q, q, cu_seqlens=cu_seqlens)
    assert not looked
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    attention(q, q, q, cu_seqlens=cu_seqlens)
    assert looked
