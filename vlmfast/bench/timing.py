"""Times to compare on a shared machine: every provider once a round, in rotated order, medians and spreads."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of some samples, in the samples' unit."""

    median: float
    p20: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """The median and the 20th and 80th percentile of `samples`, interpolated linearly between neighbours.

    Args:
        samples: at least one number.
    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("spread: samples must hold at least one number; got none")
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    return Spread(quantile(0.5), quantile(0.2), quantile(0.8))


def interleave(
    calls: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    seconds: float = 0.0,
    most: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[T]]:
    """What each call returned in each round; every round makes every call once and starts one further along.

    A slow minute of the machine so falls on all calls alike, and none always runs in the cache that another left.

    Args:
        calls: name -> a call that returns its own measurement.
        rounds: the fewest rounds, at least 1.
        seconds: rounds go on until this time has passed, so that short calls get more samples.
        most: the most rounds.
        clock: seconds that only grow.
    """
    names = list(calls)
    results: dict[str, list[T]] = {name: [] for name in names}
    start, done = clock(), 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on whichever call is running
    try:
        while done < rounds or (done < most and clock() - start < seconds):
            first = done % len(names) if names else 0
            for name in names[first:] + names[:first]:
                results[name].append(calls[name]())
            done += 1
    finally:
        if collecting:
            gc.enable()
    return results


def timed_pass(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[float, float]:
    """(forward, forward + backward) seconds of a pass as a training step makes it: with graph, into fresh gradients.

    A loss that computes its gradients in its forward (sigmoid, linear_cross_entropy) shows that in the first number.

    Args:
        loss: returns the [] loss of the leaves.
        leaves: their gradients are dropped first.
    """
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    value = loss()
    middle = time.perf_counter()
    value.backward()
    end = time.perf_counter()
    return middle - start, end - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with torch's intra-op threads set to `count`, and sets them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
