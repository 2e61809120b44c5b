"""A checkpoint is whole or refused, and a save that fails leaves the one before."""

import hashlib
import json
import os

import pytest
import torch
from standin import Towers, train
from torch import nn

from vlmfast.errors import DataError
from vlmfast.train import (
    adamw,
    checkpoint,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")


def everything(model, optimizer):
    """Every bit of both, by name; learning rates are the schedule's."""
    tensors = dict(model.state_dict())
    for slot, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{slot}/{name}": value for name, value in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    """(model, optimizer, folder) after seven steps, with checkpoints of steps 3, 6 and 7."""
    model, optimizer, _ = train(tmp_path, 7, save_every=3)
    return model, optimizer, tmp_path / "checkpoints"


RUN = {"seed": 0, "precision": "fp32"}


def test_round_trip_is_bit_exact(saved):
    model, optimizer, folder = saved
    fresh = Towers(seed=5)
    other = adamw(fresh)
    assert load_checkpoint(folder / "step_000007", fresh, other, run=RUN) == 7
    assert same(everything(fresh, other), everything(model, optimizer))
    assert [g["betas"] for g in other.param_groups] == [g["betas"] for g in optimizer.param_groups]
    assert len(optimizer.state) == len(list(model.parameters())), "the optimizer has a state to lose"


def test_layout(saved):
    _, _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_000003", "step_000006", "step_000007"]
    assert (folder / "latest").read_text() == "step_000007\n"
    assert latest_checkpoint(folder) == folder / "step_000007"
    path = folder / "step_000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    sums = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[:3]}
    assert read_state(path)["run"] == RUN


def test_weights_alone(saved):
    model, _, folder = saved
    fresh = Towers(seed=5)
    assert load_weights(folder / "step_000007", fresh)["step"] == 7
    assert same(fresh.state_dict(), model.state_dict())


def test_only_the_last_few_stay_in_order_of_their_numbers(tmp_path):
    model = Towers()
    optimizer = adamw(model)
    for step in (8, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, model, optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_1000000", "step_1000001"]
    save_checkpoint(tmp_path, 1_000_002, model, optimizer, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_1000002"]


def test_tied_and_scattered_weights(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        model.register_buffer("turned", torch.randn(2, 5).T)
        model.register_buffer("empty", torch.empty(0, 4))
        return model, torch.optim.SGD(model.parameters(), lr=1.0)

    path = save_checkpoint(tmp_path, 1, *build(0))
    model, optimizer = build(1)
    load_checkpoint(path, model, optimizer)
    assert same(model.state_dict(), build(0)[0].state_dict())
    assert model["a"].weight is model["b"].weight


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip, os.remove, lambda path: path.write_bytes(b"")])
def test_harm_is_refused_and_nothing_is_loaded(saved, name, harm):
    _, _, folder = saved
    harm(folder / "step_000007" / name)
    fresh = Towers(seed=5)
    optimizer = adamw(fresh)
    before = everything(fresh, optimizer)
    with pytest.raises(DataError) as refused:
        load_checkpoint(folder / "step_000007", fresh, optimizer, run=RUN)
    message = str(refused.value)
    assert "step_000007" in message
    assert name in message
    assert f"resume='{folder / 'step_000006'}'" in message, "it says where to go on"
    assert same(everything(fresh, optimizer), before)
    assert load_checkpoint(folder / "step_000006", fresh, optimizer, run=RUN) == 6


def test_what_is_wrong_is_said(saved):
    _, _, folder = saved
    truncate(folder / "step_000007" / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors has \d+ bytes, \d+ were written: it is truncated"):
        read_state(folder / "step_000007")
    flip(folder / "step_000006" / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors is not what SHA256SUMS says.*content has changed"):
        read_state(folder / "step_000006")
    os.remove(folder / "step_000003" / "optimizer.safetensors")
    with pytest.raises(DataError, match=r"optimizer.safetensors is missing.*there is no older one"):
        read_state(folder / "step_000003")
    with pytest.raises(DataError, match=r"no such folder.*resume='.*step_000007'"):
        read_state(folder / "step_000100")


def other_width(model):
    return Towers(width=17)


def other_names(model):
    model.extra = nn.Linear(2, 2)
    return model


def other_dtype(model):
    return model.bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_width, r"x.0.bias is float32 \[16\] in the checkpoint, float32 \[17\] here;.*, and \d more"),
        (other_names, r"extra.\w+ is absent in the checkpoint"),
        (other_dtype, r"logit_scale is float32 \[\] in the checkpoint, bfloat16 \[\] here"),
    ],
)
def test_another_model_is_refused(saved, change, message):
    _, _, folder = saved
    model = change(Towers(seed=5))
    before = everything(model, adamw(model))
    with pytest.raises(DataError, match=f"model.safetensors does not fit the model: .*{message}"):
        load_checkpoint(folder / "step_000007", model, adamw(model), run=RUN)
    assert same(everything(model, adamw(model)), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.1}, r"\[0\] weight_decay is 0.2 in the checkpoint, 0.1 here"),
        ({"betas": (0.9, 0.95)}, r"betas\[1\] is 0.98 in the checkpoint, 0.95 here"),
    ],
)
def test_another_optimizer_is_refused_but_another_learning_rate_is_not(saved, options, message):
    _, _, folder = saved
    model = Towers(seed=5)
    before = everything(model, adamw(model))
    with pytest.raises(DataError, match=message):
        load_checkpoint(folder / "step_000007", model, adamw(model, **options), run=RUN)
    assert same(everything(model, adamw(model)), before)
    assert load_checkpoint(folder / "step_000007", model, adamw(model, lr=1.0), run=RUN) == 7


def test_another_run_is_refused(saved):
    model, optimizer, folder = saved
    with pytest.raises(DataError, match=r"state.json does not fit the run: seed is 0 in the checkpoint, 1 here"):
        load_checkpoint(folder / "step_000007", model, optimizer, run={**RUN, "seed": 1})
    with pytest.raises(DataError, match="batch_size is absent in the checkpoint, 8 here"):
        load_checkpoint(folder / "step_000007", model, optimizer, run={**RUN, "batch_size": 8})


def test_another_format_is_refused(tmp_path, monkeypatch):
    model = Towers()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        path = save_checkpoint(tmp_path, 1, model, adamw(model))
    with pytest.raises(DataError, match="has format 2; this version reads format 1"):
        read_state(path)


def test_a_pointer_to_nothing_is_said(saved):
    _, _, folder = saved
    (folder / "latest").write_text("step_000009\n")
    with pytest.raises(DataError, match=r"latest names it, but it is not there.*resume='.*step_000007'"):
        latest_checkpoint(folder)


def test_without_pointer_the_newest(saved):
    _, _, folder = saved
    (folder / "latest").unlink()
    assert latest_checkpoint(folder) == folder / "step_000007"
    assert latest_checkpoint(folder / "nowhere") is None


class DiskFullError(OSError):
    pass


def test_a_save_that_fails_at_any_point_leaves_the_one_before(saved, monkeypatch):
    """Let each call that touches the disk fail in turn: the first, the second, ... until a save succeeds."""
    model, optimizer, folder = saved
    old = everything(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    new = everything(model, optimizer)
    calls = [(os, "replace"), (os, "fsync"), (checkpoint, "save_file")]
    failures = 0
    while True:
        left = [failures]

        def failing(real, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise DiskFullError("no space left on device")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, failing(getattr(module, name)))
            try:
                save_checkpoint(folder, 8, model, optimizer, run=RUN)
                break
            except DiskFullError:
                failures += 1
        found = latest_checkpoint(folder)
        fresh = Towers(seed=5)
        resumed = adamw(fresh)
        step = load_checkpoint(found, fresh, resumed, run=RUN)
        assert same(everything(fresh, resumed), old if step == 7 else new)
        if step == 8:  # the pointer was written; what failed came after it
            break
    assert failures >= 9, "two tensor files, five syncs, a rename, a pointer"
    again = save_checkpoint(folder, 9, model, optimizer, run=RUN)
    assert sorted(path.name for path in folder.glob(".*")) == [], "leftovers of failed saves are gone"
    assert latest_checkpoint(folder) == again


def test_a_checkpoint_that_latest_names_is_not_overwritten(saved):
    model, optimizer, folder = saved
    with pytest.raises(DataError, match=r"step_000007: is already the latest"):
        save_checkpoint(folder, 7, model, optimizer)


def test_a_stale_checkpoint_of_the_same_step_is_replaced(saved):
    model, optimizer, folder = saved
    checkpoint.point_latest(folder / "step_000003")
    save_checkpoint(folder, 6, model, optimizer, run={"new": True})
    assert read_state(folder / "step_000006")["run"] == {"new": True}
    assert latest_checkpoint(folder) == folder / "step_000006"


def test_what_cannot_be_saved_is_said(tmp_path):
    model = Towers()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        save_checkpoint(tmp_path, 1, model, optimizer, keep=0)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        save_checkpoint(tmp_path, 1, nn.Linear(1, 1), optimizer)
    optimizer.state[model.logit_scale]["history"] = [1, 2]
    with pytest.raises(TypeError, match="logit_scale/history is list"):
        save_checkpoint(tmp_path, 1, model, optimizer)
    assert latest_checkpoint(tmp_path) is None


def test_no_pickle(saved):
    _, _, folder = saved
    for path in checkpoints(folder):
        json.loads((path / "state.json").read_text())
        for name in FILES[:2]:
            header = (path / name).read_bytes()
            assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
