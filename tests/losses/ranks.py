"""Checks that run on every rank of a few processes, which test_distributed_loss.py starts."""

import importlib.util
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlmfast import ClipLoss, InfoNceLoss, SigLipLoss, _ext, distributed, use_backend
from vlmfast.distributed import Ranks, gather_rows, row_counts
from vlmfast.errors import BackendError, ShapeError
from vlmfast.losses.over_ranks import SIGLIP_TRANSPORTS, clip_loss_over_ranks, siglip_loss_over_ranks

WORLD = 4
MEMBERS = {2: [1, 3], 3: [0, 2, 3], 4: None}  # by size: no group's ranks are the world's, but the whole world's are
MODES = [(False, False), (False, True), (True, False), (True, True)]  # local_loss, gather_with_grad
B, D, WIDTH = 6, 5, 7
SCALE = 1 / 0.07


def run(folder, checks, timeout=300):
    """Runs the named checks on `WORLD` processes; what went wrong, as text, by rank."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, str(folder), checks)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + timeout
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    failures = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("failure-*"))]
    failures.sort(key=lambda text: "Connection closed by peer" in text)  # where another rank had failed before
    return failures + [f"rank {rank} did not end" for rank in late]


def _worker(rank, folder, checks):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="ClipLoss: local_loss")  # test_clip_loss.py has that
    warnings.filterwarnings("ignore", message=r".?torch\.distributed\.(nn|_functional_coll)")  # open_clip's, deprecated
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240))
    groups = {size: members and dist.new_group(members) for size, members in MEMBERS.items()}
    name = ""
    try:
        for name in checks:
            for size, members in MEMBERS.items():
                if members is None or rank in members:
                    globals()[name](World(size, groups[size], Path(folder)))
            dist.barrier()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"{name}, rank {rank}:\n{traceback.format_exc()}", encoding="utf-8")
        os._exit(1)
    dist.destroy_process_group()


class World:
    """A group of `size` ranks as one of them sees it, and the whole batch, of which every rank has some rows."""

    def __init__(self, size, group, folder):
        self.size, self.group, self.folder = size, group, folder
        self.rank = dist.get_rank(group)
        self.members = MEMBERS[size] or list(range(WORLD))

    def place(self):
        """What a loss is told of it."""
        return {"rank": self.rank, "world_size": self.size, "group": self.group}

    def average(self, x):
        """What DistributedDataParallel and FSDP do to gradients."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x / self.size

    def slice(self, sizes):
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def even(self):
        return [B] * self.size

    def uneven(self):
        return [B + 3 * (k % 2) - 2 * (k % 3) for k in range(self.size)]


def features(rows, dtype=torch.float64, seed=0):
    """Weakly matched rows of length one, with a scale and a bias: leaves."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, rows, D, generator=generator, dtype=torch.float64)
    image, text = (F.normalize(v, dim=1).to(dtype).requires_grad_() for v in (image, 0.5 * image + noise))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        image,
        text,
        torch.tensor(SCALE, dtype=wide).requires_grad_(),
        torch.tensor(-3.0, dtype=wide).requires_grad_(),
    )


def dense_clip(image, text, scale, bias=None):
    z, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2


def dense_siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def own(world, inputs, sizes):
    """This rank's rows of image and text, and the scalars: new leaves."""
    image, text, *scalars = inputs
    rows = world.slice(sizes)
    return [v.detach().clone().requires_grad_() for v in (image[rows], text[rows], *scalars)]


def value_and_gradients(loss, leaves):
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves, strict=True))]


def close(ours, exact, **options):
    torch.testing.assert_close(ours, exact, **({"rtol": 1e-11, "atol": 1e-13} | options))


