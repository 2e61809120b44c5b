"""Ranks that train together do what one process does; checkpoints fit any number of them."""

import io
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from standin import CLOCK
from test_checkpoint import everything, same
from torch import nn
from world_runs import STEPS, Stream, Towers, loss, train

from vlmfast.data.order import random_int
from vlmfast.errors import BackendError, DataError
from vlmfast.train import SplitLoss, adamw, load_checkpoint, load_weights, read_metrics, read_state
from vlmfast.train.ema import Ema
from vlmfast.train.world import World, blocks, inner, replicate, shard, start


def torchrun(ranks, *words):
    """The finished process of torchrun with so many ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:vlmfast"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)


def lines(out):
    """The lines of metrics.jsonl without what the clock says."""
    clock = {f"train/{name}" for name in CLOCK}
    records = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in clock} for record in records]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which two ranks left their runs, and a single process its own in `alone`."""
    out = tmp_path_factory.mktemp("runs")
    told = torchrun(2, Path(__file__).with_name("world_runs.py"), out)
    assert told.returncode == 0, told.stderr
    train(out / "alone", World())
    return out


def loaded(path, steps=STEPS, ema=False):
    """A checkpoint's tensors, read by this process alone."""
    model = Towers()
    optimizer = adamw(model, lr=0.01)
    means = Ema(model, 0.5)
    run = read_state(path)["run"]
    assert load_checkpoint(path, model, optimizer, run=run, ema=means) == steps
    return {**everything(model, optimizer), **{f"ema {name}": mean for name, mean in means.tensors.items()}}


def last(run):
    return run / f"checkpoints/step_{STEPS:06d}"


