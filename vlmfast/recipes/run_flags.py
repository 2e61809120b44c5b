"""What every command that trains has in common: how long it runs and how, where the run lies, and how it goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vlmfast.errors import DataError
from vlmfast.train import warmup_constant, warmup_cosine
from vlmfast.train.checkpoint import replace_text
from vlmfast.train.schedule import Schedule
from vlmfast.train.world import World, blocks, replicate, shard

FLAGS_FILE = "flags.json"


@dataclass(kw_only=True)
class RunFlags:
    """The flags of a run. They have open_clip's names, where it has them, and their meaning."""

    accum_freq: int = 1
    """A step has so many times --batch-size samples, taken in pieces of --batch-size: its gradients are those of the
    large batch, its memory that of a piece."""
    micro_batch_size: int | None = None
    """The same from the other side: take the --batch-size samples of a step in pieces of this size."""
    epochs: int = 32
    """Passes over the data."""
    steps: int | None = None
    """Length of the run in steps, instead of --epochs."""
    warmup: int = 20
    """Steps in which the learning rate rises."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """What the learning rate does after."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """amp_bf16: bfloat16 autocast."""
    grad_clip_norm: float | None = None
    """Longest gradient, all parameters together."""
    grad_checkpointing: bool = False
    """Keep the blocks' inputs alone for the backward, and run each block twice."""
    torchcompile: bool = False
    """Compile the model; with --fsdp each block."""
    torchcompile_backend: str = "inductor"
    """What compiles it, as torch.compile takes it."""
    ema: float | None = None
    """Decay of a mean of the weights, such as 0.9999, which checkpoints hold beside them (ema.safetensors)."""
    fsdp: bool = False
    """Several ranks: share parameters and optimizer out among them (FSDP2), instead of a copy on each (DDP)."""
    fsdp_checkpoint: Literal["full", "sharded"] = "full"
    """sharded: each rank writes its parts; either can be resumed by any of DDP, FSDP and one process."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    workers: int = 0
    """Threads that prepare batches ahead."""
    seed: int = 0
    """Of weights, order and random changes of images."""
    logs: Path = Path("logs")
    """Where runs are kept."""
    name: str = ""
    """The run's folder in --logs. Default: the time and the model."""
    resume: str | None = None
    """latest, or a checkpoint's path: go on from there, to the same bits as a run that never stopped."""
    elastic: bool = False
    """Resume from a checkpoint of another number of ranks, too: the samples of a step must be as many; tars are dealt
    out anew and read from the first on."""
    save_frequency: float = 1.0
    """Epochs between two checkpoints; 0 for the last step only, as for the next."""
    val_frequency: float = 1.0
    """Epochs between two evaluations."""
    log_every_n_steps: int = 10
    """Steps between two lines of metrics."""
    report_to: Literal["", "tensorboard"] = ""
    """tensorboard: write event files too."""
    json: bool = False
    """Print the last value of every metric as one JSON object."""


def step_sizes(flags: RunFlags, batch_size: int) -> tuple[int, int | None]:
    """Samples of a rank's step, and of its pieces if it is taken in pieces.

    Args:
        flags: --accum-freq or --micro-batch-size.
        batch_size: --batch-size.
    Raises:
        DataError: a number is less than 1, or the flags exclude each other.
    """
    numbers = (batch_size, flags.accum_freq, flags.epochs if flags.steps is None else flags.steps)
    if min(numbers) < 1:
        raise DataError("--batch-size, --accum-freq, --epochs and --steps must be at least 1")
    if flags.accum_freq > 1 and flags.micro_batch_size is not None:
        raise DataError(
            "--accum-freq and --micro-batch-size say the same from two sides; give one of them: a step has "
            "--accum-freq times --batch-size samples, or --batch-size in pieces of --micro-batch-size"
        )
    if flags.fsdp_checkpoint == "sharded" and not flags.fsdp:
        raise DataError("--fsdp-checkpoint sharded needs --fsdp: without it each rank holds the whole model")
    if flags.accum_freq > 1:
        return flags.accum_freq * batch_size, batch_size
    return batch_size, flags.micro_batch_size


def run_folder(flags: RunFlags, model: str) -> Path:
    """The run's folder, which holds no other run.

    Args:
        flags: --logs, --name and --resume.
        model: what the folder is called after, where it has no --name.
    Raises:
        DataError: the folder holds a run already, or --resume does not say which.
    """
    if flags.resume == "latest" and not flags.name:
        raise DataError("--resume latest needs the --name of the run to go on with")
    folder = flags.logs / (flags.name or f"{datetime.now():%Y_%m_%d-%H_%M_%S}-{model}")
    if flags.resume is None and (folder / FLAGS_FILE).exists():
        raise DataError(f"{folder} already holds a run; go on with it by --resume latest, or choose another --name")
    return folder


def resumed_folder(flags: RunFlags, folder: Path) -> Path | None:
    """The folder of the run that goes on, or None.

    Args:
        flags: --resume.
        folder: of this run.
    """
    return folder if flags.resume == "latest" else Path(flags.resume).parent.parent if flags.resume else None


def placed(model: Any, flags: RunFlags, world: World) -> nn.Module:
    """The model as it is trained: checkpointed and compiled in place where the flags say so, shared by the ranks.

    Args:
        model: on the world's device, with `set_grad_checkpointing`.
        flags: --grad-checkpointing, --torchcompile and --fsdp.
        world: the ranks.
    Raises:
        BackendError: --fsdp without torchrun.
    """
    model.set_grad_checkpointing(flags.grad_checkpointing)
    if flags.torchcompile:
        for part in blocks(model) if flags.fsdp else [model]:
            part.compile(backend=flags.torchcompile_backend)
    return (shard if flags.fsdp else replicate)(model, world)


def schedule_of(flags: RunFlags, lr: float, steps: int) -> Schedule:
    """The learning rate of each step.

    Args:
        flags: --warmup and --lr-scheduler.
        lr: --lr.
        steps: of the whole run.
    Raises:
        DataError: the warm-up is as long as the run.
    """
    if flags.lr_scheduler == "const":
        return warmup_constant(lr, flags.warmup)
    if flags.warmup >= steps:
        raise DataError(f"--warmup {flags.warmup} must be less than the run's {steps} steps")
    return warmup_cosine(lr, flags.warmup, steps)


def write_flags(flags: RunFlags, folder: Path) -> None:
    """Writes the command's flags into the run's folder, which is made if it is missing.

    Args:
        flags: all of them.
        folder: of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(flags).items()}
    replace_text(folder / FLAGS_FILE, json.dumps(told, indent=1) + "\n")


def print_last(flags: RunFlags, folder: Path, last: dict[str, Any], hint: str) -> None:
    """Prints the last value of every metric, for people or as JSON.

    Args:
        flags: --json.
        folder: of the run.
        last: values by name.
        hint: what can be done with the run.
    """
    if flags.json:
        print(json.dumps({"folder": str(folder), **last}))
        return
    for name, value in last.items():
        print(f"{name:<40} {value:.6g}")
    print(f"{folder}: {hint}")
