"""cached_step: the plain step's gradients in the memory of a micro-batch, with dropout, autocast and ranks."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlmfast.errors import DataError, ShapeError
from vlmfast.ops.sigmoid_loss import siglip_loss
from vlmfast.ops.softmax_loss import clip_loss, info_nce_loss
from vlmfast.recipes.objective import contrastive
from vlmfast.train import NonFiniteError, SplitLoss, adamw, cached_step, plain_step

B = 11
MICRO = [1, 3, 4, 5, 6, 10, 11, 50]  # dividing and not; one row left over; all at once


@dataclass
class Pairs:
    image: torch.Tensor
    text: torch.Tensor
    ids: torch.Tensor

    def __len__(self):
        return len(self.image)

    def split(self, size):
        return [Pairs(*each) for each in zip(*(x.split(size) for x in (self.image, self.text, self.ids)), strict=True)]


class Towers(nn.Module):
    """Two perceptrons, which drop out where asked, and the scalars of a CLIP or a SigLIP."""

    def __init__(self, *, dropout=0.0, bias=False, checkpointing=False, shape=()):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 6))
        self.text = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 6, bias=False))
        self.logit_scale = nn.Parameter(torch.full(shape, math.log(9.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if bias else None
        self.checkpointing = checkpointing

    def forward(self, image, text):
        run = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if self.checkpointing else lambda f, x: f(x)
        features = {
            "image_features": F.normalize(run(self.image, image), dim=1),
            "text_features": F.normalize(run(self.text, text), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }
        return features if self.logit_bias is None else {**features, "logit_bias": self.logit_bias}


def pairs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, B, 8, generator=generator, dtype=torch.float64)
    return Pairs(image.to(dtype), (image.flip(1) + noise).to(dtype), torch.tensor([0, 1, 2, 0, 1, 5, 6, 0, 8, 9, 9]))


def softmax(out, batch):
    features = out["image_features"], out["text_features"]
    return {"contrastive_loss": clip_loss(*features, out["logit_scale"], normalize=False)}


def sigmoid(out, batch):
    features = out["image_features"], out["text_features"]
    return {"contrastive_loss": siglip_loss(*features, out["logit_scale"], out["logit_bias"], normalize=False)}


def by_ids(out, batch):
    features = out["image_features"], out["text_features"]
    ids = {"query_ids": batch.ids, "key_ids": batch.ids, "directions": "both"}
    return {"contrastive_loss": info_nce_loss(*features, out["logit_scale"], normalize=False, **ids)}


def of(loss):
    return SplitLoss(lambda model, batch: model(batch.image, batch.text), loss)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid, "by_ids": by_ids}


def towers(loss="softmax", dtype=torch.float64, **options):
    return Towers(bias=loss == "sigmoid", **options).to(dtype)


def still(model):
    """An optimizer that keeps the weights where they are, so that gradients can be compared."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def close(found, exact, eps, sums=1):
    """Whether gradients differ by the rounding of `sums` partial sums, each as large as the tensor's largest entry."""
    assert found.keys() == exact.keys()
    for name, grad in exact.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            error = (found[name].double() - grad.double()).abs().max().item()
            assert error <= 4 * sums * eps * grad.abs().max().item(), (name, error)


