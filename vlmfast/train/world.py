"""The ranks of a run: who they are, what they tell each other beside gradients, and how they share a model.

torchrun starts the ranks and starts them again when one of them dies; it says in the environment who each one is. A
process that torchrun did not start is a world of its own, without any communication.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: as default arguments it keeps the one that it finds
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlmfast.errors import BackendError, DataError

T = TypeVar("T")

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
HOW = "start the ranks with: torchrun --nproc-per-node N -m -- vlmfast.cli train ..."
LONGEST_WAIT = timedelta(days=1)  # for rank 0 to evaluate or to save: NCCL gives up after ten minutes
STARTS = itertools.count()  # of this process
PATIENCE = timedelta(seconds=5)  # a rank that fails waits so long for rank 0 to say the same


@dataclass
class World:
    """The processes that train one model together, seen from one of them.

    As a context it ends the communication. What all ranks refuse is said once, by rank 0: the others leave with status
    1. A rank that fails alone raises its error after a few seconds, upon which torchrun ends the others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None  # what losses and gradients travel over; None in a world of one process
    words: dist.ProcessGroup | None = None  # what the rest travels over, on the CPU
    store: dist.Store | None = None  # where rank 0 leaves why it failed

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints, logs and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.words is not None:
            dist.barrier(self.words)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in their order."""
        if self.words is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.words)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0, on every rank."""
        values: list[Any] = [make() if self.main else None]
        if self.words is not None:
            dist.broadcast_object_list(values, group=self.words, group_src=0)
        return values[0]

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            # A group that something still refers to keeps its threads, which abort the interpreter at its end.
            self.group = self.words = None
            if self.store is not None:
                dist.destroy_process_group()
                gc.collect()
        elif self.store is not None:
            if self.main:
                self.store.set("failure", repr(error))
            elif self._has_said(repr(error)):
                raise SystemExit(1) from None

    def _has_said(self, failure: str) -> bool:
        """Whether rank 0 failed by the same."""
        try:
            self.store.wait(["failure"], PATIENCE)  # type: ignore[union-attr]
            return self.store.get("failure").decode() == failure  # type: ignore[union-attr]
        except RuntimeError:  # rank 0 has not failed
            return False


def start(device: str = "auto") -> World:
    """The world that torchrun's environment describes, its process groups open; without torchrun, this process alone.

    gloo carries what lies on CPUs and NCCL what lies on GPUs, of which the process with LOCAL_RANK i takes the i-th.

    Args:
        device: cpu, cuda, or auto: cuda where there is one.

    Returns:
        A World, to be used as a context.

    Raises:
        DataError: there is no such device.
        BackendError: the environment is torchrun's in part, or this machine has fewer GPUs than processes.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "RANK" not in os.environ:
        return World(device=_existing(device))
    if missing := [name for name in ENVIRONMENT if not os.environ.get(name)]:
        raise BackendError(f"train: RANK is set, but not {', '.join(missing)}; {HOW}, or unset RANK")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ENVIRONMENT[:3])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BackendError(
                f"train: this is process {local_rank + 1} of this machine, which has {torch.cuda.device_count()} GPUs; "
                "lower torchrun's --nproc-per-node"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    place = _existing(device)
    # torchrun keeps one store for all its restarts, in which the addresses of ranks that died still stand.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"vlmfast/{restarts}/{next(STARTS)}", next(dist.rendezvous("env://"))[0])
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    words = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return World(rank, world_size, local_rank, place, dist.group.WORLD, words, store)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model in DDP: each rank holds all of it, and gradients are averaged; in a world of one the model itself.

    Args:
        model: on the world's device, the same on every rank. Every parameter that is trained takes part in each loss.
        world: from `start`.

    Returns:
        What to make the optimizer for, and to give to `fit`.
    """
    if world.group is None:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, devices, process_group=world.group, gradient_as_bucket_view=True)


def shard(model: nn.Module, world: World) -> nn.Module:
    """The model in FSDP2: each rank holds a part of every parameter, its gradient and its optimizer state.

    Each of the `blocks` is gathered when it runs, and the rest of the model with its forward. Parameters without
    dimensions become [1], as FSDP2 takes no others; whole checkpoints hold them as they were.

    Args:
        model: on the world's device, the same on every rank; it is changed.
        world: from `start`, of torchrun's ranks.

    Returns:
        The model, to make the optimizer for and to give to `fit`.

    Raises:
        BackendError: torchrun did not start this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if world.group is None:
        raise BackendError(f"train: FSDP needs ranks to share the model among; {HOW}")
    points = {name for name, parameter in model.named_parameters() if parameter.dim() == 0}
    for name in points:
        path, _, last = name.rpartition(".")
        parameter = model.get_parameter(name)
        vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(path), last, vector)
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("encode_image", "encode_text", "generate", "score"):  # what evaluators call
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    model.points = points  # type: ignore[assignment]
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of every nn.ModuleList in the model: the blocks of its towers.

    Args:
        model: any module.
    """
    return [block for each in model.modules() if isinstance(each, nn.ModuleList) for block in each]


def inner(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters bear their own names: out of DDP's wrapper and torch.compile's.

    Args:
        model: any module.

    Returns:
        A module whose parameters are those of `model`.
    """
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks hold parts of the parameters, so that only all of them together can compute with it.

    Args:
        model: any module.

    Returns:
        True for what `shard` made.
    """
    return hasattr(model, "points")


def _existing(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None
