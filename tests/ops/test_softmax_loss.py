"""clip_loss and info_nce_loss. A letter in brackets, as (c), is a bug of a peer that the test would catch."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from vlmfast import clip_loss, info_nce_loss, use_backend
from vlmfast.errors import BackendError, DTypeError, ShapeError
from vlmfast.ops.softmax_loss import IMPLS, _softmax_loss, _softmax_loss_backward, reference
from vlmfast.testing import SHAPES, Watch, assert_accurate, draw, pairs

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
GRADIENTS = ("loss", "gradient of the first side", "gradient of the second side", "gradient of the scale")


def run(call, x, y, scale):
    """[loss, dx, dy, dscale] of call(x, y, scale)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, y, scale)]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def exactly(call, x, y, scale):
    """The same in float64, by the reference, of the same rounded inputs."""
    with use_backend("reference"):
        return run(call, x.double(), y.double(), scale.double())


def shortest(x):
    return x.double().norm(dim=1).min()


def check(call, x, y, scale, rows=None, cond=None):
    """Loss and gradients on the backend in use are as near to float64 as rounding lets them be.

    rows: how many rows, or columns if fewer, share the mean; by default all. cond: max |logit|, by default of cosines.
    """
    rows = rows or min(len(x), len(y))
    ours = run(call, x, y, scale)
    assert [tensor.dtype for tensor in ours] == [torch.float32, x.dtype, y.dtype, scale.dtype]
    sizes = (1.0, scale / rows / shortest(x), scale / rows / shortest(y), 1.0)
    for name, value, exact, size in zip(GRADIENTS, ours, exactly(call, x, y, scale), sizes, strict=True):
        assert_accurate(value, exact, size=size, cond=scale if cond is None else cond, name=name)


def check_closely(call, x, y, scale, positive, directions="both", positives="out", normalize=True):
    """As `check`, by the finer bound for softmaxes that are nearly certain: docs/numerics.md, "Saturated softmaxes".

    positive: the mask [M, N] of what `call` takes for positives.
    """
    a, b = (F.normalize(v.double(), dim=1) if normalize else v.double() for v in (x, y))
    u = a @ b.T
    z, cond = scale * u, float((scale * u).abs().max())
    flushed = torch.finfo(torch.float32).tiny / (4 * torch.finfo(torch.float32).eps)
    moved = torch.full_like(z, flushed)  # how far dL/dz may be off, in units of 4 eps
    loss_size = 1.0
    for axis, this in ((1, "rows"), (0, "columns")):
        if directions in (this, "both"):
            has = positive.any(axis, keepdim=True).double()
            weight = has / has.sum() / (2 if directions == "both" else 1)
            p, target = z.softmax(axis), positive / positive.sum(axis, keepdim=True).clamp_min(1)
            spread = 2 * p * (1 - p)
            if positives == "in":
                target = z.masked_fill(~positive, -torch.inf).softmax(axis).nan_to_num()
                spread += 2 * target * (1 - target)
            moved += weight * (cond * spread + p + target)
            loss_size += cond * (weight * (p - target).abs()).sum()
            if (positive.sum(axis) > 1).any() and positives != "in":
                loss_size += cond  # the mean of several logits is rounded as they are
    sizes = [loss_size, scale * moved @ b.norm(dim=1), scale * a.norm(dim=1) @ moved, (moved * u.abs()).sum()]
    for i, side in ((1, x), (2, y)):
        sizes[i] = (sizes[i] / side.double().norm(dim=1) if normalize else sizes[i])[:, None]
    ours = run(call, x, y, scale)
    for name, value, exact, size in zip(GRADIENTS, ours, exactly(call, x, y, scale), sizes, strict=True):
        assert_accurate(value, exact, size=size, name=name)


def rectangle(M, N, D, dtype=torch.float32, seed=0):
    x, y, scale = pairs(max(M, N), D, dtype=dtype, seed=seed)
    return x[:M], y[:N], scale


def group_ids(size, groups, seed):
    return draw(torch.randint, groups, (size,), generator=torch.Generator().manual_seed(seed))


# The value and every gradient


@pytest.mark.parametrize(("B", "D"), SHAPES)  # (a) B off, on and over tiles
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_clip_loss_equals_float64(backend, dtypes, B, D):
    image, text, scale = pairs(B, D, dtype=torch.float64)
    check(clip_loss, image.to(dtypes[0]), text.to(dtypes[1]), scale)


@pytest.mark.parametrize("D", [1, 3, 33, 100, 640])  # (m) widths that fill no vector register evenly
def test_widths(backend, D):
    check(clip_loss, *pairs(50, D))


@pytest.mark.parametrize("B", [11, 12, 13, 31, 32, 33, 95, 96, 97, 383, 384, 385])
def test_rows_around_a_tile(backend, B):
    check(clip_loss, *pairs(B, 16))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_smoothing_and_rows_as_given(backend, label_smoothing, normalize):
    image, text, scale = pairs(65, 33)

    def call(*inputs):
        return clip_loss(*inputs, label_smoothing=label_smoothing, normalize=normalize)

    check(call, image, text, scale, cond=4 * scale)  # lengths go up to 2


