"""`attention` over packed sequences beside padded ones, and what packed texts save of a CLIP training step.

    pytest benchmarks/ops/bench_attention.py                                     # the op, one provider after the other
    python benchmarks/ops/bench_attention.py --json FILE                         # op and text tower, interleaved
    python benchmarks/ops/bench_attention.py --what step --batch 32 --rounds 2   # a whole step of ViT-B/32
    python benchmarks/ops/bench_attention.py --what dense,op --device cuda       # ours beside PyTorch's

Model of the op: 2 * 2 * Σ T² * K * H flops forward (half where causal), 5 products instead of 2 backward; of a tower:
24 * C² flops a token and layer forward, three times that with backward, which is why tokens that are never computed are
what counts. Rivals: `scaled_dot_product_attention` padded to the longest with the padding masked, and one call a
sequence (transformers' way for Qwen-VL); of the tower and the step, ours with packing off and open_clip's model.

On the CPU seconds are the process's own, on one thread: those that others take of a shared machine are not counted. On
a GPU they are its own clock's (vlmfast/bench/meter.py), in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmfast.backend import use_backend
from vlmfast.bench import machine, meter, providers, timing
from vlmfast.models import build_clip
from vlmfast.ops.attention import attention
from vlmfast.ops.softmax_loss import clip_loss

H, K = 8, 64
MODEL, CONTEXT = "ViT-B-32-quickgelu", 77

Marks = Callable[..., list[float]]  # calls -> seconds from the first one's start to each one's end


def cpu_marks(*calls: Callable[[], object]) -> list[float]:
    start, ends = time.process_time(), []
    for call in calls:
        call()
        ends.append(time.process_time() - start)
    return ends


# ---- the op, dense: a GPU's choice -----------------------------------------------------------------------------------

SHAPES = [(50, 64), (77, 64), (197, 64), (257, 64), (577, 64), (1025, 64), (257, 72), (257, 80), (257, 128)]  # T, K


def sdpa(backend: SDPBackend, *qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv)


def on_triton(*qkv: Tensor) -> Tensor:
    with use_backend("triton"):
        return attention(*qkv)


DENSE: dict[str, Callable[..., Tensor]] = {
    "vlmfast": attention,
    "triton": on_triton,
    "sdpa": F.scaled_dot_product_attention,
    "sdpa-flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
}


def dense_calls(T: int, K: int, heads: int, device: str, marks: Marks) -> dict[str, Callable[[], list[float]]]:
    """The providers that run here; those that do not say why."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    qkv = torch.randn(heads // 8, T, 3, 8, K, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(heads // 8, T, 8, K, device=device, dtype=dtype).transpose(1, 2)

    def passes(provider: str) -> list[float]:
        out: list[Tensor] = []
        return marks(
            lambda: out.append(DENSE[provider](*qkv.permute(2, 0, 3, 1, 4))),
            lambda: torch.autograd.grad(out.pop(), qkv, grad),
        )

    calls: dict[str, Callable[[], list[float]]] = {}
    for provider in DENSE:
        try:
            passes(provider)
        except RuntimeError as why:
            print(f"dense T={T} K={K}: {provider} cannot run: {str(why).splitlines()[0]}", file=sys.stderr)
        else:
            calls[provider] = partial(passes, provider)
    return calls


# ---- the op, packed --------------------------------------------------------------------------------------------------


def lengths_of(kind: str, times: int = 1) -> tuple[list[int], bool]:
    """(lengths, causal): 32 captions of 15 tokens on average, or 8 images of several sizes in patches of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    if kind == "text":
        return sorted(torch.randint(5, 26, (32 * times,), generator=generator).tolist()), True
    sides = torch.randint(6, 20, (8 * times, 2), generator=generator)
    return sorted(sides.prod(1).tolist()), False


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    return attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens)


def padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """Rows into a padded batch, one call, and back; keys past the end are masked, which causal calls do not need."""
    lengths = cu_seqlens.diff()
    inside = torch.arange(int(lengths.max()), device=q.device) < lengths[:, None]  # [B, T]
    dense = []
    for x in (q, k, v):
        rows = x.new_zeros(*inside.shape, H, K)
        rows[inside] = x
        dense.append(rows.transpose(1, 2))
    mask = None if causal else inside[:, None, None, :]
    return F.scaled_dot_product_attention(*dense, attn_mask=mask, is_causal=causal).transpose(1, 2)[inside]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=causal).transpose(
                0, 1
            )
            for a, b in pairwise(cu_seqlens.tolist())
        ]
    )


OPS: dict[str, Callable[..., Tensor]] = {"vlmfast": packed, "padded": padded, "one-by-one": one_by_one}


def op_call(provider: str, kind: str, device: str, marks: Marks) -> Callable[[], list[float]]:
    lengths, causal = lengths_of(kind, 1 if device == "cpu" else 64)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    qkv = torch.randn(sum(lengths), 3, H, K, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(sum(lengths), H, K, device=device, dtype=dtype)

    def call() -> list[float]:
        out: list[Tensor] = []
        return marks(
            lambda: out.append(OPS[provider](*qkv.unbind(1), cu_seqlens, causal)),
            lambda: torch.autograd.grad(out.pop(), qkv, grad),
        )

    return call


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("provider", OPS)
def bench_attention(benchmark, provider, kind):
    """Forward and backward of packed sequences."""
    lengths, causal = lengths_of(kind)
    flops = 14 * sum(T * T for T in lengths) * H * K // (2 if causal else 1)
    benchmark.group = f"attention, packed {kind}, {sum(lengths)} tokens, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(least_flops=flops, least_moved_bytes=8 * 4 * sum(lengths) * H * K)
    benchmark.pedantic(op_call(provider, kind, "cpu", cpu_marks), rounds=20, warmup_rounds=2)


# ---- the text tower, and a training step -----------------------------------------------------------------------------


def texts(B: int, mean: int) -> Tensor:
    """Token ids [B, 77]: captions of 5 to 2 * mean - 5 tokens, start and end included, or all full."""
    generator = torch.Generator().manual_seed(0)
    full = mean >= CONTEXT
    lengths = torch.full((B,), CONTEXT) if full else torch.randint(5, 2 * mean - 4, (B,), generator=generator)
    text = torch.randint(1, 49406, (B, CONTEXT), generator=generator)
    text[:, 0] = 49406
    text[torch.arange(CONTEXT) >= lengths[:, None]] = 0
    text[torch.arange(B), lengths - 1] = 49407
    return text


def models() -> dict[str, Any]:
    """Ours, and open_clip's with the same weights where it can be imported."""
    found: dict[str, Any] = {"vlmfast": build_clip(MODEL, seed=0)}
    try:
        open_clip = providers.open_clip_module("open_clip")
    except providers.UnavailableError as why:
        print(f"open_clip: {why}", file=sys.stderr)
    else:
        found["open_clip"] = open_clip.create_model(MODEL)
        found["open_clip"].load_state_dict(found["vlmfast"].state_dict())
    return found


