"""`linear_cross_entropy` beside its rivals, forward and backward: time, and the memory of a pass.

    pytest benchmarks/ops/bench_linear_cross_entropy.py                                # one provider after the other
    python benchmarks/ops/bench_linear_cross_entropy.py --json FILE                    # interleaved, with memory
    python benchmarks/ops/bench_linear_cross_entropy.py --supervised 1 --rounds 3 --providers vlmfast,eager
    python benchmarks/ops/bench_linear_cross_entropy.py --device cuda --supervised 0.05,0.15,0.5,1 --json FILE

Model: 6 * m * D * V flops for m supervised rows: logits, dX and dW; the logits of a chunk of rows are kept between.
4 * (2 * V * D + 2 * M * D) bytes at the least: weight and hidden read, their gradients written. Rivals: transformers'
eager form, all logits in float32, which live as long as the model's output; the same on the supervised rows alone,
which a careful user picks by hand; torch's `F.linear_cross_entropy` with all rows, as one product and in the chunks
that it chooses itself; and on a GPU, where they can be imported, Liger-Kernel's and quack's.

On the CPU seconds are the process's own, on one thread: those that others take of a shared machine are not counted. On
a GPU they are its own clock's, in bfloat16. Memory is the highest resident set of a pass in a fresh process, less what
was resident before it (gradients included); on a GPU the highest count of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.bench import machine, memory, meter, timing
from vlmfast.ops.linear_cross_entropy import linear_cross_entropy

M, D, V = 2048, 512, 32000
SIZES = {"cpu": (M, D, V), "cuda": (4096, 4096, 128256)}  # on a GPU the head of Llama 3


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(logits, labels)
    loss.logits = logits  # type: ignore[attr-defined]  # as with the model's output, whose loss the user takes
    return loss


def eager_picked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    on = labels != -100
    return F.cross_entropy(F.linear(hidden[on], weight).float(), labels[on])


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vlmfast": linear_cross_entropy,
    "eager": eager,
    "eager-picked": eager_picked,
    "linear-cross-entropy": F.linear_cross_entropy,
    "linear-cross-entropy-chunked": torch_chunked,
}
PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"liger": liger, "quack": quack}
EVERYONE = PROVIDERS | PEERS
WHO = {"cpu": ",".join(PROVIDERS), "cuda": "vlmfast,liger,quack,eager-picked"}


def inputs(supervised: float, device: str = "cpu", sizes: tuple[int, int, int] = (M, D, V)) -> tuple[Tensor, ...]:
    """hidden [M, D] and weight [V, D], which want gradients, and labels [M], that share of them supervised."""
    rows, width, tokens = sizes
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(tokens, width, generator=generator) * 0.02).to(device, dtype).requires_grad_()
    labels = torch.randint(tokens, (rows,), generator=generator)
    ignored = torch.randperm(rows, generator=generator)[round(supervised * rows) :]
    labels[ignored] = -100
    return hidden, weight, labels.to(device)


def setup(provider: str, supervised: float, sizes: list[int]) -> Callable[[], None]:
    """A pass on the CPU, for a process that measures memory; a small one goes before, which loads the code."""
    torch.set_num_threads(1)
    PROVIDERS[provider](*inputs(supervised, sizes=(64, 64, 64))).backward()
    held = inputs(supervised, sizes=tuple(sizes))  # type: ignore[arg-type]
    return lambda: PROVIDERS[provider](*held).backward()


def timed(provider: str, held: tuple[Tensor, ...], marks: Callable[..., list[float]]) -> list[float]:
    """(forward, forward + backward) seconds, into fresh gradients."""
    held[0].grad = held[1].grad = None
    loss: list[Tensor] = []
    return marks(lambda: loss.append(EVERYONE[provider](*held)), lambda: loss.pop().backward())


def cpu_marks(*calls: Callable[[], object]) -> list[float]:
    start, ends = time.process_time(), []
    for call in calls:
        call()
        ends.append(time.process_time() - start)
    return ends


@pytest.mark.parametrize("supervised", [0.15, 1.0])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_linear_cross_entropy(benchmark, provider, supervised):
    held = inputs(supervised)
    benchmark.group = f"linear_cross_entropy, {supervised:.0%} of {M} rows, D={D}, V={V}, float32"
    flops = round(6 * supervised * M * D * V)
    benchmark.extra_info.update(least_flops=flops, least_moved_bytes=8 * D * (V + M))
    benchmark.pedantic(timed, (provider, held, cpu_marks), rounds=3, warmup_rounds=1)


def measure(supervised: float, options: argparse.Namespace, gpu: meter.Cuda | None) -> list[dict]:
    """A row for each provider: median, 20th and 80th percentile in ms, bytes, and each median over ours."""
    sizes = (options.rows, options.width, options.tokens)
    held = inputs(supervised, options.device, sizes)
    marks = gpu.marks if gpu else cpu_marks
    calls = {name: partial(timed, name, held, marks) for name in options.providers.split(",")}
    rows: list[dict] = []
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:  # somebody else's kernel, which may fail in its own way
            if name not in PEERS:
                raise
            print(f"{supervised:5.0%} {name:30} left out: {error}")
            rows.append({"supervised": supervised, "provider": name, "left_out": str(error)})
            del calls[name]
    first: dict | None = None
    for provider, samples in timing.interleave(calls, options.rounds).items():
        forward, full = (timing.spread([1e3 * sample[i] for sample in samples]) for i in (0, 1))
        if gpu:
            held[0].grad = held[1].grad = None
            extra = gpu.memory_of(lambda provider=provider: EVERYONE[provider](*held).backward()).extra_bytes
        else:
            # By the module's name: a process of its own imports it.
            there = importlib.import_module(Path(__file__).stem).setup
            extra = memory.peak_in_child(there, provider=provider, supervised=supervised, sizes=list(sizes)).extra_bytes
        rows.append(
            {
                "supervised": supervised,
                "provider": provider,
                "rounds": len(samples),
                "forward_ms": asdict(forward),
                "full_ms": asdict(full),
                "extra_bytes": extra,
                "full_ratio": full.median / first["full_ms"]["median"] if first else 1.0,
                "memory_ratio": extra / first["extra_bytes"] if first else 1.0,
            }
        )
        first = first or rows[-1]
        print(
            f"{supervised:5.0%} {provider:30} {forward.median:9.1f} ms {full.median:9.1f} ms "
            f"x{rows[-1]['full_ratio']:5.2f} {extra / 2**20:9.1f} MiB x{rows[-1]['memory_ratio']:5.2f}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--supervised", default="0.15,1", help="shares of supervised rows, with commas between")
    parser.add_argument("--providers", help="the first is what others are divided by")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, width, tokens = SIZES[options.device]
    options.rows, options.width, options.tokens = options.rows or rows, options.width or width, options.tokens or tokens
    options.providers = options.providers or WHO[options.device]
    gpu = meter.Cuda() if options.device == "cuda" else None
    with timing.threads(1):
        rows = [row for share in options.supervised.split(",") for row in measure(float(share), options, gpu)]
    if options.json:
        result = {
            "benchmark": "linear_cross_entropy",
            "command": " ".join(["python", *sys.argv]),
            "date": machine.now(),
            "machine": gpu.facts() if gpu else machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "sizes": {"M": options.rows, "D": options.width, "V": options.tokens},
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
