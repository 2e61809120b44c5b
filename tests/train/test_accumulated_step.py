"""accumulated_step: the gradient of the mean over all terms, however unevenly they lie on pieces and ranks."""

import io
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlmfast.errors import ShapeError
from vlmfast.train import adamw, fit, plain_step, read_metrics, warmup_constant
from vlmfast.train.step import NonFiniteError, SummedLoss, accumulated_step

LENGTHS = (3, 9, 1, 6, 2, 7, 4, 5)  # tokens of each sequence
SUPERVISED = (1, 8, 0, 2, 2, 0, 3, 1)  # of them; the pieces of two have 9, 2, 2 and 4
CLASSES = 5
DOUBLE = torch.finfo(torch.float64).eps


@dataclass
class Sequences:
    x: list  # of [T_b, 8]
    labels: list  # of [T_b], -100 where nothing is supervised

    def __len__(self):
        return len(self.x)

    @property
    def tokens(self):
        return sum(map(len, self.x))

    def split(self, size):
        places = range(0, len(self), size)
        return [Sequences(self.x[i : i + size], self.labels[i : i + size]) for i in places]

    def to(self, device, *, non_blocking=False):
        return self


def sequences(seed=0, rows=slice(None)):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(length, 8, generator=generator, dtype=torch.float64) for length in LENGTHS]
    labels = [torch.randint(CLASSES, (length,), generator=generator) for length in LENGTHS]
    for label, supervised in zip(labels, SUPERVISED, strict=True):
        label[: len(label) - supervised] = -100
    return Sequences(x[rows], labels[rows])


def reader(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, CLASSES)).to(dtype)


def summed(model, batch, count):
    logits, labels = model(torch.cat(batch.x)), torch.cat(batch.labels)
    hits = (logits.argmax(1) == labels).sum()
    return {"text_loss": F.cross_entropy(logits, labels, reduction="sum") / count, "accuracy": hits / count}


LOSS = SummedLoss(summed, lambda batch: torch.cat(batch.labels).ne(-100).sum().float())


def mean(model, batch):
    """The definition: cross_entropy's own mean over the supervised tokens."""
    return {"text_loss": F.cross_entropy(model(torch.cat(batch.x)), torch.cat(batch.labels))}