def is_exact(world, loss, dense, sizes, factor=1.0, mean=True):
    """The averaged value and gradients are those of one process with the whole batch."""
    inputs = features(sum(sizes))
    value, *whole = value_and_gradients(dense, inputs)
    ours, *gradients = value_and_gradients(loss, own(world, inputs, sizes))
    close(world.average(ours), value)
    if not mean:
        close(ours, value)
    for gradient, exact in zip(gradients[:2], whole[:2], strict=True):
        close(gradient, factor * world.size * exact[world.slice(sizes)])
    for gradient, exact in zip(gradients[2:], whole[2:], strict=True):
        close(world.average(gradient) if mean else gradient, exact)


# The tower's view: the table of docs/distributed.md.


def towers():
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(WIDTH, D, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [v.requires_grad_() for v in (*weights, torch.tensor(SCALE, dtype=torch.float64).log())]


def through_towers(loss, pixels, words, bias=None):
    """Gradients of both towers and of the log of the scale, whose features the loss meets."""
    *weights, log_scale = parameters = towers()
    image, text = (F.normalize(x @ w, dim=1) for x, w in zip((pixels, words), weights, strict=True))
    arguments = (image, text, log_scale.exp(), *([] if bias is None else [bias]))
    return torch.autograd.grad(loss(*arguments), parameters)


def tower_batch(rows):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return pixels, pixels + torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def row_of_table(world, loss, dense, bias=None):
    """(length of the averaged tower gradient, its cosine, that of the scale) over those of one process."""
    rows = world.slice(world.even())
    pixels, words = tower_batch(B * world.size)
    exact = through_towers(dense, pixels, words, bias)
    ours = [world.average(g) for g in through_towers(loss, pixels[rows], words[rows], bias)]
    a, b = (torch.cat([g.flatten() for g in each[:2]]) for each in (ours, exact))
    return [float(v) for v in (a.norm() / b.norm(), F.cosine_similarity(a, b, 0), ours[2] / exact[2])]


def table(world):
    """Every flag's effect, ours and (where it is there) open_clip's."""
    theirs, found = open_clip_losses(), {}
    bias = torch.tensor(-3.0, dtype=torch.float64)
    for local_loss, gather_with_grad in MODES:
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        name = f"ClipLoss local_loss={local_loss}, gather_with_grad={gather_with_grad}"
        found[name] = row_of_table(world, ClipLoss(**flags, **world.place()), dense_clip)
        if theirs and world.group is None:
            loss = theirs.ClipLoss(**flags, rank=world.rank, world_size=world.size)
            found[f"open_clip {name}"] = row_of_table(world, loss, dense_clip)
    for name in SIGLIP_TRANSPORTS:
        loss = SigLipLoss(dist_impl=name, **world.place())
        found[f"SigLipLoss {name}"] = row_of_table(world, loss, dense_siglip, bias)
    if world.rank == 0:
        (world.folder / f"table-{world.size}.json").write_text(json.dumps(found), encoding="utf-8")


def open_clip_losses():
    """open_clip's loss.py alone, or None: it needs nothing but torch."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


# Each mode, transport and option on each rank.


def every_mode_is_open_clip_s(world):
    """Restated for one process: which gradients open_clip's gathering lets through."""
    inputs = features(B * world.size)
    for local_loss, gather_with_grad in MODES:
        loss = ClipLoss(local_loss, gather_with_grad, **world.place())
        if local_loss and not gather_with_grad:
            continue
        factor = 1.0 if gather_with_grad else 1 / world.size
        is_exact(world, loss, dense_clip, world.even(), factor, mean=local_loss)
    rows = world.slice(world.even())
    leaves = own(world, inputs, world.even())

    def rows_only(image, text, scale, bias):
        """local_loss without gather_with_grad: the columns are constants."""
        labels = torch.arange(B) + B * world.rank
        columns = inputs[0].detach(), inputs[1].detach()
        per_image, per_text = scale * image @ columns[1].T, scale * text @ columns[0].T
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    assert rows.stop - rows.start == B
    ours = value_and_gradients(ClipLoss(True, False, **world.place()), leaves)
    for value, exact in zip(ours, value_and_gradients(rows_only, leaves), strict=True):
        close(value, exact)


def beside_open_clip(world):
    """The value and each rank's own gradients, open_clip itself being there."""
    theirs = open_clip_losses()
    if world.group is not None:
        return  # its losses know the default group alone
    inputs = own(world, features(B * world.size), world.even())
    for local_loss, gather_with_grad in MODES:
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        expected = value_and_gradients(theirs.ClipLoss(**flags, rank=world.rank, world_size=world.size), inputs[:3])
        ours = value_and_gradients(ClipLoss(**flags, **world.place()), inputs[:3])
        for value, exact in zip(ours[:3], expected[:3], strict=True):
            close(value, exact)
        close(world.average(ours[3]), world.average(expected[3]))  # ranks share the work differently
        # Where all ranks compute all logits, open_clip adds a bias twice: one matrix is a view of the other.
        given = inputs if local_loss else inputs[:3]
        expected = theirs.ClipLoss(**flags, rank=world.rank, world_size=world.size).get_logits(*given)
        for value, exact in zip(ClipLoss(**flags, **world.place()).get_logits(*given), expected, strict=True):
            close(value, exact)
    for name in SIGLIP_TRANSPORTS:
        expected = value_and_gradients(
            theirs.SigLipLoss(rank=world.rank, world_size=world.size, dist_impl=name), inputs
        )
        ours = value_and_gradients(SigLipLoss(dist_impl=name, **world.place()), inputs)
        for value, exact in zip(ours, expected, strict=True):
            close(value, exact)


def transports_are_exact(world):
    for join in (1, 2 * B):
        distributed.JOIN = join
        for sizes, uneven in ((world.even(), False), (world.uneven(), True)):
            options = {"uneven": uneven, "group": world.group, "normalize": False}
            for transport in ("gather", "ring"):
                part = partial(clip_loss_over_ranks, transport=transport, **options)
                is_exact(world, without_bias(part), dense_clip, sizes)
                is_exact(world, without_bias(partial(part, whole=True)), dense_clip, sizes, mean=False)
            for name in SIGLIP_TRANSPORTS:
                is_exact(world, partial(siglip_loss_over_ranks, transport=name, **options), dense_siglip, sizes)
            if uneven:
                loss = ClipLoss(True, False, uneven=True, **world.place())
                inputs = features(sum(sizes))
                close(world.average(loss(*own(world, inputs, sizes))), dense_clip(*inputs).detach())


def without_bias(loss):
    return lambda image, text, scale, bias: loss(image, text, scale)


def ring_and_gather_give_the_same_bits(world):
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        if backend == "cpu" and _ext.C is None:
            continue
        for join in (1, 2 * B):
            distributed.JOIN = join
            for sizes in (world.even(), world.uneven()):
                inputs = own(world, features(sum(sizes), dtype), sizes)[:3]
                results = []
                for transport in ("gather", "ring"):
                    loss = ClipLoss(True, True, transport=transport, uneven=True, **world.place())
                    with use_backend(backend):
                        results.append(value_and_gradients(loss, inputs))
                assert all(map(torch.equal, *results)), (backend, join, sizes, results)
                assert all(bool(gradient.abs().sum() > 0) for gradient in results[0][1:])


def the_backends_agree(world):
    if _ext.C is None:
        return
    distributed.JOIN = 2 * B
    inputs = own(world, features(B * world.size, torch.float32), world.even())
    for loss in (ClipLoss(True, True, **world.place()), SigLipLoss(**world.place())):
        results = []
        for backend in ("reference", "cpu"):
            with use_backend(backend):
                results.append(value_and_gradients(loss, inputs))
        for reference, cpu in zip(*results, strict=True):
            close(cpu, reference, rtol=1e-5, atol=1e-6)


def short_floats(world):
    """Under autocast as without; float32 beside bfloat16; gradients in the inputs' dtypes."""
    distributed.JOIN = 1
    inputs, rows = features(B * world.size, torch.bfloat16), world.slice(world.even())
    image, text, *scalars = own(world, inputs, world.even())
    wide = text.detach().float().requires_grad_()
    for loss, dense in (
        (ClipLoss(True, True, **world.place()), dense_clip),
        (SigLipLoss(**world.place()), dense_siglip),
    ):
        exact = value_and_gradients(dense, [v.detach().double().requires_grad_() for v in inputs])
        for leaves in ([image, text, *scalars], [image, wide, *scalars]):
            for backend in ("reference", *(["cpu"] if _ext.C else [])):
                with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
                    ours = value_and_gradients(loss, leaves)
                assert ours[0].dtype == torch.float32
                assert [g.dtype for g in ours[1:]] == [v.dtype for v in leaves]
                close(world.average(ours[0]).double(), exact[0], rtol=1e-5, atol=1e-6)
                for gradient, truth in zip(ours[1:3], exact[1:3], strict=True):
                    truth = world.size * truth[rows]
                    # Each block's part is rounded to bfloat16 once, and so is the sum.
                    close(gradient.double(), truth, rtol=2**-7, atol=2**-7 * float(truth.abs().max()))


def scalars_of_one_number(world):
    """FSDP2's scale is [1]; a number has no gradient."""
    image, text, scale, bias = own(world, features(B * world.size), world.even())
    for shape in ((), (1,)):
        leaves = [v.detach().reshape(shape).requires_grad_() for v in (scale, bias)]
        for loss in (ClipLoss(True, True, **world.place()), SigLipLoss(**world.place())):
            value = loss(image, text, *leaves)
            gradients = torch.autograd.grad(value, leaves)
            assert value.shape == ()
            assert [g.shape for g in gradients] == [torch.Size(shape)] * 2
            assert gradients[0].abs() > 0
    a = clip_loss_over_ranks(image, text, SCALE, group=world.group, normalize=False)
    close(a, clip_loss_over_ranks(image, text, scale, group=world.group, normalize=False))
    out = ClipLoss(True, True, **world.place())(image, text, scale, output_dict=True)
    assert list(out) == ["contrastive_loss"]


def rows_of_any_length(world):
    inputs = features(B * world.size)
    longer = [(v.detach() * torch.rand(len(v), 1, dtype=v.dtype).add(0.5)).requires_grad_() for v in inputs[:2]]
    dist.broadcast(longer[0].detach(), world.members[0], group=world.group)
    dist.broadcast(longer[1].detach(), world.members[0], group=world.group)
    image, text, scale, _ = own(world, [*longer, *inputs[2:]], world.even())
    value, *exact = value_and_gradients(lambda x, y: dense_clip(F.normalize(x), F.normalize(y), scale.detach()), longer)
    ours, *gradients = value_and_gradients(
        lambda x, y: clip_loss_over_ranks(x, y, scale.detach(), group=world.group), [image, text]
    )
    close(world.average(ours), value)
    for gradient, truth in zip(gradients, exact, strict=True):
        close(gradient, world.size * truth[world.slice(world.even())])


def a_frozen_tower_sends_nothing_back(world):
    """A locked text tower: no gradient of it, none sent, and image's is the same."""
    image, text, scale, bias = own(world, features(B * world.size), world.even())
    plain = dist.batch_isend_irecv, dist.all_to_all_single
    sent = [0]

    def counted(original):
        def call(*arguments, **options):
            sent[0] += 1
            return original(*arguments, **options)

        return call

    losses = [ClipLoss(True, True, transport=t, **world.place()) for t in ("gather", "ring")]
    losses += [SigLipLoss(dist_impl=name, **world.place()) for name in ("gather", "shift")]
    distributed.JOIN = 1
    try:
        dist.batch_isend_irecv, dist.all_to_all_single = map(counted, plain)
        for loss in losses:
            counts, gradients = [], []
            for frozen in (False, True):
                sent[0] = 0
                value = loss(image, text.detach() if frozen else text, scale, bias)
                gradients.append(torch.autograd.grad(value, [image, scale]))
                counts.append(sent[0])
            assert counts[0] > counts[1], counts
            assert all(map(torch.equal, *gradients))
            value = loss(image.detach(), text, scale.detach(), bias)
            whole = loss(image, text, scale, bias)
            assert torch.equal(torch.autograd.grad(value, text)[0], torch.autograd.grad(whole, text)[0])
            value = loss(image.detach(), text.detach(), scale, bias)
            assert torch.equal(torch.autograd.grad(value, scale)[0], gradients[0][1])
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = plain


def a_nan_reaches_every_rank(world):
    image, text, scale, bias = own(world, features(B * world.size), world.even())
    if world.rank == 1:
        image = image.detach().index_fill(0, torch.tensor([2]), torch.nan).requires_grad_()
    for transport in ("gather", "ring"):
        value, _, d_text, _ = value_and_gradients(
            ClipLoss(True, True, transport=transport, **world.place()), [image, text, scale]
        )
        assert value.isnan()
        assert d_text.isnan().any()
    value = world.average(SigLipLoss(**world.place())(image, text, scale, bias))
    assert value.isnan()


def solved_pairs_stay_above_zero(world):
    """At a scale of 100 and pairs that match, what is left of the loss is far below a logit's rounding."""
    eye = torch.eye(B * world.size)[world.slice(world.even())].requires_grad_()
    value = ClipLoss(True, True, **world.place())(eye, eye.detach().clone().requires_grad_(), torch.tensor(100.0))
    assert 0 <= value < 1e-6
    value.backward()
    assert eye.grad.isfinite().all()


def differentiable_once(world):
    leaves = own(world, features(B * world.size), world.even())
    for loss in (ClipLoss(True, True, **world.place()), SigLipLoss(**world.place())):
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves[:3], retain_graph=True)
        again = torch.autograd.grad(value, leaves[:3], retain_graph=True)
        assert all(map(torch.equal, first, again))
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(value, leaves[:3], create_graph=True)
        with torch.no_grad():
            assert torch.equal(loss(*leaves), value)


