"""Similarities against float64, and top k and ranks against numpy's argsort: exactly, with ties and without."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmfast import use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops import similarity
from vlmfast.ops.similarity import IMPLS, normalized_similarity, rank_counts, reference, similarity_topk
from vlmfast.testing import Watch, assert_accurate, draw, pairs

# (M, N, D): alone | a column | a row | under, on and over a tile | ragged | narrow, wide
SHAPES = [(1, 1, 1), (65, 1, 3), (1, 65, 33), (63, 65, 64), (64, 64, 64), (97, 257, 100), (257, 33, 640), (385, 130, 1)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def sides(M, N, D, dtype=torch.float32):
    """M queries and N items of many lengths."""
    return pairs(M, D, dtype=dtype)[0], pairs(N, D, dtype=dtype, seed=1)[1]


def whole(M, N, D=6, dtype=torch.float32):
    """Queries and items of small whole numbers: dot products are exact in any order, and many are equal."""
    generator = torch.Generator().manual_seed(M + N)
    return [draw(torch.randint, -2, 3, (rows, D), generator=generator).to(dtype) for rows in (M, N)]


def signs(M, N, dtype=torch.float32):
    """Queries and items of +1 and -1, 16 wide: their length is 4, so cosines are exact too, and many are equal."""
    generator = torch.Generator().manual_seed(M + N)
    return [(2 * draw(torch.randint, 0, 2, (rows, 16), generator=generator) - 1).to(dtype) for rows in (M, N)]


def cosines(query, items, normalize=True):
    query, items = query.double(), items.double()
    return F.normalize(query) @ F.normalize(items).T if normalize else query @ items.T


def numpy_order(s):
    """For each row the items from the most similar on, equals by their index."""
    return np.argsort(-s.cpu().numpy(), axis=1, kind="stable")


def numpy_ranks(s, positives):
    """(above, ties) of each row, read off the sorted row."""
    above, ties = [], []
    for row, order, right in zip(s.cpu().numpy(), numpy_order(s), positives.cpu().numpy(), strict=True):
        right = set(right[right >= 0])
        best = next(item for item in order if item in right)
        equals = [item for item in order if row[item] == row[best]]
        above.append(int(np.flatnonzero(order == equals[0])[0]))
        ties.append(len([item for item in equals if item not in right]))
    return torch.tensor(above), torch.tensor(ties)


def lists(M, N, P):
    """[M, P] positives: the first is an item, of the others some are -1, some are named twice."""
    generator = torch.Generator().manual_seed(P)
    positives = draw(torch.randint, -1, N, (M, P), generator=generator)
    positives[:, P // 2] = draw(torch.randint, 0, N, (M,), generator=generator)
    return positives


# normalized_similarity


@pytest.mark.parametrize("normalize", [True, False])
@dtypes
@pytest.mark.parametrize(("M", "N", "D"), SHAPES)
def test_value_and_gradients(backend, M, N, D, dtype, normalize):
    inputs = [v.requires_grad_() for v in sides(M, N, D, dtype)]
    s = normalized_similarity(*inputs, normalize=normalize)
    assert s.dtype == torch.float32
    twins = [v.detach().double().requires_grad_() for v in inputs]
    exact = F.normalize(twins[0]) @ F.normalize(twins[1]).T if normalize else twins[0] @ twins[1].T
    assert_accurate(s, exact, size=1 if normalize else 4, name="similarity")
    grad = draw(torch.randn, M, N, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(s, inputs, grad)
    truth = torch.autograd.grad(exact, twins, grad.double())
    terms = (grad.abs().sum(1, keepdim=True), grad.abs().sum(0)[:, None])
    for name, given, a, b, size in zip(("d query", "d items"), inputs, ours, truth, terms, strict=True):
        assert a.dtype == dtype
        size = size / given.detach().float().norm(dim=1, keepdim=True) if normalize else 2 * size
        assert_accurate(a, b, size=size, name=name)


def test_dtypes_may_differ(backend):
    query, items = sides(65, 33, 20)
    query = query.bfloat16()
    torch.testing.assert_close(
        normalized_similarity(query, items.half()), normalized_similarity(query.float(), items.half().float())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_exactly(backend, dtype):
    """All 65536 numbers of 16 bits; what is subnormal in float32 may count as zero, what is so in float16 may not."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    read, exact = normalized_similarity(numbers, torch.ones(1, 1), normalize=False), numbers.float()
    read, exact = (torch.where(v.abs() < torch.finfo(torch.float32).tiny, 0, v) for v in (read, exact))
    assert torch.equal(read.isnan(), exact.isnan())
    assert torch.equal(read.nan_to_num(0, 7, -7), exact.nan_to_num(0, 7, -7))


