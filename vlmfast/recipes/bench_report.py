"""`vlmfast bench report`: result files as the tables of docs/benchmarks.md, and as plots."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmfast.bench import document, goals

POSITIONAL = True  # files are named without a flag


@dataclass
class Config:
    """Turns result files into the tables of docs/benchmarks.md, and into plots.

    Every table of the document that is marked with a file's name, or with the folder that has the results for a list of
    goals, is made anew; its prose is left alone. The tables of the files that are named are printed.

    For example:
        vlmfast bench report
        vlmfast bench report --check
        vlmfast bench report benchmarks/results/h200 --plots
    """

    files: tuple[Path, ...]
    """Results to print: JSON files, or folders of them."""
    document: Path = Path("docs/benchmarks.md")
    """Whose tables are made anew."""
    results: Path = Path("benchmarks/results")
    """The folder that the document's comments name files in."""
    check: bool = False
    """Write nothing: the exit status is 1 if the document would change."""
    plots: bool = False
    """Draw time and memory against batch size beside each of the files (.png)."""


def run(config: Config) -> int:
    """The exit status: 1 if `check` finds a table that differs from its file, else 0.

    Args:
        config: the flags.
    Raises:
        BenchError: a file is missing, is no result, or lacks a batch size that the document asks for.
    """
    for path in _found(config.files):
        print(f"<!-- results: {os.path.relpath(path, config.results)} -->")
        print(document.tables(path) + "<!-- end of results -->\n")
        if config.plots:
            print("\n".join(f"drawn: {picture}" for picture in document.plots(path)), file=sys.stderr)
    if not config.document.exists() and config.files:
        return 0
    text = config.document.read_text(encoding="utf-8")
    prefix = Path(os.path.relpath(config.results, config.document.parent)).as_posix()
    new = goals.refreshed(document.refreshed(text, config.results, prefix), config.results)
    if config.check:
        print(f"{config.document}: " + ("its tables differ from their files" if new != text else "as its files say"))
        return int(new != text)
    if new != text:
        config.document.write_text(new, encoding="utf-8")
        print(f"written: {config.document}", file=sys.stderr)
    return 0


def _found(paths: tuple[Path, ...]) -> Iterator[Path]:
    """The files, and the results in the folders in the order of their names."""
    for path in paths:
        yield from filter(document.is_result, sorted(path.glob("**/*.json"))) if path.is_dir() else [path]