def factors_of_the_loss(world):
    """Halved on every rank, every gradient is."""
    leaves = own(world, features(B * world.size), world.even())
    for loss in (ClipLoss(True, True, **world.place()), SigLipLoss(**world.place())):
        whole = value_and_gradients(loss, leaves)
        half = value_and_gradients(lambda *v: loss(*v) / 2, leaves)  # noqa: B023
        assert all(torch.equal(a / 2, b) for a, b in zip(whole, half, strict=True))


def other_logits_are_obeyed(world):
    """A margin on the diagonal, in every mode; and SigLIP's, which needs the texts of all."""

    class Margin(ClipLoss):
        def get_logits(self, *arguments, **options):
            per_image, per_text = super().get_logits(*arguments, **options)
            mine = F.one_hot(self.get_ground_truth(per_image.device, len(per_image)), per_image.shape[1])
            return per_image - mine, per_text - mine

    class Doubled(SigLipLoss):
        def get_logits(self, *arguments):
            return 2 * super().get_logits(*arguments)

    class Halved(SigLipLoss):
        def _loss(self, *arguments, **options):
            return super()._loss(*arguments, **options) / 2

    def with_margin(image, text, scale, bias=None):
        z = scale * image @ text.T - torch.eye(len(image), dtype=image.dtype)
        labels = torch.arange(len(image))
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2

    for local_loss, gather_with_grad in MODES:
        loss = Margin(local_loss, gather_with_grad, cache_labels=True, **world.place())
        if (local_loss, gather_with_grad) != (True, False):
            factor = 1.0 if gather_with_grad else 1 / world.size
            is_exact(world, loss, with_margin, world.even(), factor, mean=local_loss)
    doubled = lambda x, y, s, b: dense_siglip(x, y, 2 * s, 2 * b)  # noqa: E731
    is_exact(world, Doubled(**world.place()), doubled, world.even())
    is_exact(world, Halved(**world.place()), lambda *v: dense_siglip(*v) / 2, world.even())
    inputs = own(world, features(sum(world.even())), world.even())
    for loss in (Margin(True, True, uneven=True, **world.place()), Doubled(uneven=True, **world.place())):
        with pytest.raises(BackendError, match=r"all ranks must have as many rows, .* leave out uneven=True"):
            loss(*inputs)


