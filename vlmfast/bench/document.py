"""Results as Markdown: the tables of docs/benchmarks.md are made of the files in benchmarks/results and nothing else.

A table stands between two comments: `<!-- results: <file in that folder> -->`, or `<file>, B = 64, 256` for some of its
batch sizes, and `<!-- end of results -->`. All else in the document is prose, and is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlmfast.bench.loss import LossBench
from vlmfast.bench.model import ModelBench
from vlmfast.bench.providers import TITLES, BenchError
from vlmfast.bench.report import MIB, Report, Row, device_name, set_ratios, write_plot
from vlmfast.bench.timing import Spread
from vlmfast.bench.topk import TopkBench

BLOCK = re.compile(r"<!-- results: ([^\s,]+)(?:, B = ([\d, ]+?))? -->\n(.*?)<!-- end of results -->", re.S)
RENAMED = {"microkernel_gflops": "peak_gflops", "microkernel_share": "peak_share"}  # of the first schema
SPREADS = ("forward_ms", "backward_ms", "full_ms", "cpu_ms")
ABSENT = "–"


def is_result(path: Path) -> bool:
    """Whether a JSON file holds what `vlmfast bench` measured; other results may lie beside it."""
    read = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(read, dict) and ("reports" in read or {"kernel", "rows"} <= read.keys())


def load(path: Path) -> list[Report]:
    """The reports in a result file: one, or those of a whole part of benchmarks/gpu_check.sh.

    Reports of one kernel, shape and dtype come as one.

    Raises:
        BenchError: the file is missing, or is no result of `vlmfast bench`.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return _merged([_report(each) for each in read.get("reports", [read])])
    except FileNotFoundError:
        raise BenchError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is no result of vlmfast bench: {type(error).__name__}: {error}") from error


def tables(path: Path, batches: Sequence[int] | None = None, link: str | None = None) -> str:
    """The Markdown of a result file: its command, a table a kernel and dtype, and where it comes from.

    Args:
        path: of the JSON.
        batches: only these; None for all.
        link: how a document refers to the file; by default its name alone.
    Raises:
        BenchError: the file is missing or no result, or has nothing at one of the batch sizes.
    """
    reports = load(path)
    known = {row.batch for report in reports for row in report.rows}
    if wrong := [batch for batch in batches or () if batch not in known]:
        raise BenchError(f"{path} has no batch size {wrong[0]}; it has {', '.join(map(str, sorted(known)))}")
    groups: dict[tuple, list[Report]] = {}
    for report in reports:
        groups.setdefault((_heading(report), str(report.config.get("device"))), []).append(report)
    parts = [
        *(_table(group, batches) for group in groups.values() if "caption_length" not in group[0].config),
        *(_step_table(report) for report in reports if "caption_length" in report.config),
    ]
    first = reports[0]
    sha = f", commit {first.commit['sha'][:7]}" if first.commit else ""
    changed = " with changes" if first.commit and first.commit["dirty"] else ""
    version = first.machine.get("gpu", {}).get("driver")
    driver = f", driver {version}" if version else ""
    name = f"[{path.name}]({link})" if link else path.name
    source = (
        f"{name}: {device_name(first)}{driver}, PyTorch {first.versions['torch']}, {first.date[:10]}{sha}{changed}."
    )
    return "\n\n".join([_command(path, reports), *filter(None, parts), source]) + "\n"


def refreshed(text: str, results: Path, prefix: str) -> str:
    """The document with every marked table made anew from its file.

    Args:
        text: the document.
        results: the folder that the comments' names are relative to.
        prefix: the same folder as the document's links name it.
    Raises:
        BenchError: a comment names a file or batch size that is not there.
    """

    def block(match: re.Match) -> str:
        name, some, _ = match.groups()
        batches = [int(batch) for batch in some.split(",")] if some else None
        start = match.group(0).splitlines()[0]
        return f"{start}\n{tables(results / name, batches, f'{prefix}/{name}')}<!-- end of results -->"

    return BLOCK.sub(block, text)


def plots(path: Path) -> list[Path]:
    """The pictures drawn beside a result file, one for each of its reports with more than one batch size.

    Raises:
        BenchError: the file is missing or no result.
    """
    drawn = [report for report in load(path) if len(report.batches()) > 1]
    pictures = []
    for report in drawn:
        words = (report.config.get("loss"), report.config["dtype"], report.config["dim"])
        name = path.stem if len(drawn) == 1 else "-".join([path.stem, *(str(word) for word in words if word)])
        pictures.append(path.with_name(name + ".png"))
        write_plot(report, pictures[-1])
    return pictures


