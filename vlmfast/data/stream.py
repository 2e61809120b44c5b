"""Shards as one stream of records: the order of a rank, and a position in it that can be saved and found again.

Each epoch the shards are permuted by (seed, epoch) and dealt out, shards[rank::world_size] to each rank, which reads
them one after the other through a shuffle buffer. Nothing here knows what a record is: the data set decodes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlmfast.data.order import permutation, random_bits, random_int
from vlmfast.errors import DataError

SHARD_STRIDE = 2**32  # index of a record = source * SOURCE_STRIDE + shard * SHARD_STRIDE + number within the shard
SOURCE_STRIDE = 2**56


class Shards(Protocol):
    """What a stream needs of a data set that can only be read shard by shard, each from its beginning.

    `resampled`: an epoch's shards are drawn, with replacement, instead of each coming once.
    """

    shards: int  # how many there are
    shuffle_buffer: int  # records held for shuffling; below 2 the shards alone are shuffled
    resampled: bool

    @property
    def skipped(self) -> Mapping[str, int]: ...

    def records(self, shard: int) -> Iterator[Any]:
        """The records of one shard in their order, not decoded, the same each time."""
        ...


@dataclass(frozen=True)
class Record:
    """One record where it comes up in the stream."""

    source: int  # number of its data set
    epoch: int  # of that data set
    index: int
    data: Any


def nothing_readable(dataset: Any) -> DataError:
    """The error to raise when all of `dataset` was met and nothing of it can be used."""
    return DataError(f"batches: the data set holds no readable sample; skipped: {dict(dataset.skipped)}")


def patience(world_size: int) -> int:
    """Epochs without anything readable before a rank gives up: a rank's shards of the next may be better ones."""
    return 1 if world_size == 1 else 20


class Stream:
    """The records of one rank, epoch after epoch; several data sets take turns by their weights.

    After n records every data set has given n times its share of the weights, to less than one record.

    Args:
        sources: data sets in shards.
        weights: of each data set's records, > 0.
        seed: any integer.
        shuffle: False reads shards and records in their own order.
        rank: 0 .. world_size - 1.
        world_size: how many ranks share the shards.
        epochs: how many passes over the data; None is without end.

    Raises:
        DataError: fewer shards than ranks.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ) -> None:
        for source in sources:
            if source.shards < world_size and not source.resampled:
                raise DataError(
                    f"batches: {world_size} ranks need at least {world_size} shards, and the data set has "
                    f"{source.shards}; split it into more shards, or use fewer ranks"
                )
        self.shares = [weight / sum(weights) for weight in weights]
        self._taken = [0] * len(sources)
        self._readers = [_Reader(source, seed, shuffle, rank, world_size, epochs) for source in sources]
        self._records = [iter(reader) for reader in self._readers]

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        number = 1 + sum(self._taken)
        behind = [share * number - taken for share, taken in zip(self.shares, self._taken, strict=True)]
        source = behind.index(max(behind))
        index, data = next(self._records[source])
        self._taken[source] += 1
        return Record(source, self._readers[source].epoch, source * SOURCE_STRIDE + index, data)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON holds it: numbers of shards and records, not what is in them."""
        return {"taken": list(self._taken), "sources": [reader.state() for reader in self._readers]}

    def load(self, state: dict[str, Any]) -> None:
        """Puts a stream that has given nothing yet to where `state` was taken.

        Only the shards are opened whose records were in the shuffle buffer, and the one that was being read.

        Raises:
            DataError: a record of the buffer is no longer there.
        """
        self._taken = list(state["taken"])
        for reader, place in zip(self._readers, state["sources"], strict=True):
            reader.load(place)


class _Reader:
    """One rank's records of one data set."""

    def __init__(
        self, dataset: Shards, seed: int, shuffle: bool, rank: int, world_size: int, epochs: int | None
    ) -> None:
        self._dataset, self._seed, self._shuffle, self._epochs = dataset, seed, shuffle, epochs
        self._rank, self._world_size = rank, world_size
        self.epoch = 0
        self._came = 0  # records of this epoch so far, those in the buffer included
        self._place, self._number = 0, 0  # of the record that comes next: its shard's place in the order, its number
        self._buffer: list[tuple[int, Any]] = []  # (index, record); at the end of an epoch the last leaves first

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        size = self._dataset.shuffle_buffer if self._shuffle else 0
        barren = 0
        while self._epochs is None or self.epoch < self._epochs:
            order = self._order()
            leaving = self._place == len(order)  # found so in a state: the buffer has its order already
            for item in self._coming(order):
                if size > 1 and len(self._buffer) < size:
                    self._buffer.append(item)
                    continue
                if size > 1:
                    place = random_int(self._seed, self.epoch, self._came - 1) % size
                    self._buffer[place], item = item, self._buffer[place]
                yield item
            if not leaving:
                last = permutation(len(self._buffer), self._seed, self.epoch, size)[::-1]
                self._buffer = [self._buffer[place] for place in last]
            while self._buffer:
                yield self._buffer.pop()
            barren = 0 if self._came else barren + 1
            if barren >= patience(self._world_size):
                raise nothing_readable(self._dataset)
            self.epoch, self._came, self._place, self._number = self.epoch + 1, 0, 0, 0

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "came": self._came,
            "place": self._place,
            "number": self._number,
            "buffer": [index for index, _ in self._buffer],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self._came = state["epoch"], state["came"]
        self._place, self._number = state["place"], state["number"]
        held: dict[int, Any] = dict.fromkeys(state["buffer"])
        for shard, group in itertools.groupby(sorted(held), lambda index: index // SHARD_STRIDE):
            wanted = {index - shard * SHARD_STRIDE for index in group}
            for number, record in enumerate(itertools.islice(self._dataset.records(shard), max(wanted) + 1)):
                if number in wanted:
                    wanted.remove(number)
                    held[shard * SHARD_STRIDE + number] = record
            if wanted:
                raise DataError(
                    f"batches: the state needs record {min(wanted)} of shard {shard}, which is not there; the data "
                    "have changed since it was saved"
                )
        self._buffer = [(index, held[index]) for index in state["buffer"]]

    def _order(self) -> list[int]:
        """The shards of this epoch that this rank reads."""
        n = self._dataset.shards
        if self._dataset.resampled and self._shuffle:
            drawn = np.arange(-(-n // self._world_size))
            return (random_bits(self._seed, self.epoch, self._rank, drawn) % np.uint64(n)).tolist()
        shards = permutation(n, self._seed, self.epoch) if self._shuffle else np.arange(n)
        return shards[self._rank :: self._world_size].tolist()

    def _coming(self, order: list[int]) -> Iterator[tuple[int, Any]]:
        """(index, record) of the epoch's shards, from the place on."""
        while self._place < len(order):
            shard = order[self._place]
            for record in itertools.islice(self._dataset.records(shard), self._number, None):
                self._number += 1
                self._came += 1
                yield shard * SHARD_STRIDE + self._number - 1, record
            self._place, self._number = self._place + 1, 0