def gathered_rows_have_their_gradient(world):
    """That of the sum of all ranks' losses, here each with a weight of its own."""
    for sizes in (world.even(), world.uneven()):
        inputs = features(sum(sizes))[0]
        leaf = inputs.detach()[world.slice(sizes)].requires_grad_()
        known = None if sizes == world.even() else row_counts(leaf, world.group)
        assert known in (None, sizes)
        every = gather_rows(leaf, world.group, sizes=known)
        assert torch.equal(every, inputs.detach())
        weights = [torch.linspace(k, 1, every.numel(), dtype=torch.float64).view_as(every) for k in range(world.size)]
        (every * weights[world.rank]).sum().backward()
        close(leaf.grad, sum(weights)[world.slice(sizes)])
    short = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([256.0 if k == world.rank else 1.0 for k in range(world.size)], dtype=torch.bfloat16)
    (gather_rows(short, world.group)[:, 0] * (weight if world.rank == 0 else weight.fill_(1))).sum().backward()
    if world.rank == 0:  # 256 + 1 + ...: in bfloat16 no 1 would change 256
        assert short.grad.item() == torch.tensor(255.0 + world.size).bfloat16().item()
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        rows = torch.full((2, 3), world.rank, dtype=dtype)
        assert gather_rows(rows, world.group)[:, 0].tolist() == [k for k in range(world.size) for _ in range(2)]
    with pytest.raises(ShapeError, match=r"gather_rows: sizes must hold the rows of each of"):
        gather_rows(torch.zeros(2, 3), world.group, sizes=[2])


