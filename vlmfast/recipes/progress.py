"""How far a command is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from vlmfast.train.progress import LINE_EVERY_S

Item = TypeVar("Item", bound=Sized)


def counted(items: Iterable[Item], what: str, total: int | None = None, size: Callable[[Item], int] = len) -> Iterator:
    """The items, one after the other, while standard error tells how many things they held.

    A terminal shows one line that changes; a log file gets a line each few seconds, and one at the end.

    Args:
        items: batches, of which each holds several things.
        what: the things' name.
        total: how many there are, if that is known.
        size: how many an item holds.
    """
    out, terminal = sys.stderr, sys.stderr.isatty()
    of = "" if total is None else f"/{total:,}"
    began = told = time.monotonic()
    done, shown = 0, -1
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - told >= (0.1 if terminal else LINE_EVERY_S):
            print(_line(what, done, of, now - began), end="\r" if terminal else "\n", file=out, flush=True)
            told, shown = now, done
    if terminal or done > shown:
        print(_line(what, done, of, time.monotonic() - began), file=out, flush=True)


def _line(what: str, done: int, of: str, seconds: float) -> str:
    return f"{what} {done:,}{of}  {done / max(seconds, 1e-9):,.0f}/s"
