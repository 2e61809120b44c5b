"""Peak memory of a call on the CPU, as the kernel counts it: the resident set at its highest, in a process of its own.

Linux keeps each process's highest resident set (VmHWM) exactly and lets it be reset (5 > /proc/self/clear_refs); no
allocation, of PyTorch's, MKL's or ours, escapes it. Counted are pages that were written to, so memory that is only
reserved is free, for every provider alike.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """The memory of one call, in bytes."""

    extra_bytes: int  # the highest resident set during the call, less the resident set before it
    process_bytes: int  # the highest resident set of the process during the call: interpreter, libraries and inputs too


def unmeasurable() -> str | None:
    """None where peaks can be measured, else the reason."""
    if not STATUS.exists() or "VmHWM" not in STATUS.read_text():
        return "this system does not report VmHWM in /proc/self/status (Linux does)"
    if not os.access(CLEAR_REFS, os.W_OK):
        return "/proc/self/clear_refs cannot be written, so the peak cannot be reset"
    return None


def peak_of(call: Callable[[], object]) -> Peak:
    """The peak memory of `call()` in this process.

    Memory that earlier calls freed but the allocator kept would hide the call's own: use a fresh process, or
    `keep_nothing()` first.

    Raises:
        OSError: the system cannot reset or report peaks; `unmeasurable()` tells beforehand.
    """
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    call()
    highest = _status("VmHWM")
    return Peak(max(0, highest - before), highest)


def keep_nothing() -> None:
    """From here on this process gives freed blocks back to the system at once, and now those that it holds (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)


def peak_in_child(setup: Callable[..., Callable[[], object]], **arguments: object) -> Peak:
    """The peak memory of the call that `setup(**arguments)` returns, in a fresh process.

    What setup does itself (imports, inputs, a warm-up) is not counted as extra.

    Args:
        setup: a function at the top of an importable module.
        arguments: what JSON can carry.
    Raises:
        RuntimeError: the process ended without an answer; the message says how.
    """
    order = json.dumps([setup.__module__, setup.__qualname__, arguments])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "vlmfast.bench.memory", order]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == -9:
        raise RuntimeError("killed by the system, most likely for want of memory")
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def available_bytes() -> int | None:
    """Memory that a new process can have without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _status(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))


def _child(order: str) -> None:
    module, function, arguments = json.loads(order)
    keep_nothing()
    call = getattr(importlib.import_module(module), function)(**arguments)
    gc.collect()  # what the setup dropped must not be freed during the call
    keep_nothing()
    print(json.dumps(asdict(peak_of(call))))


if __name__ == "__main__":
    _child(sys.argv[1])
