"""The benchmark of a whole training step of a CLIP: our model beside open_clip's, on the same batch and weights."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmfast.bench import machine, memory, report, timing
from vlmfast.bench.meter import Cuda, Meter, guarded, meter
from vlmfast.bench.providers import BenchError, UnavailableError, first_line, open_clip_module, quiet_compiler
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import spread
from vlmfast.models import Clip, ClipConfig, build_clip, load_config
from vlmfast.ops.sigmoid_loss import siglip_loss
from vlmfast.ops.softmax_loss import clip_loss

PROVIDERS = ("vlmfast", "open_clip", "open_clip-compile")
PARTS = ("data", "image tower", "text tower", "loss", "backward", "optimizer")
COMPARED = 4  # pairs whose features are compared before anything is timed
# The longest difference of two unit rows of features. On a GPU convolutions round their operands to TF32.
APART = {"cpu": 1e-4, "cuda": 1e-2}
SKEW = 0.5  # standard deviation of the logarithm of "real" lengths


@dataclass(frozen=True)
class ModelBench:
    """Time, memory and rate of a training step, uint8 images to AdamW, ours beside open_clip's, interleaved."""

    model: str = "ViT-B-32"
    """A model's name, or the path of its JSON config."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 1
    """Threads of PyTorch and of our kernels."""
    batch: int = 32
    """Pairs in a batch B."""
    caption_length: str = "15"
    """Tokens of a caption: their mean, the lengths evenly spread around it, up to 77 (all full); or real: skewed around
    15 with a long tail."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """float32, or bfloat16 autocast around the forward."""
    providers: str = "vlmfast,open_clip"
    """Who runs, joined by commas, of vlmfast, open_clip and open_clip-compile."""
    rounds: int = 3
    """The fewest rounds; every round runs every provider once."""
    seconds: float = 0.0
    """Rounds go on for so long at least."""
    seed: int = 0
    """Of the weights and of the random batch."""
    json: Path | None = None
    """Write everything here, with machine, versions and commit."""


@dataclass
class Trained:
    """A provider's model with what a step of it takes."""

    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[..., Tensor]  # (image_features, text_features, logit_scale[, logit_bias]) -> []
    pixels: Callable[[Tensor], Tensor] = lambda image: image  # of uint8 images, what encode_image takes
    forward: Callable[..., Any] | None = None  # both towers in one compiled call
    value: Tensor | None = field(default=None, repr=False)  # the loss of the last step


def main(config: ModelBench) -> Report:
    """The report of the benchmark, printed as a table and written to the file that the config names.

    Raises:
        BenchError: a provider, length or number in the config makes no sense, or the device is missing.
        MissingExtraError: rich is missing.
    """
    report.check_outputs(None, None)
    result = run(config, partial(print, file=sys.stderr, flush=True))
    report.write(result, config.json, None, None)
    report.show(result)
    return result