def still(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def close(found, exact):
    """Whether gradients differ by the rounding of sums over 37 tokens, each as large as the largest entry."""
    for ours, theirs in zip(found.parameters(), exact.parameters(), strict=True):
        error = (ours.grad - theirs.grad).abs().max().item()
        assert error <= 4 * sum(LENGTHS) * DOUBLE * theirs.grad.abs().max().item()


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 8, 50])
def test_gradients_are_those_of_the_mean_over_all_supervised_tokens(size):
    plain, pieces, batch = reader(), reader(), sequences()
    expected = plain_step(plain, mean, batch, still(plain), 0.0, step=1)
    found = accumulated_step(pieces, LOSS, batch, still(pieces), 0.0, step=1, micro_batch_size=size)
    close(pieces, plain)
    for name in ("text_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)  # metrics are read back as float32
    assert found["accuracy"] == pytest.approx(plain_step(plain, LOSS, batch, still(plain), 0.0, step=1)["accuracy"])


def test_each_piece_by_its_own_count_would_be_another_gradient():
    """So the test above can fail: the mean of the pieces' means differs by more than a tenth."""
    plain, means, batch = reader(), reader(), sequences()
    plain_step(plain, mean, batch, still(plain), 0.0, step=1)
    pieces = [piece for piece in batch.split(2) if (torch.cat(piece.labels) >= 0).any()]
    torch.stack([mean(means, piece)["text_loss"] for piece in pieces]).mean().backward()
    error, size = (means[0].weight.grad - plain[0].weight.grad).abs().max(), plain[0].weight.grad.abs().max()
    assert error > 0.1 * size


def test_the_weights_after_three_steps_with_clipping():
    plain, pieces = reader(), reader()
    optimizers = [adamw(model, lr=1e-2) for model in (plain, pieces)]
    for step in range(3):
        options = {"step": step + 1, "grad_clip_norm": 0.05}
        plain_step(plain, mean, sequences(step), optimizers[0], 1e-2, **options)
        accumulated_step(pieces, LOSS, sequences(step), optimizers[1], 1e-2, micro_batch_size=3, **options)
    for ours, theirs in zip(pieces.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_batch_without_a_supervised_token_teaches_nothing():
    model, batch = reader(), sequences()
    for labels in batch.labels:
        labels.fill_(-100)
    metrics = accumulated_step(model, LOSS, batch, still(model), 0.0, step=1, micro_batch_size=2)
    assert metrics["text_loss"] == metrics["grad_norm"] == 0.0


def test_what_is_not_finite_never_reaches_the_weights():
    model, batch = reader(), sequences()
    before = [p.detach().clone() for p in model.parameters()]
    batch.x[1][8] = math.nan
    with pytest.raises(NonFiniteError, match="step 7: text_loss is nan"):
        accumulated_step(model, LOSS, batch, adamw(model), 1.0, step=7, micro_batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1; got 0"):
        accumulated_step(model, LOSS, batch, still(model), 0.0, step=1, micro_batch_size=0)


def test_parts_have_learning_rates_of_their_own():
    model = nn.ModuleDict({"tower": nn.Linear(8, 16), "head": nn.Linear(16, CLASSES)}).double()
    optimizer = adamw(model, lr_scales={"tower": 0.25})
    assert [group["name"] for group in optimizer.param_groups] == ["tower decay", "tower no_decay", "decay", "no_decay"]

    def in_turn(model, batch):
        return mean(lambda x: model["head"](model["tower"](x)), batch)

    plain_step(model, in_turn, sequences(), optimizer, 0.4, step=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.4, 0.4]
    with pytest.raises(ValueError, match=r"lr_scales names \['towers'\]"):
        adamw(model, lr_scales={"towers": 1.0})
    model["tower"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"lr_scales names \['tower'\], in which the model trains no parameter"):
        adamw(model, lr_scales={"tower": 0.25})


def train(out, **options):
    model = reader()
    how = {"steps": 4, "out": out, "log_every": 1, "stream": io.StringIO(), **options}
    fit(model, LOSS, lambda start: map(sequences, range(start, 9)), adamw(model), warmup_constant(0.01), **how)
    return read_metrics(out / "metrics.jsonl")


def test_the_loop_takes_it_whole_or_in_pieces(tmp_path):
    whole, pieces = train(tmp_path / "whole"), train(tmp_path / "pieces", micro_batch_size=2)
    for a, b in zip(whole, pieces, strict=True):
        assert a["train/text_loss"] == pytest.approx(b["train/text_loss"], rel=1e-6)
        assert a["train/tokens_per_second"] > a["train/samples_per_second"] > 0


W = 2


def on_a_rank(rank, folder):
    """What each of W processes runs; its findings lie in a file of the folder. Rank 0 has 13 terms, rank 1 has 4."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    rows, found = slice(rank, None, W), {}
    for name, size in (("whole", None), ("pieces", 1), ("fsdp", 1)):
        model, rounds = reader(), []
        if name == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (W,)))
            shared = model
        else:
            shared = DistributedDataParallel(model)

            def count(state, bucket, rounds=rounds):
                rounds.append(bucket.is_last())
                flat = bucket.buffer().div_(W)
                return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])

            shared.register_comm_hook(None, count)
        options = {"step": 1, "group": dist.group.WORLD, "micro_batch_size": size}
        metrics = accumulated_step(shared, LOSS, sequences(rows=rows), still(model), 0.0, **options)
        gradients = [p.grad.full_tensor() if name == "fsdp" else p.grad for p in model.parameters()]
        found[name] = {"gradients": gradients, "metrics": metrics, "rounds": rounds}
    model = reader()
    try:
        uneven = sequences(rows=slice(0, 5 - 2 * rank))
        accumulated_step(model, LOSS, uneven, still(model), 0.0, step=1, group=dist.group.WORLD, micro_batch_size=2)
    except ShapeError as error:
        found["uneven"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=W)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "pieces", "fsdp"])
def test_ranks_do_what_one_process_does(ranks, name):
    model = reader()
    expected = plain_step(model, mean, sequences(), still(model), 0.0, step=1)
    for rank in ranks:
        for ours, theirs in zip(rank[name]["gradients"], model.parameters(), strict=True):
            error = (ours - theirs.grad).abs().max().item()
            # The count reaches the ranks as float32.
            assert error <= 4 * torch.finfo(torch.float32).eps * theirs.grad.abs().max().item()
        assert rank[name]["metrics"]["text_loss"] == pytest.approx(expected["text_loss"], rel=1e-6)
        assert rank[name]["rounds"] == ([] if name == "fsdp" else [True]), "gradients travel once a step"


@pytest.mark.slow
def test_every_rank_is_told_that_one_has_fewer_pieces(ranks):
    for rank in ranks:
        assert "as many pieces; got 3, 2" in rank["uneven"]
