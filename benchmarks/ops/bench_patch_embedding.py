"""`patch_embed` from uint8 images beside plain PyTorch, forward, and forward and backward.

    pytest benchmarks/ops/bench_patch_embedding.py                       # one provider after the other
    python benchmarks/ops/bench_patch_embedding.py --json FILE           # interleaved, with machine and versions
    python benchmarks/ops/bench_patch_embedding.py --device cuda         # on a GPU, under bfloat16 autocast

Model: 2 * N * K * D flops for N patches of K pixels and D features, and as many for the weight's gradient; N * K bytes
read, 4 * N * D written. Every provider gives tokens with class token and positions, and the gradients of weight, class
token and positions. Rivals: normalise as floats, then a convolution (open_clip's and Hugging Face's way) or one matrix
product, and the first of them compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.bench import machine, meter, timing
from vlmfast.ops.patch_embedding import patch_embed

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE, WIDTH = 224, 768
SIZES = [(32, 8), (32, 32), (16, 8), (16, 32)]  # side of a patch, images
GPU_SIZES = [(16, 1024), (32, 1024)]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # pixels, weight, class token, positions


def inputs(p: int, B: int, device: str = "cpu") -> Inputs:
    """Random images and parameters of a ViT-B/p."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    weight = 0.02 * torch.randn(WIDTH, 3, p, p, generator=generator)
    class_token = torch.randn(WIDTH, generator=generator)
    positions = torch.randn(1 + (SIDE // p) ** 2, WIDTH, generator=generator)
    pixels, *parameters = (tensor.to(device) for tensor in (pixels, weight, class_token, positions))
    weight, class_token, positions = (parameter.requires_grad_() for parameter in parameters)
    return pixels, weight, class_token, positions


def ours(pixels: Tensor, weight: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    return patch_embed(pixels, weight, class_token=class_token, positions=positions, mean=MEAN, std=STD)


def normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def eager(pixels: Tensor, weight: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    x = F.conv2d(normalized(pixels), weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return torch.cat([class_token.expand(len(x), 1, -1), x], 1) + positions


def eager_linear(pixels: Tensor, weight: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    p = weight.shape[2]
    x = normalized(pixels).unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
    x = F.linear(x.flatten(3).flatten(1, 2), weight.flatten(1))
    return torch.cat([class_token.expand(len(x), 1, -1), x], 1) + positions


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "vlmfast": ours,
    "eager": eager,
    "eager-linear": eager_linear,
    "torch-compile": torch.compile(eager, dynamic=False),
}


CLOCKS = {"ms": time.perf_counter, "cpu_ms": time.process_time}  # the second does not run while others do


def timed(provider: Callable[..., Tensor], given: Inputs, grad: Tensor) -> Callable[[], dict[str, float]]:
    """A call that returns its times: forward_ms, full_ms (forward + backward) and the processor's, likewise."""

    def call() -> dict[str, float]:
        start = {name: clock() for name, clock in CLOCKS.items()}
        tokens = provider(*given)
        middle = {name: clock() for name, clock in CLOCKS.items()}
        torch.autograd.grad(tokens, given[1:], grad)
        end = {name: clock() for name, clock in CLOCKS.items()}
        times = {f"forward_{name}": 1e3 * (middle[name] - start[name]) for name in CLOCKS}
        return times | {f"full_{name}": 1e3 * (end[name] - start[name]) for name in CLOCKS}

    return call


def timed_on_gpu(gauge: meter.Cuda, provider: Callable[..., Tensor], given: Inputs) -> Callable[[], dict[str, float]]:
    """Likewise by the GPU's clock, in mixed precision."""
    tokens: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            tokens.append(provider(*given))

    def call() -> dict[str, float]:
        ends = gauge.marks(forward, lambda: torch.autograd.grad(tokens.pop(), given[1:], grad))
        return {"forward_ms": 1e3 * ends[0], "full_ms": 1e3 * ends[1]}

    forward()
    grad = torch.randn_like(tokens.pop())
    return call


@pytest.mark.parametrize(("p", "B"), SIZES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_patch_embed(benchmark, provider, p, B):
    """Forward and backward."""
    given = inputs(p, B)
    grad = torch.randn_like(PROVIDERS[provider](*given))
    N, K = B * (SIDE // p) ** 2, 3 * p * p
    flops = 4 * N * K * WIDTH
    benchmark.group = f"patch_embed B/{p}, {B} images, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(least_flops=flops, least_moved_bytes=2 * N * K + 8 * N * WIDTH)
    benchmark.pedantic(timed(PROVIDERS[provider], given, grad), rounds=7, warmup_rounds=1)
    benchmark.extra_info["gflops"] = flops / benchmark.stats.stats.median / 1e9


def measure(p: int, B: int, threads: int, rounds: int, seconds: float, gauge: meter.Cuda | None = None) -> list[dict]:
    """A row for each provider: median, 20th and 80th percentile of its times, and how many times ours the median is."""
    given = inputs(p, B, "cuda" if gauge else "cpu")
    if gauge:
        calls = {name: timed_on_gpu(gauge, provider, given) for name, provider in PROVIDERS.items()}
    else:
        grad = torch.randn_like(ours(*given))
        calls = {name: timed(provider, given, grad) for name, provider in PROVIDERS.items()}
    for call in calls.values():
        call()  # compilers compile, allocators allocate
    found = timing.interleave(calls, rounds, seconds=seconds)
    flops = 2 * B * (SIDE // p) ** 2 * 3 * p * p * WIDTH
    rows: list[dict] = []
    for name, samples in found.items():
        times = {which: timing.spread([sample[which] for sample in samples]) for which in samples[0]}
        row = {"provider": name, "patch": p, "batch": B, "threads": threads, "rounds": len(samples)}
        row |= {which: asdict(spread) for which, spread in times.items()}
        first = rows[0] if rows else row
        row |= {f"{which}_ratio": spread.median / first[which]["median"] for which, spread in times.items()}
        row |= {"forward_gflops": flops / times["forward_ms"].median / 1e6}
        rows.append(row | {"gflops": 2 * flops / times["full_ms"].median / 1e6})
    return rows


def kept_bytes(provider: Callable[..., Tensor], given: Inputs) -> int:
    """What the graph keeps for backward, beyond inputs and parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = provider(*given)
    own.add(tokens.untyped_storage().data_ptr())
    return sum(size for place, size in kept.items() if place not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", default="1,2", help="on the CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="rounds go on for so long at least")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gauge = meter.Cuda() if options.device == "cuda" else None
    facts = {
        "op": "patch_embed",
        "command": "python " + " ".join(sys.argv),
        "date": machine.now(),
        "machine": gauge.facts() if gauge else machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    measurements = []
    for threads in [1] if gauge else map(int, options.threads.split(",")):
        for p, B in GPU_SIZES if gauge else SIZES:
            with timing.threads(threads):
                rows = measure(p, B, threads, options.rounds, options.seconds, gauge)
            for row in rows:
                times = "  ".join(
                    f"{what} {row[f'{what}_ms']['median']:6.2f} ms ({row[f'{what}_ms_ratio']:.2f}x)"
                    for what in ("forward", "forward_cpu", "full", "full_cpu")
                    if f"{what}_ms" in row
                )
                print(f"B/{p} {B:2} images {threads} threads {row['provider']:13} {times}", flush=True)
            measurements += rows
    given = inputs(16, 32)
    facts["kept_for_backward_bytes"] = {name: kept_bytes(PROVIDERS[name], given) for name in ("vlmfast", "eager")}
    print("kept for backward at B/16, 32 images, beyond images and parameters:", facts["kept_for_backward_bytes"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "measurements": measurements}, indent=1) + "\n")


if __name__ == "__main__":
    main()