def test_gradients_are_those_of_finite_differences():
    query, items = (v.requires_grad_() for v in sides(4, 5, 3, torch.float64))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(normalized_similarity, (query, items))
        assert normalized_similarity(query, items).dtype == torch.float64


def test_zero_rows_stay_zero(backend):
    query, items = sides(5, 4, 3)
    query[2] = 0
    s = normalized_similarity(query.requires_grad_(), items)
    assert not s[2].any()
    torch.testing.assert_close(s, F.normalize(query) @ F.normalize(items).T)
    assert torch.autograd.grad(s.sum(), query)[0].isfinite().all()


def test_length_changes_nothing(backend):
    query, items = sides(65, 33, 20)
    a, b = normalized_similarity(query, items), normalized_similarity(query * 1e-3, items * 1e3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalized_similarity(query * 1e20, items * 1e30), b, rtol=0, atol=1e-6)


def test_a_gradient_of_stride_zero(backend):
    query, items = (v.requires_grad_() for v in sides(65, 33, 20))
    sums = torch.autograd.grad(normalized_similarity(query, items).sum(), (query, items))
    ones = torch.autograd.grad(normalized_similarity(query, items), (query, items), torch.ones(65, 33))
    assert all(torch.equal(a, b) for a, b in zip(sums, ones, strict=True))


def test_only_the_needed_gradient_is_computed(backend, monkeypatch):
    needs = []
    backward = IMPLS[backend].backward

    def spy(*args):
        needs.append(args[4:])
        return backward(*args)

    monkeypatch.setattr(IMPLS[backend], "backward", spy)
    query, items = sides(5, 4, 3)
    normalized_similarity(query, items.requires_grad_()).sum().backward()
    normalized_similarity(query.requires_grad_(), items.detach()).sum().backward()
    assert needs == [(False, True), (True, False)]


def test_nan_is_not_hidden(backend):
    query, items = sides(65, 33, 20)
    items[30, 3] = torch.nan
    s = normalized_similarity(query, items)
    assert s[:, 30].isnan().all()
    assert s.isnan().sum() == 65


def test_second_derivatives_are_refused(backend):
    query, items = (v.requires_grad_() for v in sides(5, 4, 3))
    gradient = torch.autograd.grad(normalized_similarity(query, items).square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="normalized_similarity_backward"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: normalized_similarity(q, items).sum())(query.detach())


# similarity_topk


@dtypes
@pytest.mark.parametrize("k", [1, 5, 130])
@pytest.mark.parametrize("kind", ["dots", "cosines"])
def test_topk_with_ties_is_numpys_argsort(backend, kind, k, dtype):
    query, items = whole(97, 130, dtype=dtype) if kind == "dots" else signs(97, 130, dtype)
    s = cosines(query, items, kind == "cosines")
    values, indices = similarity_topk(query, items, k, normalize=kind == "cosines")
    order = torch.as_tensor(numpy_order(s))[:, :k]
    assert torch.equal(indices, order)
    assert torch.equal(values, s.gather(1, order).float())
    assert len(s[0].unique()) < 130


