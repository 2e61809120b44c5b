"""What a result must carry to be repeated: the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlmfast._ext import C, reason
from vlmfast._version import __version__

INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The machine: CPU model, cores that this process may use, instruction sets, memory, load.

    Returns: JSON-able. `load_average` is that of the last minute, None where the system has none.
    """
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model_stepping": [cpuinfo.get(key) for key in ("cpu family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


@cache
def gpu() -> dict[str, Any]:
    """The GPU that torch uses, and what drives it. torch must see one.

    Returns: JSON-able. `driver` and `power_limit` are None where there is no nvidia-smi.
    """
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver, power_limit = _nvidia_smi("driver_version", "power.limit") or (None, None)
    return {
        "name": facts.name,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "driver": driver,
        "power_limit": power_limit,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python and of the libraries that a result depends on; None for one that is not installed.

    Args:
        more: further libraries, by the names under which they are installed.
    """
    found: dict[str, str | None] = {"vlmfast": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "open_clip_torch", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["vlmfast_extension"] = (C.isa() if hasattr(C, "isa") else "built") if C is not None else f"none: {reason}"
    return found


def commit() -> dict[str, Any] | None:
    """The git commit that this package lies in and whether tracked files differ from it; None outside a checkout.

    There VLMFAST_COMMIT may name it, for a copy of the files without their history; `dirty` is None then.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is a checkout of something else around us
        return {"sha": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        sha = os.environ.get("VLMFAST_COMMIT")
        return {"sha": sha, "dirty": None} if sha else None


def now() -> str:
    """The date and time in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git(*words: str) -> str:
    here = Path(__file__).resolve().parent
    return subprocess.run(["git", *words], cwd=here, check=True, capture_output=True, text=True).stdout.strip()


def _nvidia_smi(*names: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU that this process may use, or None."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    command += [f"--id={visible}"] * bool(visible)
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        found = done.stdout.splitlines()[0].split(", ")
        return found if len(found) == len(names) else None
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _cpuinfo() -> dict[str, str]:
    """The first core's entries of /proc/cpuinfo, none where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
