"""What `vlmfast demo` leaves: a summary for programs, a table for the terminal, a page with pictures for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from torch import Tensor

from vlmfast.bench.report import MIB, Report, Row, headline
from vlmfast.errors import missing_extra
from vlmfast.recipes.page import OURS, REFERENCE, RIVAL, figure, page, picture, svg, table

COMPARED = 100  # steps over which the two losses must agree
AGREEMENT = 1e-4  # relative
ACCURACY_GOAL = 0.95
POINTS_GOAL = 1.0  # percentage points between the two final accuracies
STRIP = 45  # test scans in the strip of predictions, and at most as many misses


@dataclass(frozen=True)
class Trained:
    """One run: its loss at each step, its scores on test scans, its seconds."""

    losses: list[float]
    scores: dict[str, float]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Zero-shot top-1 accuracy on the test scans."""
        return self.scores["zero_shot/acc1"]


@dataclass(frozen=True)
class Query:
    """A caption, the digit that it asks for, and the scans that the model finds, nearest first."""

    text: str
    digit: int
    found: list[int]


@dataclass(frozen=True)
class Results:
    """All that the demo measured."""

    fused: Trained
    reference: Trained
    backend: str  # that ran the fused losses
    extension_reason: str  # why the extension is missing; empty if it is there
    images: Tensor  # [N, 3, 8, 8] uint8, the test scans
    labels: Tensor  # [N] int64
    predicted: Tensor  # [N] int64, zero-shot by the fused run's model
    queries: list[Query]
    bench: Report
    seconds: float

    @property
    def differences(self) -> list[float]:
        """|fused - reference| / reference of the losses, at each step."""
        return [abs(a - b) / b for a, b in zip(self.fused.losses, self.reference.losses, strict=True)]

    @property
    def largest_difference(self) -> float:
        """The largest of `differences` over the first 100 steps."""
        return max(self.differences[:COMPARED])

    @property
    def agree(self) -> bool:
        """Whether the two losses agree over the first 100 steps."""
        return self.largest_difference <= AGREEMENT


def goals(results: Results) -> list[tuple[str, str, bool]]:
    """What the demo promises: (what, what was measured, whether it is reached).

    Args:
        results: what was measured.
    """
    points = 100 * abs(results.fused.accuracy - results.reference.accuracy)
    steps = min(COMPARED, len(results.fused.losses))
    return [
        (
            f"zero-shot top-1 on held-out digits, at least {ACCURACY_GOAL:.0%}",
            f"{results.fused.accuracy:.1%}",
            results.fused.accuracy >= ACCURACY_GOAL,
        ),
        (
            f"fused and reference loss over the first {steps} steps, within {AGREEMENT:g} relative",
            f"{results.largest_difference:.1e}",
            results.agree,
        ),
        (f"their final accuracies, within {POINTS_GOAL:g} point", f"{points:.1f} points", points <= POINTS_GOAL),
    ]


def summary(results: Results) -> dict[str, Any]:
    """The numbers, ready for JSON.

    Args:
        results: what was measured.
    """
    runs = {"fused": results.fused, "reference": results.reference}
    return {
        "schema": "vlmfast-demo-1",
        "goals": [{"goal": goal, "measured": value, "reached": reached} for goal, value, reached in goals(results)],
        "backend": results.backend,
        "extension_missing": results.extension_reason or None,
        "largest_relative_difference": results.largest_difference,
        "runs": {
            name: {
                "steps": len(run.losses),
                "first_loss_nats": run.losses[0],
                "last_loss_nats": run.losses[-1],
                "training_s": run.seconds,
                "test": run.scores,
            }
            for name, run in runs.items()
        },
        "bench": asdict(results.bench),
        "total_s": results.seconds,
    }


