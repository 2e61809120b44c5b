"""DistillClipLoss in the place of open_clip's: one process, and several."""

import inspect
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.losses import distill
from vlmfast.losses.clip import ClipLoss
from vlmfast.losses.distill import DistillClipLoss
from vlmfast.testing import Watch, assert_accurate, pairs

NAMES = [
    "image_features",
    "text_features",
    "logit_scale",
    "dist_image_features",
    "dist_text_features",
    "dist_logit_scale",
]


def open_clip_loss(image, text, scale, images, texts, dist_image, dist_text, dist_scale, dist_images, dist_texts, own):
    """open_clip 3.3.0's, restated: rows against columns, and each row's own column."""

    def dist_loss(teacher, student):
        return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean(0)

    per_image, per_text = scale * image @ texts.T, scale * text @ images.T
    teacher_image, teacher_text = dist_scale * dist_image @ dist_texts.T, dist_scale * dist_text @ dist_images.T
    contrastive = (F.cross_entropy(per_image, own) + F.cross_entropy(per_text, own)) / 2
    return contrastive, (dist_loss(teacher_image, per_image) + dist_loss(teacher_text, per_text)) / 2


def of_one_process(image, text, scale, dist_image, dist_text, dist_scale):
    own = torch.arange(len(image), device=image.device)
    return open_clip_loss(
        image, text, scale, image, text, dist_image, dist_text, dist_scale, dist_image, dist_text, own
    )


def features(B=65, D=20, E=12, *, match=0.2, scale=1 / 0.07, dtype=torch.float32):
    """Student and teacher, of other widths; the teacher knows more."""
    image, text, scale = pairs(B, D, match=match, scale=scale)
    dist_image, dist_text, dist_scale = pairs(B, E, match=0.8, scale=20.0, seed=1)
    image, text, dist_image, dist_text = (F.normalize(v, dim=1).to(dtype) for v in (image, text, dist_image, dist_text))
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), dist_image, dist_text, dist_scale


def gradients(losses, leaves):
    return [g for loss in losses for g in torch.autograd.grad(loss, leaves, retain_graph=True)]


