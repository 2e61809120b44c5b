"""What a benchmark hands over: a table for people, JSON and Liger-Kernel's CSV for programs, a plot."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmfast._version import __version__
from vlmfast.bench.providers import BenchError
from vlmfast.bench.timing import Spread
from vlmfast.errors import missing_extra

MIB = 2**20
PICTURES = (".png", ".svg", ".pdf")
# Liger-Kernel's benchmark schema, so that its visualiser reads ours; the last column is the library's version.
CSV_COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label"),
    *("x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp"),
    "vlmfast_version",
)


@dataclass
class Row:
    """One provider at one batch size: what was measured, or the reason why it did not run."""

    provider: str
    batch: int
    reason: str | None = None  # why it did not run; all below is then None
    form: str | None = None  # which of its forms was the fastest; for vlmfast the backend
    rounds: int | None = None
    forward_ms: Spread | None = None  # with the graph, as a training step runs it
    backward_ms: Spread | None = None
    full_ms: Spread | None = None  # forward + backward; of a training step: all of it
    cpu_ms: Spread | None = None  # of a training step on a processor: the process's own time, by thread
    parts_ms: dict[str, Spread] | None = None  # of a training step: of its own time on a processor
    samples_per_s: float | None = None  # of a training step, on a processor of its own time; and images a second
    images_per_s: float | None = None  # through the forward of the image tower, likewise
    features_apart: float | None = None  # longest difference of unit rows of features from ours in float32
    forward_gflops: float | None = None  # the flops that a forward cannot do without / its median time / 1e9
    gflops: float | None = None  # the loss's least flops / median time of forward + backward / 1e9
    peak_share: float | None = None  # gflops / the report's peak_gflops; of a training step, to the highest of those
    extra_bytes: int | None = None  # highest memory of a pass (resident set, or allocated on the GPU), beyond inputs
    process_bytes: int | None = None  # and gradients; and in all
    loss: float | None = None
    loss_error: float | None = None  # relative, against float64 on the same rounded inputs; of top k: of its values
    # Input -> length of the error / length of the float64 gradient, or None where the provider gives none.
    gradient_errors: dict[str, float | None] | None = None
    recall: float | None = None  # of top k: the share of the exact top k that was found
    forward_ratio: float | None = None  # this provider's median / vlmfast's: above 1, vlmfast is faster
    full_ratio: float | None = None
    cpu_ratio: float | None = None
    memory_ratio: float | None = None  # this provider's extra bytes / vlmfast's

    @property
    def gradient_error(self) -> float | None:
        """The larger of the two embeddings' gradient errors."""
        errors = self.gradient_errors or {}
        both = [error for error in (errors.get("image"), errors.get("text")) if error is not None]
        return max(both, default=None)


@dataclass
class Report:
    """A benchmark's results, and what is needed to repeat it."""

    kernel: str  # clip_loss, siglip_loss, vse_loss, "vse_loss, hardest", similarity_topk
    config: dict[str, Any]
    date: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: dict[str, Any] | None
    rows: list[Row] = field(default_factory=list)
    peak_of: str = "the micro-kernel"  # what peak_gflops is the rate of
    peak_gflops: dict[str, Spread] = field(default_factory=dict)  # batch size -> measured between its rounds
    copy_gb_per_s: dict[str, Spread] = field(default_factory=dict)  # likewise: a GPU's memory, read and written
    memory_reason: str | None = None  # why extra_bytes was not measured
    schema: str = "vlmfast-bench-2"

    def batches(self) -> list[int]:
        """The batch sizes, in the order measured."""
        return list(dict.fromkeys(row.batch for row in self.rows))


def set_ratios(rows: Sequence[Row]) -> None:
    """Fills in each row's ratios to the row of vlmfast at the same batch size, where both were measured."""
    ours = {row.batch: row for row in rows if row.provider == "vlmfast"}
    for row in rows:
        if (us := ours.get(row.batch)) is None:
            continue
        if row.forward_ms and us.forward_ms:
            row.forward_ratio = row.forward_ms.median / us.forward_ms.median
        if row.full_ms and us.full_ms:
            row.full_ratio = row.full_ms.median / us.full_ms.median
        if row.cpu_ms and us.cpu_ms:
            row.cpu_ratio = row.cpu_ms.median / us.cpu_ms.median
        if row.extra_bytes is not None and us.extra_bytes:
            row.memory_ratio = row.extra_bytes / us.extra_bytes


def check_outputs(csv_path: Path | None, plot_path: Path | None) -> None:
    """Raises now what `write` and `show` would raise after the benchmark.

    Raises:
        BenchError: the CSV exists and has other columns, or the plot's suffix is no picture's.
        MissingExtraError: rich, or for a plot matplotlib, is missing.
    """
    if importlib.util.find_spec("rich") is None:
        raise missing_extra("rich", "cli")
    if csv_path is not None:
        _check_columns(csv_path)
    if plot_path is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise missing_extra("matplotlib", "demo")
        if plot_path.suffix not in PICTURES:
            raise BenchError(f"{plot_path} must end in one of {', '.join(PICTURES)}")


