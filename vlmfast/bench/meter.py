"""What is measured differently on a processor and on a GPU: time, memory, and what the machine itself can do."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlmfast._ext import C
from vlmfast.bench import machine, memory, timing
from vlmfast.bench.memory import Peak
from vlmfast.bench.providers import BenchError, first_line
from vlmfast.bench.report import Row

MICROKERNEL_SECONDS = 0.02  # once a round
FLUSH_BYTES = 2**28  # written before each call: several times the L2 cache of any GPU
PRODUCT, PRODUCTS = 8192, 5  # the bfloat16 matrix product that loses are compared with, and how many at a time
COPY_BYTES, COPIES = 2**31, 3  # copied within the GPU's memory: read once and written once


class DeviceLostError(RuntimeError):
    """The GPU answers nothing any more: some kernel failed for good, and only a new process can use it again."""


class Cpu:
    """Wall time and resident memory."""

    name = "cpu"
    peak_of = "the micro-kernel"

    def __init__(self, threads: int = 1) -> None:
        self.device, self.threads = torch.device("cpu"), threads

    def facts(self) -> dict[str, Any]:
        """What a result says of the machine."""
        return machine.machine()

    def memory_reason(self) -> str | None:
        """None where peaks can be measured, else why not."""
        return memory.unmeasurable()

    def free_bytes(self) -> int | None:
        """Memory that a call can still have, or None where nobody knows."""
        return memory.available_bytes()

    def recover(self) -> None:
        """Makes room after a call that failed."""
        gc.collect()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def marks(self, *calls: Callable[[], object]) -> list[float]:
        """Seconds from the first call's start to each call's end."""
        start, ends = time.perf_counter(), []
        for call in calls:
            call()
            ends.append(time.perf_counter() - start)
        return ends

    def timed_pass(self, loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[float, float]:
        """(forward, forward + backward) seconds of a pass."""
        return timing.timed_pass(loss, leaves)

    def ceilings(self, dim: int) -> dict[str, Callable[[], float]]:
        """GFLOP/s of our micro-kernel alone."""
        if not hasattr(C, "microkernel_gflops"):
            return {}
        return {"product": lambda: self.threads * C.microkernel_gflops(dim, MICROKERNEL_SECONDS)}  # type: ignore[union-attr]


class Cuda:
    """The GPU's own clock (CUDA events, after the L2 cache was overwritten) and its allocator's count of bytes.

    A call is given to the GPU while it still overwrites its cache, so the time of launching shows only where it is
    longer than the kernels' own, as in a training step.

    Raises:
        BenchError: torch sees no GPU.
    """

    name, where = "cuda", "cuda"  # `where` lies the memory: tests put it on the processor
    peak_of = f"a bfloat16 matrix product of {PRODUCT}³"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BenchError(f"device: torch {torch.__version__} sees no GPU (torch.cuda.is_available() is False)")
        self.device = torch.device(self.where)
        self._cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict[str, Any]:
        """What a result says of the machine and its GPU."""
        return machine.machine() | {"gpu": machine.gpu()}

    def memory_reason(self) -> str | None:
        """None: the allocator always counts."""
        return None

    def free_bytes(self) -> int | None:
        """Memory that a call can still have: what no process holds, and what the allocator keeps for reuse."""
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept

    def recover(self) -> None:
        """Makes room after a call that failed.

        Raises:
            DeviceLostError: it took the GPU along.
        """
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLostError(str(error).strip().splitlines()[0]) from error

    def memory_of(self, call: Callable[[], object]) -> Peak:
        """The allocator's highest count during the call, less that before it; and in all, without this harness's own.

        What cuBLAS keeps from the first product on for all that follow counts in all.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
        return Peak(highest - before, highest - self._cache.nbytes)

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call on the GPU."""
        return self.marks(call)[0]

    def timed_pass(self, loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[float, float]:
        """(forward, forward + backward) seconds of a pass on the GPU, with graph, into fresh gradients."""
        for leaf in leaves:
            leaf.grad = None
        value: list[Tensor] = []
        forward, full = self.marks(lambda: value.append(loss()), lambda: value.pop().backward())
        return forward, full

    def ceilings(self, dim: int) -> dict[str, Callable[[], float]]:
        """GFLOP/s of a large bfloat16 product of random numbers, and GB/s, read and written, of a large copy."""
        a, b, c = (torch.randn(PRODUCT, PRODUCT, device=self.device, dtype=torch.bfloat16) for _ in range(3))
        here, there = (torch.zeros(COPY_BYTES, device=self.device, dtype=torch.uint8) for _ in range(2))

        def product() -> float:
            seconds = self.timed(lambda: [torch.mm(a, b, out=c) for _ in range(PRODUCTS)])
            return PRODUCTS * 2 * PRODUCT**3 / seconds / 1e9

        def copy() -> float:
            seconds = self.timed(lambda: [there.copy_(here) for _ in range(COPIES)])
            return COPIES * 2 * COPY_BYTES / seconds / 1e9

        return {"product": product, "copy": copy}

    def marks(self, *calls: Callable[[], object]) -> list[float]:
        """Seconds from the first call's start to each call's end."""
        start, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(1 + len(calls)))
        self._cache.zero_()
        start.record()
        for call, end in zip(calls, ends, strict=True):
            call()
            end.record()
        ends[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for end in ends]


Meter: TypeAlias = Cpu | Cuda


def meter(device: str, threads: int = 1) -> Meter:
    """The meter of a device, "cpu" or "cuda".

    Args:
        device: its name.
        threads: of the processor.
    """
    return Cuda() if device == "cuda" else Cpu(threads)


def guarded(row: Row, gauge: Meter, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call; once it has failed its row has the reason, and it does nothing and returns None.

    Args:
        row: of the provider that is called.
        gauge: makes room after a failure.
        call: any.
    """

    def attempt() -> Any:
        if row.reason:
            return None
        try:
            return call()
        except Exception as error:
            row.reason = first_line(error)
            if row.provider == "vlmfast":
                traceback.print_exc()
        gauge.recover()  # out here: the error, as long as it lives, holds on to the tensors of the call

    return attempt