def run(
    config: ModelBench, say: Callable[[str], None] = lambda line: None, spent: Callable[[], bool] = lambda: False
) -> Report:
    """The report of the benchmark; nothing is printed or written.

    Args:
        config: what to run.
        say: takes a line of progress at a time.
        spent: asked before each provider: once true, those that are left have this for their reason.
    Raises:
        BenchError: a provider, length or number in the config makes no sense, or the device is missing.
        DataError: there is no such model.
        DeviceLostError: a provider broke the GPU for this process.
    """
    names = list(dict.fromkeys(config.providers.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise BenchError(f"unknown provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    for name in ("threads", "batch", "rounds"):
        if getattr(config, name) < 1:
            raise BenchError(f"{name} must be at least 1; got {getattr(config, name)}")
    clip = load_config(config.model)
    gauge = meter(config.device, config.threads)
    lengths = caption_lengths(config.caption_length, config.batch, clip.text_cfg.context_length, config.seed)
    settings = {name: value for name, value in asdict(config).items() if name != "json"}
    settings |= {"dim": clip.embed_dim, "dtype": "float32" if config.precision == "fp32" else "bfloat16"}
    settings |= {"mean_tokens": float(lengths.double().mean())}
    facts = machine.now(), gauge.facts(), machine.versions(), machine.commit()
    reason = gauge.memory_reason()
    result = Report(f"{Path(config.model).stem}, training step", settings, *facts, memory_reason=reason)
    result.peak_of = gauge.peak_of
    with timing.threads(config.threads):
        _run(config, clip, gauge, lengths, names, result, say, spent)
    report.set_ratios(result.rows)
    return result


def caption_lengths(text: str, batch: int, context_length: int, seed: int) -> Tensor:
    """How many tokens, start and end included, each caption has: [B] int64.

    Args:
        text: a mean, or "real" for lengths whose logarithms are normal, with mean 15.
        batch: B.
        context_length: the most.
        seed: of the draw.
    Raises:
        BenchError: text is neither a number from 3 to context_length nor "real".
    """
    generator = torch.Generator().manual_seed(seed)
    if text == "real":
        drawn = (SKEW * torch.randn(batch, generator=generator) - SKEW**2 / 2).exp() * 15
        return drawn.round().long().clamp(3, context_length)
    if not text.isdigit() or not 3 <= int(text) <= context_length:
        raise BenchError(f"caption_length must be a mean from 3 to {context_length}, or real; got {text!r}")
    mean = int(text)
    half = min(mean - 3, context_length - mean, 2 * mean // 3)
    return torch.randint(mean - half, mean + half + 1, (batch,), generator=generator)


def random_batch(config: ClipConfig, lengths: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random pixels, and random captions that end with the end-of-text token and are padded with 0.

    Args:
        config: of the model.
        lengths: [B].
        seed: of the draw.
    Returns: image uint8 [B, 3, H, W], text int64 [B, T].
    """
    generator = torch.Generator().manual_seed(seed)
    B, T, V = len(lengths), config.text_cfg.context_length, config.text_cfg.vocab_size
    image = torch.randint(0, 256, (B, 3, *config.vision_cfg.image_hw), dtype=torch.uint8, generator=generator)
    end = V - 1 if config.text_cfg.eos_id is None else config.text_cfg.eos_id
    text = torch.randint(1, V - 2, (B, T), generator=generator)
    if end < V - 2:
        text[text == end] = V - 2
    text[:, 0] = V - 2
    places = torch.arange(T)
    text = text.where(places < lengths[:, None] - 1, 0)
    return image, text.where(places != lengths[:, None] - 1, end)


def least_gflops(config: ClipConfig, lengths: Tensor) -> float | None:
    """The matrix products of one step on these captions: forward, and backward as twice that; None for a ResNet.

    Tokens after a caption's end are not counted where the model need not compute them, nor are the masked halves of
    causal attention left out, as is usual.

    Args:
        config: of the model.
        lengths: [B].
    """
    vision, text = config.vision_cfg, config.text_cfg
    if isinstance(vision.layers, tuple):
        return None
    if not text.ends_early:
        lengths = torch.full_like(lengths, text.context_length)
    patches = vision.grid[0] * vision.grid[1]
    image: float = 2 * patches * 3 * vision.patch_size**2 * vision.width + 2 * vision.width * config.embed_dim
    image += _blocks(vision.layers, vision.width, vision.mlp_ratio, [vision.tokens])
    captions = _blocks(text.layers, text.width, text.mlp_ratio, lengths.tolist())
    captions += 2 * text.width * config.embed_dim * len(lengths)
    return 3 * (image * len(lengths) + captions) / 1e9


def _blocks(layers: int, C: int, mlp_ratio: float, lengths: Iterable[int]) -> float:
    """Flops of a transformer's forward: four maps of C x C and a perceptron a token, and two products with T keys."""
    return layers * sum(T * (2 * C * C * (4 + 2 * mlp_ratio) + 4 * T * C) for T in lengths)


def trained(provider: str, config: ModelBench, weights: Clip, device: torch.device) -> Trained:
    """A provider's model with these weights, ready for a step. Its learning rate is 0: every step is the same one.

    Each provider has the optimizer of its own trainer: ours PyTorch's fused AdamW, open_clip's PyTorch's default.

    Args:
        provider: one of PROVIDERS.
        config: what to run.
        weights: on the processor.
        device: of the model.
    Raises:
        UnavailableError: open_clip cannot be imported, or does not take the weights.
    """
    biased = weights.logit_bias is not None
    if provider == "vlmfast":
        model = copy.deepcopy(weights).to(device)
        loss = partial(siglip_loss if biased else clip_loss, normalize=False)
        return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True), loss)
    open_clip = open_clip_module("open_clip")
    if Path(config.model).is_file():
        open_clip.add_model_config(Path(config.model))
    try:
        theirs = open_clip.create_model(Path(config.model).stem)
        theirs.load_state_dict(weights.state_dict())
    except RuntimeError as error:
        raise UnavailableError(f"open_clip's {config.model} is another model: {first_line(error)}") from error
    theirs = theirs.to(device).train()
    mean, std = (
        torch.tensor(each, device=device).view(3, 1, 1)
        for each in (weights.config.image_mean, weights.config.image_std)
    )
    return Trained(
        theirs,
        torch.optim.AdamW(theirs.parameters(), lr=0.0),
        open_clip.SigLipLoss() if biased else open_clip.ClipLoss(),
        lambda image: (image.float() / 255 - mean) / std,
        torch.compile(theirs) if provider == "open_clip-compile" else None,
    )


def step_parts(
    of: Trained, image: Tensor, text: Tensor, device: torch.device, precision: str
) -> dict[str, Callable[[], object]]:
    """The parts of one training step by name, to be called in order: those of PARTS, or the towers as one.

    Args:
        of: the provider's.
        image: uint8 [B, 3, H, W]
        text: int64 [B, T], both where a loader left them.
        device: of the model.
        precision: "fp32" or "amp_bf16".
    """
    held: dict[str, Any] = {}
    model = of.model

    def mixed() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16")

    def data() -> None:
        of.optimizer.zero_grad(set_to_none=True)
        held["image"] = of.pixels(image.to(device, non_blocking=True))
        held["text"] = text.to(device, non_blocking=True)

    def image_tower() -> None:
        with mixed():
            held["image"] = model.encode_image(held["image"], normalize=True)

    def text_tower() -> None:
        with mixed():
            held["text"] = model.encode_text(held["text"], normalize=True)
            held["scalars"] = (
                model.logit_scale.exp(),
                *[b for b in [getattr(model, "logit_bias", None)] if b is not None],
            )

    def towers() -> None:
        assert of.forward is not None
        with mixed():
            held["image"], held["text"], *held["scalars"] = of.forward(held["image"], held["text"])

    def loss() -> None:
        with mixed():
            held["loss"] = of.loss(held["image"], held["text"], *held["scalars"])

    def backward() -> None:
        held["loss"].backward()

    def optimizer() -> None:
        of.optimizer.step()
        of.value = held["loss"].detach()
        held.clear()

    both = {"towers": towers} if of.forward else {"image tower": image_tower, "text tower": text_tower}
    return {"data": data, **both, "loss": loss, "backward": backward, "optimizer": optimizer}


def one_step(provider: str, config: dict[str, Any]) -> Callable[[], object]:
    """A step ready to run, after one that made the optimizer's state: what a fresh process measures the memory of."""
    settings = ModelBench(**config)
    torch.set_num_threads(settings.threads)
    clip = build_clip(settings.model, seed=settings.seed)
    lengths = caption_lengths(
        settings.caption_length, settings.batch, clip.config.text_cfg.context_length, settings.seed
    )
    image, text = random_batch(clip.config, lengths, settings.seed)
    cpu = torch.device("cpu")
    of = trained(provider, settings, clip, cpu)
    del clip
    # A compiled model belongs to one batch size, and compiling it is not part of a step.
    few = len(image) if of.forward else 2
    _take(step_parts(of, image[:few], text[:few], cpu, settings.precision))
    of.optimizer.zero_grad(set_to_none=True)
    return partial(_take, step_parts(of, image, text, cpu, settings.precision))


def _take(parts: dict[str, Callable[[], object]]) -> None:
    with quiet_compiler():
        for part in parts.values():
            part()


def _run(
    config: ModelBench,
    clip: ClipConfig,
    gauge: Meter,
    lengths: Tensor,
    names: list[str],
    result: Report,
    say: Callable[[str], None],
    spent: Callable[[], bool],
) -> None:
    """Adds the rows, and the ceilings measured beside them."""
    rows = {name: Row(name, config.batch) for name in names}
    result.rows += rows.values()
    weights = build_clip(clip, seed=config.seed)
    image, text = random_batch(clip, lengths, config.seed)
    features = _features(weights, image, text)
    if gauge.device.type == "cuda":
        image, text = image.pin_memory(), text.pin_memory()
    ready: dict[str, tuple[Trained, dict[str, Callable[[], object]]]] = {}
    for name, row in rows.items():
        say(f"{config.model}, B={config.batch}: {name}")
        try:
            if spent():
                raise UnavailableError("left out: the time for this was spent")
            of = trained(name, config, weights, gauge.device)
            row.features_apart = _apart(of, image, text, gauge, features)
            parts = step_parts(of, image, text, gauge.device, config.precision)
            _take(parts)
            _measure_memory(config, gauge, row, of, parts)
            ready[name] = of, parts
        except UnavailableError as why:
            row.reason = str(why)
        except Exception as error:  # what torch.compile, a full memory or another library raises
            row.reason = first_line(error)
        if row.reason:
            gauge.recover()

    say(f"{config.model}, B={config.batch}: {len(ready)} providers in turn")
    calls: dict[str, Callable[[], Any]] = {
        name: guarded(rows[name], gauge, partial(_timed, gauge, parts)) for name, (_, parts) in ready.items()
    }
    ceilings = gauge.ceilings(clip.embed_dim) if calls else {}
    samples = timing.interleave(calls | ceilings, config.rounds, seconds=config.seconds)
    peak: float | None = None
    if "product" in ceilings:
        result.peak_gflops[str(config.batch)] = spread(samples["product"])
        peak = max(samples["product"])  # a ceiling: what others took of the machine in between is no part of it
    if "copy" in ceilings:
        result.copy_gb_per_s[str(config.batch)] = spread(samples["copy"])
    gflops = least_gflops(clip, lengths)
    for name, (of, parts) in ready.items():
        if not rows[name].reason:
            _fill(rows[name], samples[name], list(parts), config, gflops, peak)
            rows[name].loss = float(of.value) if of.value is not None else None


def _features(model: Any, image: Tensor, text: Tensor, pixels: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Unit features of the first pairs' images and texts, in float32: [2 * COMPARED, D]."""
    with torch.no_grad():
        images = model.encode_image(pixels(image[:COMPARED]), normalize=True)
        return torch.cat([images, model.encode_text(text[:COMPARED], normalize=True)]).float()


def _apart(of: Trained, image: Tensor, text: Tensor, gauge: Meter, expected: Tensor) -> float:
    """The longest difference of a row of features from what is expected; raises UnavailableError if it is too long."""
    found = _features(of.model, image.to(gauge.device), text.to(gauge.device), of.pixels)
    apart = float((found.cpu() - expected).norm(dim=1).max())
    if not apart <= APART[gauge.name]:
        raise UnavailableError(f"with the same weights its features differ from ours by {apart:.1e}")
    return apart


def _measure_memory(config: ModelBench, gauge: Meter, row: Row, of: Trained, parts: dict) -> None:
    """The row's peak: of a step on a GPU, of one in a fresh process on a processor."""
    if gauge.memory_reason():
        return
    if isinstance(gauge, Cuda):
        of.optimizer.zero_grad(set_to_none=True)
        row.extra_bytes = gauge.memory_of(partial(_take, parts)).extra_bytes
        state = [each for values in of.optimizer.state.values() for each in values.values() if isinstance(each, Tensor)]
        row.process_bytes = row.extra_bytes + sum(each.nbytes for each in [*of.model.state_dict().values(), *state])
        return
    settings = {name: value for name, value in asdict(config).items() if name != "json"}
    try:
        peak = memory.peak_in_child(one_step, provider=row.provider, config=settings)
    except RuntimeError as error:
        raise UnavailableError(f"while its memory was measured: {error}") from error
    row.extra_bytes, row.process_bytes = peak.extra_bytes, peak.process_bytes


def _timed(gauge: Meter, parts: dict[str, Callable[[], object]]) -> tuple[list[float], list[float]]:
    """Seconds from a step's start to the end of each part: as the gauge counts them, and the processor's own."""
    own: list[float] = []
    start = time.process_time()

    def then_note(part: Callable[[], object]) -> None:
        part()
        own.append(time.process_time() - start)

    return gauge.marks(*(partial(then_note, part) for part in parts.values())), own


def _fill(
    row: Row,
    samples: list[tuple[list[float], list[float]]],
    parts: list[str],
    config: ModelBench,
    gflops: float | None,
    peak: float | None,
) -> None:
    """Times and rates of a row. On a processor parts and rates are of its own time, which others cannot take."""
    row.rounds = len(samples)
    row.full_ms = spread([1e3 * wall[-1] for wall, _ in samples])
    step_ms, ends = row.full_ms, [wall for wall, _ in samples]
    if config.device == "cpu":
        ends = [[end / config.threads for end in own] for _, own in samples]
        step_ms = row.cpu_ms = spread([1e3 * own[-1] for own in ends])
    row.parts_ms = {
        name: spread([1e3 * (end[i] - (end[i - 1] if i else 0.0)) for end in ends]) for i, name in enumerate(parts)
    }
    row.samples_per_s = 1e3 * config.batch / step_ms.median
    if tower := row.parts_ms.get("image tower"):
        row.images_per_s = 1e3 * config.batch / tower.median
    if gflops is not None:
        row.gflops = 1e3 * gflops / step_ms.median
        row.peak_share = row.gflops / peak if peak else None