def model_calls(what: str, B: int, mean: int) -> dict[str, Callable[[], list[float]]]:
    """name -> a call that returns (forward, forward + backward [+ optimiser]) seconds."""
    text = texts(B, mean)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(B, 3, 224, 224, generator=generator)
    grad = torch.randn(B, 512, generator=generator)
    found = models()
    optimisers = {name: torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True) for name, model in found.items()}

    def loss_of(name: str, model: Any) -> Tensor:
        if what == "text":
            return (model.encode_text(text) * grad).sum()
        if name == "vlmfast":
            out = model(image, text)
            return clip_loss(out["image_features"], out["text_features"], out["logit_scale"], normalize=False)
        logits_per_image, logits_per_text = model.get_logits(image, text)
        labels = torch.arange(B)
        return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2

    def backward(name: str, loss: Tensor) -> None:
        loss.backward()
        if what == "step":
            optimisers[name].step()

    def call(name: str, packing: bool | None) -> list[float]:
        found[name].packing = packing
        found[name].zero_grad(set_to_none=True)
        loss: list[Tensor] = []
        return cpu_marks(lambda: loss.append(loss_of(name, found[name])), lambda: backward(name, loss.pop()))

    calls = {"vlmfast": lambda: call("vlmfast", None), "vlmfast, packing off": lambda: call("vlmfast", False)}
    if "open_clip" in found:
        calls["open_clip"] = lambda: call("open_clip", None)
    return calls


# ---- interleaved -----------------------------------------------------------------------------------------------------


def measure(name: str, calls: dict[str, Callable[[], list[float]]], rounds: int, seconds: float) -> list[dict]:
    """A row for each provider: median, 20th and 80th percentile in ms, and how many times ours its median is."""
    for call in calls.values():
        call()
    rows: list[dict] = []
    for provider, samples in timing.interleave(calls, rounds, seconds=seconds).items():
        forward, full = (timing.spread([1e3 * sample[i] for sample in samples]) for i in (0, 1))
        rows.append(
            {
                "what": name,
                "provider": provider,
                "rounds": len(samples),
                "forward_ms": asdict(forward),
                "full_ms": asdict(full),
                "forward_ratio": forward.median / rows[0]["forward_ms"]["median"] if rows else 1.0,
                "full_ratio": full.median / rows[0]["full_ms"]["median"] if rows else 1.0,
            }
        )
        print(
            f"{name:28} {provider:22} {forward.median:9.2f} ms {full.median:9.2f} ms  "
            f"x{rows[-1]['forward_ratio']:5.2f} x{rows[-1]['full_ratio']:5.2f}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="op,text", help="dense, op, text and step, with commas between")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of dense and op")
    parser.add_argument("--heads", type=int, default=2048, help="sequences x heads of dense")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mean", default="15,77", help="mean lengths of captions; 77: all full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the op; towers take --rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    gpu = meter.Cuda() if options.device == "cuda" else None
    place = (options.device, gpu.marks if gpu else cpu_marks)
    with timing.threads(1):
        for what in options.what.split(","):
            if what == "dense":
                for T, K in SHAPES:
                    calls = dense_calls(T, K, options.heads, *place)
                    rows += measure(f"dense, T={T}, K={K}", calls, options.rounds, options.seconds)
                continue
            if what == "op":
                for kind in ("text", "images"):
                    calls = {provider: op_call(provider, kind, *place) for provider in OPS}
                    rows += measure(f"packed {kind}", calls, options.rounds, options.seconds)
                continue
            for mean in map(int, options.mean.split(",")):
                name = f"{what}, B={options.batch}, {mean} tokens"
                rows += measure(name, model_calls(what, options.batch, mean), options.rounds, 0)
    if options.json:
        result = {
            "benchmark": "attention",
            "command": " ".join(["python", *sys.argv]),
            "date": machine.now(),
            "machine": gpu.facts() if gpu else machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "model": MODEL,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
