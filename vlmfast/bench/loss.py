"""The benchmark of a contrastive loss: time, memory and error of ours and of its rivals on the same pairs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast._ext import C
from vlmfast.bench import machine, memory, providers, report, timing
from vlmfast.bench.providers import BenchError, LossFn, LossName, UnavailableError
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import Spread, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAVES = ("image", "text", "scale", "bias")
LOGIT_SCALE, LOGIT_BIAS = 1 / 0.07, -10.0  # CLIP's first scale; SigLIP's first bias
MATCH = 0.3  # a text is MATCH * its image + a random unit row: well matched pairs have no gradient left to compare
TUNING_ROUNDS, TUNING_SECONDS = 2, 0.2
PEAK_SECONDS = 0.02  # of the micro-kernel, once a round
WARM_UP = 64  # pairs in the pass that loads code before a peak is taken: too few to leave buffers that would hide it


@dataclass(frozen=True)
class LossBench:
    """Time, memory and error of a contrastive loss, ours beside its rivals, interleaved on the same pairs."""

    loss: LossName = "clip"
    """Which loss: clip (softmax, both directions), siglip (pairwise sigmoid) or vse (sum of hinges)."""
    device: Literal["cpu"] = "cpu"
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
    """Who runs, joined by commas; "reference" is one more."""
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


def run(config: LossBench, say: Callable[[str], None] = lambda line: None) -> Report:
    """The report of the benchmark; nothing is printed or written.

    Args:
        config: what to run.
        say: takes a line of progress at a time.
    Raises:
        BenchError: a provider, batch size or number in the config makes no sense.
    """
    names, batches = providers.known_providers(config.providers.split(",")), parse_batches(config.batch)
    for name in ("threads", "dim", "rounds"):
        if getattr(config, name) < 1:
            raise BenchError(f"{name} must be at least 1; got {getattr(config, name)}")
    settings = {name: value for name, value in asdict(config).items() if name not in ("json", "csv", "plot")}
    facts = machine.now(), machine.machine(), machine.versions(), machine.commit()
    result = Report(f"{config.loss}_loss", settings, *facts, memory_reason=memory.unmeasurable())
    with timing.threads(config.threads):
        for batch in batches:
            rows, peak = _run_batch(config, batch, names, say)
            result.rows += rows
            if peak is not None:
                result.microkernel_gflops[str(batch)] = peak
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


def pairs(batch: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weakly matched random pairs of unit rows, a scale and a bias, all wanting gradients.

    Args:
        batch: B.
        dim: D.
        dtype: of the embeddings; scale and bias are float32.
        seed: of the generator.
    Returns: image [B, D], text [B, D], scale [], bias [].
    """
    generator = torch.Generator().manual_seed(seed)
    image, noise = (F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for _ in range(2))
    text = F.normalize(MATCH * image + noise, dim=1)
    leaves = image.to(dtype), text.to(dtype), torch.tensor(LOGIT_SCALE), torch.tensor(LOGIT_BIAS)
    image, text, scale, bias = (leaf.requires_grad_() for leaf in leaves)
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
    loss: LossName, provider: str, leaves: Sequence[Tensor], prefer: str | None = None
) -> tuple[str, LossFn]:
    """The name and function of the provider's fastest form on these pairs, forward and backward; it has run once.

    Args:
        loss: which loss.
        provider: one of PROVIDERS.
        leaves: image, text, scale, bias.
        prefer: a form to take without timing the others, where the provider has it.
    Raises:
        UnavailableError: the provider cannot run the loss, at this size, or at all.
    """
    _refuse_what_does_not_fit(provider, len(leaves[0]))
    forms = providers.forms(loss, provider)
    if prefer in forms:
        forms = {prefer: forms[prefer]}
    calls = {form: partial(timing.timed_pass, bind(fn, leaves), leaves) for form, fn in forms.items()}
    try:
        with providers.quiet_compiler():
            for call in calls.values():
                call()
        if len(forms) == 1:
            return next(iter(forms.items()))
        passes = timing.interleave(calls, TUNING_ROUNDS, seconds=TUNING_SECONDS)
    except (RuntimeError, TypeError) as error:  # what torch.compile, a missing kernel or another library raises
        raise UnavailableError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    best = min(forms, key=lambda form: spread([full for _, full in passes[form]]).median)
    return best, forms[best]