def over_pieces(model, loss_fn, batch, size, autocast=False):
    """Plain autograd over the same micro-batches, drawing the same random numbers: (metrics, gradients)."""
    model.zero_grad()

    def mixed():
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    outputs = []
    for piece in batch.split(size):
        with mixed():
            outputs.append(loss_fn.embed(model, piece))
    whole = {k: torch.cat([o[k] for o in outputs]) if v.dim() == 2 else v for k, v in outputs[0].items()}
    with mixed():
        loss = loss_fn.loss(whole, batch)["contrastive_loss"]
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("size", MICRO)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_plain_steps(loss, size):
    plain, cached, batch, loss_fn = towers(loss), towers(loss), pairs(), of(LOSSES[loss])
    expected = plain_step(plain, loss_fn, batch, still(plain), 0.0, step=1)
    found = cached_step(cached, loss_fn, batch, still(cached), 0.0, step=1, micro_batch_size=size)
    close(gradients(cached), gradients(plain), torch.finfo(torch.float64).eps, sums=B)
    assert found == pytest.approx(expected, rel=1e-6)
    assert {name: p.grad.shape for name, p in cached.named_parameters()} == {
        name: p.shape for name, p in cached.named_parameters()
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_in_float32(loss):
    exact, cached, loss_fn = towers(loss), towers(loss, torch.float32), of(LOSSES[loss])
    plain_step(exact, loss_fn, pairs(), still(exact), 0.0, step=1)
    cached_step(cached, loss_fn, pairs(torch.float32), still(cached), 0.0, step=1, micro_batch_size=3)
    # A logit of up to 9 is rounded by 9 * eps, and so is the softmax that the gradient is made of.
    close(gradients(cached), gradients(exact), 9 * torch.finfo(torch.float32).eps, sums=B)


@pytest.mark.parametrize("size", MICRO)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed(size, checkpointing):
    options = {"dropout": 0.3, "checkpointing": checkpointing}
    plain, cached, batch, loss_fn = towers(**options), towers(**options), pairs(), of(softmax)
    torch.manual_seed(5)
    value, expected = over_pieces(plain, loss_fn, batch, size)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found = cached_step(cached, loss_fn, batch, still(cached), 0.0, step=1, micro_batch_size=size)
    close(gradients(cached), expected, torch.finfo(torch.float64).eps, sums=B)
    assert found["contrastive_loss"] == pytest.approx(value, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_loss_that_draws_random_numbers_draws_them_between_the_passes():
    batch, noisy = pairs(), of(lambda out, batch: softmax({**out, "logit_scale": 9 * torch.rand(())}, batch))
    plain, cached = towers(dropout=0.3), towers(dropout=0.3)
    torch.manual_seed(5)
    _, expected = over_pieces(plain, noisy, batch, 4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    cached_step(cached, noisy, batch, still(cached), 0.0, step=1, micro_batch_size=4)
    close(gradients(cached), expected, torch.finfo(torch.float64).eps, sums=B)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("size", [3, 11])
def test_autocast(size):
    dtypes = []

    def seen(out, batch):
        dtypes.append(out["image_features"].dtype)
        return softmax(out, batch)

    plain, cached, batch = towers(dtype=torch.float32), towers(dtype=torch.float32), pairs(torch.float32)
    _, expected = over_pieces(plain, of(seen), batch, size, autocast=True)
    options = {"step": 1, "micro_batch_size": size, "precision": "amp_bf16"}
    cached_step(cached, of(seen), batch, still(cached), 0.0, **options)
    close(gradients(cached), expected, torch.finfo(torch.bfloat16).eps, sums=-(-B // size))
    assert dtypes[0] == dtypes[1]  # features stay in the dtype that the model gave
    assert {p.grad.dtype for p in cached.parameters()} == {torch.float32}


@pytest.mark.parametrize("pieces", [{}, {"micro_batch_size": 4}])
def test_an_outer_autocast_changes_nothing(pieces):
    """Its cache would keep weights that were cast without a graph, or before the optimizer changed them."""
    models = [towers(dtype=torch.float32) for _ in range(2)]
    for outer, model in enumerate(models):
        optimizer = adamw(model)
        with torch.autocast("cpu", torch.bfloat16) if outer else nullcontext():
            for step in range(3):
                options = {"step": step + 1, "precision": "amp_bf16", **pieces}
                take = cached_step if pieces else plain_step
                take(model, of(softmax), pairs(torch.float32, seed=step), optimizer, 1e-2, **options)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_after_three_steps(loss):
    plain, cached = towers(loss), towers(loss, shape=(1,))
    rates = {True: adamw(plain), False: adamw(cached)}
    for step in range(3):
        batch, options = pairs(seed=step), {"step": step + 1, "grad_clip_norm": 0.05}
        expected = plain_step(plain, of(LOSSES[loss]), batch, rates[True], 1e-2, **options)
        found = cached_step(cached, of(LOSSES[loss]), batch, rates[False], 1e-2, micro_batch_size=4, **options)
        assert found == pytest.approx(expected, rel=1e-6)
        assert list(found) == list(expected)
    assert found["grad_norm"] > 0.05
    for ours, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.view_as(ours), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["image", "logit_scale"])
@pytest.mark.parametrize("size", [4, 11])
def test_what_is_frozen_gets_no_gradient(frozen, size):
    asked = []

    def loss(out, batch):
        asked.append({name for name, value in out.items() if value.requires_grad})
        return softmax(out, batch)

    models = [towers(), towers()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    plain, cached = models
    plain_step(plain, of(loss), pairs(), still(plain), 0.0, step=1)
    cached_step(cached, of(loss), pairs(), still(cached), 0.0, step=1, micro_batch_size=size)
    close(gradients(cached), gradients(plain), torch.finfo(torch.float64).eps, sums=B)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2


def test_an_output_that_the_loss_leaves_out_gets_no_gradient():
    plain, cached = towers("sigmoid"), towers("sigmoid")
    plain_step(plain, of(softmax), pairs(), still(plain), 0.0, step=1)
    cached_step(cached, of(softmax), pairs(), still(cached), 0.0, step=1, micro_batch_size=4)
    assert cached.logit_bias.grad is None
    close(gradients(cached), gradients(plain), torch.finfo(torch.float64).eps, sums=B)


def test_only_a_micro_batch_has_a_graph():
    """Bytes kept for the backward at one time, of a forward over all and over micro-batches."""
    live, peak = 0, []

    def keep(x):
        nonlocal live
        live += x.nbytes
        peak[-1] = max(peak[-1], live)
        return x

    def give(x):
        nonlocal live
        live -= x.nbytes
        return x

    model, batch = towers(), pairs()
    for size in (11, 4, 1):
        live = 0
        peak.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, give):
            cached_step(model, of(softmax), batch, still(model), 0.0, step=1, micro_batch_size=size)
    assert peak[0] > 1.8 * peak[1] > 2 * peak[2]


def test_a_plain_step_takes_a_split_loss_and_a_compiled_model():
    model, compiled = towers(), towers()
    plain_step(model, of(softmax), pairs(), still(model), 0.0, step=1)
    wrapped = torch.compile(compiled, backend="eager")
    metrics = cached_step(wrapped, of(softmax), pairs(), still(wrapped), 0.0, step=1, micro_batch_size=4)
    close(gradients(compiled), gradients(model), torch.finfo(torch.float64).eps, sums=B)
    assert metrics["logit_scale"] == pytest.approx(9, rel=1e-6)


@pytest.mark.parametrize("size", [4, 11])
def test_what_is_not_finite_never_reaches_the_weights(size):
    model = towers()
    before = copy.deepcopy(model.state_dict())
    batch = pairs()
    batch.image[5] = math.nan
    with pytest.raises(NonFiniteError, match="step 7: contrastive_loss is nan"):
        cached_step(model, of(softmax), batch, adamw(model), 1.0, step=7, micro_batch_size=size)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batch_norms_are_refused_unless_they_are_frozen_or_see_the_whole_batch():
    model = towers()
    model.image.insert(1, nn.BatchNorm1d(16).double())
    run = {"step": 1, "micro_batch_size": 4}
    with pytest.raises(ValueError, match=r"image.1 is a batch norm in training mode.*Freeze it"):
        cached_step(model, of(softmax), pairs(), still(model), 0.0, **run)
    cached_step(model, of(softmax), pairs(), still(model), 0.0, step=1, micro_batch_size=B)
    model.image[1].eval()
    cached_step(model, of(softmax), pairs(), still(model), 0.0, **run)


def test_refusals():
    model, run = towers(), {"step": 1, "micro_batch_size": 4}

    def step(embed, **changes):
        cached_step(model, SplitLoss(embed, softmax), pairs(), still(model), 0.0, **{**run, **changes})

    with pytest.raises(TypeError, match=r"must be a SplitLoss.*got function"):
        cached_step(model, lambda *_: {}, pairs(), still(model), 0.0, **run)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1; got 0"):
        step(of(softmax).embed, micro_batch_size=0)
    with pytest.raises(ValueError, match="one of fp32, amp_bf16; got 'fp16'"):
        step(of(softmax).embed, precision="fp16")
    with pytest.raises(ValueError, match=r"'..._loss'; got \['sum'\]"):
        cached_step(model, of(lambda out, batch: {"sum": out["logit_scale"]}), pairs(), still(model), 0.0, **run)
    with pytest.raises(TypeError, match="'logit_bias' as NoneType"):
        step(lambda model, b: {**model(b.image, b.text), "logit_bias": None})
    with pytest.raises(ShapeError, match=r"'flat' of shape \(4,\) for 4 samples"):
        step(lambda model, batch: {"flat": batch.image[:, 0]})
    with pytest.raises(ShapeError, match=r"'twice' of shape \(8, 8\) for 4 samples"):
        step(lambda model, batch: {"twice": batch.image.repeat(2, 1)})
    with pytest.raises(ValueError, match="scalar 'logit_scale' differs between micro-batches"):
        step(lambda model, b: {**model(b.image, b.text), "logit_scale": 0.01 * b.image.square().mean()})


def test_an_objective_by_ids_needs_ids():
    batch = replace(pairs(), ids=None)
    with pytest.raises(DataError, match="positives='out' needs batches with ids"):
        plain_step(towers(), contrastive(positives="out"), batch, still(towers()), 0.0, step=1)


@pytest.mark.parametrize("positives", ["pair", "out", "in", "soft"])
def test_a_bias_takes_part_in_the_softmax_losses_too(positives):
    model = towers("sigmoid")
    plain_step(model, contrastive(positives=positives), pairs(), still(model), 0.0, step=1)
    assert model.logit_bias.grad == 0  # None would be a parameter that DDP waits for


W = 2
OBJECTIVES = {
    "softmax": {},
    "sigmoid": {"siglip": True},
    "out": {"positives": "out"},
    "in": {"positives": "in"},
    "soft": {"positives": "soft"},
}


def of_rank(rank, batch, size):
    return Pairs(*(x[rank * size : (rank + 1) * size] for x in (batch.image, batch.text, batch.ids)))


def on_a_rank(rank, folder):
    """What each of W processes runs; its findings lie in a file of the folder."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    batch, found, group = of_rank(rank, pairs(), 5), {}, dist.group.WORLD
    for name, flags in OBJECTIVES.items():
        loss_fn = contrastive(**flags, rank=rank, world_size=W, group=group)
        for size in (2, 5):
            model = towers("sigmoid" if name == "sigmoid" else "softmax")
            shared, rounds = DistributedDataParallel(model), []

            def count(state, bucket, rounds=rounds):
                rounds.append(bucket.is_last())
                flat = bucket.buffer().div_(W)
                return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])

            shared.register_comm_hook(None, count)
            options = {"step": 1, "group": group}
            metrics = cached_step(shared, loss_fn, batch, still(model), 0.0, micro_batch_size=size, **options)
            found[name, size] = {"gradients": gradients(model), "metrics": metrics, "rounds": rounds}

    model, loss_fn = towers(shape=(1,)), contrastive(rank=rank, world_size=W, group=group)
    mesh = init_device_mesh("cpu", (W,))
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    optimizer = adamw(model)
    for step in range(3):
        options = {"step": step + 1, "grad_clip_norm": 0.05, "group": group}
        batch = of_rank(rank, pairs(seed=step), 5)
        metrics = cached_step(model, loss_fn, batch, optimizer, 1e-2, micro_batch_size=2, **options)
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    found["fsdp"] = {"weights": weights, "metrics": metrics}

    if rank == 1:
        batch.image[0] = math.nan
    alone = SplitLoss(lambda model, b: model(b.image, b.text), softmax)
    refused = []
    for take in (plain_step, partial(cached_step, micro_batch_size=2)):
        try:
            take(towers(), alone, batch, still(model), 0.0, step=4, group=group)
        except NonFiniteError as error:
            refused.append(str(error))
    found["refused"] = refused
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=W)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", [2, 5])
def test_two_ranks_have_one_processes_gradients_after_one_round(ranks, name, size):
    model, batch = towers("sigmoid" if name == "sigmoid" else "softmax"), of_rank(0, pairs(), 10)
    expected = plain_step(model, contrastive(**OBJECTIVES[name]), batch, still(model), 0.0, step=1)
    for found in ranks:
        close(found[name, size]["gradients"], gradients(model), torch.finfo(torch.float64).eps, sums=B)
        assert found[name, size]["metrics"] == pytest.approx(expected, rel=1e-6)
        assert found[name, size]["rounds"] == [True]


@pytest.mark.slow
def test_fsdp_takes_the_same_steps(ranks):
    model = towers(shape=(1,))
    optimizer = adamw(model)
    for step in range(3):
        batch, options = of_rank(0, pairs(seed=step), 10), {"step": step + 1, "grad_clip_norm": 0.05}
        expected = plain_step(model, contrastive(), batch, optimizer, 1e-2, **options)
    for found in ranks:
        assert found["fsdp"]["metrics"] == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["fsdp"]["weights"][name], parameter.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_stops_all(ranks):
    assert [len(found["refused"]) for found in ranks] == [2, 2]
    assert all("step 4: contrastive_loss is nan" in each for found in ranks for each in found["refused"])
