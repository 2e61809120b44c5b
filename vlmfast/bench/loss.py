"""The benchmark of a contrastive loss: time, memory and error of ours and of its rivals on the same pairs."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.bench import machine, memory, providers, report, timing
from vlmfast.bench.meter import Cpu, Cuda, Meter, guarded, meter
from vlmfast.bench.providers import (
    LOGIT_BIAS,
    LOGIT_SCALE,
    BenchError,
    LossFn,
    LossName,
    UnavailableError,
    first_line,
)
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAVES = ("image", "text", "scale", "bias")
MATCH = 0.3  # a text is MATCH * its image + a random unit row: well matched pairs have no gradient left to compare
TUNING_ROUNDS, TUNING_SECONDS = 2, 0.2
WARM_UP = 64  # pairs in the pass that loads code before a peak is taken: too few to leave buffers that would hide it


@dataclass(frozen=True)
class LossBench:
    """Time, memory and error of a contrastive loss, ours beside its rivals, interleaved on the same pairs."""

    loss: LossName = "clip"
    """Which loss: clip (softmax, both directions), siglip (pairwise sigmoid), vse (sum of hinges) or vse-hardest."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 1
    """Threads of PyTorch and of our kernels."""
    batch: str = "1024,4096"
    """Batch sizes: 1024,4096 or 1024..65536:x2, or both joined by commas."""
    dim: int = 512
    """Embedding width D."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the embeddings; below float32 every provider runs under autocast, as in mixed-precision training."""
    providers: str = "vlmfast,eager-one,eager-two,linear-cross-entropy,torch-compile,open_clip"
    """Who runs, joined by commas; more are torch-compile-two, inf-cl, memeff, siglip-kernel and reference."""
    precision: str | None = None
    """Our function's keyword argument of that name, None for its default."""
    max_workspace: int | None = None
    """Likewise: bytes."""
    rounds: int = 5
    """The fewest rounds; every round runs every provider once."""
    seconds: float = 2.0
    """Rounds go on for so long at least, so that small batches get more of them."""
    exact_up_to: int = 8192
    """The largest batch size whose errors are measured: the float64 truth costs several times a float32 pass."""
    seed: int = 0
    """Of the random pairs."""
    json: Path | None = None
    """Write everything here, with machine, versions and commit."""
    csv: Path | None = None
    """Append to this file in Liger-Kernel's benchmark schema."""
    plot: Path | None = None
    """Draw time and memory against batch size here (.png, .svg or .pdf)."""


def main(config: LossBench) -> Report:
    """The report of the benchmark, printed as tables and written to the files that the config names.

    Progress goes to stderr, a line at a time.

    Raises:
        BenchError: a provider, batch size or number in the config makes no sense, or a file cannot take the results.
        MissingExtraError: rich, or for a plot matplotlib, is missing.
    """
    report.check_outputs(config.csv, config.plot)
    result = run(config, partial(print, file=sys.stderr, flush=True))
    report.write(result, config.json, config.csv, config.plot)
    report.show(result)
    return result


def run(
    config: LossBench, say: Callable[[str], None] = lambda line: None, spent: Callable[[], bool] = lambda: False
) -> Report:
    """The report of the benchmark; nothing is printed or written.

    Args:
        config: what to run.
        say: takes a line of progress at a time.
        spent: asked before each provider: once true, those that are left have this for their reason.
    Raises:
        BenchError: a provider, batch size or number in the config makes no sense, or the device is missing.
        DeviceLostError: a provider broke the GPU for this process.
    """
    names, batches = providers.known_providers(config.providers.split(",")), parse_batches(config.batch)
    for name in ("threads", "dim", "rounds"):
        if getattr(config, name) < 1:
            raise BenchError(f"{name} must be at least 1; got {getattr(config, name)}")
    providers.check_options(config.loss, _options(config))
    gauge = meter(config.device, config.threads)
    settings = {name: value for name, value in asdict(config).items() if name not in ("json", "csv", "plot")}
    versions = machine.versions(
        *(package for package, _, _ in providers.PEERS.values()) if gauge.name == "cuda" else ()
    )
    facts = machine.now(), gauge.facts(), versions, machine.commit()
    result = Report(
        providers.TITLES[config.loss], settings, *facts, peak_of=gauge.peak_of, memory_reason=gauge.memory_reason()
    )
    with timing.threads(config.threads):
        for batch in batches:
            _run_batch(config, gauge, batch, names, result, say, spent)
    report.set_ratios(result.rows)
    return result


