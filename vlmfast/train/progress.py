"""How far a run is: a bar on a terminal, plain lines elsewhere or where rich is not installed."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

LINE_EVERY_S = 5.0  # plain lines are for log files: the first, the last, and one each few seconds between


class Progress(Protocol):
    """What a run tells while it goes on."""

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` steps are taken; the metrics are the newest."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


@contextmanager
def show_progress(
    total: int, done: int = 0, stream: TextIO | None = None, *, silent: bool = False
) -> Iterator[Progress]:
    """A Progress for the length of the block.

    Args:
        total: steps of the whole run.
        done: steps already taken before.
        stream: where to write; default: standard error.
        silent: write nothing: for a rank that is not the first.

    Yields:
        A bar with samples/s and the time that is left if the stream is a terminal and rich is installed, else plain
        lines with the same numbers.
    """
    stream = stream or sys.stderr
    if silent:
        yield _Silence()
        return
    columns = _columns() if stream.isatty() else None
    if columns is None:
        yield _Lines(total, done, stream)
        return
    import rich.console
    import rich.progress

    with rich.progress.Progress(*columns, console=rich.console.Console(file=stream)) as bar:
        yield _Bar(bar, bar.add_task("train", total=total, completed=done, rate="", loss=""))


class _Silence:
    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: Any, task: Any):
        self._bar, self._task = bar, task

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=done, rate=_rate(metrics), loss=_losses(metrics))

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


class _Lines:
    def __init__(self, total: int, done: int, stream: TextIO):
        self._total, self._before, self._stream = total, done, stream
        self._began, self._told = time.monotonic(), 0.0

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if not (done == self._before + 1 or done == self._total or now - self._told >= LINE_EVERY_S):
            return
        self._told = now
        left_s = (now - self._began) / (done - self._before) * (self._total - done)
        left = datetime.timedelta(seconds=round(left_s))
        parts = [f"step {done}/{self._total}", _losses(metrics), _rate(metrics), f"{left} left"]
        self.say("  ".join(part for part in parts if part))

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _columns() -> tuple[Any, ...] | None:
    """The bar's columns, or None without rich."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    text = [TextColumn("{task.fields[" + field + "]}", markup=False) for field in ("loss", "rate")]
    return TextColumn("step"), MofNCompleteColumn(), BarColumn(), *text, TimeRemainingColumn(), TextColumn("left")


def _losses(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("_loss"))


def _rate(metrics: Mapping[str, float]) -> str:
    rates = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s"}
    return "  ".join(f"{metrics[name]:,.0f} {unit}" for name, unit in rates.items() if name in metrics)