def info_nce_finds_the_keys_of_all(world):
    """With labels (one query has none), an offset or ids; ranks differ in how many of their queries have a positive."""
    query, key, scale, _ = features(B * world.size)
    key = torch.cat([key, key.flip(0)]).detach().requires_grad_()  # twice as many keys
    rows, columns = world.slice(world.even()), world.slice([2 * B] * world.size)
    mine = [v.detach().clone().requires_grad_() for v in (query[rows], key[columns], scale)]
    first = 2 * B * torch.arange(world.size).repeat_interleave(B)
    labels = torch.arange(B * world.size) % B
    labels[0] = -1
    ids = torch.arange(B * world.size) % 4, torch.arange(2 * B * world.size) % 7 - 1  # 4 ... and -1 are nobody's
    ways = [
        ({"offset": 2}, {"labels": first + torch.arange(B).repeat(world.size) + 2}),
        ({"labels": labels[rows]}, {"labels": torch.where(labels >= 0, labels + first, -1)}),
        ({"query_ids": ids[0][rows], "key_ids": ids[1][columns]}, {"query_ids": ids[0], "key_ids": ids[1]}),
    ]
    for directions in ("rows", "columns", "both"):
        for own_positives, positives in ways:
            loss = InfoNceLoss(directions=directions, gather=True, group=world.group)
            ours = value_and_gradients(partial(loss, **own_positives), mine)
            exact = value_and_gradients(partial(InfoNceLoss(directions=directions), **positives), [query, key, scale])
            close(world.average(ours[0]), exact[0])
            close(ours[1], world.size * exact[1][rows])
            close(ours[2], world.size * exact[2][columns])
            close(world.average(ours[3]), exact[3])
    with pytest.raises(ShapeError, match=r"InfoNceLoss: offset must be in \[0, N - M = 6\]; got 7"):
        InfoNceLoss(gather=True, group=world.group)(*mine, offset=7)
    with pytest.raises(ValueError, match="InfoNceLoss: give the positives once"):
        InfoNceLoss(gather=True, group=world.group)(*mine, query_ids=ids[0][rows])