def _report(read: dict[str, Any]) -> Report:
    known = {field.name for field in fields(Report)}
    values = {RENAMED.get(name, name): value for name, value in read.items()}
    rows = [_row(each) for each in values.pop("rows")]
    for name in ("peak_gflops", "copy_gb_per_s"):
        values[name] = {batch: Spread(**each) for batch, each in values.get(name, {}).items()}
    report = Report(rows=rows, **{name: value for name, value in values.items() if name in known})
    report.kernel = TITLES.get(report.config.get("loss", ""), report.kernel)
    return report


def _row(read: dict[str, Any]) -> Row:
    values = {RENAMED.get(name, name): value for name, value in read.items()}
    for name in SPREADS:
        values[name] = Spread(**values[name]) if values.get(name) else None
    if values.get("parts_ms"):
        values["parts_ms"] = {name: Spread(**each) for name, each in values["parts_ms"].items()}
    return Row(**values)


def _merged(reports: Sequence[Report]) -> list[Report]:
    """One report for those that differ in batch size and providers only, their rows in order of size."""
    found: dict[str, Report] = {}
    for report in reports:
        same = {name: report.config.get(name) for name in ("device", "threads", "dim", "dtype", "k", "queries")}
        more = [report.config.get(name) for name in ("precision", "max_workspace", "caption_length", "batch")]
        key = json.dumps([report.kernel, same, more if "caption_length" in report.config else more[:2]])
        if key in found:
            into = found[key]
            into.rows = sorted([*into.rows, *report.rows], key=lambda row: row.batch)
            into.peak_gflops |= report.peak_gflops
            into.copy_gb_per_s |= report.copy_gb_per_s
        else:
            found[key] = report
    for report in found.values():
        set_ratios(report.rows)
    return list(found.values())


def _command(path: Path, reports: Sequence[Report]) -> str:
    """The command that measured the file."""
    read = json.loads(path.read_text(encoding="utf-8"))
    if "command" in read:
        return f"`{read['command']}`"
    config = reports[0].config
    command, bench = _bench(config)
    unsaid = {field.name: field.default for field in fields(bench)}
    always = ("loss", "batch", "dim", "threads", "queries", "items", "k", "model", "caption_length")
    words = [
        f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f"--{name.replace('_', '-')} {value}"
        for name, value in config.items()
        if name in unsaid
        and (name in always or value != unsaid.get(name))
        and not (name == "threads" and config["device"] == "cuda")
    ]
    return f"`vlmfast bench {command} {' '.join(words)}`"


def _bench(config: dict[str, Any]) -> tuple[str, type]:
    """The command, and its config."""
    if "caption_length" in config:
        return "model", ModelBench
    return ("topk", TopkBench) if "queries" in config else ("loss", LossBench)


def _heading(report: Report) -> str:
    """The kernel, and what is not usual about the call."""
    config = report.config
    usual = "bfloat16" if config["device"] == "cuda" else "float32"
    said = [report.kernel, *[config["dtype"]] * (config["dtype"] != usual)]
    if "queries" in config:
        said.append(f"k = {config['k']}, {config['queries']} queries")
    said += [str(config[name]) for name in ("precision",) if config.get(name)]
    said += [f"{config['threads']} threads"] * (config["device"] == "cpu" and config["threads"] > 1)
    return ", ".join(said)


def _table(reports: Sequence[Report], batches: Sequence[int] | None) -> str:
    """One table: a line for each width and batch size, a column a provider, then what ours does and everyone holds."""
    lines = [(report, batch) for report in reports for batch in report.batches() if not batches or batch in batches]
    if not lines:
        return ""
    rows = {(id(report), row.batch, row.provider): row for report in reports for row in report.rows}
    ran = [row for report, batch in lines for row in report.rows if row.batch == batch and row.full_ms]
    everyone = [row.provider for report, batch in lines for row in report.rows if row.batch == batch]
    names = [name for name in dict.fromkeys(everyone) if any(row.provider == name for row in ran)]
    if not names:
        return _reasons(lines)
    tera = "gpu" in reports[0].machine
    errors = "values, recall" if "queries" in reports[0].config else "loss, gradients"
    header = [_heading(reports[0]), *names, *_rates(None, None, tera, reports[0].peak_of)]
    header += [
        f"extra MiB: {', '.join(names)}",
        f"error of vlmfast: {errors}",
    ]
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for report, batch in lines:
        found = [rows.get((id(report), batch, name)) for name in names]
        ours = rows.get((id(report), batch, "vlmfast"))
        peak = report.peak_gflops.get(str(batch))
        cells = [_point(report, batch)]
        cells += [_time(row) for row in found]
        cells += _rates(ours, peak, tera, report.peak_of).values()
        cells.append(
            ", ".join(
                _number(row.extra_bytes / MIB) if row and row.extra_bytes is not None else ABSENT for row in found
            )
        )
        cells.append(_errors(ours))
        text.append("| " + " | ".join(cells) + " |")
    notes = _reasons(lines)
    return "\n".join(text) + ("\n\n" + notes if notes else "")


