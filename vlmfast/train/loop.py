"""The training loop: it knows steps, files and the clock, and neither models nor data nor metrics by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import nn

from vlmfast.data.order import random_int
from vlmfast.errors import DataError
from vlmfast.train import checkpoint
from vlmfast.train.ema import Ema
from vlmfast.train.log import FILE, MetricsLog
from vlmfast.train.progress import show_progress
from vlmfast.train.schedule import Schedule
from vlmfast.train.step import LossFn, SummedLoss, accumulated_step, cached_step, plain_step
from vlmfast.train.world import World, inner, is_sharded

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
    micro_batch_size: int | None = None,
    ema: float | None = None,
    seed: int = 0,
    run: Mapping[str, Any] | None = None,
    world: World | None = None,
    sharded_checkpoints: bool = False,
    elastic: bool = False,
    on_start: Callable[[], None] | None = None,
    tensorboard: bool = False,
    stream: TextIO | None = None,
) -> dict[str, float]:
    """The last value of every metric, after `steps` steps of training that change the model and the optimizer.

    Everything random in step t (dropout, say) depends on (seed, t, rank) alone: torch's generators are seeded anew
    before each step. With batches that depend on (seed, t, rank) alone, or that can tell where they stand, a run that
    was killed at any moment and resumed gives the bits of one that was not, on the same machine with the same number
    of threads. Evaluation changes no bit either.

    With several ranks each of them calls this. Rank 0 alone prints, logs and writes, and it alone evaluates, unless
    the model is in parts, of which all ranks are needed.

    Files: out/metrics.jsonl (and out/tensorboard), out/checkpoints. See docs/training.md.

    Args:
        model: on the device on which it is to be trained; with several ranks, from `world.replicate` or `world.shard`.
        loss_fn: (model, batch) -> scalars by name; the sum of those whose name ends in "_loss" is minimised.
        batches: start_step -> iterator over this rank's batches of steps start_step, start_step + 1, ... If it has
            `state_dict()`, a checkpoint holds what that gives; a resumed run gives it to the new iterator's
            `load_state_dict` before the first batch.
        optimizer: over the parameters of `model`.
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
        micro_batch_size: take each step in pieces of so many samples, by `accumulated_step` for a SummedLoss, else by
            `cached_step`; None: at once.
        ema: decay of a mean of the weights, kept beside them in the checkpoints; see `Ema`.
        seed: any integer.
        run: what else must be the same for a checkpoint to be this run's, as JSON holds it (batch size, model, data).
        world: the ranks that train together; None for this process alone.
        sharded_checkpoints: each rank writes its parts of the model; see `save_checkpoint`.
        elastic: resume from a checkpoint of another number of ranks, too; `batches` begins at the step then, without a
            state.
        on_start: called on rank 0 before the first step, once it is certain that the run can begin or go on.
        tensorboard: also write event files.
        stream: where progress is shown; default: standard error.

    Returns:
        The last value of every key of metrics.jsonl, with "step"; on rank 0.

    Raises:
        DataError: `out` holds another run, a checkpoint is not whole or not this run's, the batches end too early, or
            the ranks see different folders.
        NonFiniteError: a loss or gradient is not finite; the message names the step, the weights are untouched by it.
    """
    out, world = Path(out), world or World()
    folder = out / "checkpoints"
    run = {"seed": seed, "precision": precision, **({} if ema is None else {"ema": ema}), **(run or {})}
    means = None if ema is None else Ema(inner(model), ema)
    found, start = _find(out, resume), 0
    if found is not None:
        ranks = None if elastic else world.world_size
        start = checkpoint.load_checkpoint(found, model, optimizer, run=run, ema=means, world_size=ranks)
    if start > steps:
        raise DataError(f"checkpoint {found}: is at step {start}, past the {steps} steps of this run; raise steps")
    source = iter(batches(start))
    if found is not None and (state := checkpoint.data_state(found, world)) is not None:
        source.load_state_dict(state)  # type: ignore[attr-defined]
    starts = world.gather(start)  # every rank has read what rank 0 is about to change, and refused what it refuses
    if len(set(starts)) > 1:
        raise DataError(f"fit: the ranks are at steps {starts}; all ranks must see one folder {out.absolute()}")
    if world.main:
        if found is not None and found.parent.resolve() == folder.resolve():
            checkpoint.point_latest(found)
        out.mkdir(parents=True, exist_ok=True)
        if on_start is not None:
            on_start()
    device = next(model.parameters()).device
    step_how: dict[str, Any] = {"precision": precision, "grad_clip_norm": grad_clip_norm, "group": world.group}
    take_step: Callable[..., dict[str, float]] = plain_step
    if isinstance(loss_fn, SummedLoss):
        take_step, step_how["micro_batch_size"] = accumulated_step, micro_batch_size
    elif micro_batch_size is not None:
        take_step, step_how["micro_batch_size"] = cached_step, micro_batch_size

    with (
        MetricsLog(out, start, tensorboard=tensorboard, silent=not world.main) as log,
        show_progress(steps, start, stream, silent=not world.main) as progress,
    ):
        if resume is not None:
            progress.say(f"resumed at step {start} from {found}" if found else f"no checkpoint in {folder}: a new run")
        model.train()
        clock = _Clock(world.world_size)
        for step in range(start, steps):
            done = step + 1
            clock.start()
            batch = next(source, None)
            if batch is None:
                raise DataError(f"fit: the batches ended after step {step} of {steps}; give more epochs or fewer steps")
            batch = batch.to(device, non_blocking=True)
            clock.loaded(len(batch), getattr(batch, "tokens", 0))
            torch.manual_seed(random_int(seed, step, *([world.rank] if world.rank else [])))
            metrics = take_step(model, loss_fn, batch, optimizer, schedule(step), step=done, **step_how)
            if means is not None:
                means.update(inner(model), done)
            metrics |= clock.stop()
            progress.update(done, metrics)
            if _due(done, log_every, steps):
                log.write(done, {f"train/{name}": value for name, value in metrics.items()})
                clock = _Clock(world.world_size)
            if evaluators and _due(done, eval_every, steps):
                if world.main or is_sharded(inner(model)):
                    values = evaluate(inner(model), evaluators)
                    log.write(done, {f"val/{name}": value for name, value in values.items()})
                    progress.say(f"step {done}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
                world.wait()
            if _due(done, save_every, steps):
                if world.main:
                    log.sync()  # a checkpoint promises that the lines up to it are there
                checkpoint.save_checkpoint(
                    folder,
                    done,
                    model,
                    optimizer,
                    run=run,
                    keep=keep,
                    ema=means,
                    data=source.state_dict() if hasattr(source, "state_dict") else None,
                    world=world,
                    sharded=sharded_checkpoints,
                )
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
        if is_sharded(model):
            model.reshard()  # type: ignore[operator]


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

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._steps, self._samples, self._tokens, self._data_s, self._step_s = 0, 0, 0, 0.0, 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def loaded(self, samples: int, tokens: int) -> None:
        self._samples += samples
        self._tokens += tokens
        self._data_s += time.perf_counter() - self._began

    def stop(self) -> dict[str, float]:
        """The means so far, under open_clip's names; samples of all ranks and of this one, times in seconds a step.

        Tokens are those of all ranks, if every rank has as many as this one.
        """
        self._steps += 1
        self._step_s += time.perf_counter() - self._began
        tokens = {"tokens_per_second": self._world_size * self._tokens / self._step_s} if self._tokens else {}
        return {
            **tokens,
            "samples_per_second": self._world_size * self._samples / self._step_s,
            "samples_per_second_per_gpu": self._samples / self._step_s,
            "data_time": self._data_s / self._steps,
            "batch_time": self._step_s / self._steps,
        }