def unlike_ranks_are_told(world):
    """On every rank, so that none is left waiting."""
    image, text, scale, bias = own(world, features(sum(world.uneven())), world.uneven())
    message = rf"all ranks must have as many rows; got \[{world.uneven()[0]}, .*uneven=True"
    for loss in (ClipLoss(True, True, **world.place()), SigLipLoss(**world.place())):
        with pytest.raises(ShapeError, match=message):
            loss(image, text, scale, bias)
    with pytest.raises(ShapeError, match=message):
        ClipLoss(True, False, **world.place())(image, text, scale)
    rows = torch.zeros(B, D + (world.rank == 1), dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"one dtype; got, by rank, \[6, 5\] torch.float64, \[6, 6\] torch.float64"):
        ClipLoss(True, True, **world.place())(rows, rows, scale)
    rows = torch.zeros(B, D, dtype=torch.bfloat16 if world.rank else torch.float16)  # as many bytes
    with pytest.raises(ShapeError, match=r"one dtype; got, by rank, \[6, 5\] torch.float16, \[6, 5\] torch.bfloat16"):
        ClipLoss(True, True, **world.place())(rows, rows, scale)
    rows = torch.zeros(B * (world.rank != 0), D)
    with pytest.raises(ShapeError, match=r"every rank must have at least one row; got \[0, 6"):
        ClipLoss(True, True, uneven=True, **world.place())(rows, rows, scale)


