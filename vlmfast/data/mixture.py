"""Several data sets in shards, read together by weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any


class Mixture:
    """Data sets that `batches` reads in turns, each with its own epochs, each as often as its weight says.

    Args:
        sources: data sets that can be read as streams, such as WebdatasetPairs.
        weights: how many of the records come from each, in proportion; default: alike.

    Raises:
        ValueError: no source, a weight that is not positive, or not one for each source.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if not self.sources or len(self.weights) != len(self.sources) or min(self.weights) <= 0:
            raise ValueError(f"Mixture: needs a weight > 0 for each of {len(self.sources)} sources; got {self.weights}")

    def __iter__(self) -> Iterator[Any]:
        """The readable samples of one pass over each source, the sources taking turns while they last."""
        for turn in itertools.zip_longest(*self.sources):
            yield from (sample for sample in turn if sample is not None)

    def texts(self) -> Iterator[str]:
        """The captions of one pass over each source, the sources taking turns while they last."""
        for turn in itertools.zip_longest(*(source.texts() for source in self.sources)):
            yield from (text for text in turn if text is not None)

    @property
    def num_samples(self) -> int | None:
        """Samples of all sources together, if every source knows how many it has."""
        counts = [source.num_samples for source in self.sources]
        return None if None in counts else sum(counts)

    @property
    def skipped(self) -> Counter[str]:
        """How many unreadable things were met so far, by reason."""
        return sum((source.skipped for source in self.sources), Counter())

    def describe_skipped(self) -> str:
        """A line for each source that tells what was skipped in it, with examples; empty if nothing was."""
        return "\n".join(line for source in self.sources if (line := source.describe_skipped()))
