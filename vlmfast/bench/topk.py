"""The benchmark of exact search: time, memory and recall of our top k beside a matrix product and a sort."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import select
from vlmfast.bench import machine, memory, report, timing
from vlmfast.bench.loss import DTYPES
from vlmfast.bench.meter import Cuda, Meter, guarded, meter
from vlmfast.bench.providers import BenchError, UnavailableError, first_line
from vlmfast.bench.report import Report, Row
from vlmfast.bench.timing import spread
from vlmfast.ops import similarity

PROVIDERS = ("vlmfast", "mm-topk")
CHUNKS = (256, 1024)  # queries at a time; the whole matrix at once is tried too, where it fits
TUNING_ROUNDS, TUNING_SECONDS = 2, 0.2
Search: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TopkBench:
    """Time, memory and recall of the k items most similar to each query, ours beside PyTorch's product and sort."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 1
    """Threads of PyTorch and of our kernels."""
    queries: int = 8192
    """Number of queries M."""
    items: int = 2**20
    """Number of items N."""
    dim: int = 512
    """Embedding width D."""
    k: int = 10
    """How many items of each query."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the embeddings."""
    rounds: int = 5
    """The fewest rounds; every round runs every provider once."""
    seconds: float = 2.0
    """Rounds go on for so long at least."""
    checked: int = 64
    """Queries whose answers are compared with float64."""
    seed: int = 0
    """Of the random unit rows."""
    json: Path | None = None
    """Write everything here, with machine, versions and commit."""


def main(config: TopkBench) -> Report:
    """The report of the benchmark, printed as a table and written to the file that the config names.

    Raises:
        BenchError: a number in the config makes no sense, or the device is missing.
        MissingExtraError: rich is missing.
    """
    report.check_outputs(None, None)
    result = run(config, partial(print, file=sys.stderr, flush=True))
    report.write(result, config.json, None, None)
    report.show(result)
    return result


def run(config: TopkBench, say: Callable[[str], None] = lambda line: None) -> Report:
    """The report of the benchmark; nothing is printed or written.

    Args:
        config: what to run.
        say: takes a line of progress at a time.
    Raises:
        BenchError: a number in the config makes no sense, or the device is missing.
        DeviceLostError: a provider broke the GPU for this process.
    """
    for name in ("threads", "queries", "items", "dim", "k", "rounds", "checked"):
        if getattr(config, name) < 1:
            raise BenchError(f"{name} must be at least 1; got {getattr(config, name)}")
    gauge = meter(config.device, config.threads)
    settings = {name: value for name, value in asdict(config).items() if name != "json"}
    facts = machine.now(), gauge.facts(), machine.versions(), machine.commit()
    result = Report("similarity_topk", settings, *facts, peak_of=gauge.peak_of, memory_reason=gauge.memory_reason())
    with timing.threads(config.threads), torch.no_grad():
        _run(config, gauge, result, say)
    report.set_ratios(result.rows)
    return result


