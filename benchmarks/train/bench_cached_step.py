"""`cached_step` beside the plain step and beside open_clip's own --accum-freq, and a batch that only it can take.

    python benchmarks/train/bench_cached_step.py --json FILE                   # where all fit, interleaved
    python benchmarks/train/bench_cached_step.py --what large --threads 2      # 16 384 pairs: seconds and peak memory
    python benchmarks/train/bench_cached_step.py --device cuda                 # ViT-B/32: 4096 pairs, and 65 536

Model: a step is F + 2F of towers for K micro-batches, a cached one another F for all but the last: at least
3K / (4K - 1) of the plain step's rate, 0.76 for K = 16. open_clip's pays all K again, and its loss K times.

open_clip's step is its own `open_clip_train.train.train_one_epoch` with accum_freq K on K loader batches, which it
gets as normalised float32 images. Weights, images and captions are the same, the learning rate is 0, and losses are
compared. On the CPU rates and ratios are of the process's own seconds, which others cannot take of a shared machine,
and peaks are resident memory in a fresh process; on a GPU both are the GPU's (vlmfast/bench/meter.py).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlmfast.bench import machine, memory, meter, timing
from vlmfast.bench.model import caption_lengths, random_batch
from vlmfast.bench.providers import UnavailableError, open_clip_module
from vlmfast.data.batch import Batch
from vlmfast.models import ClipConfig, build_clip, load_config
from vlmfast.ops.softmax_loss import clip_loss
from vlmfast.recipes.objective import contrastive
from vlmfast.train import adamw, cached_step, plain_step

PROVIDERS = ("plain", "cached", "open_clip")
SAME = {"fp32": 1e-4, "amp_bf16": 2e-2}  # by how much losses may differ, relative
DEFAULTS = {
    "cpu": {"model": "CLIP-tiny", "batch": 256, "large_batch": 16384, "micro_batch": 256, "precision": "fp32"},
    "cuda": {"model": "ViT-B-32", "batch": 4096, "large_batch": 65536, "micro_batch": 2048, "precision": "amp_bf16"},
}


@dataclass(frozen=True)
class Step:
    """What is run."""

    model: str
    batch: int
    micro_batch: int
    precision: str
    captions: str  # a mean number of tokens, or "real": see vlmfast bench model
    threads: int
    device: str

    @property
    def pieces(self) -> int:
        return -(-self.batch // self.micro_batch)

    def name(self) -> str:
        return (
            f"{self.model}, B={self.batch}, {self.pieces} x {self.micro_batch}, {self.precision}, "
            f"captions {self.captions}, {self.device}"
        )


def pairs(config: ClipConfig, step: Step) -> Batch:
    """Random pixels, made on the device, and captions."""
    lengths = caption_lengths(step.captions, step.batch, config.text_cfg.context_length, 0)
    patch = config.vision_cfg.patch_size
    _, text = random_batch(replace(config, vision_cfg=replace(config.vision_cfg, image_size=patch)), lengths, 0)
    generator = torch.Generator(step.device).manual_seed(0)
    shape = (step.batch, 3, *config.vision_cfg.image_hw)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=step.device)
    return Batch(image, text.to(step.device), torch.arange(step.batch, device=step.device))


def prepared(provider: str, **settings: Any) -> Callable[[], float | None]:
    """A step that returns its loss (open_clip's: that of its last micro-batch's call), after a small one to warm up."""
    step = Step(**settings)
    torch.set_num_threads(step.threads)
    config = load_config(step.model)
    ours, batch = build_clip(config, seed=0).to(step.device), pairs(config, step)
    if provider == "open_clip":
        return theirs(ours, batch, step)
    optimizer, loss_fn = adamw(ours), contrastive()
    take: Callable[..., dict[str, float]] = plain_step
    if provider == "cached":
        take = partial(cached_step, micro_batch_size=step.micro_batch)

    def call(rows: Batch = batch) -> float:
        return take(ours, loss_fn, rows, optimizer, 0.0, step=1, precision=step.precision)["contrastive_loss"]

    call(batch.split(min(2 * step.micro_batch, step.batch))[0] if provider == "cached" else batch)
    optimizer.zero_grad(set_to_none=True)
    return call


def theirs(ours: Any, batch: Batch, step: Step) -> Callable[[], float | None]:
    """One optimizer step of open_clip's own training loop; raises UnavailableError where it cannot be imported."""
    open_clip = open_clip_module("open_clip")
    train = open_clip_module("open_clip_train.train")
    logging.getLogger().setLevel(logging.WARNING)
    if step.model not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / f"{step.model}.json"
            config.write_text(json.dumps(ours.config.to_dict()["model_cfg"]))
            open_clip.add_model_config(config)
    model = open_clip.create_model(step.model, output_dict=True)
    model.load_state_dict(ours.state_dict())
    model = model.to(step.device).train()
    mean, std = (
        torch.tensor(x, device=step.device).view(3, 1, 1) for x in (ours.config.image_mean, ours.config.image_std)
    )
    loaded = [((piece.image.float() / 255 - mean) / std, piece.text) for piece in batch.split(step.micro_batch)]

    class Loader(list):
        num_batches, num_samples = step.pieces, step.batch

    seen: list[Tensor] = []
    compare = open_clip.ClipLoss()

    def loss(**arguments: Any) -> dict[str, Tensor]:
        values = compare(**arguments)
        seen[:] = [value.detach() for value in values.values()]
        return values

    arguments = SimpleNamespace(
        device=step.device,
        precision=step.precision,
        accum_freq=step.pieces,
        batch_size=step.micro_batch,
        world_size=1,
        rank=0,
        local_rank=0,
        distributed=False,
        log_local=False,
        horovod=False,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=None,
        log_every_n_steps=10**9,
        wandb=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    data = {"train": SimpleNamespace(dataloader=Loader(loaded), set_epoch=lambda epoch: None)}

    def call() -> float:
        train.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
        return float(seen[0])

    call()
    return call


def peak_bytes(provider: str, step: Step, gauge: meter.Meter, call: Callable[[], object] | None) -> dict[str, int]:
    """Of one step: on a processor in a process of its own."""
    if isinstance(gauge, meter.Cuda):
        assert call is not None
        return asdict(gauge.memory_of(call))
    sys.path.insert(0, str(Path(__file__).parent))
    setup = importlib.import_module(Path(__file__).stem).prepared
    return asdict(memory.peak_in_child(setup, provider=provider, **asdict(step)))


def timed(gauge: meter.Meter, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds as the gauge counts them, and the process's own."""
    start = time.process_time()
    seconds = gauge.timed(call)
    return seconds, time.process_time() - start


def loss_alone(step: Step) -> Callable[[], None]:
    """Forward and backward of the loss of the whole batch."""
    D, dtype = load_config(step.model).embed_dim, torch.float32 if step.precision == "fp32" else torch.bfloat16
    generator = torch.Generator(step.device).manual_seed(1)
    shape = {"size": (step.batch, D), "generator": generator, "device": step.device}
    image, text = (torch.nn.functional.normalize(torch.randn(**shape)).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, device=step.device, requires_grad=True)

    def call() -> None:
        image.grad = text.grad = scale.grad = None
        clip_loss(image, text, scale, normalize=False).backward()

    return call


def measure(step: Step, names: list[str], rounds: int, gauge: meter.Meter) -> list[dict[str, Any]]:
    """A row for each provider that runs here, and one for the loss alone, interleaved."""
    print(step.name())
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    peaks: dict[str, dict[str, int]] = {}
    losses: dict[str, float | None] = {}
    for name in names:
        try:
            call = prepared(name, **asdict(step))
        except UnavailableError as why:
            print(f"{name}: {why}", file=sys.stderr)
            continue
        losses[name], calls[name] = call(), partial(timed, gauge, call)
        peaks[name] = peak_bytes(name, step, gauge, call)
    for name, loss in losses.items():
        if not abs(loss / losses[names[0]] - 1) <= SAME[step.precision]:
            raise RuntimeError(f"{name} has the loss {loss}, {names[0]} {losses[names[0]]}: not the same step")
    calls["loss alone"] = partial(timed, gauge, loss_alone(step))
    samples = timing.interleave(calls, rounds)
    own = gauge.name == "cpu"
    spreads = {name: [timing.spread([1e3 * each[i] for each in of]) for i in (0, 1)] for name, of in samples.items()}
    ms = {name: each[int(own)].median for name, each in spreads.items()}
    rows: list[dict[str, Any]] = []
    for name, (wall, cpu) in spreads.items():
        row = {
            "what": step.name(),
            "provider": name,
            "batch": step.batch,
            "rounds": len(samples[name]),
            "wall_ms": asdict(wall),
            "cpu_ms": asdict(cpu) if own else None,
            "samples_per_s": 1e3 * step.batch / ms[name] * (step.threads if own else 1),
            "full_ratio": ms[name] / ms["cached"] if "cached" in ms else None,
            "loss": losses.get(name),
            **peaks.get(name, {}),
        }
        rows.append(row)
        told = f"{row['extra_bytes'] / 2**20:9.0f} MiB" if "extra_bytes" in row else ""
        times = f"{row['full_ratio']:7.3f} of cached" if row["full_ratio"] else ""
        print(f"{name:12} {ms[name]:10.0f} ms {row['samples_per_s']:9.1f} samples/s {times} {told}", flush=True)
    return rows


def large(step: Step, gauge: meter.Meter) -> list[dict[str, Any]]:
    """A row for one cached step in this process, with its peak, and one for the loss alone."""
    print(step.name())
    call, alone, seconds = prepared("cached", **asdict(step)), loss_alone(step), []
    if isinstance(gauge, meter.Cuda):
        peak = gauge.memory_of(lambda: seconds.append(gauge.timed(call)))
    else:
        memory.keep_nothing()
        peak = memory.peak_of(lambda: seconds.append(gauge.timed(call)))
    seconds.append(gauge.timed(alone))
    rows: list[dict[str, Any]] = [
        {
            "what": step.name(),
            "provider": name,
            "batch": step.batch,
            "wall_ms": 1e3 * each,
            "samples_per_s": step.batch / each,
            "full_ratio": each / seconds[0],
        }
        for name, each in zip(("cached", "loss alone"), seconds, strict=True)
    ]
    rows[0] |= asdict(peak)
    print(
        f"cached {seconds[0]:.1f} s, {step.batch / seconds[0]:.1f} samples/s, loss {rows[1]['full_ratio']:.1%} of it, "
        f"{peak.extra_bytes / 2**30:.2f} GiB, the process in all {peak.process_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="both", choices=("step", "large", "both"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="a model's name")
    parser.add_argument("--batch", type=int, help="pairs of step, where the plain step fits")
    parser.add_argument("--pieces", type=int, default=16, help="micro-batches of step")
    parser.add_argument("--large-batch", type=int, help="pairs of large")
    parser.add_argument("--micro-batch", type=int, help="pairs in a micro-batch of large")
    parser.add_argument("--captions", default="real,full", help="tokens of a caption: means, real or full, with commas")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"))
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    gauge = meter.meter(options.device, options.threads)
    context = load_config(options.model).text_cfg.context_length
    captions = [str(context) if each == "full" else each for each in options.captions.split(",")]
    common = (options.precision, captions[0], options.threads, options.device)
    rows: list[dict[str, Any]] = []
    with timing.threads(options.threads):
        if options.what != "large":
            step = Step(options.model, options.batch, -(-options.batch // options.pieces), *common)
            for each in captions:
                rows += measure(replace(step, captions=each), options.providers.split(","), options.rounds, gauge)
        if options.what != "step":
            rows += large(Step(options.model, options.large_batch, options.micro_batch, *common), gauge)
    if options.json:
        result = {
            "benchmark": "cached step",
            "command": " ".join(["python", *sys.argv]),
            "date": machine.now(),
            "machine": gauge.facts(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
