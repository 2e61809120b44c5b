"""Compiles every Triton kernel that the ops launch, in every shipped tile, for GPUs that are not here.

    python benchmarks/compile_gates.py [sm_80 sm_90 sm_100 gfx942] [--markdown | --survey]

Each op runs on tensors without data while its launches are written down; each of them is then compiled, and so is each
candidate of `vlmfast tune` with the kernels that it is measured for. A line a kernel: registers a thread, shared
memory, pipeline stages. The exit status is 1 if one does not compile, spills, keeps a stack, passes the shared memory
that a program may have, or computes tiles without the matrix unit. No kernel runs: this says nothing about speed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmfast.ops import _configs, _tiles
from vlmfast.ops._configs import CANDIDATES, Config
from vlmfast.ops.attention import _triton as attention
from vlmfast.ops.hinge_loss import _triton as hinge_loss
from vlmfast.ops.linear_cross_entropy import _triton as linear_cross_entropy
from vlmfast.ops.patch_embedding import _triton as patches
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
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.int32: "i32",
}
DOCUMENT = Path(__file__).parent.parent / "docs/backends.md"
MARKERS = "<!-- compile-gates: begin -->\n", "<!-- compile-gates: end -->"
# Kernel over tiles -> its column in the document; + with several positives
COLUMNS = {
    "_tile_sums": "sums",
    "_gradient_tiles": "gradient",
    "_tile_sums+": "sums+",
    "_gradient_tiles+": "gradient+",
    "_sigmoid_tiles": "sigmoid",
    "_hinge_tiles": "hinge",
    "_hardest_tiles": "hardest",
    "_best_of_rows": "top k",
    "_counts_of_rows": "ranks",
    "_diagonal": "ranks",
    "_matrix_tiles": "matrix",
    "_power_tiles": "vocabulary",
}


class Launch(NamedTuple):
    """What decides how a kernel is compiled."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    config: Config | None
    fuse: bool


def describe(kernel: Any, args: tuple, constants: dict[str, Any], config: Config | None, fuse: bool) -> Launch:
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
    return Launch(kernel, tuple(signature), tuple(constants.items()), tuple(divisible), config, fuse)