def parse_batches(text: str) -> list[int]:
    """The batch sizes that `text` names: "1024,4096", "1024..65536:x2", or such parts joined by commas.

    Raises:
        BenchError: a part is neither a size nor a range that grows.
    """
    batches: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+):x(\d+))?\s*", part)
        size, last, factor = (int(number) if number else 0 for number in match.groups()) if match else (0, 0, 0)
        if size < 1 or (last and (factor < 2 or last < size)):
            raise BenchError(f"batch: expected sizes such as 1024,4096 or 1024..65536:x2; got {text!r}")
        batches.append(size)
        while batches[-1] * factor <= last and factor:
            batches.append(batches[-1] * factor)
    return batches


def pairs(
    batch: int, dim: int, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weakly matched random pairs of unit rows, a scale and a bias, all wanting gradients.

    Args:
        batch: B.
        dim: D.
        dtype: of the embeddings; scale and bias are float32.
        seed: of the generator.
        device: where they are drawn; each kind of device draws its own.
    Returns: image [B, D], text [B, D], scale [], bias [].
    """
    generator = torch.Generator(device).manual_seed(seed)
    image, noise = (F.normalize(torch.randn(batch, dim, generator=generator, device=device), dim=1) for _ in range(2))
    text = F.normalize(MATCH * image + noise, dim=1)
    scalars = (torch.tensor(value, device=device) for value in (LOGIT_SCALE, LOGIT_BIAS))
    image, text, scale, bias = (leaf.requires_grad_() for leaf in (image.to(dtype), text.to(dtype), *scalars))
    return image, text, scale, bias


def bind(fn: LossFn, leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loss of these leaves as a call; in mixed precision under autocast, as a training step calls it."""
    image, text, scale, bias = leaves
    mixed = image.dtype in (torch.bfloat16, torch.float16)

    def call() -> Tensor:
        with torch.autocast(image.device.type, image.dtype) if mixed else nullcontext():
            return fn(image, text, scale, bias)

    return call


def values_and_gradients(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of each leaf that takes part in it."""
    for leaf in leaves:
        leaf.grad = None
    value = loss()
    value.backward()
    gradients = {name: leaf.grad for name, leaf in zip(LEAVES, leaves, strict=True) if leaf.grad is not None}
    return {"loss": value.detach()} | gradients


def fastest_form(
    loss: LossName,
    provider: str,
    leaves: Sequence[Tensor],
    prefer: str | None = None,
    gauge: Meter | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[str, LossFn]:
    """The name and function of the provider's fastest form on these pairs, forward and backward; it has run once.

    Args:
        loss: which loss.
        provider: one of PROVIDERS.
        leaves: image, text, scale, bias.
        prefer: a form to take without timing the others, where the provider has it.
        gauge: what times them; by default the processor's.
        options: keyword arguments of our own function.
    Raises:
        UnavailableError: the provider cannot run the loss, at this size, or at all.
    """
    gauge = gauge or Cpu()
    _refuse_what_does_not_fit(provider, len(leaves[0]), gauge)
    forms = providers.forms(loss, provider, options)
    if prefer in forms:
        forms = {prefer: forms[prefer]}
    calls = {form: partial(gauge.timed_pass, bind(fn, leaves), leaves) for form, fn in forms.items()}
    try:
        with providers.quiet_compiler():
            for call in calls.values():
                call()
        if len(forms) == 1:
            return next(iter(forms.items()))
        passes = timing.interleave(calls, TUNING_ROUNDS, seconds=TUNING_SECONDS)
    except Exception as error:  # what torch.compile, Triton, a missing kernel, a full memory or another library raises
        raise UnavailableError(first_line(error)) from error
    best = min(forms, key=lambda form: spread([full for _, full in passes[form]]).median)
    return best, forms[best]


def one_pass(
    loss: LossName,
    provider: str,
    form: str,
    batch: int,
    dim: int,
    dtype: str,
    seed: int,
    threads: int,
    options: Mapping[str, Any],
) -> Callable[[], object]:
    """A forward and backward of the provider's form, ready to run: what the fresh process measures the memory of."""
    torch.set_num_threads(threads)
    fn = providers.forms(loss, provider, options)[form]
    # A compiled function belongs to one batch size, and compiling it is not part of a step.
    compiled = provider.startswith("torch-compile")
    warm_up = pairs(batch if compiled else min(batch, WARM_UP), dim, DTYPES[dtype], seed)
    timing.timed_pass(bind(fn, warm_up), warm_up)
    leaves = pairs(batch, dim, DTYPES[dtype], seed)
    return partial(timing.timed_pass, bind(fn, leaves), leaves)


def _run_batch(
    config: LossBench,
    gauge: Meter,
    batch: int,
    names: Sequence[str],
    result: Report,
    say: Callable[[str], None],
    spent: Callable[[], bool],
) -> None:
    """Adds the rows of one batch size, and the ceilings measured beside them."""
    if any(name.startswith("torch-compile") for name in names):
        torch.compiler.reset()
    leaves = pairs(batch, config.dim, DTYPES[config.dtype], config.seed, gauge.device)
    rows = {name: Row(name, batch) for name in names}
    result.rows += rows.values()
    losses: dict[str, Callable[[], Tensor]] = {}
    for name, row in rows.items():
        say(f"B={batch}: {name}")
        try:
            if spent():
                raise UnavailableError("left out: the time for this was spent")
            prefer = f"of {rows['eager-one'].form}" if "eager-one" in rows else None
            form, fn = fastest_form(config.loss, name, leaves, prefer, gauge, _options(config))
            row.form = providers.backend_of(config.loss, *leaves[:2]) if name == "vlmfast" else form
            bound = bind(fn, leaves)
            _measure_memory(config, gauge, form, row, partial(gauge.timed_pass, bound, leaves), leaves)
            losses[name] = bound
        except UnavailableError as why:
            row.reason = str(why)
            if name == "vlmfast" and why.__cause__:
                say("".join(traceback.format_exception(why.__cause__)))
        if row.reason:
            gauge.recover()

    if batch <= config.exact_up_to and losses:
        say(f"B={batch}: errors against float64")
        exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = values_and_gradients(bind(providers.forms(config.loss, "reference")[""], exact_leaves), exact_leaves)
        for name, loss in losses.items():
            values = guarded(rows[name], gauge, partial(values_and_gradients, loss, leaves))()
            if values is not None:
                _measure_errors(rows[name], values, truth)
        del exact_leaves, truth

    say(f"B={batch}: {len(losses)} providers in turn")
    calls: dict[str, Callable[[], Any]] = {
        name: guarded(rows[name], gauge, partial(gauge.timed_pass, loss, leaves)) for name, loss in losses.items()
    }
    if config.rounds > 1:
        for call in calls.values():
            call()
    ceilings = gauge.ceilings(config.dim) if calls else {}
    samples = timing.interleave(calls | ceilings, config.rounds, seconds=config.seconds)
    measured = {name: spread(samples.pop(name)) for name in ceilings}
    if peak := measured.get("product"):
        result.peak_gflops[str(batch)] = peak
    if copy := measured.get("copy"):
        result.copy_gb_per_s[str(batch)] = copy
    for name, passes in samples.items():
        row = rows[name]
        if row.reason:
            continue
        row.rounds = len(passes)
        row.forward_ms = spread([1e3 * forward for forward, _ in passes])
        row.backward_ms = spread([1e3 * (full - forward) for forward, full in passes])
        row.full_ms = spread([1e3 * full for _, full in passes])
        forward, full = (flops * batch**2 * config.dim / 1e6 for flops in providers.LEAST_FLOPS[config.loss])
        row.gflops = full / row.full_ms.median
        if config.loss == "clip":  # the others compute gradients in their forward
            row.forward_gflops = forward / row.forward_ms.median
        row.peak_share = row.gflops / peak.median if peak else None


def _options(config: LossBench) -> dict[str, Any]:
    """The keyword arguments of our own function that the config names."""
    named = {"precision": config.precision, "max_workspace": config.max_workspace}
    return {name: value for name, value in named.items() if value is not None}


def _refuse_what_does_not_fit(provider: str, batch: int, gauge: Meter) -> None:
    needed, free = providers.LOGITS_HELD.get(provider, 0) * 4 * batch**2, gauge.free_bytes()
    if free is not None and needed > free:
        raise UnavailableError(f"its [B, B] arrays need {needed / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free")


def _measure_memory(
    config: LossBench, gauge: Meter, form: str, row: Row, call: Callable[[], object], leaves: Sequence[Tensor]
) -> None:
    """The row's peak: of this call on a GPU, of a fresh process on a processor, where freed memory would hide it."""
    if gauge.memory_reason():
        return
    try:
        if isinstance(gauge, Cuda):
            for leaf in leaves:
                leaf.grad = None
            peak = gauge.memory_of(call)
        else:
            where = {"loss": config.loss, "provider": row.provider, "form": form, "batch": row.batch}
            how = {"dim": config.dim, "dtype": config.dtype, "seed": config.seed, "threads": config.threads}
            peak = memory.peak_in_child(one_pass, **where, **how, options=_options(config))
    except RuntimeError as error:
        raise UnavailableError(f"while its memory was measured: {error}") from error
    gradients = 2 * row.batch * config.dim * DTYPES[config.dtype].itemsize
    row.extra_bytes, row.process_bytes = max(0, peak.extra_bytes - gradients), peak.process_bytes


def _measure_errors(row: Row, values: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Errors relative to the exact value or length (absolute where that is 0); None for a gradient that is missing."""
    errors: dict[str, float | None] = {}
    for name, exact in truth.items():
        value, length = values.get(name), float(exact.norm())
        errors[name] = None if value is None else float((value.double() - exact).norm()) / (length or 1.0)
    row.loss, row.loss_error = float(values["loss"]), errors.pop("loss")
    row.gradient_errors = errors