def unit_rows(config: TopkBench, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random unit rows.

    Returns: queries [M, D], items [N, D].
    """
    generator = torch.Generator(device).manual_seed(config.seed)

    def rows(count: int) -> Tensor:
        drawn = torch.randn(count, config.dim, generator=generator, device=device)
        return F.normalize(drawn, dim=1).to(DTYPES[config.dtype])

    return rows(config.queries), rows(config.items)


def forms(provider: str, k: int) -> dict[str, Search]:
    """The ways in which a provider can search, by name: the harness times them and takes the fastest.

    Args:
        provider: one of PROVIDERS.
        k: how many items of each query.
    """
    if provider == "vlmfast":
        return {"": lambda queries, items: similarity.similarity_topk(queries, items, k, normalize=False)}

    def by(chunk: int, queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.mm(some, items.T).topk(k, dim=1) for some in queries.split(chunk)]
        values, indices = zip(*found, strict=True)
        return torch.cat(values), torch.cat(indices)

    chunked: dict[str, Search] = {f"{chunk} queries at a time": partial(by, chunk) for chunk in CHUNKS}
    return chunked | {"whole": partial(by, 2**62)}


def one_search(provider: str, form: str, config: dict[str, Any]) -> Callable[[], object]:
    """A search ready to run: what a fresh process measures the memory of."""
    settings = TopkBench(**config)
    torch.set_num_threads(settings.threads)
    queries, items = unit_rows(settings, "cpu")
    search = forms(provider, settings.k)[form]
    search(queries[:8], items[: 8 * settings.k])  # loads code
    return partial(search, queries, items)


def _run(config: TopkBench, gauge: Meter, result: Report, say: Callable[[str], None]) -> None:
    queries, items = unit_rows(config, gauge.device)
    flops = 2 * config.queries * config.items * config.dim
    rows = {name: Row(name, config.items) for name in PROVIDERS}
    result.rows += rows.values()
    calls: dict[str, Callable[[], Any]] = {}
    for name, row in rows.items():
        say(f"N={config.items}: {name}")
        try:
            form, search = _fastest(name, config, gauge, queries, items)
            row.form = form or select("similarity_topk", similarity.IMPLS, queries.device, queries, items)
            _measure_memory(config, gauge, form, row, partial(search, queries, items))
            calls[name] = guarded(row, gauge, partial(gauge.timed, partial(search, queries, items)))
            _check(config, row, search, queries, items)
        except (UnavailableError, RuntimeError) as why:
            row.reason = str(why) if isinstance(why, UnavailableError) else first_line(why)
        if row.reason:
            calls.pop(name, None)
            gauge.recover()

    say(f"N={config.items}: {len(calls)} providers in turn")
    ceilings = gauge.ceilings(config.dim) if calls else {}
    samples = timing.interleave(calls | ceilings, config.rounds, seconds=config.seconds)
    measured = {name: spread(samples.pop(name)) for name in ceilings}
    if peak := measured.get("product"):
        result.peak_gflops[str(config.items)] = peak
    if copy := measured.get("copy"):
        result.copy_gb_per_s[str(config.items)] = copy
    for name, seconds in samples.items():
        row = rows[name]
        if row.reason:
            continue
        row.rounds, row.full_ms = len(seconds), spread([1e3 * each for each in seconds])
        row.gflops = flops / row.full_ms.median / 1e6
        row.peak_share = row.gflops / peak.median if peak else None


def _fastest(name: str, config: TopkBench, gauge: Meter, queries: Tensor, items: Tensor) -> tuple[str, Search]:
    """The provider's fastest form among those that fit and run; each has run once."""
    able: dict[str, Callable[[], float]] = {}
    found = forms(name, config.k)
    reason = f"the similarities of {CHUNKS[0]} queries do not fit"
    for form, search in found.items():
        failed = Row(name, config.items)
        call = guarded(failed, gauge, partial(gauge.timed, partial(search, queries, items)))
        if _fits(form, config, gauge, items):
            call()
            reason = failed.reason or reason
            if not failed.reason:
                able[form] = call
    if not able:
        raise UnavailableError(reason)
    best = next(iter(able))
    if len(able) > 1:
        samples = timing.interleave(able, TUNING_ROUNDS, seconds=TUNING_SECONDS)
        best = min(able, key=lambda form: spread(samples[form]).median)
    return best, found[best]


def _fits(form: str, config: TopkBench, gauge: Meter, items: Tensor) -> bool:
    """Whether the similarities that the form holds at a time fit in memory."""
    if not form:
        return True
    rows = config.queries if form == "whole" else min(config.queries, int(form.split()[0]))
    free = gauge.free_bytes()
    return free is None or rows * len(items) * items.itemsize <= free


def _measure_memory(config: TopkBench, gauge: Meter, form: str, row: Row, call: Callable[[], object]) -> None:
    """The row's peak: of this call on a GPU, of a fresh process on a processor."""
    if gauge.memory_reason():
        return
    if isinstance(gauge, Cuda):
        peak = gauge.memory_of(call)
    else:
        settings = asdict(config) | {"json": None}
        peak = memory.peak_in_child(one_search, provider=row.provider, form=form, config=settings)
    answer = config.queries * config.k * (4 + 8)
    row.extra_bytes, row.process_bytes = max(0, peak.extra_bytes - answer), peak.process_bytes


def _check(config: TopkBench, row: Row, search: Search, queries: Tensor, items: Tensor) -> None:
    """The row's recall, and the relative error of its values, on the first queries."""
    values, indices = search(queries, items)
    some = queries[: config.checked].double()
    # A chunk of items at a time: a million of them in float64 would be four gigabytes.
    exact = torch.cat([some @ part.double().T for part in items.split(2**16)], 1)
    true_values, true_indices = exact.topk(config.k, dim=1)
    same = (indices[: config.checked, :, None] == true_indices[:, None, :]).any(2)
    row.recall = float(same.double().mean())
    row.loss_error = float((values[: config.checked].double() - true_values).norm() / true_values.norm())