@dtypes
@pytest.mark.parametrize(("M", "N", "D"), SHAPES)
def test_topk_without_ties_is_numpys_argsort(backend, M, N, D, dtype):
    query, items = sides(M, N, max(D, 3), dtype)
    s = cosines(query, items)
    k = min(N, 7)
    values, indices = similarity_topk(query, items, k)
    assert values.dtype == torch.float32
    assert_accurate(values, s.sort(1, descending=True).values[:, :k], name="values")
    # Two cosines closer than rounding may change places; none else may.
    assert (s.gather(1, indices) - s.gather(1, torch.as_tensor(numpy_order(s))[:, :k])).abs().max() < 1e-6
    assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("k", [1, 3, 66])
def test_topk_of_equals_is_the_first_k(backend, k):
    values, indices = similarity_topk(torch.ones(3, 2), torch.ones(66, 2), k)
    assert torch.equal(indices, torch.arange(k).expand(3, -1))
    torch.testing.assert_close(values, torch.ones(3, k))


def test_topk_of_nan_stays_in_range(backend):
    """A gather with its indices must not fall off the items."""
    query, items = whole(5, 70)
    query[3, 0] = torch.nan
    items[9] = torch.nan
    _, indices = similarity_topk(query, items, 70, normalize=False)
    assert torch.equal(indices.sort(1).values, torch.arange(70).expand(5, -1))


def test_topk_of_infinities(backend):
    query, items = torch.ones(1, 1), torch.tensor([[-torch.inf], [1.0], [torch.inf], [-torch.inf]])
    values, indices = similarity_topk(query, items, 4, normalize=False)
    assert indices.tolist() == [[2, 1, 0, 3]]
    assert values.tolist() == [[torch.inf, 1.0, -torch.inf, -torch.inf]]


def test_topk_has_no_gradient(backend):
    query, items = (v.requires_grad_() for v in sides(5, 4, 3))
    assert not similarity_topk(query, items, 2)[0].requires_grad


# rank_counts


@dtypes
@pytest.mark.parametrize("kind", ["dots", "cosines"])
@pytest.mark.parametrize(("M", "N", "P"), [(1, 1, 1), (65, 33, 1), (97, 130, 5), (20, 7, 30)])
def test_ranks_with_ties_are_numpys(backend, M, N, P, kind, dtype):
    query, items = whole(M, N, dtype=dtype) if kind == "dots" else signs(M, N, dtype)
    positives = lists(M, N, P)
    above, ties = rank_counts(query, items, positives, normalize=kind == "cosines")
    expected = numpy_ranks(cosines(query, items, kind == "cosines"), positives)
    assert above.dtype == ties.dtype == torch.int64
    assert torch.equal(above, expected[0])
    assert torch.equal(ties, expected[1])
    assert N == 1 or P == 30 or ties.any()


@pytest.mark.parametrize(("M", "N", "D", "P"), [(65, 33, 20, 1), (130, 257, 100, 5), (50, 385, 640, 2)])
def test_ranks_without_ties_are_numpys(backend, M, N, D, P):
    query, items = sides(M, N, D)
    positives = lists(M, N, P)
    s = cosines(query, items)
    expected, _ = numpy_ranks(s, positives)
    above, ties = rank_counts(query, items, positives)
    best = s.sort(1, descending=True).values.gather(1, expected[:, None])
    clear = ((s - best).abs() < 1e-6).sum(1) == 1  # no other item that rounding could move past the positive
    assert clear.float().mean() > 0.9
    assert torch.equal(above[clear], expected[clear])
    assert not ties[clear].any()