def _step_table(report: Report) -> str:
    """One table: a line a provider, then who did not run."""
    config, rows = report.config, report.rows
    said = [Path(config["model"]).stem, config["precision"], f"B = {config['batch']}"]
    said.append(f"captions of {config['mean_tokens']:.1f} tokens")
    said += [f"{config['threads']} threads"] * (config["device"] == "cpu" and config["threads"] > 1)
    own = "gpu" not in report.machine
    header = [", ".join(said), "ms", *["processor's ms"] * own, "samples/s", "images/s", f"of {report.peak_of}"]
    header += ["extra MiB", "in all MiB", "ms of its parts"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        if not row.parts_ms:
            continue
        cells = [row.provider, _time(row)]
        cells += [_multiple(row, row.cpu_ms, row.cpu_ratio)] * own
        cells += [ABSENT if rate is None else _number(rate, 3) for rate in (row.samples_per_s, row.images_per_s)]
        cells.append(_share(row.peak_share))
        cells += [ABSENT if n is None else _number(n / MIB, 3) for n in (row.extra_bytes, row.process_bytes)]
        cells.append(", ".join(f"{name} {_number(ms.median, 3)}" for name, ms in row.parts_ms.items()))
        lines.append("| " + " | ".join(cells) + " |")
    absent = [f"- {row.provider} did not run: {row.reason}" for row in rows if row.reason]
    return "\n".join(lines) + "\n" * bool(absent) + "".join(f"\n{line}" for line in absent)


def _point(report: Report, batch: int) -> str:
    return f"D = {report.config['dim']}, {'N' if 'queries' in report.config else 'B'} = {batch}"


def _time(row: Row | None) -> str:
    """Milliseconds, and for a rival how many times ours that is."""
    return ABSENT if row is None else _multiple(row, row.full_ms, row.full_ratio)


def _multiple(row: Row, ms: Spread | None, ratio: float | None) -> str:
    if ms is None:
        return ABSENT
    return _number(ms.median, 3) + (f" ({ratio:.2f}×)" if ratio and row.provider != "vlmfast" else "")


def _share(share: float | None) -> str:
    return f"{share:.0%}".replace("%", " %") if share else ABSENT


def _rates(ours: Row | None, peak: Spread | None, tera: bool, of: str) -> dict[str, str]:
    """Column -> what ours does a second, and its share of the machine's own."""
    share = _share(ours.peak_share if ours else None)
    if not tera:
        return {f"of {of}": share}

    def rate(gflops: float | None) -> str:
        return f"{gflops / 1e3:.0f}" if gflops else ABSENT

    return {
        "TFLOP/s forward": rate(ours.forward_gflops if ours else None),
        "TFLOP/s": rate(ours.gflops if ours else None),
        f"of {of}": f"{share} of {rate(peak.median)}" if peak else share,
    }


def _errors(ours: Row | None) -> str:
    if ours is None or ours.loss_error is None:
        return ABSENT
    second = f"{ours.recall:.4f}" if ours.recall is not None else _exponent(ours.gradient_error)
    return f"{_exponent(ours.loss_error)}, {second}"


def _exponent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0e}"


def _reasons(lines: Sequence[tuple[Report, int]]) -> str:
    """Who did not run, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for report, batch in lines:
        for row in report.rows:
            if row.batch == batch and row.reason:
                found.setdefault((row.provider, row.reason), []).append(_point(report, batch))
    return "\n".join(f"- {name} did not run at {'; '.join(at)}: {reason}" for (name, reason), at in found.items())


def _number(value: float, digits: int = 2) -> str:
    """Three digits, or two, and never an exponent."""
    places = max(0, digits - 1 - (len(str(int(value))) - 1 if value >= 1 else 0))
    return f"{value:.{places}f}"