def test_bfloat16_gradients_do_not_lose_with_the_batch(backend):
    """(e), (h): a sum over 1000 pairs that is held in bfloat16 is off by far more than its rounding."""
    check(clip_loss, *pairs(1000, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_too_small_for_a_normal_float16(backend, dtype):
    """float16 has no normal numbers below 6.1e-5: rows of such numbers have a direction all the same."""
    image, text, scale = pairs(33, 8, dtype=torch.float64)
    image, text = (1e-5 * image).to(dtype), (1e-5 * text).to(dtype)
    assert_accurate(clip_loss(image, text, scale), exactly(clip_loss, image, text, scale)[0], cond=scale)


WAYS = {
    "diagonal": {},
    "offset": {"offset": 7},
    "labels": {"labels": lambda M, N: group_ids(M, N, 1)},
    "few labels": {"labels": lambda M, N: torch.where(torch.arange(M) % 3 == 0, group_ids(M, N, 1), -1)},
    "out": {"groups": 9, "positives": "out"},
    "soft": {"groups": 9, "positives": "soft"},
    "in": {"groups": 9, "positives": "in"},
    "in, sparse": {"groups": 200, "positives": "in"},
    "smooth labels": {"labels": lambda M, N: group_ids(M, N, 2), "label_smoothing": 0.1},
    "smooth groups": {"groups": 9, "label_smoothing": 0.1},
}


def options_of(way, M, N):
    """(keyword arguments of info_nce_loss, the positives as a mask [M, N])."""
    options = dict(WAYS[way])
    if "groups" in options:
        groups = options.pop("groups")
        options |= {"query_ids": group_ids(M, groups, 3), "key_ids": group_ids(N, groups, 4)}
        return options, options["query_ids"][:, None] == options["key_ids"]
    if "labels" in options:
        options["labels"] = options["labels"](M, N)
        return options, options["labels"][:, None] == torch.arange(N)
    return options, torch.arange(M)[:, None] + options.get("offset", 0) == torch.arange(N)


@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("M", "N"), [(40, 65), (65, 257)])
def test_info_nce_loss_equals_float64(backend, M, N, way, directions):
    options, positive = options_of(way, M, N)
    rows = min(int(positive.any(1).sum()), int(positive.any(0).sum()))
    check(lambda *inputs: info_nce_loss(*inputs, directions=directions, **options), *rectangle(M, N, 33), rows=rows)


@pytest.mark.parametrize(("M", "N"), [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
def test_one_row_or_one_column(backend, M, N, directions):
    options = {"labels": torch.zeros(M, dtype=torch.int64), "directions": directions}
    check(lambda *inputs: info_nce_loss(*inputs, **options), *rectangle(M, N, 8), rows=1)


# The reference against the formulas as others write them


def dense_info_nce(x, y, scale, positive, directions, positives="out", label_smoothing=0.0):
    """info_nce_loss from the [M, N] logits and the mask of positives [M, N]."""
    z = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    losses = []
    for logits, mask in ((z, positive),) * (directions != "columns") + ((z.T, positive.T),) * (directions != "rows"):
        logits, mask = logits[mask.any(1)], mask[mask.any(1)]
        if positives == "in":
            losses.append(-(mask * logits.softmax(1)).sum(1).log().mean())
        else:
            target = mask.to(z.dtype) / mask.sum(1, keepdim=True)
            losses.append(F.cross_entropy(logits, target, label_smoothing=label_smoothing))
    return sum(losses) / len(losses)


def close(ours, expected):
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
@pytest.mark.parametrize("way", WAYS)
def test_the_reference_equals_the_dense_formula(way, directions, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)
    x, y, scale = rectangle(40, 65, 33, torch.float64)
    options, positive = options_of(way, 40, 65)
    extra = {name: options[name] for name in ("positives", "label_smoothing") if name in options}
    close(
        run(lambda *inputs: info_nce_loss(*inputs, directions=directions, **options), x, y, scale.double()),
        run(lambda *inputs: dense_info_nce(*inputs, positive, directions, **extra), x, y, scale.double()),
    )


def open_clip_loss(image, text, scale):
    """open_clip 3.3.0, loss.py, for world size 1: features are normalised before."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    labels = torch.arange(logits_per_image.shape[0], dtype=torch.long)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def transformers_loss(image, text, scale):
    """transformers 5, modeling_clip.py: image_text_contrastive_loss of logits_per_text."""
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    logits_per_text = torch.matmul(text, image.t()) * scale
    caption_loss = F.cross_entropy(logits_per_text, torch.arange(len(logits_per_text)))
    image_loss = F.cross_entropy(logits_per_text.t(), torch.arange(len(logits_per_text)))
    return (caption_loss + image_loss) / 2.0


@pytest.mark.parametrize("theirs", [open_clip_loss, transformers_loss])
@pytest.mark.parametrize("B", [1, 2, 65, 257, 600])
def test_the_reference_equals_the_libraries(B, theirs):
    image, text, scale = pairs(B, 20, dtype=torch.float64)
    close(run(clip_loss, image, text, scale.double()), run(theirs, image, text, scale.double()))


def test_smoothing_is_cross_entropy_s(backend):
    image, text, scale = pairs(65, 33)
    z = scale * F.normalize(image) @ F.normalize(text).T
    labels = torch.arange(65)
    expected = F.cross_entropy(z, labels, label_smoothing=0.1) + F.cross_entropy(z.T, labels, label_smoothing=0.1)
    torch.testing.assert_close(clip_loss(image, text, scale, label_smoothing=0.1), expected / 2)


def test_gradients_equal_finite_differences():
    """(d) The scale's included."""
    x, y, scale = rectangle(5, 7, 3, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, y, scale.double() / 4)]
    for way in WAYS:
        options, _ = options_of(way if way != "offset" else "diagonal", 5, 7)
        call = lambda *inputs, options=options: info_nce_loss(*inputs, directions="both", **options)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)


# Several positives


@pytest.mark.parametrize("positives", ["out", "in", "soft"])
def test_the_forms_are_one_where_each_has_one_positive(backend, positives):
    image, text, scale = pairs(65, 33)
    ids = draw(torch.randperm, 65, generator=torch.Generator().manual_seed(0)) - 30
    options = {"query_ids": ids, "key_ids": ids, "positives": positives, "directions": "both"}
    ours = run(lambda *inputs: info_nce_loss(*inputs, **options), image, text, scale)
    for value, expected in zip(ours, run(clip_loss, image, text, scale), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_soft_is_out(backend):
    x, y, scale = rectangle(40, 65, 33)
    ids = {"query_ids": group_ids(40, 9, 3), "key_ids": group_ids(65, 9, 4)}
    assert torch.equal(*(info_nce_loss(x, y, scale, positives=form, **ids) for form in ("out", "soft")))


@pytest.mark.parametrize("positives", ["out", "in"])
def test_queries_without_a_positive_are_left_out_of_the_mean(backend, positives):
    x, y, scale = rectangle(40, 65, 33)
    query_ids = torch.arange(40)
    key_ids = torch.arange(65) // 2  # queries 33.. have no key
    whole = info_nce_loss(x, y, scale, query_ids=query_ids, key_ids=key_ids, positives=positives)
    some = info_nce_loss(x[:33], y, scale, query_ids=query_ids[:33], key_ids=key_ids, positives=positives)
    torch.testing.assert_close(whole, some)


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
def test_no_positive_at_all_is_no_loss_and_no_gradient(backend, positives, directions):
    ids = {"query_ids": torch.zeros(5, dtype=torch.int64), "key_ids": torch.ones(7, dtype=torch.int64)}
    options = {"positives": positives, "directions": directions, **ids}
    assert not any(value.any() for value in run(lambda *inputs: info_nce_loss(*inputs, **options), *rectangle(5, 7, 3)))


def test_ids_are_64_bits_wide(backend):
    """(k) in small: ids that agree in their lower 32 bits are different ids."""
    x, y, scale = rectangle(2, 2, 8)
    ids = torch.tensor([1, 1 + 2**32])
    both = info_nce_loss(x, y, scale, query_ids=ids, key_ids=ids)
    torch.testing.assert_close(both, info_nce_loss(x, y, scale))
    assert info_nce_loss(x, y, scale, query_ids=ids % 2**32, key_ids=ids % 2**32) != both


def test_labels_and_offset_agree(backend):
    x, y, scale = rectangle(40, 65, 33)
    for directions in ("rows", "columns", "both"):
        by_offset = info_nce_loss(x, y, scale, offset=7, directions=directions)
        by_label = info_nce_loss(x, y, scale, torch.arange(40) + 7, directions=directions)
        torch.testing.assert_close(by_offset, by_label)


@pytest.mark.slow
def test_more_logits_than_an_int32_counts(cpu_backend):
    """(k) All pairs but the last are alike, so the loss is known."""
    B = 46_400
    assert B * B > 2**31
    same = torch.zeros(B, 1)
    same[-1] = 1
    loss = info_nce_loss(same, same, 20.0, normalize=False)
    last = math.log(B - 1 + math.exp(20)) - 20
    assert_accurate(loss, torch.tensor(((B - 1) * math.log(B) + last) / B, dtype=torch.float64), cond=20)


# Laws


def test_the_order_of_pairs_is_nothing(backend):
    image, text, scale = pairs(65, 33)
    order = draw(torch.randperm, 65, generator=torch.Generator().manual_seed(0))
    loss, dimage, dtext, dscale = run(clip_loss, image, text, scale)
    moved = run(clip_loss, image[order], text[order], scale)
    for value, expected in zip(moved, (loss, dimage[order], dtext[order], dscale), strict=True):
        assert_accurate(value, expected, size=scale / 65 / 0.5, cond=2 * scale)  # two roundings: twice one's tolerance


def test_the_sides_are_alike(backend):
    image, text, scale = pairs(65, 33)
    loss, dimage, dtext, dscale = run(clip_loss, image, text, scale)
    swapped = run(clip_loss, text, image, scale)
    for value, expected in zip(swapped, (loss, dtext, dimage, dscale), strict=True):
        assert_accurate(value, expected, size=scale / 65 / 0.5, cond=2 * scale)


@pytest.mark.parametrize("length", [3, 1e-6, 1e6, 1e20, 1e30])
def test_longer_embeddings_change_nothing(backend, length):
    image, text, scale = pairs(65, 33)
    loss, dimage, *_ = run(clip_loss, image, text, scale)
    longer, dlonger, *_ = run(clip_loss, length * image, text, scale)
    assert_accurate(longer, loss, cond=2 * scale)
    assert_accurate(length * dlonger, dimage, size=scale / 65 / 0.5, cond=2 * scale)


def test_gradients_are_orthogonal_to_embeddings(backend):
    image, text, scale = pairs(65, 33)
    _, dimage, dtext, _ = run(clip_loss, image, text, scale)
    for x, dx in ((image, dimage), (text, dtext)):
        assert_accurate((dx.double() * x).sum(1).float(), torch.zeros(65), size=scale / 65, cond=scale)


@pytest.mark.parametrize("B", [1, 2, 65, 257])
def test_equal_embeddings_cost_log_b(backend, B):
    same = draw(torch.randn, 33, generator=torch.Generator().manual_seed(0)).expand(B, 33)
    loss, dimage, dtext, dscale = run(clip_loss, same, same, torch.tensor(14.0))
    assert_accurate(loss, torch.tensor(math.log(B)), cond=14)
    for gradient, size in ((dimage, 14 / B / same[0].norm()), (dtext, 14 / B / same[0].norm()), (dscale, 1)):
        assert_accurate(gradient, torch.zeros_like(gradient), size=size, cond=14)


def test_identical_pairs_share_their_loss(backend):
    """(l) Every pair twice: each softmax has two equal maxima."""
    image, text, scale = pairs(40, 33)
    image, text = image.repeat(2, 1), text.repeat(2, 1)
    check(clip_loss, image, text, scale)
    twice = clip_loss(image, text, scale)
    torch.testing.assert_close(twice, clip_loss(image[:40], text[:40], scale) + math.log(2))


# Large logits


@pytest.mark.parametrize("B", [8, 64, 1000])
def test_random_towers_at_scale_100(backend, B):
    """(b) The temperature 0.01 on towers that know nothing yet."""
    check_closely(clip_loss, *pairs(B, 64, match=0, scale=100.0), torch.eye(B, dtype=torch.bool))


@pytest.mark.parametrize("B", [2, 65, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solved_pairs_at_scale_100(backend, dtype, B):
    """Saturated: the loss and its gradients are near 0 in truth, and must be near 0 here."""
    image, _, _ = pairs(B, 64, dtype=dtype)
    check_closely(clip_loss, image, image.clone(), torch.tensor(100.0), torch.eye(B, dtype=torch.bool))


def test_wrongly_solved_pairs_at_scale_100(backend):
    """The worst of all: every image equals its neighbour's text."""
    image, _, _ = pairs(65, 64)
    check_closely(clip_loss, image, image.roll(1, 0), torch.tensor(100.0), torch.eye(65, dtype=torch.bool))


def saturated(form, state):
    """(x [130, 512], y [137, 512], options of info_nce_loss, positives [130, 137]): all pairs are solved, or one half.

    Where a form has several positives a query, only its own partner is near it.
    """
    generator = torch.Generator().manual_seed(0)
    x, noise, other = draw(torch.randn, 3, 137, 512, generator=generator)
    y = x + 0.2 * noise
    if state == "half solved":
        y[::2] = other[::2]
    if form == "labels":
        order = draw(torch.randperm, 137, generator=generator)
        labels = order.argsort()[:130].masked_fill(torch.arange(130) % 5 == 0, -1)
        return x[:130], y[order], {"labels": labels}, labels[:, None] == torch.arange(137)
    if form == "offset":
        return x[:130], y.roll(7, 0), {"offset": 7}, torch.arange(130)[:, None] + 7 == torch.arange(137)
    ids = torch.arange(137) // 2
    options = {"query_ids": ids[:130], "key_ids": ids, "positives": form}
    return x[:130], y, options, ids[:130, None] == ids


SATURATED = pytest.mark.parametrize("form", ["labels", "offset", "out", "in"])
STATES = pytest.mark.parametrize("state", ["half solved", "solved"])


@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
@SATURATED
@STATES
def test_every_form_and_direction_at_scale_100(backend, state, form, directions):
    x, y, options, positive = saturated(form, state)
    call = lambda *inputs: info_nce_loss(*inputs, directions=directions, **options)  # noqa: E731
    check_closely(call, x, y, torch.tensor(100.0), positive, directions, options.get("positives", "out"))


@pytest.mark.parametrize("directions", ["rows", "columns"])
@SATURATED
@STATES
def test_a_softmax_sums_to_one_however_high_its_logits_are(backend, state, form, directions):
    """A last coordinate of 1 adds the scale to every logit; its gradient is scale * weight * (sum of p - 1), so 0.

    A log-sum-exp that is rounded to float32 near 100 misses by up to 3.8e-6, and all of its row's p with it.
    """
    x, y, options, positive = saturated(form, state)
    x, y = (F.pad(F.normalize(v), (0, 1), value=1.0) for v in (x, y))
    call = lambda *v: info_nce_loss(*v, directions=directions, normalize=False, **options)  # noqa: E731
    gradient = run(call, x, y, torch.tensor(100.0))[1 if directions == "rows" else 2][:, -1]
    rows = positive.any(1 if directions == "rows" else 0).sum()
    assert_accurate(gradient, torch.zeros_like(gradient), size=2 * 100 / rows)  # p and the target add up to 2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
@STATES
def test_positives_inside_the_logarithm_at_800(backend, state, directions, sign):
    x, y, options, positive = saturated("in", state)
    x, y = F.normalize(x), F.normalize(y)
    call = lambda x, y, s: info_nce_loss(x, y, sign * s, directions=directions, normalize=False, **options)  # noqa: E731
    # The bound asks for the scale as it is used; its sign may as well be y's.
    check_closely(
        lambda x, y, s: call(x, sign * y, s), x, sign * y, torch.tensor(800.0), positive, directions, "in", False
    )


@pytest.mark.parametrize("directions", ["rows", "columns", "both"])
@SATURATED
@STATES
def test_the_finer_bound_is_what_eager_float32_keeps(state, form, directions):
    """Dense logits and log_softmax, all in float32, pass by it: it asks of no backend what eager cannot do."""
    x, y, options, positive = saturated(form, state)
    positives = options.get("positives", "out")

    def eager(x, y, scale):
        z = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        losses = []
        for logits, mask in ((z, positive),) * (directions != "columns") + ((z.T, positive.T),) * (
            directions != "rows"
        ):
            logits, mask = logits[mask.any(1)].log_softmax(1), mask[mask.any(1)]
            if positives == "in":
                losses.append(-logits.masked_fill(~mask, -torch.inf).logsumexp(1).mean())
            else:
                losses.append(-((mask / mask.sum(1, keepdim=True)) * logits).sum(1).mean())
        return sum(losses) / len(losses)

    check_closely(eager, x, y, torch.tensor(100.0), positive, directions, positives)


@pytest.mark.parametrize("size", [88.8, 1e3, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_beyond_the_range_of_exp(backend, size, sign):
    """(c) exp overflows float32 at 88.7 and is 0 from -104 on."""
    image, text, _ = pairs(65, 16)
    image, text = F.normalize(image), F.normalize(text)
    call = lambda x, y, scale: clip_loss(x, y, sign * scale, normalize=False)  # noqa: E731
    check(call, image, text, torch.tensor(size))


def test_rows_of_very_different_height(backend):
    """No one shift fits all rows: some rows' logits are thousands below the others'."""
    image, text, scale = pairs(65, 16)
    image = F.normalize(image) * torch.logspace(-3, 3, 65)[:, None]
    text = F.normalize(text) + 2 * F.normalize(text[:1])
    for way in ({}, {"query_ids": group_ids(65, 9, 3), "key_ids": group_ids(65, 9, 4), "positives": "in"}):
        call = lambda *inputs, way=way: info_nce_loss(*inputs, directions="both", normalize=False, **way)  # noqa: E731
        ours = run(call, image, text, scale)
        z = scale.double() * image.double() @ text.double().T
        for value, exact, size in zip(
            ours,
            exactly(call, image, text, scale),
            (z.abs().max() / scale, 3 * scale / 65, 1e3 * scale / 65, z.abs().max() / scale),
            strict=True,
        ):
            assert_accurate(value, exact, size=size, cond=z.abs().max())


# NaN and infinity in, NaN or infinity out (n)


@pytest.mark.parametrize("options", [{}, {"positives": "out"}, {"positives": "in"}], ids=["one", "out", "in"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "last x", "y", "last y", "scale"])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_not_finite_is_never_hidden(backend, options, wrong, where, normalize):
    x, y, scale = pairs(33, 8)
    {"x": x[3], "last x": x[-1], "y": y[5], "last y": y[-1], "scale": scale.reshape(1)}[where][-1] = wrong
    if options:
        options = {**options, "query_ids": torch.arange(33) // 2, "key_ids": torch.arange(33) // 2}
    call = lambda *inputs: info_nce_loss(*inputs, directions="both", normalize=normalize, **options)  # noqa: E731
    loss, dx, dy, dscale = run(call, x, y, scale)
    assert not loss.isfinite()
    assert not dscale.isfinite()
    assert not dx.isfinite().all()
    assert not dy.isfinite().all()


def test_a_zero_row_stays_zero(backend):
    """As F.normalize: a length is at least 1e-12, so a zero row is similar to nothing and its loss is finite."""
    image, text, scale = pairs(33, 8)
    image[4] = 0
    assert_accurate(clip_loss(image, text, scale), exactly(clip_loss, image, text, scale)[0], cond=scale)


# How tensors come in


def views(x):
    """The same values [B, D] at another place: offset, strided, transposed, gathered."""
    B, D = x.shape
    room = torch.full((2 * B + 1, D + 5), math.nan, dtype=x.dtype)
    yield "offset by three elements", room.flatten()[3 : 3 + B * D].view(B, D)
    yield "columns of a wider matrix", room[:B, 2 : 2 + D]
    yield "every second row", room[1::2, :D][:B]
    yield "transposed", torch.empty(D, B, dtype=x.dtype).T
    yield "every second column", torch.empty(B, 2 * D, dtype=x.dtype)[:, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(backend, dtype):
    """(m) Our kernels not a bit; the reference's sums follow torch's, whose order depends on alignment."""
    image, text, scale = pairs(65, 33, dtype=dtype)
    expected = run(clip_loss, image, text, scale)
    for (name, x), (_, y) in zip(views(image), reversed(list(views(text))), strict=True):
        x.copy_(image), y.copy_(text)
        for value, exact in zip(run(clip_loss, x, y, scale), expected, strict=True):
            if backend == "reference":
                assert_accurate(value, exact, size=scale / 65 / 0.5, cond=2 * scale, name=name)
            else:
                assert torch.equal(value, exact), name


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_scale_s_gradient_comes_as_the_scale_came(backend, shape, dtype):
    image, text, scale = pairs(33, 8)
    scale = scale.to(dtype).reshape(shape)
    loss, _, _, dscale = run(clip_loss, image, text, scale)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (dscale.shape, dscale.dtype) == (shape, dtype)
    exact = exactly(clip_loss, image, text, scale.reshape(()))[3]
    assert_accurate(dscale.reshape(()), exact, cond=float(scale))


def test_the_scale_may_be_a_number(backend):
    image, text, _ = pairs(33, 8)
    assert torch.equal(clip_loss(image, text, 14.0), clip_loss(image, text, torch.tensor(14.0)))
    assert torch.equal(info_nce_loss(image, text, 14), info_nce_loss(image, text, torch.tensor(14.0)))


def test_the_incoming_gradient_is_honoured(backend):
    image, text, scale = pairs(33, 8)
    _, dimage, _, _ = run(clip_loss, image, text, scale)
    image.requires_grad_()
    for grad in (torch.ones(()), torch.ones(1).expand(7)[3], torch.full((2, 2), 1.0)[:, 1][1]):
        (ours,) = torch.autograd.grad(clip_loss(image, text, scale), image, grad)
        assert torch.equal(ours, dimage)
    (ours,) = torch.autograd.grad(clip_loss(image, text, scale).expand(2, 2).sum(), image)
    torch.testing.assert_close(ours, 4 * dimage)


def test_a_frozen_tower_s_gradient_is_not_computed(backend, monkeypatch):
    asked = []

    def spy(*args, backward=IMPLS[backend].backward):
        asked.append(args[-4:-2])
        return backward(*args)

    monkeypatch.setattr(IMPLS[backend], "backward", spy)
    for trainable in ((True, True), (True, False), (False, True), (False, False)):
        image, text, scale = pairs(33, 8)
        image.requires_grad_(trainable[0]), text.requires_grad_(trainable[1]), scale.requires_grad_()
        clip_loss(image, text, scale).backward()
        assert asked[-1] == trainable
        assert (image.grad is not None, text.grad is not None, scale.grad is not None) == (*trainable, True)
    expected = run(clip_loss, *pairs(33, 8))
    torch.testing.assert_close(scale.grad, expected[3])


def test_no_grad_does_no_gradient_work(backend, monkeypatch):
    """(i)"""
    monkeypatch.setattr(IMPLS[backend], "backward", None)
    image, text, scale = (tensor.requires_grad_() for tensor in pairs(33, 8))
    with torch.no_grad():
        loss = clip_loss(image, text, scale)
    assert not loss.requires_grad
    assert torch.equal(loss, clip_loss(image, text, scale).detach())


def test_autocast_changes_no_bit(backend):
    image, text, scale = pairs(65, 33)
    expected = run(clip_loss, image, text, scale)
    with torch.autocast(image.device.type, torch.bfloat16):
        ours = run(clip_loss, image, text, scale)
    assert all(map(torch.equal, ours, expected))


def test_inputs_are_left_as_they_were(backend):
    inputs = pairs(33, 8)
    before = [tensor.clone() for tensor in inputs]
    run(clip_loss, *inputs)
    assert all(map(torch.equal, inputs, before))


# Memory and bits


FORMS = pytest.mark.parametrize("form", ["index", "out", "in"])


def both_directions(form, B, groups):
    """info_nce_loss of B pairs in one of its forms, both ways; with ids, pairs belong to so many groups."""
    ids = {"query_ids": group_ids(B, groups, 3), "key_ids": group_ids(B, groups, 4), "positives": form}
    return partial(info_nce_loss, directions="both", **{} if form == "index" else ids)


@FORMS
def test_nothing_is_as_large_as_the_logits(backend, form, monkeypatch, scratch_below):
    """The watch stands inside the op: around it, it would see only what the op returns."""
    watches = []

    def watched(function):
        def call(*args):
            with Watch(B * B) as watch:
                watches.append(watch)
                return function(*args)

        return call

    B = 1200
    monkeypatch.setattr(IMPLS[backend], "forward", watched(IMPLS[backend].forward))
    monkeypatch.setattr(IMPLS[backend], "backward", watched(IMPLS[backend].backward))
    with scratch_below(B * B):
        run(both_directions(form, B, 100), *pairs(B, 8))
    assert len(watches) == 2
    assert all(watch.largest >= B for watch in watches)


@FORMS
def test_what_autograd_keeps_is_the_inputs_and_vectors(backend, form):
    """(f)"""
    B, D = 600, 8
    inputs = [tensor.requires_grad_() for tensor in pairs(B, D)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        both_directions(form, B, 50)(*inputs)
    assert sum(tensor.nbytes for tensor in kept.values()) <= 2 * B * D * 4 + 10 * B * 8


@FORMS
def test_bits_repeat(backend, form):
    inputs = pairs(600, 33)
    call = both_directions(form, 600, 50)
    assert all(map(torch.equal, run(call, *inputs), run(call, *inputs)))


@FORMS
def test_threads_change_no_bit(cpu_backend, form):
    inputs = pairs(600, 256)  # enough work for seven threads: each starts for 2**23 multiply-adds
    call = both_directions(form, 600, 50)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(run(call, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))


@FORMS
def test_the_reference_s_chunks_change_nothing(form, monkeypatch):
    inputs = pairs(600, 8, dtype=torch.float64)
    call = both_directions(form, 600, 50)
    expected = run(call, *inputs)
    monkeypatch.setattr(reference, "CHUNK", 7)
    close(run(call, *inputs), expected)


# torch's machinery


def test_backends_have_one_signature():
    for name, impl in IMPLS.items():
        for function in ("unsupported", "forward", "backward"):
            ours = inspect.signature(getattr(impl, function))
            assert str(ours) == str(inspect.signature(getattr(reference, function))), f"{name}.{function}"


def op_arguments(form, backend):
    x, y, scale = (tensor.requires_grad_() for tensor in rectangle(5, 7, 3))
    rows, columns = torch.full((5,), 0.2), torch.full((7,), 1 / 7)
    share = (rows, columns) if form == "out" else (None, None)
    weights = (rows, None) if form == "index" else (rows, columns)
    ids = torch.arange(5), torch.arange(7) % 5
    return x, y, scale, *ids, *weights, *share, form, 0.0 if form == "in" else 0.1, True, "ieee", 0, 2**20, backend


@pytest.mark.parametrize("form", ["index", "out", "in"])
def test_opcheck(backend, form):
    arguments = op_arguments(form, backend)
    torch.library.opcheck(_softmax_loss.overload, arguments)
    *tensors, options_form, smoothing, normalize, precision, _, workspace, name = arguments
    saved, limits = _softmax_loss(*arguments)[1:], (precision, workspace, name)
    for need in ((True, False), (False, True)):
        torch.library.opcheck(
            _softmax_loss_backward.overload,
            [
                value.detach() if isinstance(value, torch.Tensor) else value
                for value in (torch.ones(()), *tensors, options_form, smoothing, normalize, *saved, *need, *limits)
            ],
        )


def numbers(x):
    """Each row's number, modulo 7."""
    return torch.arange(len(x), device=x.device) % 7


COMPILED = {
    "clip_loss": clip_loss,
    "out": lambda x, y, s: info_nce_loss(x, y, s, query_ids=numbers(x), key_ids=numbers(y)),
    "in": lambda x, y, s: info_nce_loss(
        x, y, s, query_ids=numbers(x), key_ids=numbers(y), positives="in", directions="both"
    ),
    "labels": lambda x, y, s: info_nce_loss(x, y, s, numbers(x), directions="both"),
}


def equal(ours, expected, backend):
    """To the bit; but Triton's powers that were kept of S have other references than those computed again."""
    if backend == "triton":
        return all(map(partial(torch.allclose, rtol=1e-5, atol=1e-6), ours, expected))
    return all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("form", ["clip", "labels", "offset", "columns", "both", "out", "in"])
def test_what_is_kept_of_s_changes_no_bit(backend, form):
    """Where memory allows, the backward reads S, or its powers, from the forward: the same as computing it again."""
    M, N, D = (70, 70, 60) if form == "clip" else (70, 75, 60)
    x, y, scale = rectangle(M, N, D)
    ids = {"query_ids": torch.arange(70) // 2, "key_ids": torch.arange(75) // 2}
    options = {
        "labels": {"labels": draw(torch.randperm, 75, generator=torch.Generator().manual_seed(0))[:70] - 1},
        "offset": {"offset": 3},
        "columns": {"offset": 3, "directions": "columns"},
        "both": {"offset": 3, "directions": "both", "label_smoothing": 0.1},
        "out": {**ids, "directions": "both"},
        "in": {**ids, "directions": "both", "positives": "in"},
    }
    call = clip_loss if form == "clip" else partial(info_nce_loss, **options[form])
    for logit_scale in (scale, torch.tensor(100.0)):
        again = run(partial(call, max_workspace=0), x, y, logit_scale)
        for most in (42_000, 2**24):  # Triton keeps the first 64 rows; all
            assert equal(run(partial(call, max_workspace=most), x, y, logit_scale), again, backend)


def test_s_is_kept_where_it_is_asked_for_and_no_larger_than_the_embeddings(backend):
    sizes = {}
    for B, keep, grad in ((40, 2**20, True), (40, 2**20, False), (40, 100, True), (600, 2**20, True)):
        x, y, scale = pairs(B, 64)
        ids, weight = torch.arange(B), torch.full((B,), 0.5 / B)
        plan = (ids, ids, weight, weight, None, None, "index", 0.0, True, "ieee", keep if grad else 0, 2**20)
        sizes[B, keep, grad] = _softmax_loss(x, y, scale, *plan, backend)[5].numel()
    expected = {"reference": [0, 0, 0, 0], "cpu": [4 * 40 * 40, 0, 0, 0]}
    if backend == "triton":  # whole bands of tiles: how many rows fit, memory decides
        assert sizes[40, 2**20, True] > 4 * 40 * 40
        assert sizes[40, 100, True] == 0
        assert 0 < sizes[600, 2**20, True] <= 2**20
    else:
        assert list(sizes.values()) == expected[backend]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(backend, name):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter)
    for B in (33, 40, 65):
        inputs = pairs(B, 8)
        assert equal(run(compiled, *inputs), run(COMPILED[name], *inputs), backend)
    assert counter.frame_count == 2  # the second size is traced again, with a symbol; the third runs as it is


def test_compiled_under_autocast_equals_eager(backend):
    torch.compiler.reset()
    inputs = pairs(33, 8)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        ours = run(torch.compile(clip_loss, fullgraph=True, backend="aot_eager"), *inputs)
    assert equal(ours, run(clip_loss, *inputs), backend)


def test_a_compiled_call_follows_use_backend(backend):
    torch.compiler.reset()
    used = []

    def graphs(module, inputs):
        used.extend(str(node.args) for node in module.graph.nodes if "softmax_loss" in str(node.target))
        return module.forward

    compiled = torch.compile(clip_loss, fullgraph=True, backend=graphs)
    inputs = pairs(33, 8)
    compiled(*inputs)
    with use_backend("reference"):
        compiled(*inputs)
    assert f"'{backend}'" in used[0]
    assert "'reference'" in used[-1]


def test_what_has_no_second_derivative_says_so(backend):
    image, text, scale = (tensor.requires_grad_() for tensor in pairs(5, 3))
    loss = clip_loss(image, text, scale)
    (dimage,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="vlmfast::softmax_loss_backward has no gradient"):
        (loss + dimage.square().sum()).backward()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: clip_loss(x, text, scale))(image)


# Refusals

X, Y, SCALE = torch.ones(4, 8), torch.ones(5, 8), torch.tensor(10.0)
IDS4, IDS5 = torch.arange(4), torch.arange(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, Y, SCALE), {}, ShapeError, r"clip_loss: image and text must .*\(4, 8\).*\(5, 8\)"),
        ((X, X[:, :7], SCALE), {}, ShapeError, r"clip_loss: .* width D"),
        ((X[0], X[0], SCALE), {}, ShapeError, r"clip_loss: image must be a matrix .* got shape \(8,\)"),
        ((X[:0], X[:0], SCALE), {}, ShapeError, r"clip_loss: image must have at least one row .* \(0, 8\)"),
        ((X[:, :0], X[:, :0], SCALE), {}, ShapeError, r"clip_loss: image must have at least one .* \(4, 0\)"),
        ((X.int(), X, SCALE), {}, DTypeError, r"clip_loss: image must be float32.* torch.int32"),
        ((X, X.to(torch.complex64), SCALE), {}, DTypeError, r"clip_loss: text must be float32"),
        ((X, X, torch.ones(2)), {}, ShapeError, r"clip_loss: logit_scale must hold one number.* \(2,\)"),
        ((X, X, torch.tensor(10)), {}, DTypeError, r"clip_loss: logit_scale must be float32.* torch.int64"),
        ((X, X.to("meta"), SCALE), {}, ValueError, r"clip_loss: .* one device; got image on cpu, text on meta"),
        ((X, X, SCALE), {"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ((X, X, SCALE), {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\); got -0.1"),
    ],
)
def test_clip_loss_refuses(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        clip_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offset": 2}, ShapeError, r"offset must be in \[0, N - M = 1\]; got 2 with 4 queries and 5 keys"),
        ({"offset": -1}, ShapeError, r"offset must be in"),
        ({"labels": IDS4.int()}, DTypeError, r"labels must be int64; got torch.int32"),
        ({"labels": IDS5}, ShapeError, r"labels must be \[4\]"),
        ({"labels": IDS4.to("meta")}, ValueError, r"one device"),
        ({"query_ids": IDS4}, ValueError, r"query_ids and key_ids go together"),
        ({"query_ids": IDS4, "key_ids": IDS4}, ShapeError, r"key_ids must be \[5\]"),
        ({"query_ids": IDS4.float(), "key_ids": IDS5}, DTypeError, r"query_ids must be int64"),
        ({"query_ids": IDS4, "key_ids": IDS5, "labels": IDS4}, ValueError, r"give the positives once"),
        ({"labels": IDS4, "offset": 1}, ValueError, r"give the positives once"),
        ({"positives": "all"}, ValueError, r"positives must be 'out', 'in' or 'soft'; got 'all'"),
        ({"directions": "row"}, ValueError, r"directions must be 'rows', 'columns' or 'both'; got 'row'"),
        ({"positives": "in", "label_smoothing": 0.1}, ValueError, r"positives='in' has no target to smooth"),
    ],
)
def test_info_nce_loss_refuses(backend, options, error, message):
    x, y, scale = (tensor.to(torch.get_default_device()) for tensor in (X, Y, SCALE))
    with pytest.raises(error, match=f"info_nce_loss: .*{message}"):
        info_nce_loss(x, y, scale, **options)


@pytest.mark.parametrize("shift", [2, -2])
def test_labels_beyond_the_keys(backend, monkeypatch, shift):
    """Refused on the CPU; on a GPU, where looking takes a synchronisation, when debugging; else they are none."""
    x, y, scale = rectangle(4, 5, 8)
    labels = torch.arange(4) + shift
    if x.device.type != "cpu":
        none = torch.where((labels < 0) | (labels >= 5), -1, labels)
        assert torch.equal(info_nce_loss(x, y, scale, labels), info_nce_loss(x, y, scale, none))
        monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), or -1 for none; got {5 if shift > 0 else -2}"):
        info_nce_loss(x, y, scale, labels)


def test_values_are_looked_at_when_debugging(backend, monkeypatch):
    image, text, scale = pairs(4, 8)
    image[2, 1] = math.nan
    monkeypatch.setenv("VLMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match=r"clip_loss: image must be finite; got nan at \(2, 1\)"):
        clip_loss(image, text, scale)
    with pytest.raises(ValueError, match=r"clip_loss: text row 3 is all zeros"):
        clip_loss(text, text * torch.tensor([1, 1, 1, 0])[:, None], scale)


def test_a_backend_that_cannot_run_says_why(backend):
    image, text, scale = pairs(4, 8, dtype=torch.float64)
    if backend == "reference":
        with (
            use_backend("triton"),
            pytest.raises(BackendError, match=r"clip_loss: backend 'triton' cannot run this call"),
        ):
            clip_loss(image, text, scale)
    else:
        with pytest.raises(BackendError, match=f"clip_loss: backend '{backend}' cannot run this call: .*float64"):
            clip_loss(image, text, scale)


def test_float64_runs_on_the_reference():
    image, text, scale = pairs(4, 8, dtype=torch.float64)
    assert clip_loss(image, text, scale).dtype == torch.float64
    assert clip_loss(image.float(), text, scale).dtype == torch.float64