def show(results: Results) -> None:
    """Prints the numbers as tables.

    Args:
        results: what was measured.
    Raises:
        MissingExtraError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise missing_extra("rich", "cli") from None
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    for title, header, rows in (_goal_table(results), _score_table(results), _bench_table(results)):
        grid = Table(title=title, title_justify="left", title_style="bold")
        for place, name in enumerate(header):
            grid.add_column(name, justify="right" if place else "left")
        for row in rows:
            grid.add_row(*row, style="bold" if row[0] == "vlmfast" else None)
        console.print(grid)
    if results.extension_reason:
        console.print(_missing_extension(results), markup=False)


TableOf = tuple[str, list[str], list[list[str]]]  # title, header, rows


def _goal_table(results: Results) -> TableOf:
    rows = [[goal, value, "reached" if reached else "MISSED"] for goal, value, reached in goals(results)]
    return "What the demo promises", ["goal", "measured", ""], rows


def _score_table(results: Results) -> TableOf:
    a, b = results.fused, results.reference
    rows = [[_spoken(name), _number(name, a.scores[name]), _number(name, b.scores[name])] for name in a.scores]
    rows.append(["last training loss, nats", f"{a.losses[-1]:.4f}", f"{b.losses[-1]:.4f}"])
    rows.append(["training, s", f"{a.seconds:.1f}", f"{b.seconds:.1f}"])
    title = f"After {len(a.losses)} steps, on {len(results.labels)} held-out scans with held-out templates"
    return title, ["", f"fused ({results.backend})", "reference"], rows


def _bench_table(results: Results) -> TableOf:
    header = ["provider", "B", "forward ms", "fwd + bwd ms", "x vlmfast", "extra MiB", "x vlmfast"]
    rows = [_bench_cells(row) for row in results.bench.rows]
    return headline(results.bench), header, rows


def _bench_cells(row: Row) -> list[str]:
    if row.reason or row.forward_ms is None or row.full_ms is None:
        return [row.provider, str(row.batch), row.reason or "-", "-", "-", "-", "-"]
    return [
        row.provider,
        str(row.batch),
        f"{row.forward_ms.median:.4g}",
        f"{row.full_ms.median:.4g}",
        "-" if row.full_ratio is None else f"{row.full_ratio:.2f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / MIB:.1f}",
        "-" if row.memory_ratio is None else f"{row.memory_ratio:.1f}",
    ]


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _missing_extension(results: Results) -> str:
    return f"The extension is missing, so the fused loss ran as the reference: {results.extension_reason}"


def _spoken(name: str) -> str:
    """zero_shot/acc1 as people say it."""
    kind, _, metric = name.partition("/")
    metric = {"acc1": "top-1", "acc5": "top-5"}.get(metric, metric.replace("_", " "))
    return f"{kind.replace('_', '-')} {metric}"


def _number(name: str, value: float) -> str:
    return f"{value:.2f}" if name.endswith("rank") else f"{value:.1%}"


def html(results: Results) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        results: what was measured.
    Raises:
        MissingExtraError: matplotlib or Pillow is missing.
    """
    hits = results.predicted == results.labels
    misses = (~hits).nonzero()[:, 0].tolist()
    strip = _strip(results, list(range(min(STRIP, len(hits)))))
    if misses:
        title = f"All {len(misses)} misses" if len(misses) <= STRIP else f"The first {STRIP} of {len(misses)} misses"
        strip += f"<h3>{title}</h3>" + _strip(results, misses[:STRIP])
    named = f"Zero-shot: {int(hits.sum())} of {len(hits)} scans named right"
    tables = "".join(table(*part) for part in (_score_table(results), _bench_table(results)))
    sections = [
        ("The same run twice", LOSS_TEXT, _loss_figure(results)),
        (named, STRIP_TEXT, strip),
        ("From words to images", QUERY_TEXT, "".join(_found(results, query) for query in results.queries)),
        ("What the loss costs", BENCH_TEXT, _bench_figure(results.bench)),
        ("The numbers", "", tables),
    ]
    cards = [(value, goal, reached) for goal, value, reached in goals(results)]
    cards += [(number, what, True) for number, what in _gains(results)]
    facts = results.bench.machine
    versions = ", ".join(f"{name} {version}" for name, version in results.bench.versions.items() if version)
    footer = (
        f"{facts['cpu']}, {facts['cores']} cores · {versions} · {results.bench.date} · {results.seconds:.0f} s in all"
    )
    return page(
        "CLIP learns to read handwriting",
        INTRODUCTION,
        cards,
        sections,
        footer,
        note=_missing_extension(results) if results.extension_reason else "",
    )


def _gains(results: Results) -> list[tuple[str, str]]:
    """PyTorch's two-matrix loss over ours, at the largest batch: time and extra memory."""
    batch = results.bench.batches()[-1]
    rival = next((row for row in results.bench.rows if (row.provider, row.batch) == ("eager-two", batch)), None)
    ratios = []
    if rival and rival.full_ratio:
        ratios.append(
            (f"{rival.full_ratio:.1f}×", f"open_clip's way (two logit matrices) in time over ours, B = {batch}")
        )
    if rival and rival.memory_ratio:
        ratios.append((f"{rival.memory_ratio:.0f}×", f"its extra memory over ours, B = {batch}"))
    return ratios