def one_pass(
    loss: LossName, provider: str, form: str, batch: int, dim: int, dtype: str, seed: int, threads: int
) -> Callable[[], object]:
    """A forward and backward of the provider's form, ready to run: what the fresh process measures the memory of."""
    torch.set_num_threads(threads)
    fn = providers.forms(loss, provider)[form]
    # A compiled function belongs to one batch size, and compiling it is not part of a step.
    warm_up = pairs(batch if provider == "torch-compile" else min(batch, WARM_UP), dim, DTYPES[dtype], seed)
    timing.timed_pass(bind(fn, warm_up), warm_up)
    leaves = pairs(batch, dim, DTYPES[dtype], seed)
    return partial(timing.timed_pass, bind(fn, leaves), leaves)


def _run_batch(
    config: LossBench, batch: int, names: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Row], Spread | None]:
    """The rows of one batch size, and the micro-kernel's GFLOP/s."""
    leaves = pairs(batch, config.dim, DTYPES[config.dtype], config.seed)
    rows = {name: Row(name, batch) for name in names}
    losses: dict[str, Callable[[], Tensor]] = {}
    for name, row in rows.items():
        say(f"B={batch}: {name}")
        try:
            prefer = f"of {rows['eager-one'].form}" if "eager-one" in rows else None
            form, fn = fastest_form(config.loss, name, leaves, prefer)
            row.form = providers.backend_of(config.loss, *leaves[:2]) if name == "vlmfast" else form
            _measure_memory(config, form, row)
            losses[name] = bind(fn, leaves)
        except UnavailableError as why:
            row.reason = str(why)

    if batch <= config.exact_up_to:
        say(f"B={batch}: errors against float64")
        exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = values_and_gradients(bind(providers.forms(config.loss, "reference")[""], exact_leaves), exact_leaves)
        for name, loss in losses.items():
            _measure_errors(rows[name], values_and_gradients(loss, leaves), truth)

    say(f"B={batch}: {len(losses)} providers in turn")
    calls: dict[str, Callable[[], Any]] = {
        name: partial(timing.timed_pass, loss, leaves) for name, loss in losses.items()
    }
    for call in calls.values():
        call()
    if microkernel := getattr(C, "microkernel_gflops", None):
        calls["micro-kernel"] = lambda: config.threads * microkernel(config.dim, PEAK_SECONDS)
    samples = timing.interleave(calls, config.rounds, seconds=config.seconds)
    peak = spread(samples.pop("micro-kernel")) if "micro-kernel" in samples else None
    for name, passes in samples.items():
        row = rows[name]
        row.rounds = len(passes)
        row.forward_ms = spread([1e3 * forward for forward, _ in passes])
        row.backward_ms = spread([1e3 * (full - forward) for forward, full in passes])
        row.full_ms = spread([1e3 * full for _, full in passes])
        row.gflops = providers.LEAST_FLOPS[config.loss][1] * batch**2 * config.dim / row.full_ms.median / 1e6
        row.microkernel_share = row.gflops / peak.median if peak else None
    return list(rows.values()), peak


def _refuse_what_does_not_fit(provider: str, batch: int) -> None:
    needed, free = providers.LOGITS_HELD.get(provider, 0) * 4 * batch**2, memory.available_bytes()
    if free is not None and needed > free:
        raise UnavailableError(f"its [B, B] arrays need {needed / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free")


def _measure_memory(config: LossBench, form: str, row: Row) -> None:
    if memory.unmeasurable():
        return
    where = {"loss": config.loss, "provider": row.provider, "form": form, "batch": row.batch, "dim": config.dim}
    how = {"dtype": config.dtype, "seed": config.seed, "threads": config.threads}
    try:
        peak = memory.peak_in_child(one_pass, **where, **how)
    except RuntimeError as error:
        raise UnavailableError(f"in a process of its own: {error}") from error
    gradients = 2 * row.batch * config.dim * DTYPES[config.dtype].itemsize
    row.extra_bytes, row.process_bytes = max(0, peak.extra_bytes - gradients), peak.process_bytes


def _measure_errors(row: Row, values: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Errors relative to the exact value or length (absolute where that is 0); inputs that take no part have none."""
    lengths = {
        name: (float((values[name].double() - exact).norm()), float(exact.norm())) for name, exact in truth.items()
    }
    errors = {name: error / (length or 1.0) for name, (error, length) in lengths.items()}
    row.loss, row.loss_error = float(values["loss"]), errors.pop("loss")
    row.gradient_errors = errors