def launches(where: str, call: Callable[[], Any]) -> list[Launch]:
    """What `call`, on tensors without data, would launch on a GPU of that kind."""
    found: list[Launch] = []

    def record(kernel, grid, *args, config=None, fuse=True, **constants):
        found.append(describe(kernel, args, constants, config, fuse))

    before = _tiles.launch, _tiles.target, _tiles._accumulate
    _tiles.launch, _tiles.target = record, lambda device: where
    _tiles._accumulate = lambda *args, **kwargs: None
    try:
        call()
    finally:
        _tiles.launch, _tiles.target, _tiles._accumulate = before
    return list(dict.fromkeys(found))


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) for every dtype, precision and bucket of D that has kernels or a tile of its own."""
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
        kinds = KINDS if every else ONCE
        yield name, lambda dtype=dtype, precision=precision, D=D, kinds=kinds: ops(dtype, precision, D, kinds)
    for pixels, dtype, precision, patch in (
        (torch.uint8, torch.bfloat16, "bf16x3", (1, 16, 16)),
        (torch.uint8, torch.bfloat16, "bf16x3", (1, 14, 14)),  # a channel is no whole number of steps
        (torch.uint8, torch.float16, "bf16x3", (1, 16, 16)),
        (torch.bfloat16, torch.bfloat16, "bf16x3", (2, 14, 14)),
        (torch.uint8, torch.float32, "bf16x3", (1, 16, 16)),
        (torch.float32, torch.float32, "bf16x3", (1, 16, 16)),
        (torch.uint8, torch.float32, "tf32", (1, 16, 16)),
        (torch.uint8, torch.float32, "ieee", (1, 16, 16)),
    ):
        name = f"{TYPES[pixels]}, {TYPES[dtype]}" + (f" {precision}" if dtype == torch.float32 else "")
        yield name, partial(patch_embedding, pixels, dtype, precision, patch)
    for T, K, dtype, packed, causal in (
        (50, 64, torch.bfloat16, False, False),
        (77, 64, torch.bfloat16, False, True),
        (128, 72, torch.bfloat16, False, False),
        (128, 128, torch.bfloat16, False, True),
        (257, 64, torch.bfloat16, False, False),
        (256, 80, torch.bfloat16, False, True),
        (577, 72, torch.float16, False, False),
        (577, 128, torch.bfloat16, False, True),
        (64, 64, torch.bfloat16, True, True),
        (77, 64, torch.bfloat16, True, True),
        (256, 80, torch.bfloat16, True, False),
        (77, 64, torch.float32, True, True),
    ):
        name = f"{TYPES[dtype]} T={T} K={K}" + " packed" * packed
        yield name, partial(attend, T, K, dtype, packed, causal)


def candidates(where: str, survey: bool) -> Iterator[tuple[str, Config, Callable[[], Any]]]:
    """(kind, tile, call) for each candidate of `vlmfast tune` and each kind it is measured for; in a survey, any."""
    for tile, listed in CANDIDATES[where].items():
        for kind in TUNED if survey else listed.split():
            yield kind, tile, lambda kind=kind: ops(torch.bfloat16, "bf16x3", 512, TUNED[kind])


def ops(dtype: torch.dtype, precision: str, D: int, kinds: tuple[Callable[..., None], ...]) -> None:
    """Forward and backward of some kinds of op on tensors without data."""
    M, N = 4096, 8192
    with torch.device("meta"):
        x, y = torch.empty(M, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    for kind in kinds:
        kind(x, y, precision)


def softmax(
    x: torch.Tensor,
    y: torch.Tensor,
    precision: str,
    form: str = "index",
    sides: str = "both",
    smoothing: float = 0.0,
    keep: int = 0,
) -> None:
    scale, rows, cols = (
        x.new_empty((), dtype=torch.float32),
        *(x.new_empty(len(s), dtype=torch.float32) for s in (x, y)),
    )
    ids = [x.new_empty(len(side), dtype=torch.int64) for side in (x, y)]
    shares = (rows, cols) if form == "out" else (None, None)
    weights = (rows if sides != "columns" else None, cols if sides != "rows" else None)
    plan = (x, y, scale, *ids, *weights, *shares, form, smoothing, True)
    saved = softmax_loss.forward(*plan, precision, keep)[1:]
    softmax_loss.backward(scale, *plan, *saved, True, True, precision, WORKSPACE)


def sigmoid(x: torch.Tensor, y: torch.Tensor, precision: str, gradient: bool = True) -> None:
    scale = x.new_empty((), dtype=torch.float32)
    sigmoid_loss.forward(x, y, scale, scale, 0, True, gradient, gradient, gradient, precision, WORKSPACE)


def hinge(x: torch.Tensor, y: torch.Tensor, precision: str, gradient: bool = True) -> None:
    hinge_loss.forward(x, x, 0.2, False, True, gradient, gradient, precision, WORKSPACE)


def hardest(x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
    hinge_loss.forward(x, x, 0.2, True, True, False, False, precision, WORKSPACE)


def matrix(x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
    similarity.forward(x, y, True, precision)


def vocabulary(x: torch.Tensor, y: torch.Tensor, precision: str, gradient: bool = True, bias: bool = False) -> None:
    head = y[:, 0] if bias else None
    labels, factor = x.new_empty(len(x), dtype=torch.int64), x.new_empty((), dtype=torch.float32)
    needs = gradient, gradient, gradient and bias
    linear_cross_entropy.forward(x, y, head, labels, factor, 0.0, 0.0, *needs, precision, WORKSPACE)


def topk(x: torch.Tensor, y: torch.Tensor, precision: str, k: int = 10) -> None:
    similarity.topk(x, y, k, True, precision)


def ranks(x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
    similarity.ranks(x, y, x.new_empty(len(x), 2, dtype=torch.int64), True, precision)


def patch_embedding(pixels: torch.dtype, dtype: torch.dtype, precision: str, patch: tuple[int, int, int]) -> None:
    """Forward and backward of images of 224 x 224 to tokens."""
    t, p, q = patch
    x = torch.empty(64, 3, t, 224, 224, dtype=pixels, device="meta")
    x = x.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 1, 3, 5, 7)
    weight = torch.empty(768, 3, *patch, dtype=dtype, device="meta")
    positions = torch.empty(1 + x.shape[1:4].numel(), 768, dtype=dtype, device="meta")
    mean, std = [0.0] * 3, [1.0] * 3
    tokens = patches.forward(x, weight, None, positions[0], positions, mean, std, precision)
    patches.backward(tokens, x, weight, mean, std, False, True, precision)


def attend(T: int, K: int, dtype: torch.dtype, packed: bool, causal: bool) -> None:
    """Forward and backward of attention over sequences of T tokens, or of up to T."""
    with torch.device("meta"):
        x = torch.empty(4096, 8, K, dtype=dtype) if packed else torch.empty(64, 8, T, K, dtype=dtype)
        ends = torch.empty(65, dtype=torch.int32) if packed else None
    arguments = (ends, T if packed else 0, causal, K**-0.5)
    out, lse = attention.forward(x, x, x, *arguments)
    attention.backward(out, x, x, x, out, lse, *arguments)


WORKSPACE = 2**27
KEEP = 2**40  # of the softmax's powers: all
ONCE = (softmax, sigmoid, hinge, hardest, matrix, topk, ranks, vocabulary)
KINDS = (
    *ONCE,
    partial(softmax, keep=KEEP),
    partial(softmax, sides="rows"),
    partial(softmax, sides="columns", smoothing=0.1),
    partial(softmax, smoothing=0.1),
    partial(softmax, form="out", smoothing=0.1),
    partial(softmax, form="in"),
    partial(sigmoid, gradient=False),
    partial(hinge, gradient=False),
    partial(vocabulary, bias=True),
    partial(vocabulary, gradient=False),
    partial(topk, k=1),
    partial(topk, k=64),
)
# What a candidate is compiled with: the kernels that `vlmfast tune` measures
TUNED = {
    "softmax": (softmax,),
    "sigmoid": (sigmoid,),
    "hinge": (hinge,),
    "hardest": (hardest,),
    "topk": (topk,),
}


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
    options: dict[str, Any] = {} if launch.fuse else {"enable_fp_fusion": False}
    if launch.config:
        options |= {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
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


class Job(NamedTuple):
    """One kernel to compile, and why."""

    where: str
    name: str  # of the call, or "candidate"
    kind: str
    launch: Launch


def jobs(targets: list[str], fast: bool, only: str, survey: bool) -> list[Job]:
    """All that is to be compiled; a kernel comes once for each reason."""
    found = []
    for where in targets:
        for name, call in [] if survey else list(calls())[: 1 if fast else None]:
            found += [Job(where, name, "", launch) for launch in launches(where, call)]
        for kind, tile, call in candidates(where, survey):
            with _configs.trying(tile):
                found += [Job(where, "candidate", kind, launch) for launch in launches(where, call) if launch.config]
    return [job for job in dict.fromkeys(found) if only in job.launch.kernel.__name__]


JOBS: list[Job] = []  # a process that is forked off finds its job here: kernels do not pickle


def work(place: int) -> Result:
    return compiled(JOBS[place].launch, TARGETS[JOBS[place].where])


def line(job: Job, result: Result) -> str:
    """What is printed of a kernel."""
    constants = {key: value for key, value in job.launch.constants if key not in ("UPCAST", "BLOCK_K", "PRECISION")}
    shape = job.launch.config or Config(0, 0, 0, 4, 0)
    return (
        f"{job.where:7} {job.name:18} {job.launch.kernel.__name__:18} {shape.warps} warps {shape.stages} stages "
        f"{result.registers:3} registers {result.shared_bytes / 1024:5.0f} KiB {'; '.join(result.faults) or 'ok'} "
        + "".join(f" {key}={value}" for key, value in constants.items())
    )


def markdown(done: list[tuple[Job, Result]]) -> str:
    """A row for each tile of each target: the most registers a thread that each kernel needs with it."""
    columns = list(dict.fromkeys(COLUMNS.values()))
    rows: dict[tuple[str, str, Config], dict[str, int]] = {}
    for job, result in done:
        several = "+" if dict(job.launch.constants).get("FORM", 0) else ""
        tile, column = job.launch.config, COLUMNS.get(job.launch.kernel.__name__ + several)
        if tile is None or column is None:
            continue
        row = rows.setdefault((job.where, job.name, tile), {"KiB": 0})
        row[column] = max(row.get(column, 0), result.registers)
        row["KiB"] = max(row["KiB"], round(result.shared_bytes / 1024))
    lines = [f"| target | tile, warps, stages | for | KiB | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    for (where, name, tile), row in rows.items():
        shape = f"{tile.block_m}×{tile.block_n}×{tile.block_k} {tile.warps} {tile.stages}"
        cells = " | ".join(str(row.get(column, "")) for column in columns)
        lines.append(f"| {where} | {shape} | {name} | {row['KiB']} | {cells} |")
    return "\n".join(lines) + "\n"


def write_markdown(text: str) -> None:
    """Puts the table between its markers in docs/backends.md."""
    begin, end = MARKERS
    document = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise SystemExit(f"{DOCUMENT} has no lines {begin.strip()} and {end}")
    DOCUMENT.write_text(before + begin + text + end + after, encoding="utf-8")


def fits(done: list[tuple[Job, Result]]) -> str:
    """Of a survey: each candidate, and the kinds of kernel that it fits; a line for _configs.CANDIDATES."""
    kinds: dict[tuple[str, Config], list[str]] = {}
    for job, _ in done:
        assert job.launch.config is not None
        kinds.setdefault((job.where, job.launch.config), list(TUNED))
    for job, result in done:
        found = kinds[job.where, job.launch.config]  # type: ignore[index]
        if result.faults and job.kind in found:
            found.remove(job.kind)
    return "\n".join(f'{where:7} Config{tuple(tile)}: "{" ".join(found)}",' for (where, tile), found in kinds.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="target")
    parser.add_argument("--fast", action="store_true", help="of the shipped tiles, those of bfloat16 alone")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="write the table of docs/backends.md")
    parser.add_argument("--survey", action="store_true", help="which kinds of kernel each candidate fits, and no gate")
    options = parser.parse_args()
    if options.markdown and (options.fast or options.only or options.survey or set(options.targets) != set(TARGETS)):
        parser.error("--markdown writes the whole table: leave the other options out")
    start = time.perf_counter()
    wanted = jobs(options.targets, options.fast, options.only, options.survey)
    JOBS[:] = {(job.where, job.launch): job for job in reversed(wanted)}.values()  # each kernel once
    JOBS.reverse()
    results = {}
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for job, result in zip(JOBS, pool.imap(work, range(len(JOBS))), strict=True):
            print(line(job, result), flush=True)
            results[job.where, job.launch] = result
    broken = sum(bool(result.faults) for result in results.values())
    seconds = time.perf_counter() - start
    print(f"{len(results)} kernels compiled in {seconds:.0f} s with Triton {triton.__version__}; {broken} broken")
    done = [(job, results[job.where, job.launch]) for job in wanted]
    if options.survey:
        print(fits(done))
        return 0
    if options.markdown:
        write_markdown(markdown(done))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
