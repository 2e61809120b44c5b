"""Compiles every Triton kernel that the ops launch, in every shipped configuration, for GPUs that are not here.

    python benchmarks/compile_gates.py [sm_80 sm_90 sm_100 gfx942]

Each op runs on tensors without data while its launches are written down; each of them is then compiled. A line a
kernel: registers a thread, shared memory, pipeline stages. The exit status is 1 if one does not compile, spills, keeps
a stack, passes the shared memory that a program may have, or computes tiles without the matrix unit. No kernel runs:
this says nothing about speed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmfast.ops import _tiles
from vlmfast.ops.hinge_loss import _triton as hinge_loss
from vlmfast.ops.sigmoid_loss import _triton as sigmoid_loss
from vlmfast.ops.similarity import _triton as similarity
from vlmfast.ops.softmax_loss import _triton as softmax_loss

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Target(NamedTuple):
    """A GPU to compile for: the shared memory a program may have, and what its matrix unit's instructions look like."""

    gpu: GPUTarget
    shared_bytes: int
    matrix: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, r"mma\.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, r"wgmma\.mma_async"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, r"tcgen05\.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_"),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


class Launch(NamedTuple):
    """What decides how a kernel is compiled."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    config: _tiles.Config | None


def describe(kernel: Any, args: tuple, constants: dict[str, Any], config: _tiles.Config | None) -> Launch:
    """A launch as the compiler sees it: the types that Triton would find at run time."""
    signature, divisible = [], []
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            divisible.append(place)
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature.append((name, f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32"))
            if value % 16 == 0 and not kernel.params[place].do_not_specialize:
                divisible.append(place)
    signature += [(name, "constexpr") for name in constants]
    return Launch(kernel, tuple(signature), tuple(constants.items()), tuple(divisible), config)


def launches(where: str, call: Callable[[], Any]) -> list[Launch]:
    """What `call`, on tensors without data, would launch on a GPU of that kind."""
    found: list[Launch] = []

    def record(kernel, grid, *args, config=None, **constants):
        found.append(describe(kernel, args, constants, config))

    before = _tiles.launch, _tiles.target, _tiles._accumulate
    _tiles.launch, _tiles.target = record, lambda device: where
    _tiles._accumulate = lambda *args, **kwargs: None
    try:
        call()
    finally:
        _tiles.launch, _tiles.target, _tiles._accumulate = before
    return list(dict.fromkeys(found))


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) for every dtype, precision and bucket of D that has kernels or a configuration of its own."""
    for dtype, precision, D, every in (
        (torch.bfloat16, "bf16x3", 512, True),
        (torch.bfloat16, "bf16x3", 100, False),  # rows do not start on 16 bytes: the kernels without descriptors
        (torch.bfloat16, "bf16x3", 64, False),
        (torch.float16, "bf16x3", 512, False),
        (torch.float32, "bf16x3", 512, True),
        (torch.float32, "tf32", 512, False),
        (torch.bfloat16, "ieee", 512, False),
        (torch.float32, "ieee", 512, False),
    ):
        name = f"{TYPES[dtype]} D={D}" + (f" {precision}" if dtype == torch.float32 or precision == "ieee" else "")
        yield name, lambda dtype=dtype, precision=precision, D=D, every=every: ops(dtype, precision, D, every)


def ops(dtype: torch.dtype, precision: str, D: int, every: bool) -> None:
    """Forward and backward of the ops, in `every` form or the most used."""
    _tiles.PRECISION = precision
    M, N = 4096, 8192
    with torch.device("meta"):
        x, y = torch.empty(M, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
        positives = torch.empty(M, 2, dtype=torch.int64)
        scale, ids = torch.empty(()), (torch.empty(M, dtype=torch.int64), torch.empty(N, dtype=torch.int64))
        rows, cols = torch.empty(M), torch.empty(N)
    softmax(x, y, scale, ids, rows, cols, every)
    for need in (True, False) if every else (True,):
        sigmoid_loss.forward(x, x, scale, scale, True, need, need, need)
        hinge_loss.forward(x, x, 0.2, False, True, need, need)
    hinge_loss.forward(x, x, 0.2, True, True, False, False)
    similarity.forward(x, y, True)
    for k in (1, 10, 64) if every else (10,):
        similarity.topk(x, y, k, True)
    similarity.ranks(x, y, positives, True)


def softmax(x, y, scale, ids, rows, cols, every) -> None:
    """clip_loss; one direction alone; several positives."""
    forms = [
        ("index", rows, cols, 0.0),
        ("index", rows, None, 0.0),
        ("index", None, cols, 0.1),
        ("out", rows, cols, 0.1),
        ("in", rows, cols, 0.0),
    ]
    for form, row_weight, col_weight, smoothing in forms if every else forms[:1]:
        shares = (rows, cols) if form == "out" else (None, None)
        plan = (x, y, scale, *ids, row_weight, col_weight, *shares, form, smoothing, True)
        lses = softmax_loss.forward(*plan)[1:]
        softmax_loss.backward(scale, *plan, *lses, True, True)


class Result(NamedTuple):
    """What a compiled kernel needs, and what is wrong with it."""

    registers: int
    shared_bytes: int
    faults: list[str]


def compiled(launch: Launch, target: Target) -> Result:
    """Compiles one kernel and reads its needs from what came out."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages} if launch.config else {}
    try:
        binary = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:
        return Result(0, 0, [f"does not compile: {str(error).strip().splitlines()[-1][:100]}"])
    if target.gpu.backend == "cuda":
        text = binary.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
        registers, spilled = int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
    else:
        text = binary.asm["amdgcn"]
        found = dict(
            re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
        )
        registers = int(found["vgpr_count"])
        spilled = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
    faults = []
    if spilled:
        faults.append(f"spills or keeps a stack: {spilled} bytes")
    if binary.metadata.shared > target.shared_bytes:
        faults.append(f"takes {binary.metadata.shared} bytes of shared memory; the target has {target.shared_bytes}")
    constants = dict(launch.constants)
    exact = any("fp32" in kind for name, kind in launch.signature[:2]) and constants.get("PRECISION") == "ieee"
    if "PRECISION" in constants and not exact and not re.search(target.matrix, text):
        faults.append("does not use the matrix unit")
    return Result(registers, binary.metadata.shared, faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="target")
    parser.add_argument("--fast", action="store_true", help="bfloat16 alone")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args()
    broken = count = 0
    start = time.perf_counter()
    for where in options.targets:
        done: set[Launch] = set()
        for name, call in list(calls())[: 1 if options.fast else None]:
            for launch in launches(where, call):
                kernel = launch.kernel.__name__
                if launch in done or options.only not in kernel:
                    continue
                done.add(launch)
                result = compiled(launch, TARGETS[where])
                constants = dict(launch.constants)
                flags = "".join(
                    f" {key}={value}"
                    for key, value in constants.items()
                    if key not in ("UPCAST", "BLOCK_K", "PRECISION")
                )
                shape = launch.config or _tiles.Config(0, 0, 0, 4, 0)
                print(
                    f"{where:7} {name:18} {kernel:18} {shape.warps} warps {shape.stages} stages "
                    f"{result.registers:3} registers {result.shared_bytes / 1024:5.0f} KiB "
                    f"{'; '.join(result.faults) or 'ok'} {flags}",
                    flush=True,
                )
                broken += bool(result.faults)
                count += 1
    print(
        f"{count} kernels compiled in {time.perf_counter() - start:.0f} s with Triton {triton.__version__}; "
        f"{broken} broken"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