def test_one_positive_may_come_as_a_vector(backend):
    query, items = whole(20, 30)
    positives = lists(20, 30, 1)
    for a, b in zip(
        rank_counts(query, items, positives[:, 0], normalize=False),
        rank_counts(query, items, positives, normalize=False),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_twins_of_the_positive_are_ties_wherever_they_stand(backend):
    """The same item in every column: each must get the very same bits as the positive, in any tile and at any edge."""
    query, items = sides(67, 1, 100)
    above, ties = rank_counts(query, items.expand(131, -1), torch.arange(67))
    assert not above.any()
    assert (ties == 130).all()


def test_positives_are_no_ties_of_each_other(backend):
    above, ties = rank_counts(torch.ones(1, 2), torch.ones(9, 2), torch.tensor([[4, 2, 4, -1, 8]]))
    assert (above.item(), ties.item()) == (0, 6)


def test_a_query_without_positives_has_every_item_above(backend):
    above, ties = rank_counts(*whole(3, 70), torch.tensor([[1, -1], [-1, -1], [-1, 0]]), normalize=False)
    assert (above[1].item(), ties[1].item()) == (70, 0)
    assert (above[[0, 2]] < 70).all()


@pytest.mark.parametrize("broken", ["query", "positive", "foreigner"])
def test_nan_ranks_last(backend, broken):
    """A model that has diverged must not be perfect."""
    query, items = whole(4, 70)
    before, _ = rank_counts(query, items, torch.arange(4), normalize=False)
    {"query": query[1], "positive": items[1], "foreigner": items[50]}[broken][:] = torch.nan
    above, ties = rank_counts(query, items, torch.arange(4), normalize=False)
    if broken == "foreigner":
        assert (above >= before).all()
        assert (above >= 1).all()
    else:
        assert (above[1].item(), ties[1].item()) == (70, 0)


# all three


@pytest.mark.parametrize("view", ["transposed", "every other", "offset", "expanded"])
def test_views(backend, view):
    query, items = whole(64, 70, 32)
    view = {
        "transposed": query.T.contiguous().T,
        "every other": torch.stack([query, 2 * query], 2).reshape(64, 64)[:, ::2],
        "offset": torch.cat([items[:1], query])[1:],
        "expanded": query[:1].expand(64, -1),
    }[view]
    copy, positives = view.clone(memory_format=torch.contiguous_format), lists(64, 70, 4)
    calls = (
        lambda q, p: normalized_similarity(q, items),
        lambda q, p: torch.stack(similarity_topk(q, items, 3)),
        lambda q, p: torch.stack(rank_counts(q, items, p)),
    )
    for call in calls:
        assert torch.equal(call(view, positives.T.contiguous().T), call(copy, positives))


@pytest.mark.parametrize("kind", ["topk", "ranks"])
def test_nothing_of_the_size_of_the_matrix_is_held(backend, kind, scratch_below):
    query, items = whole(1200, 1300)
    last = torch.arange(1200) if kind == "ranks" else 3
    with Watch(1200 * 1300), scratch_below(1200 * 1300):
        getattr(IMPLS[backend], kind)(query, items, last[:, None] if kind == "ranks" else last, False, "ieee")


def test_the_reference_is_the_same_in_any_chunks(monkeypatch):
    query, items = whole(65, 33)
    args = (query, items, lists(65, 33, 3), False, "ieee")
    expected = *reference.ranks(*args), *reference.topk(query, items, 4, False, "ieee")
    for chunk in (1, 33 * 7, 33 * 64):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        ours = *reference.ranks(*args), *reference.topk(query, items, 4, False, "ieee")
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_backends_have_the_signatures_of_the_reference():
    for impl in IMPLS.values():
        for name in ("unsupported", "forward", "backward", "topk", "ranks"):
            ours, its = (inspect.signature(getattr(module, name)) for module in (impl, reference))
            assert ours.parameters == its.parameters


def test_autocast_changes_nothing(backend):
    query, items = sides(33, 40, 20)
    query.requires_grad_()
    s, best = normalized_similarity(query, items), similarity_topk(query, items, 3)
    gradient = torch.autograd.grad(s.sum(), query, retain_graph=True)[0]
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        assert torch.equal(normalized_similarity(query, items), s)
        assert torch.equal(torch.autograd.grad(s.sum(), query)[0], gradient)
        assert torch.equal(similarity_topk(query, items, 3)[0], best[0])


def test_opcheck(backend):
    query, items = (v.requires_grad_() for v in sides(5, 4, 3))
    torch.library.opcheck(similarity._normalized_similarity.overload, (query, items, True, "ieee", backend))
    arguments = (query.detach().half(), items, False, "ieee", backend)
    torch.library.opcheck(similarity._normalized_similarity.overload, arguments)
    plain = query.detach(), items.detach()
    torch.library.opcheck(similarity._similarity_topk.overload, (*plain, 2, True, "ieee", backend))
    torch.library.opcheck(similarity._rank_counts.overload, (*plain, lists(5, 4, 3), True, "ieee", backend))


def test_compiled_equals_eager(backend):
    def everything(query, items, positives):
        return (
            normalized_similarity(query, items),
            *similarity_topk(query, items, 3),
            *rank_counts(query, items, positives),
        )

    query, items = (v.requires_grad_() for v in sides(33, 40, 20))
    args = (query, items, lists(33, 40, 3))
    eager, ours = everything(*args), torch.compile(everything, fullgraph=True, backend="aot_eager")(*args)
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
    gradients = [torch.autograd.grad(s.square().sum(), (query, items)) for s in (eager[0], ours[0])]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


Q, V = torch.ones(4, 3), torch.ones(5, 3)


@pytest.mark.parametrize(
    ("function", "last"), [(normalized_similarity, ()), (similarity_topk, (1,)), (rank_counts, (torch.arange(4),))]
)
@pytest.mark.parametrize(
    ("query", "items", "error", "message"),
    [
        (Q, V[:, :2], ShapeError, r"query and items must have one embedding width D.* \(4, 3\).* \(5, 2\)"),
        (Q[0], V, ShapeError, r"query must be a matrix \[rows, D\]; got shape \(3,\)"),
        (Q, V[:0], ShapeError, r"items must have at least one row .* \(0, 3\)"),
        (Q, V.long(), DTypeError, r"items must be float32.* got torch.int64"),
        (Q, V.to("meta"), ValueError, r"all tensors must be on one device.*items on meta"),
    ],
)
def test_refusals(function, last, query, items, error, message):
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(query, items, *last)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_beyond_the_items_is_refused(k):
    with pytest.raises(ShapeError, match=rf"similarity_topk: k must be in \[1, N = 5\], the number of items; got {k}"):
        similarity_topk(Q, V, k)


@pytest.mark.parametrize(
    ("positives", "error", "message"),
    [
        (torch.arange(3), ShapeError, r"positives must be \[M\] or \[M, P\] with M = 4 queries; got \(3,\)"),
        (torch.zeros(4, 0).long(), ShapeError, r"positives must be .* got \(4, 0\)"),
        (torch.zeros(4, 1, 1).long(), ShapeError, r"positives must be .* got \(4, 1, 1\)"),
        (torch.zeros(4), DTypeError, r"positives must be int64; got torch.float32"),
        (torch.tensor([0, 1, 2, 5]), ValueError, r"positives must be in \[0, 5\), or -1 for none; got 5"),
        (torch.tensor([0, 1, 2, -2]), ValueError, r"positives must be in \[0, 5\), or -1 for none; got -2"),
    ],
)
def test_refused_positives(positives, error, message):
    with pytest.raises(error, match=f"rank_counts: {message}"):
        rank_counts(Q, V, positives)


def test_values_are_checked_when_debugging(monkeypatch):
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="rank_counts: every query needs a positive; row 2 of positives holds only -1"):
        rank_counts(Q, V, torch.tensor([0, 1, -1, 2]))
    with pytest.raises(ValueError, match="similarity_topk: query must be finite"):
        similarity_topk(Q * torch.inf, V, 1)


def test_a_forced_backend_that_does_not_exist_is_refused():
    with use_backend("cuda"), pytest.raises(BackendError, match="rank_counts: backend 'cuda' cannot run this call"):
        rank_counts(Q, V, torch.arange(4))