def _loss_figure(results: Results) -> str:
    """Both loss curves, one over the other, and how far they are apart."""
    drawing = figure(figsize=(9.6, 4.6), layout="constrained")
    top, bottom = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    steps = range(1, len(results.fused.losses) + 1)
    top.plot(steps, results.reference.losses, color=REFERENCE, linewidth=5, alpha=0.55, label="reference (PyTorch)")
    top.plot(steps, results.fused.losses, color=OURS, linewidth=1.3, label=f"fused ({results.backend})")
    top.set(ylabel="training loss, nats")
    top.legend(frameon=False)
    bottom.semilogy(steps, [max(x, 1e-9) for x in results.differences], color="#52606d", linewidth=1)
    bottom.axhline(AGREEMENT, color="#c0392b", linewidth=1, linestyle="--")
    bottom.axvspan(1, min(COMPARED, len(steps)), color=OURS, alpha=0.08)
    bottom.set(ylabel="relative\ndifference", xlabel="step", xlim=(1, max(len(steps), 2)))
    return svg(drawing, "Training loss of the fused and of the reference run, and their relative difference")


def _bench_figure(bench: Report) -> str:
    """Time and memory of each provider, a column a batch size."""
    batches = bench.batches()
    drawing = figure(figsize=(9.6, 5.2), layout="constrained")
    panels = drawing.subplots(2, len(batches), squeeze=False)
    for column, batch in enumerate(batches):
        rows = [row for row in bench.rows if row.batch == batch][::-1]
        times = [row.full_ms.median if row.full_ms else None for row in rows]
        sizes = [None if row.extra_bytes is None else row.extra_bytes / MIB for row in rows]
        for axes, values, unit in ((panels[0][column], times, "ms"), (panels[1][column], sizes, "MiB")):
            names = [row.provider for row in rows]
            colours = [OURS if name == "vlmfast" else RIVAL for name in names]
            bars = axes.barh(names, [value or 0 for value in values], color=colours, height=0.68)
            labels = ["not measured" if value is None else f"{_three_digits(value)} {unit}" for value in values]
            axes.bar_label(bars, labels, padding=4, fontsize=9)
            axes.margins(x=0.24)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            what = "forward + backward" if unit == "ms" else "extra memory"
            axes.set_title(f"B = {batch}: {what}", fontsize=10, loc="left")
    return svg(drawing, "Time and memory of the loss by provider")


def _strip(results: Results, rows: list[int]) -> str:
    """Scans with what the model calls them; a miss shows the truth too."""
    cells = []
    for row in rows:
        said, truth = int(results.predicted[row]), int(results.labels[row])
        kind, caption = ("hit", f"{said}") if said == truth else ("miss", f"{said} <i>is {truth}</i>")
        cells.append(_figure(results, row, kind, f"<figcaption>{caption}</figcaption>"))
    return f'<div class="strip">{"".join(cells)}</div>'


def _found(results: Results, query: Query) -> str:
    """A caption and the scans that the model finds for it, hits and misses marked."""
    kinds = ["hit" if int(results.labels[row]) == query.digit else "miss" for row in query.found]
    cells = "".join(_figure(results, row, kind) for row, kind in zip(query.found, kinds, strict=True))
    return f'<div class="query"><q>{escape(query.text)}</q><div class="strip">{cells}</div></div>'


def _figure(results: Results, row: int, kind: str, caption: str = "") -> str:
    """A test scan as its own pixels, which the page draws large."""
    what = f"a handwritten {int(results.labels[row])}"
    return f"<figure class={kind}>{picture(results.images[row], what)}{caption}</figure>"


INTRODUCTION = """A small CLIP, trained from nothing on scikit-learn's scans of handwritten digits and captions about
them, through vlmfast's fused contrastive loss: nothing of size batch × batch is ever held."""
LOSS_TEXT = """One seed, the same batches; only the implementation of the loss differs. The thick line is the reference,
the thin one the fused loss. Below: how far they are apart. In the shaded steps they must agree; after that rounding
differences grow, as between any two runs of one training, and what counts is where both end."""
STRIP_TEXT = """Test scans that training never saw, named by the nearest of ten class vectors. Each vector is the mean
of captions whose templates training never saw either. Red: what the model said, and what it is."""
QUERY_TEXT = """The nearest test scans to a caption, nearest first. Green: the digit that was asked for."""
BENCH_TEXT = """Forward and backward of the CLIP loss on random pairs: medians of interleaved rounds. Extra memory is
the peak of a pass beyond inputs and gradients, in a process of its own."""