THREADS = """
import os, torch
from torch import nn
from vlmfast.train.world import replicate, start

def main(world):
    replicate(nn.Linear(3, 4), world)(torch.ones(2, 3)).sum().backward()
    world.gather(1)

with start("cpu") as world:
    main(world)
assert not any("gloo_run" in open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_the_groups_threads_end_before_python_does(tmp_path):
    """One that still has a tensor in hand when the interpreter ends aborts the process, at the end of a good run."""
    (tmp_path / "threads.py").write_text(THREADS, encoding="utf-8")
    told = torchrun(2, tmp_path / "threads.py")
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ddp", "micro", "fsdp", "fsdp-micro", "sharded", "crossed", "uncrossed"])
def test_ranks_do_what_one_process_does(runs, run):
    """Losses, gradient lengths, weights, AdamW's moments and the mean of weights, in float64."""
    alone, ours = loaded(last(runs / "alone")), loaded(last(runs / run))
    assert alone.keys() == ours.keys()
    for name, exact in alone.items():
        torch.testing.assert_close(
            ours[name], exact, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    told, exact = lines(runs / run), lines(runs / "alone")
    assert len(told) == (len(exact) if "crossed" not in run else len(exact) // 2)
    for line, wanted in zip(told, exact[-len(told) :], strict=True):
        assert line == pytest.approx(wanted, rel=1e-6)  # metrics are read back as float32


@pytest.mark.slow
def test_sharded_and_whole_checkpoints_hold_the_same_bits(runs):
    assert same(loaded(last(runs / "sharded")), loaded(last(runs / "fsdp")))
    for step in (3, STEPS):
        folder = runs / f"sharded/checkpoints/step_{step:06d}"
        names = sorted(path.name for path in folder.iterdir())
        assert names[:2] == ["SHA256SUMS", "shard-00001-model-00001-of-00001.safetensors"]
        assert names[2:] == ["shard-00002-model-00001-of-00001.safetensors", "state.json"], "no pickle among them"
    assert not list((runs / "sharded/checkpoints").glob(".*")), "no leftovers"
    whole = {path.name for path in last(runs / "fsdp").iterdir()}
    assert whole == {"SHA256SUMS", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"}
    from safetensors.torch import load_file

    assert load_file(last(runs / "fsdp") / "model.safetensors")["logit_scale"].shape == ()


@pytest.mark.slow
def test_a_shard_that_is_harmed_is_refused(runs):
    path = runs / "sharded/checkpoints/step_000003"
    file = path / "shard-00002-model-00001-of-00001.safetensors"
    good = file.read_bytes()
    for harmed, message in ((good[:-5], "truncated"), (good[:-5] + bytes(5), "content has changed")):
        file.write_bytes(harmed)
        with pytest.raises(DataError, match=rf"shard-00002\S+ .*{message}"):
            load_weights(path, Towers())
    file.write_bytes(good)
    load_weights(path, Towers())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_resumed_ranks_are_straight_ranks(runs, run):
    """Dropout differs between ranks, the data remembers where it stood on each, and every bit returns."""
    assert same(loaded(last(runs / f"{run}-resumed")), loaded(last(runs / f"{run}-straight")))
    assert lines(runs / f"{run}-resumed") == lines(runs / f"{run}-straight")
    state = read_state(last(runs / f"{run}-resumed"))
    assert state["data"] == [{"rank": rank, "at": STEPS} for rank in range(2)]
    assert state["world_size"] == 2
    assert not same(loaded(last(runs / f"{run}-straight")), loaded(last(runs / "ddp"))), "dropout is at work"


@pytest.mark.slow
def test_what_ranks_tell_each_other(runs):
    for rank in range(2):
        assert json.loads((runs / f"said-{rank}.json").read_text()) == [["rank 0", "rank 1"], "first 0"]


@pytest.mark.slow
def test_samples_are_counted_over_all_ranks_and_for_one(runs):
    for line in read_metrics(runs / "ddp/metrics.jsonl"):
        if "train/lr" in line:
            assert line["train/samples_per_second"] == pytest.approx(2 * line["train/samples_per_second_per_gpu"])


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_unless_asked_for(runs, tmp_path):
    path = runs / "ddp/checkpoints/step_000003"
    with pytest.raises(
        DataError, match=r"written at world_size 2, this run has world_size 1: other batches.*--elastic"
    ):
        train(tmp_path / "one", World(), resume=path)
    train(tmp_path / "one", World(), resume=path, elastic=True)
    exact = loaded(last(runs / "alone"))
    for name, value in loaded(last(tmp_path / "one")).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-8, atol=1e-10)


def test_the_mean_of_weights_follows_them(tmp_path):
    model = nn.Linear(2, 1)
    model.register_buffer("count", torch.tensor(0))
    means, exact = Ema(model, 0.5), model.weight.detach().clone().double()
    for step in range(1, 7):
        with torch.no_grad():
            model.weight += 1
            model.count += 1
        means.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        exact = decay * exact + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(means.tensors["weight"].double(), exact, rtol=1e-6, atol=0)
    assert means.tensors["count"] == 6
    with pytest.raises(ValueError, match=r"at least 0 and less than 1; got 1.0"):
        Ema(model, 1.0)


def test_a_mean_is_kept_resumed_and_loaded(tmp_path):
    train(tmp_path / "a", World())
    train(tmp_path / "b", World(), steps=2)
    train(tmp_path / "b", World(), resume="latest")
    assert same(loaded(last(tmp_path / "a")), loaded(last(tmp_path / "b")))
    plain, mean = Towers(), Towers()
    load_weights(last(tmp_path / "a"), plain)
    load_weights(last(tmp_path / "a"), mean, ema=True)
    assert not same(plain.state_dict(), mean.state_dict())
    assert torch.equal(mean.head.weight, loaded(last(tmp_path / "a"))["ema head.weight"])
    train(tmp_path / "without", World(), ema=None)
    with pytest.raises(DataError, match="holds no mean of the weights"):
        load_weights(last(tmp_path / "without"), Towers(), ema=True)
    with pytest.raises(DataError, match=r"ema is absent in the checkpoint, 0.5 here"):
        train(tmp_path / "without", World(), resume="latest", steps=STEPS + 1)


def test_each_rank_draws_its_own(tmp_path, monkeypatch):
    seeds = []

    def embed(model, batch):
        seeds.append(torch.initial_seed())
        return model(batch.x, batch.y)

    monkeypatch.setattr("world_runs.LOSS", SplitLoss(embed, loss))
    monkeypatch.setattr("vlmfast.train.checkpoint.save_checkpoint", lambda *_, **__: None)
    for rank in (0, 1):
        train(tmp_path / str(rank), World(rank=rank, world_size=2))
    assert len(set(seeds)) == len(seeds) == 2 * STEPS
    assert [seed % 2**64 for seed in seeds[:STEPS]] == [random_int(0, step) for step in range(STEPS)], "rank 0 as alone"


def test_data_that_knows_where_it_stands_is_told(tmp_path):
    train(tmp_path / "a", World(), dropout=0.3, stateful=True)
    train(tmp_path / "b", World(), dropout=0.3, stateful=True, steps=3)
    train(tmp_path / "b", World(), dropout=0.3, stateful=True, resume="latest")
    assert same(loaded(last(tmp_path / "a")), loaded(last(tmp_path / "b")))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert next(Stream(World(), 3, stateful=True)).x.equal(next(Stream(World(), 0, stateful=False)).x), (
        "it would not know"
    )


def test_data_that_refuses_its_state_changes_no_file(tmp_path, monkeypatch):
    train(tmp_path, World(), stateful=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(stream, state):
        raise DataError("other shards")

    monkeypatch.setattr(Stream, "_load", refuse)
    with pytest.raises(DataError, match="other shards"):
        train(tmp_path, World(), stateful=True, resume=tmp_path / "checkpoints/step_000003")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_ranks_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "gather", lambda world, value: [value, 3])
    with pytest.raises(DataError, match=r"the ranks are at steps \[0, 3\]; all ranks must see one folder"):
        train(tmp_path / "a", World())
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_speaks(tmp_path, capsys):
    said = io.StringIO()
    train(tmp_path / "a", World(), stream=said)
    assert "step 1/6" in said.getvalue()
    said = io.StringIO()
    (tmp_path / "b").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmfast.train.checkpoint.save_checkpoint", lambda *_, **__: None)
        train(tmp_path / "b", World(rank=1, world_size=2), stream=said)
    assert said.getvalue() == ""
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = start("cpu")
    assert (world.rank, world.world_size, world.device.type, world.group) == (0, 1, "cpu", None)
    assert world.main
    assert world.gather(3) == [3]
    assert world.first(lambda: 4) == 4
    model = Towers()
    assert replicate(model, world) is model
    assert inner(model) is model
    assert inner(torch.compile(model)) is model
    assert blocks(model) == list(model.blocks)
    with pytest.raises(BackendError, match=r"FSDP needs ranks.*torchrun --nproc-per-node"):
        shard(model, world)


def test_an_environment_that_is_torchruns_in_part_is_said(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        BackendError, match="RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start"
    ):
        start("cpu")
    monkeypatch.delenv("RANK")
    with pytest.raises(DataError, match="--device toaster"):
        start("toaster")


def test_what_all_ranks_refuse_is_said_once(monkeypatch):
    monkeypatch.setattr("vlmfast.train.world.PATIENCE", timedelta(seconds=0.01))
    store = dist.HashStore()
    with pytest.raises(DataError, match="mine"), World(rank=1, store=store):
        raise DataError("mine")
    with pytest.raises(DataError, match="all of us"), World(store=store):
        raise DataError("all of us")
    with pytest.raises(SystemExit) as left, World(rank=1, store=store):
        raise DataError("all of us")
    assert left.value.code == 1
    with pytest.raises(DataError, match="mine"), World(rank=1, store=store):
        raise DataError("mine")