def write(report: Report, json_path: Path | None, csv_path: Path | None, plot_path: Path | None) -> None:
    """Writes the files whose paths are given, and the folders on the way; `check_outputs` tells what can go wrong."""
    for path, writer in ((json_path, write_json), (csv_path, write_csv), (plot_path, write_plot)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer(report, path)


def write_json(report: Report, path: Path) -> None:
    """Writes all of the report, one object."""
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def write_csv(report: Report, path: Path) -> None:
    """Appends a line per provider, batch size, mode and metric, in Liger-Kernel's schema.

    Raises:
        BenchError: the file exists and has other columns.
    """
    fresh = _check_columns(path)
    with path.open("a", newline="") as file:
        lines = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        if fresh:
            lines.writeheader()
        lines.writerows(csv_lines(report))


def csv_lines(report: Report) -> list[dict[str, Any]]:
    """The report as lines of Liger-Kernel's schema: speed in ms for every mode, memory in MB of 2**20 for "full"."""
    lines = []
    for row in report.rows:
        extra = {name: report.config[name] for name in ("dim", "dtype", "threads")} | {"form": row.form}
        common = {
            "kernel_name": report.kernel,
            "kernel_provider": row.provider,
            "x_name": "B",
            "x_label": "batch size",
            "x_value": row.batch,
            "extra_benchmark_config_str": json.dumps(extra),
            "gpu_name": device_name(report),
            "timestamp": datetime.fromisoformat(report.date).strftime("%Y-%m-%d %H:%M:%S"),
            "vlmfast_version": __version__,
        }
        memory = None if row.extra_bytes is None else Spread(*3 * (row.extra_bytes / MIB,))
        for mode, metric, unit, values in (
            ("forward", "speed", "ms", row.forward_ms),
            ("backward", "speed", "ms", row.backward_ms),
            ("full", "speed", "ms", row.full_ms),
            ("full", "memory", "MB", memory),
        ):
            if values is not None:
                names = {"kernel_operation_mode": mode, "metric_name": metric, "metric_unit": unit}
                y = {"y_value_50": values.median, "y_value_20": values.p20, "y_value_80": values.p80}
                lines.append(common | names | y)
    return lines


def write_plot(report: Report, path: Path) -> None:
    """Draws time and extra memory against the batch size, a line per provider; the suffix chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for place, provider in enumerate(dict.fromkeys(row.provider for row in report.rows)):
        rows = sorted((row for row in report.rows if row.provider == provider), key=lambda row: row.batch)
        style: dict[str, Any] = {"color": f"C{place}", "marker": "o", "label": provider}
        style["linewidth"] = 2.5 if provider == "vlmfast" else 1.2
        timed = [(row.batch, row.full_ms) for row in rows if row.full_ms]
        if timed:
            batches = [batch for batch, _ in timed]
            time_axes.plot(batches, [ms.median for _, ms in timed], **style)
            time_axes.fill_between(
                batches, [ms.p20 for _, ms in timed], [ms.p80 for _, ms in timed], color=style["color"], alpha=0.2
            )
        sized = [(row.batch, row.extra_bytes / MIB) for row in rows if row.extra_bytes]
        if sized:
            memory_axes.plot(*zip(*sized, strict=True), **style)
    for axes, label in ((time_axes, "forward + backward, ms"), (memory_axes, "extra memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel=label)
        axes.set_xticks(report.batches(), [str(batch) for batch in report.batches()], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(headline(report), fontsize="medium")
    figure.savefig(path, dpi=130)


def show(report: Report, console: Any = None) -> None:
    """Prints the report as tables, one a batch size, on a rich console (default: stdout)."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 180)  # a file has no width to keep to
    console.print(headline(report), highlight=False)
    for batch in report.batches():
        console.print(table(report, batch))
        console.print(notes(report, batch), highlight=False, markup=False)
    console.print(legend(report), highlight=False, markup=False)


def headline(report: Report) -> str:
    """The kernel, the shape and the machine, in one line."""
    config, facts = report.config, report.machine
    shape = f"D={config['dim']}"
    if "queries" in config:
        shape = f"{config['queries']} queries, k={config['k']}, {shape}"
    if "caption_length" in config:
        shape = f"captions of {config['mean_tokens']:.1f} tokens"
    where = device_name(report)
    if "gpu" not in facts:
        threads = f"{config['threads']} thread{'s' if config['threads'] != 1 else ''}"
        where = f"{threads}, {where} ({facts['cores']} cores)"
    return f"{report.kernel}, {shape}, {config['dtype']}, {where}"


def device_name(report: Report) -> str:
    """The name of the processor or GPU that ran."""
    return report.machine["gpu"]["name"] if "gpu" in report.machine else report.machine["cpu"]


def table(report: Report, batch: int) -> Any:
    """The rows of one batch size as a rich table."""
    from rich.table import Table

    rows = [row for row in report.rows if row.batch == batch and row.full_ms]
    lines = [_cells(row, tera="gpu" in report.machine) for row in rows]
    grid = Table(title=_title(report, batch), title_justify="left")
    columns = [name for name in (lines[0] if lines else ()) if any(line[name] != "-" for line in lines)]
    for name in columns:
        grid.add_column(name, justify="left" if name == "provider" else "right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        grid.add_row(*(line[name] for name in columns), style="bold" if row.provider == "vlmfast" else None)
    return grid


def _title(report: Report, batch: int) -> str:
    """The batch size, and what the machine itself did between the rounds."""
    peak, copy = report.peak_gflops.get(str(batch)), report.copy_gb_per_s.get(str(batch))
    tera = "gpu" in report.machine
    rate = "" if peak is None else f"{peak.median / 1e3:.0f} TFLOP/s" if tera else f"{peak.median:.0f} GFLOP/s"
    letter = "N" if "queries" in report.config else "B"
    return (
        f"{letter} = {batch}"
        + f"; {report.peak_of}: {rate}" * bool(peak)
        + (f"; a copy: {copy.median / 1e3:.2f} TB/s" if copy else "")
    )


def notes(report: Report, batch: int) -> str:
    """For each provider at this batch size the form that was its fastest, or why it did not run."""
    rows = [row for row in report.rows if row.batch == batch]
    ran = ", ".join(f"{row.provider}: {row.form}" for row in rows if row.form and not row.reason)
    lines = [f"({ran})"] * bool(ran) + [f"{row.provider} did not run: {row.reason}" for row in rows if row.reason]
    for row in rows:
        if row.parts_ms:
            parts = ", ".join(f"{name} {ms.median:.4g}" for name, ms in row.parts_ms.items())
            lines.append(f"{row.provider}, ms: {parts}")
        missing = [name for name, error in (row.gradient_errors or {}).items() if error is None]
        lines += [f"{row.provider} gives no gradient of {' and '.join(missing)}"] * bool(missing)
    return "\n".join(lines)


def legend(report: Report) -> str:
    """What the table's columns mean, and what could not be measured."""
    of_cpu = "peak resident memory of a pass beyond inputs and gradients, in a fresh process; in all: all of it."
    of_gpu = "peak of PyTorch's allocator during a pass beyond inputs and gradients; in all: with them."
    if "caption_length" in report.config:
        return _step_legend(report)
    lines = [
        "x: the provider's / vlmfast's. FLOP/s count the flops that the loss cannot do without. Errors are "
        "relative, against float64 on the same inputs.",
        "extra MiB: " + (of_gpu if "gpu" in report.machine else of_cpu),
    ]
    if report.memory_reason:
        lines.append(f"Memory was not measured: {report.memory_reason}.")
    return "\n".join(lines)


def _step_legend(report: Report) -> str:
    own = ", and parts and rates of it alone" * ("gpu" not in report.machine)
    unmeasured = f"\nMemory was not measured: {report.memory_reason}." * bool(report.memory_reason)
    return (
        f"x: the provider's / vlmfast's. The processor's ms are the process's own, by thread{own}. FLOP/s count the "
        "products of real tokens, forward and twice that. images/s: the image tower's forward.\nextra MiB: peak of a "
        f"step beyond weights and optimizer state; in all: with them.{unmeasured}"
    )


def _check_columns(path: Path) -> bool:
    """Whether the CSV has yet to get its header; raises BenchError where it has another one."""
    lines = path.read_text().splitlines() if path.exists() else []
    if lines and lines[0] != ",".join(CSV_COLUMNS):
        raise BenchError(f"{path} has the columns {lines[0]}; expected {','.join(CSV_COLUMNS)}. Name another file")
    return not lines


def _cells(row: Row, tera: bool = False) -> dict[str, str]:
    """Column -> what it shows of the row; rates in TFLOP/s or GFLOP/s."""

    def number(value: float | None, form: str, per: float = 1.0) -> str:
        return "-" if value is None else format(value / per, form)

    full, unit, per = row.full_ms, "TFLOP/s" if tera else "GFLOP/s", 1e3 if tera else 1.0
    return {
        "provider": row.provider,
        "forward ms": number(row.forward_ms.median if row.forward_ms else None, ".4g"),
        "fwd + bwd ms" if row.forward_ms else "ms": number(full.median if full else None, ".4g"),
        "p20-p80": f"{full.p20:.4g}-{full.p80:.4g}" if full else "-",
        "x time": number(row.full_ratio, ".2f"),
        "processor's ms": number(row.cpu_ms.median if row.cpu_ms else None, ".4g"),
        "x processor": number(row.cpu_ratio, ".2f"),
        "samples/s": number(row.samples_per_s, ".4g"),
        "images/s": number(row.images_per_s, ".4g"),
        f"forward {unit}": number(row.forward_gflops if tera else None, ".0f", per),
        unit: number(row.gflops, ".0f", per),
        "of peak": number(row.peak_share, ".0%"),
        "extra MiB": number(row.extra_bytes, ".1f", MIB),
        "x memory": number(row.memory_ratio, ".1f"),
        "in all MiB": number(row.process_bytes, ".0f", MIB),
        "recall": number(row.recall, ".4f"),
        "value err" if row.recall is not None else "loss err": number(row.loss_error, ".0e"),
        "grad err": number(row.gradient_error, ".0e"),
        "features apart": number(row.features_apart, ".0e"),
    }
