"""A run that stops and goes on is the run that did not stop, bit for bit."""

import importlib
import io
import math

import pytest
import torch
from standin import CLOCK, Towers, batches, lines, loss_fn, train
from test_checkpoint import everything, same

from vlmfast.errors import DataError
from vlmfast.train import NonFiniteError, adamw, checkpoints, latest_checkpoint, read_metrics, warmup_cosine


def score(model):
    torch.rand(7)  # an evaluator may draw what it likes
    assert not model.training
    assert not torch.is_grad_enabled()
    return {"norm": sum(p.square().sum() for p in model.parameters()), "scale": model.logit_scale}


@pytest.mark.parametrize(("stop", "precision"), [(10, "fp32"), (1, "fp32"), (19, "fp32"), (10, "amp_bf16")])
def test_resumed_is_straight(tmp_path, stop, precision):
    options = {"log_every": 1, "precision": precision, "grad_clip_norm": 1.0}
    straight = train(tmp_path / "a", 20, **options)
    train(tmp_path / "b", stop, **options)
    resumed = train(tmp_path / "b", 20, resume="latest", model=Towers(seed=9), **options)
    assert same(everything(*resumed[:2]), everything(*straight[:2]))
    assert lines(tmp_path / "b") == lines(tmp_path / "a")
    assert [line["step"] for line in lines(tmp_path / "a")] == list(range(1, 21))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        files = [tmp_path / run / "checkpoints/step_000020" / name for run in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_stand_in_would_show_a_lost_bit(tmp_path):
    """Dropout, batch norm, momentum and the scale's clamp are all at work: without any of them a resume is too easy."""
    model, *_ = train(tmp_path, 20)
    assert model.logit_scale.item() != pytest.approx(math.log(99))
    assert model.x[1].num_batches_tracked == 20
    losses = {loss_fn(model.train(), next(batches(0)))["contrastive_loss"].item() for _ in range(3)}
    assert len(losses) == 3


def test_evaluating_and_saving_change_no_bit(tmp_path):
    plain = train(tmp_path / "a", 12)
    watched = train(tmp_path / "b", 12, evaluators={"score": score}, eval_every=2, save_every=5, log_every=1)
    assert same(everything(*plain[:2]), everything(*watched[:2]))
    assert watched[0].training


def test_what_is_written_and_when(tmp_path):
    _, _, last = train(tmp_path, 11, evaluators={"score": score}, log_every=4, eval_every=5, save_every=2, keep=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "train/lr" in r] == [4, 8, 11]
    assert [r["step"] for r in records if "val/score/norm" in r] == [5, 10, 11]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [
        "step_000008",
        "step_000010",
        "step_000011",
    ]
    names = {"contrastive_loss", "accuracy", "logit_scale", "lr", "grad_norm"}
    assert set(records[0]) == {"step"} | {f"train/{name}" for name in names | CLOCK}
    assert last == {**records[-2], **records[-1]}
    schedule = warmup_cosine(3e-3, 4, 20)
    assert [r["train/lr"] for r in records if "train/lr" in r] == [schedule(3), schedule(7), schedule(10)]
    assert records[0]["train/samples_per_second"] == pytest.approx(12 / records[0]["train/batch_time"])
    assert records[0]["train/data_time"] <= records[0]["train/batch_time"]


def test_nothing_but_the_end_by_default(tmp_path):
    train(tmp_path, 5, log_every=0, evaluators={"score": score})
    assert [line["step"] for line in lines(tmp_path)] == [5, 5]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_000005"]


def test_latest_without_a_checkpoint_is_a_new_run_and_cuts_off_old_lines(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text('{"step": 1, "train/contrastive_loss": 9.0}\n{"step": 2, "tr')
    said = io.StringIO()
    begun = train(tmp_path / "a", 6, resume="latest", stream=said)
    fresh = train(tmp_path / "b", 6)
    assert same(everything(*begun[:2]), everything(*fresh[:2]))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert "no checkpoint in" in said.getvalue()


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    model, optimizer, last = train(tmp_path, 6)
    again = train(tmp_path, 6, resume="latest", model=Towers(seed=9))
    assert again[2] == last
    assert same(everything(*again[:2]), everything(model, optimizer))
    with pytest.raises(DataError, match="is at step 6, past the 5 steps of this run"):
        train(tmp_path, 5, resume="latest")


def test_going_back_to_an_older_checkpoint(tmp_path):
    straight = train(tmp_path / "a", 12, log_every=1)
    train(tmp_path / "b", 10, save_every=4, log_every=1)
    folder = tmp_path / "b/checkpoints"
    said = io.StringIO()
    train(tmp_path / "b", 6, resume=folder / "step_000004", log_every=1, stream=said)
    assert f"resumed at step 4 from {folder / 'step_000004'}" in said.getvalue()
    assert [line["step"] for line in lines(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]
    assert latest_checkpoint(folder) == folder / "step_000006"
    again = train(tmp_path / "b", 12, resume="latest", save_every=4, log_every=1)  # writes step 8 a second time
    assert same(everything(*again[:2]), everything(*straight[:2]))
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def test_going_on_in_another_folder(tmp_path):
    straight = train(tmp_path / "a", 8, log_every=1)
    train(tmp_path / "b", 4, log_every=1)
    moved = train(tmp_path / "c", 8, resume=str(tmp_path / "b/checkpoints/step_000004"), log_every=1)
    assert same(everything(*moved[:2]), everything(*straight[:2]))
    assert lines(tmp_path / "c") == lines(tmp_path / "a")[4:]
    with pytest.raises(DataError, match="b: already holds a run"):
        train(tmp_path / "b", 8, resume=str(tmp_path / "c/checkpoints/step_000008"))


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    train(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="already holds a run; go on with it by resume='latest'"):
        train(tmp_path, 3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_seed_or_run_is_refused(tmp_path):
    train(tmp_path, 3, run={"batch_size": 12})
    with pytest.raises(DataError, match="seed is 0 in the checkpoint, 1 here"):
        train(tmp_path, 6, resume="latest", seed=1, run={"batch_size": 12})
    with pytest.raises(DataError, match="batch_size is 12 in the checkpoint, 24 here"):
        train(tmp_path, 6, resume="latest", run={"batch_size": 24})


def test_the_seed_matters(tmp_path):
    runs = [train(tmp_path / str(i), 4, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert same(everything(*runs[0][:2]), everything(*runs[1][:2]))
    assert not same(everything(*runs[0][:2]), everything(*runs[2][:2]))


def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_before_it_is_good(tmp_path):
    def breaks(model, pairs):
        breaks.calls += 1
        return {"contrastive_loss": loss_fn(model, pairs)["contrastive_loss"] * (math.nan if breaks.calls == 6 else 1)}

    breaks.calls = 0
    with pytest.raises(NonFiniteError, match="step 6: contrastive_loss is nan"):
        train(tmp_path / "a", 20, loss_fn=breaks, save_every=4)
    assert latest_checkpoint(tmp_path / "a/checkpoints").name == "step_000004"
    resumed = train(tmp_path / "a", 20, resume="latest")
    assert same(everything(*resumed[:2]), everything(*train(tmp_path / "b", 20)[:2]))


def test_batches_that_end_too_early(tmp_path):
    with pytest.raises(DataError, match="batches ended after step 7 of 20"):
        train(tmp_path, 20, batches=lambda start: [next(batches(t)) for t in range(start, 7)])


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    train(tmp_path, 9, log_every=1)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*text[:4], "garbage\n", *text[5:]]))
    with pytest.raises(DataError, match=r"metrics.jsonl: line 5 is not a JSON object.*got 'garbage'"):
        train(tmp_path, 12, resume="latest")


def test_tensorboard_has_open_clips_keys_and_no_step_twice(tmp_path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, 8, save_every=4, log_every=1, tensorboard=True, evaluators={"score": score})
    resumed = tmp_path / "checkpoints/step_000004"
    train(tmp_path, 8, log_every=1, tensorboard=True, evaluators={"score": score}, resume=resumed)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {
        "train/contrastive_loss",
        "train/samples_per_second",
        "train/logit_scale",
        "train/lr",
        "val/score/norm",
    } < set(events.Tags()["scalars"])
    losses = [event.value for event in events.Scalars("train/contrastive_loss")]
    assert [event.step for event in events.Scalars("train/contrastive_loss")] == list(range(1, 9))
    assert losses == pytest.approx([line["train/contrastive_loss"] for line in lines(tmp_path) if "train/lr" in line])


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard is not installed; run: pip install 'vlmfast\[log\]'"):
        train(tmp_path, 2, tensorboard=True)


def test_frozen_parameters_do_not_move(tmp_path):
    model = Towers()
    model.x.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(tmp_path, 4, model=model, optimizer=adamw(model))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