class OnGpu:
    """As much of a tensor on a GPU as is asked of it before anything is sent."""

    device, dtype = SimpleNamespace(type="cuda"), torch.float32

    def __init__(self, rows):
        self.shape = (rows, D)

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return 2


class Counted(Ranks):
    exchanges = 0

    def counts(self, x):
        self.exchanges += 1
        return super().counts(torch.empty(x.shape))


def a_gpu_is_asked_once_for_a_shape(world):
    """Uneven calls ask each time, and say nothing of even ones: here of the shape that rank 0 had among others."""
    ranks, even, uneven = Counted(world.group), OnGpu(41), OnGpu(world.uneven()[world.rank] + 50)
    for _ in range(3):
        assert ranks.rows("loss", even) == [41] * world.size
    assert ranks.exchanges == 1
    for _ in range(2):
        assert ranks.rows("loss", uneven, uneven=True) == [n + 50 for n in world.uneven()]
    assert ranks.exchanges == 3
    assert ranks.rows("loss", OnGpu(world.uneven()[0] + 50)) == [world.uneven()[0] + 50] * world.size
    assert ranks.exchanges == 4


def another_rank_or_size_is_refused(world):
    image, text, scale, bias = own(world, features(B * world.size), world.even())
    for wrong in ({"rank": (world.rank + 1) % world.size, "world_size": world.size}, {"rank": 0, "world_size": 9}):
        for loss in (ClipLoss(True, True, group=world.group, **wrong), SigLipLoss(group=world.group, **wrong)):
            with pytest.raises(BackendError, match=rf"world_size={wrong['world_size']} were given, but this process"):
                loss(image, text, scale, bias)
    if world.group is not None:
        loss = ClipLoss(True, True, group=world.group)
        assert (loss.rank, loss.world_size) == (world.rank, world.size)
        sigmoid = SigLipLoss(group=world.group)
        assert (sigmoid.rank, sigmoid.world_size) == (world.rank, world.size)


CHECKS = [
    table,
    every_mode_is_open_clip_s,
    transports_are_exact,
    ring_and_gather_give_the_same_bits,
    the_backends_agree,
    short_floats,
    scalars_of_one_number,
    rows_of_any_length,
    a_frozen_tower_sends_nothing_back,
    a_nan_reaches_every_rank,
    solved_pairs_stay_above_zero,
    differentiable_once,
    factors_of_the_loss,
    other_logits_are_obeyed,
    gathered_rows_have_their_gradient,
    info_nce_finds_the_keys_of_all,
    unlike_ranks_are_told,
    a_gpu_is_asked_once_for_a_shape,
    another_rank_or_size_is_refused,
]