def check(arguments, loss=None):
    """Both losses and their gradients, within rounding of open_clip's in float64 on the same inputs."""
    losses = (loss or DistillClipLoss())(*arguments)
    leaves = arguments[:3]
    exact_arguments = [v.detach().double().requires_grad_(v.requires_grad) for v in arguments]
    exact = of_one_process(*exact_arguments)
    scale, B = arguments[2].detach(), len(arguments[0])
    for ours, truth, name in zip(losses, exact, ("contrastive", "distill"), strict=True):
        assert ours.shape == ()
        assert_accurate(ours, truth, size=1, cond=scale, name=name)
    found, truths = gradients(losses, leaves), gradients(exact, exact_arguments[:3])
    sizes = 2 * [scale / B, scale / B, torch.tensor(1.0)]
    for i, v in enumerate(leaves):  # distillation's gradient is the contrastive one and another, each in v's dtype
        sizes[3 + i] = sizes[i] + truths[i].abs() * torch.finfo(v.dtype).eps / torch.finfo(torch.float32).eps / scale
    names = [f"d {each} of {of}" for of in ("contrastive", "distill") for each in ("image", "text", "scale")]
    for ours, truth, size, name in zip(found, truths, sizes, names, strict=True):
        assert_accurate(ours, truth, size=size, cond=scale, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B", [1, 2, 65, 300])
def test_it_is_open_clip_s_loss(backend, B, dtype):
    check(features(B, dtype=dtype))


@pytest.mark.parametrize("match", [0.2, 1.0], ids=["strangers", "copies"])
def test_at_clip_s_last_scale(backend, match):
    check(features(match=match, scale=100.0))


def test_a_teacher_as_wide_as_the_student_and_one_wider(backend):
    for E in (20, 33):
        check(features(E=E))


def test_float64_is_exact_to_float64():
    arguments = [v.detach().double().requires_grad_(v.requires_grad) for v in features()]
    ours, exact = DistillClipLoss()(*arguments), of_one_process(*arguments)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)
    for a, b in zip(gradients(ours, arguments[:3]), gradients(exact, arguments[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_its_own_teacher(backend):
    """A student that is its teacher is left with the entropy of its answers; distillation pulls it nowhere."""
    image, text, scale, *_ = features()
    p = (scale * image @ text.T).detach()
    entropy = [-(z.softmax(1) * z.log_softmax(1)).sum(1).mean() for z in (p, p.T)]
    _, loss = DistillClipLoss()(image, text, scale, image.detach(), text.detach(), scale.detach())
    torch.testing.assert_close(loss, sum(entropy) / 2, rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(loss, (image, text)):
        assert gradient.abs().max() < 1e-6 * scale


def test_a_certain_teacher_teaches_the_pairs(backend):
    image, text, scale, dist_image, *_ = features()
    contrastive, loss = DistillClipLoss()(image, text, scale, dist_image, dist_image, torch.tensor(1e4))
    torch.testing.assert_close(loss, contrastive, rtol=1e-6, atol=0)


def test_the_teacher_gets_no_gradient():
    arguments = [v.detach().requires_grad_() for v in features()]
    losses = DistillClipLoss()(*arguments)
    sum(losses).backward()
    assert [v.grad is None for v in arguments] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_tower_and_scale(frozen):
    arguments = list(features())
    arguments[frozen] = arguments[frozen].detach()
    leaves = [v for v in arguments if v.requires_grad]
    ours, exact = (torch.autograd.grad(f(*arguments)[1], leaves) for f in (DistillClipLoss(), of_one_process))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_dict_and_a_scale_of_shape_1():
    arguments = list(features())
    arguments[2] = arguments[2].detach().reshape(1).requires_grad_()
    arguments[5] = arguments[5].reshape(1)
    check(arguments)
    both = DistillClipLoss()(*arguments, output_dict=True)
    assert list(both) == ["contrastive_loss", "distill_loss"]
    assert list(both.values()) == list(DistillClipLoss()(*arguments))


def test_nothing_of_the_size_of_the_logits_is_held(backend, monkeypatch):
    monkeypatch.setattr(distill, "ROWS", 50)
    arguments = features(400, 8, 8)
    leaves = arguments[:3]
    with Watch(400 * 400):
        losses = DistillClipLoss()(*arguments)
        torch.autograd.grad(sum(losses), leaves)


def test_the_same_in_any_chunks(monkeypatch):
    arguments = [v.detach().double().requires_grad_(v.requires_grad) for v in features()]
    whole = DistillClipLoss()(*arguments)
    for rows in (1, 7, 64):
        monkeypatch.setattr(distill, "ROWS", rows)
        chunked = DistillClipLoss()(*arguments)
        torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
        for a, b in zip(gradients(chunked, arguments[:3]), gradients(whole, arguments[:3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_autocast_changes_nothing(backend):
    arguments = features()
    plain = DistillClipLoss()(*arguments)
    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
        ours = DistillClipLoss()(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracing
def test_compiles_whole(backend):
    arguments = features()
    loss = DistillClipLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*arguments), loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    for a, b in zip(gradients(ours, arguments[:3]), gradients(eager, arguments[:3]), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused():
    image, *rest = features()
    _, loss = DistillClipLoss()(image, *rest)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(loss, image, create_graph=True)[0].sum(), image)


@pytest.mark.parametrize("method", ["get_logits", "get_ground_truth", "dist_loss"])
def test_a_patched_method_is_obeyed(monkeypatch, method):
    arguments = features()
    ours, called = DistillClipLoss(), []
    original = getattr(ours, method)
    monkeypatch.setattr(ours, method, lambda *a, **k: called.append(method) or original(*a, **k))
    torch.testing.assert_close(ours(*arguments), of_one_process(*arguments))
    assert called


def test_its_arguments_are_open_clip_s():
    assert issubclass(DistillClipLoss, ClipLoss)
    assert list(inspect.signature(DistillClipLoss().forward).parameters) == [*NAMES, "output_dict"]


def test_equals_the_installed_open_clip(open_clip):
    arguments = features()
    torch.testing.assert_close(DistillClipLoss()(*arguments), open_clip.loss.DistillClipLoss()(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {3: torch.ones(64, 12), 4: torch.ones(64, 12)},
            ShapeError,
            r"dist_image_features .*\(64, 12\) and \(65, 20\)",
        ),
        ({4: torch.ones(65, 11)}, ShapeError, r"dist_image_features and dist_text_features .*\(65, 12\).*\(65, 11\)"),
        ({3: torch.ones(65)}, ShapeError, r"dist_image_features must be a matrix"),
        ({3: torch.ones(65, 12).int()}, DTypeError, r"dist_image_features must be float32"),
        ({5: torch.ones(2)}, ShapeError, r"dist_logit_scale must hold one number"),
        ({1: torch.ones(64, 20)}, ShapeError, r"image and text .*\(65, 20\).*\(64, 20\)"),
        ({3: torch.ones(65, 12, device="meta")}, ValueError, r"must be on one device"),
    ],
)
def test_refusals(change, error, message):
    arguments = list(features())
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error, match=message):
        DistillClipLoss()(*arguments)


# Several processes

MODES = [(local_loss, with_grad) for local_loss in (False, True) for with_grad in (False, True)]


def expected(arguments, sizes, rank, local_loss, with_grad):
    """What rank `rank` must get: open_clip's losses, and each one's gradients of its image, text and scale.

    Gathered with its gradient, a feature gets what every rank's loss says of it; else what its own rank's does.
    """
    image, text, scale, dist_image, dist_text, dist_scale = (v.detach() for v in arguments)
    sides = [[v.clone().requires_grad_() for v in side.split(sizes)] for side in (image, text)]
    teacher = [side.split(sizes) for side in (dist_image, dist_text)]
    leaves = sides[0][rank], sides[1][rank], scale.requires_grad_()

    def losses_of(k):
        columns = [
            torch.cat(
                [v if with_grad or (owner == k and not local_loss) else v.detach() for owner, v in enumerate(side)]
            )
            for side in sides
        ]
        rows = [side[k] for side in (*sides, *teacher)] if local_loss else [*columns, dist_image, dist_text]
        own = torch.arange(len(rows[0])) + (sum(sizes[:k]) if local_loss else 0)
        losses = open_clip_loss(*rows[:2], leaves[2], *columns, *rows[2:], dist_scale, dist_image, dist_text, own)
        weight = len(sizes) * len(rows[0]) / sum(sizes) if local_loss else 1  # so that the parts' mean is the whole's
        return [weight * loss for loss in losses]

    mine, every = losses_of(rank), [losses_of(k) for k in range(len(sizes))] if with_grad else None
    towers = [sum(each[i] for each in every) for i in (0, 1)] if every else mine
    return [
        (
            mine[i].detach(),
            *torch.autograd.grad(towers[i], leaves[:2], retain_graph=True),
            *torch.autograd.grad(mine[i], leaves[2:], retain_graph=True),
        )
        for i in (0, 1)
    ]


def run_rank(rank, world, store):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the biased modes
    options = {"init_method": f"file://{store}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **options)
    arguments = [v.detach().double() for v in features(6 * world, 5, 4)]
    for local_loss, with_grad in MODES:
        for sizes in ([6] * world, [6 + world - 1, *[5] * (world - 1)]):
            uneven = len(set(sizes)) > 1
            truth = expected(arguments, sizes, rank, local_loss, with_grad)
            leaves = [v.split(sizes)[rank].clone().requires_grad_() for v in arguments[:2]]
            leaves.append(arguments[2].clone().requires_grad_())
            dist_image, dist_text = (v.split(sizes)[rank] for v in arguments[3:5])
            loss = DistillClipLoss(local_loss, with_grad, rank=rank, world_size=world, uneven=uneven)
            losses = loss(*leaves, dist_image, dist_text, arguments[5])
            for i in (0, 1):
                found = losses[i], *torch.autograd.grad(losses[i], leaves, retain_graph=True)
                for scale_gradient in (found[3], truth[i][3]):  # what each rank has of it is its own affair
                    dist.all_reduce(scale_gradient)
                for ours, exact, name in zip(found, truth[i], ("value", "image", "text", "scale"), strict=True):
                    message = f"{name} of loss {i}, {local_loss=}, {with_grad=}, {sizes=}, {rank=}"
                    assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-13), f"{message}: {ours} is not {exact}"
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_mode_of_open_clip_over_ranks(tmp_path):
    world = 3
    torch.multiprocessing.spawn(run_rank, (world, tmp_path / "store"), nprocs=world)
