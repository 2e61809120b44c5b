"""The training loop: it knows steps, files and the clock, and neither models nor data nor metrics by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import nn

from vlmfast.data.batch import random_int
from vlmfast.errors import DataError
from vlmfast.train import checkpoint
from vlmfast.train.log import FILE, MetricsLog
from vlmfast.train.progress import show_progress
from vlmfast.train.schedule import Schedule
from vlmfast.train.step import LossFn, plain_step

Evaluator = Callable[[nn.Module], Mapping[str, float]]


class SizedBatch(Protocol):
    """What the loop needs of a batch."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Any: ...


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Callable[[int], Iterator[SizedBatch]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    steps: int,
    out: str | Path,
    evaluators: Mapping[str, Evaluator] | None = None,
    log_every: int = 10,
    save_every: int = 0,
    eval_every: int = 0,
    keep: int = 3,
    resume: str | Path | None = None,
    precision: str = "fp32",
    grad_clip_norm: float | None = None,
    seed: int = 0,
    run: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    stream: TextIO | None = None,
) -> dict[str, float]:
    """The last value of every metric, after `steps` steps of training that change the model and the optimizer.

    Everything random in step t (dropout, say) depends on (seed, t) alone: torch's generators are seeded anew before
    each step. With batches that depend on (seed, t) alone, a run that was killed at any moment and resumed gives the
    bits of one that was not, on the same machine with the same number of threads. Evaluation changes no bit either.

    Files: out/metrics.jsonl (and out/tensorboard), out/checkpoints. See docs/training.md.

    Args:
        model: on the device on which it is to be trained.
        loss_fn: (model, batch) -> scalars by name; the sum of those whose name ends in "_loss" is minimised.
        batches: start_step -> iterator over the batches of steps start_step, start_step + 1, ...
        optimizer: over the model's parameters.
        schedule: steps taken before -> learning rate.
        steps: length of the whole run, what came before `resume` included.
        out: the run's folder; made if it is missing.
        evaluators: name -> function(model) -> values by name, called in evaluation mode without gradients; the values
            are logged as "val/<name>/<value's name>".
        log_every: steps between two lines of metrics; 0 for the last step only, as for the next two.
        save_every: steps between two checkpoints.
        eval_every: steps between two evaluations.
        keep: how many checkpoints stay.
        resume: None for a new run; "latest" to go on from the last checkpoint in `out`, or to begin without one; or
            a checkpoint's path. If that lies in `out`, the run goes back to it and later metrics are cut off.
        precision: "fp32", or "amp_bf16" for bfloat16 autocast around loss_fn.
        grad_clip_norm: longest gradient; None for no clipping.
        seed: any integer.
        run: what else must be the same for a checkpoint to be this run's, as JSON holds it (batch size, model, data).
        tensorboard: also write event files.
        stream: where progress is shown; default: standard error.

    Returns:
        The last value of every key of metrics.jsonl, with "step".

    Raises:
        DataError: `out` holds another run, a checkpoint is not whole or not this run's, or the batches end too early.
        NonFiniteError: a loss or gradient is not finite; the message names the step, the weights are untouched by it.
    """
    out = Path(out)
    folder = out / "checkpoints"
    run = {"seed": seed, "precision": precision, **(run or {})}
    found = _find(out, resume)
    start = 0 if found is None else checkpoint.load_checkpoint(found, model, optimizer, run=run)
    if start > steps:
        raise DataError(f"checkpoint {found}: is at step {start}, past the {steps} steps of this run; raise steps")
    if found is not None and found.parent.resolve() == folder.resolve():
        checkpoint.point_latest(found)
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device

    with MetricsLog(out, start, tensorboard=tensorboard) as log, show_progress(steps, start, stream) as progress:
        if resume is not None:
            progress.say(f"resumed at step {start} from {found}" if found else f"no checkpoint in {folder}: a new run")
        model.train()
        source = iter(batches(start))
        clock = _Clock()
        for step in range(start, steps):
            done = step + 1
            clock.start()
            batch = next(source, None)
            if batch is None:
                raise DataError(f"fit: the batches ended after step {step} of {steps}; give more epochs or fewer steps")
            batch = batch.to(device, non_blocking=True)
            clock.loaded(len(batch))
            torch.manual_seed(random_int(seed, step))
            metrics = plain_step(
                model,
                loss_fn,
                batch,
                optimizer,
                schedule(step),
                step=done,
                precision=precision,
                grad_clip_norm=grad_clip_norm,
            )
            metrics |= clock.stop()
            progress.update(done, metrics)
            if _due(done, log_every, steps):
                log.write(done, {f"train/{name}": value for name, value in metrics.items()})
                clock = _Clock()
            if evaluators and _due(done, eval_every, steps):
                values = evaluate(model, evaluators)
                log.write(done, {f"val/{name}": value for name, value in values.items()})
                progress.say(f"step {done}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
            if _due(done, save_every, steps):
                log.sync()  # a checkpoint promises that the lines up to it are there
                checkpoint.save_checkpoint(folder, done, model, optimizer, run=run, keep=keep)
        return log.last


def evaluate(model: nn.Module, evaluators: Mapping[str, Evaluator]) -> dict[str, float]:
    """What every evaluator says of the model, as "<evaluator>/<value's name>"; the model is in training mode after.

    Args:
        model: any module.
        evaluators: name -> function(model) -> values by name, called in evaluation mode without gradients.

    Returns:
        The values, as Python floats.
    """
    model.eval()
    try:
        with torch.no_grad():
            return {f"{name}/{key}": float(v) for name, call in evaluators.items() for key, v in call(model).items()}
    finally:
        model.train()


def _find(out: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to start from, or None for a new run in a folder that holds none."""
    folder = out / "checkpoints"
    if resume == "latest":
        return checkpoint.latest_checkpoint(folder)
    path = None if resume is None else Path(resume)
    if path is not None and path.parent.resolve() == folder.resolve():
        return path
    if (out / FILE).exists() or checkpoint.checkpoints(folder):
        raise DataError(f"{out}: already holds a run; go on with it by resume='latest', or choose another folder")
    return path


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


class _Clock:
    """Where the time of the steps since the last line went; evaluation and saving do not count."""

    def __init__(self) -> None:
        self._steps, self._samples, self._data_s, self._step_s = 0, 0, 0.0, 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def loaded(self, samples: int) -> None:
        self._samples += samples
        self._data_s += time.perf_counter() - self._began

    def stop(self) -> dict[str, float]:
        """The means so far, under open_clip's names; the two times are seconds a step."""
        self._steps += 1
        self._step_s += time.perf_counter() - self._began
        return {
            "samples_per_second": self._samples / self._step_s,
            "data_time": self._data_s / self._steps,
            "batch_time": self._step_s / self._steps,
        }
