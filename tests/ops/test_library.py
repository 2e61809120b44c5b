"""What every op owes torch's machinery: sizes that stay symbols, strides as announced, no tangent lost."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from vlmfast import clip_loss, info_nce_loss, normalized_similarity, rank_counts, siglip_loss, similarity_topk, vse_loss
from vlmfast.ops import hinge_loss, sigmoid_loss, similarity, softmax_loss
from vlmfast.testing import pairs


def groups(x):
    return torch.arange(x.shape[0], device=x.device) // 3


LOSSES = {
    "clip_loss": lambda x, y: clip_loss(x, y, 14.0),
    "info_nce_loss, offset": lambda x, y: info_nce_loss(x, y, 14.0, directions="both"),
    "info_nce_loss, out": lambda x, y: info_nce_loss(x, y, 14.0, query_ids=groups(x), key_ids=groups(y)),
    "info_nce_loss, in": lambda x, y: info_nce_loss(
        x, y, 14.0, query_ids=groups(x), key_ids=groups(y), positives="in", directions="both"
    ),
    "siglip_loss": lambda x, y: siglip_loss(x, y, 14.0, -2.0),
    "vse_loss": vse_loss,
    "vse_loss, hardest": lambda x, y: vse_loss(x, y, hardest=True),
}
CALLS = LOSSES | {
    "normalized_similarity": normalized_similarity,
    "similarity_topk": lambda x, y: similarity_topk(x, y, 2),
    "rank_counts": lambda x, y: rank_counts(x, y, torch.arange(x.shape[0], device=x.device)),
}
LOOKS_AT_VALUES = {"rank_counts"}  # outside torch.compile, which make_fx is
first_dual = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by dual_level, of torch itself
calls = pytest.mark.parametrize("name", CALLS)


def two_sides(B, D=8):
    return pairs(B, D)[:2]


def equal(a, b):
    both = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(*pair) for pair in both)


@calls
def test_any_number_of_sizes_takes_two_compiles(name):
    """The first size is taken for a constant, the second makes it a symbol, and no other is looked at again."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter)
    for B in (20, 33, 40, 65, 21):
        inputs = two_sides(B)
        assert equal(compiled(*inputs), CALLS[name](*inputs))
    assert counter.frame_count == 2


@calls
def test_exported_with_any_batch(name):
    class Call(torch.nn.Module):
        def forward(self, x, y):
            return CALLS[name](x, y)

    B = torch.export.Dim("B", min=4, max=1000)
    exported = torch.export.export(Call(), two_sides(20), dynamic_shapes={"x": {0: B}, "y": {0: B}}).module()
    for size in (9, 50):
        inputs = two_sides(size)
        assert equal(exported(*inputs), CALLS[name](*inputs))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in LOOKS_AT_VALUES])
def test_traced_with_symbols(name):
    traced = make_fx(lambda x, y: CALLS[name](x, y), tracing_mode="symbolic")(*two_sides(20))
    inputs = two_sides(33)
    assert equal(traced(*inputs), CALLS[name](*inputs))


VIEWS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other": lambda x: torch.stack([x, x], 2).reshape(len(x), -1)[:, ::2],
    "expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_as_announced(backend, view, normalize):
    """A compiler plans with the strides that the fakes tell; opcheck compares them with the real ones."""
    x, y = (VIEWS[view](v) for v in two_sides(5))
    check, scale, ids = torch.library.opcheck, torch.tensor(14.0), torch.arange(5)
    kinds = {"test_utils": ("test_schema", "test_faketensor")}
    weight = torch.full((5,), 0.1)
    plan = (ids, ids, weight, weight, None, None, "index", 0.0, normalize)
    limits = ("ieee", 2**20)
    check(softmax_loss._softmax_loss.overload, (x, y, scale, *plan, "ieee", 0, 2**20, backend), **kinds)
    saved = softmax_loss._softmax_loss(x, y, scale, *plan, "ieee", 0, 2**20, backend)[1:]
    arguments = (torch.tensor(1.0), x, y, scale, *plan, *saved, True, True, *limits, backend)
    check(softmax_loss._softmax_loss_backward.overload, arguments, **kinds)
    arguments = (x, y, scale, torch.tensor(-2.0), 0, normalize, True, True, True, *limits, backend)
    check(sigmoid_loss._siglip_loss.overload, arguments, **kinds)
    for hardest in (False, True):
        check(hinge_loss._vse_loss.overload, (x, y, 0.2, hardest, normalize, True, True, *limits, backend), **kinds)
    check(similarity._normalized_similarity.overload, (x, y, normalize, "ieee", backend), **kinds)
    arguments = (torch.ones(5, 5), x, y, normalize, True, True, backend)
    check(similarity._normalized_similarity_backward.overload, arguments, **kinds)
    check(similarity._similarity_topk.overload, (x, y, 5, normalize, "ieee", backend), **kinds)
    check(similarity._rank_counts.overload, (x, y, ids[:, None], normalize, "ieee", backend), **kinds)


@first_dual
@pytest.mark.parametrize("name", [*LOSSES, "normalized_similarity"])
def test_forward_mode_is_refused(backend, name):
    """Tangents that came out as zero would be wrong without a word."""
    x, y = two_sides(5)
    with pytest.raises(RuntimeError, match=r"vlmfast::\w+ has no derivative in forward mode"):
        torch.func.jvp(lambda x: CALLS[name](x, y), (x,), (x,))
    with forward_ad.dual_level():
        expected = CALLS[name](x, y)
        with pytest.raises(RuntimeError, match="has no derivative in forward mode"):
            CALLS[name](x, forward_ad.make_dual(y, y))
    assert torch.equal(expected, CALLS[name](x, y))


@first_dual
@pytest.mark.parametrize("name", ["similarity_topk", "rank_counts"])
def test_what_has_no_derivative_drops_tangents(backend, name):
    x, y = two_sides(5)
    with forward_ad.dual_level():
        assert equal(CALLS[name](forward_ad.make_dual(x, x), y), CALLS[name](x, y))


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Records each call's name and the number of elements that it returned."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.made.append((str(func), tensor.numel()))
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_backward_fills_no_zeros_for_outputs_that_nobody_differentiates(backend, name):
    """Losses with their gradient computed in forward return it: autograd would hand backward zeros of its size."""
    x, y = (v.requires_grad_() for v in two_sides(300, 16))
    loss = CALLS[name](x, y)
    with Sizes() as sizes:
        loss.backward()
    filled = [call for call in sizes.made if call[0].startswith("aten.zeros") and call[1] >= 300]
    assert not [call for call in filled if call[0] == "aten.zeros.default"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_outside_the_gradient_s_path_passes_none(backend, name):
    """An output that is used, with a gradient that is not: autograd hands over None, not zeros."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, y = (v.requires_grad_() for v in two_sides(9))
    (Cut.apply(CALLS[name](x, y)) + 0 * x.sum()).backward()
    assert not x.grad.any()
    assert y.grad is None
