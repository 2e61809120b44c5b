"""Samples, batches, and the order in which a data set becomes batches.

The batch at step t is a pure function of (data set, seed, t): a run that resumes at step t, or reads with another
number of workers, sees the same batches. All randomness is counter-based (order.py): no generator has a state to save.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.mixture import Mixture
from vlmfast.data.order import permutation, random_bits
from vlmfast.data.skips import Skipped
from vlmfast.data.stream import Record, Shards, Stream, nothing_readable, patience
from vlmfast.errors import DataError, ShapeError

Item = TypeVar("Item")
Collate = Callable[[list[Any], list[int]], Any]  # samples and their places -> what the stream hands out
Result = TypeVar("Result")

REDRAWS = 100  # draws for one unreadable sample before its row is left out
MARK_EVERY = 512  # records of a stream between two states of it: a resumed run passes by so many at most


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its caption."""

    image: Tensor  # [3, H, W] uint8
    text: str
    id: int  # samples with one id are positives of each other (a digit's class, an image's number)


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors."""

    image: Tensor  # [B, 3, H, W] uint8
    text: Tensor  # [B, T] int64 token ids
    index: Tensor  # [B] int64, the place of each sample in its data set
    ids: Tensor | None = None  # [B] int64, Sample.id

    def __len__(self) -> int:
        return len(self.image)

    def split(self, size: int) -> list[Batch]:
        """The batch in pieces of `size` rows, in order, the last one shorter if it must be; views, not copies.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"Batch.split: size must be at least 1; got {size}")
        columns = [self.image, self.text, self.index] + ([] if self.ids is None else [self.ids])
        return [Batch(*parts) for parts in zip(*(column.split(size) for column in columns), strict=True)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        image, text, index = (x.to(device, non_blocking=non_blocking) for x in (self.image, self.text, self.index))
        ids = None if self.ids is None else self.ids.to(device, non_blocking=non_blocking)
        return Batch(image, text, index, ids)


class MapDataset(Protocol):
    """What `batches` needs of a data set with places 0 .. len - 1.

    If it also has `draw(index, seed, epoch)`, that is called instead of `dataset[index]`: randomness (crop, template)
    comes from the three numbers, and None says that the sample is unreadable and has been counted. With
    `draw_all(indices, seed, epoch) -> list` beside it a batch is drawn by one call, and without either, if it has
    `__getitems__(indices) -> list`, a batch is read by one call of that.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # a Sample, or what `collate` takes


class StreamDataset(Shards, Protocol):
    """What `batches` needs of a data set that is read as a stream, such as tar files: shards, and how to decode."""

    def decode(self, record: Any, index: int, seed: int, epoch: int) -> Sample | None:
        """The sample of a record, or None if it is unreadable; counted then. Called from several threads."""
        ...


Mark = dict[str, Any]  # Stream.state()
Positioned = Generator[tuple[Any, dict[str, Any]], None, None]  # batches, each with the position after it
Reader = Callable[[dict[str, Any]], Positioned]  # position -> what comes from there on


def collate(samples: list[Sample], indices: list[int], tokenizer: Callable[[list[str]], Tensor]) -> Batch:
    """The batch that holds the samples, in order.

    Args:
        samples: B samples, whose images all have one shape [3, H, W].
        indices: B places of the samples in their data set.
        tokenizer: maps B texts to int64 [B, T].

    Returns:
        A Batch of B rows on the CPU.

    Raises:
        ShapeError: the images differ in shape.
    """
    shapes = {tuple(sample.image.shape): index for sample, index in zip(samples, indices, strict=True)}
    if len(shapes) > 1:
        got = ", ".join(f"{shape} (sample {index})" for shape, index in shapes.items())
        raise ShapeError(
            f"collate: the images of a batch must have one shape; got {got}. Give the reader an image_size"
        )
    return Batch(
        image=torch.stack([sample.image for sample in samples]),
        text=tokenizer([sample.text for sample in samples]),
        index=torch.tensor(indices, dtype=torch.int64),
        ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
    )


_collate = collate  # where an argument of that name hides it


def batches(
    dataset: MapDataset | StreamDataset | Mixture,
    tokenizer: Callable[[list[str]], Tensor] | None,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    drop_last: bool | None = None,
    epochs: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    collate: Collate | None = None,
) -> Batches:
    """The batches of steps start_step, start_step + 1, ... of one rank; without end if `epochs` is None.

    The batch at step t is a pure function of (dataset, seed, t, rank, world_size), whatever start_step and workers are.
    A data set with places is read in a new permutation each epoch: the ranks' rows of a step together are the rows that
    one rank with batch_size * world_size would read. A data set of shards is dealt out to the ranks and read as one
    stream of epochs, and a batch may lie across the border of two. To start at a later step there without a state, what
    lies before is read and decoded; with `load_state_dict` it is not.

    An unreadable sample is counted by its data set (`dataset.skipped`). With `shuffle`, another sample, drawn from
    (seed, t), takes its row, so that batches keep their size; without, its row is left out.

    Args:
        dataset: MapDataset, StreamDataset, or a Mixture of these last.
        tokenizer: maps B texts to int64 [B, T]; None where `collate` does without.
        batch_size: B of this rank, at least 1.
        seed: any integer.
        start_step: the first step, counted from 0.
        shuffle: False reads in the data set's own order: for evaluation.
        drop_last: leave out the last batch of an epoch (of the stream, for shards) if it is short; default: `shuffle`.
        epochs: how many passes over the data.
        workers: threads that prepare batches ahead, 0 for none. Threads, not processes: decoding and resizing an image
            release Python's lock, and the counts of unreadable samples stay in one place.
        rank: 0 .. world_size - 1.
        world_size: how many processes read the data set together, each its own rows.
        collate: makes a batch of B samples and their places, whatever the data set's samples are; None: a Batch.

    Returns:
        Iterator over Batch, or what `collate` makes, of batch_size rows, or fewer at the end of an epoch without
        `drop_last`, which then is shared out evenly. It has `state_dict` and `load_state_dict`.

    Raises:
        ValueError: batch_size < 1, or start_step, epochs or workers < 0, no such rank, epochs of a mixture, or neither
            tokenizer nor collate.
        DataError: the data set is empty, or smaller than one batch with `drop_last`, has fewer shards than there are
            ranks, or a whole batch is unreadable.
    """
    if batch_size < 1 or start_step < 0 or workers < 0 or (epochs is not None and epochs < 0):
        raise ValueError(
            "batches: batch_size must be at least 1, start_step, epochs and workers at least 0; "
            f"got {batch_size}, {start_step}, {epochs}, {workers}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"batches: rank must be 0 .. world_size - 1; got rank {rank} of {world_size}")
    drop_last = shuffle if drop_last is None else drop_last
    if collate is None:
        if tokenizer is None:
            raise ValueError("batches: needs a tokenizer, or a collate that does without")
        collate = functools.partial(_collate, tokenizer=tokenizer)
    plan = _Plan(collate, batch_size, seed, shuffle, drop_last, epochs, workers, rank, world_size)
    data: Any = dataset
    if not is_stream(data):
        return Batches(_map_reader(data, plan), plan.told() | {"samples": len(data)}, start_step, [data])
    sources, weights = (data.sources, data.weights) if isinstance(data, Mixture) else ([data], [1.0])
    if len(sources) > 1 and epochs is not None:
        raise ValueError("batches: each data set of a mixture has its own epochs; leave epochs out")
    shards = [[source.shards, source.shuffle_buffer, source.resampled] for source in sources]
    run = plan.told() | {"weights": weights, "shards, shuffle buffer, resampled": shards}
    return Batches(_stream_reader(sources, weights, plan), run, start_step, sources)


def is_stream(dataset: Any) -> bool:
    """Whether `batches` reads the data set as a stream of shards, without places and without a length."""
    return isinstance(dataset, Mixture) or (hasattr(dataset, "records") and hasattr(dataset, "shards"))


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool = True) -> int:
    """How many batches one pass over `samples` samples gives."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


class Batches:
    """Iterator over batches that can say where it stands: what `batches` returns.

    `state_dict()` is the position after the last batch that was handed out, however far ahead the workers have read.
    `load_state_dict(state)`, before the first batch, goes on from there: batch for batch what the other would have
    given, and with its counts of unreadable samples.
    """

    def __init__(self, read: Reader, run: dict[str, Any], start_step: int, sources: list[Any]) -> None:
        self._read, self._run = read, run
        self._skips: list[Skipped] = [source.skips for source in sources if hasattr(source, "skips")]
        self._position: dict[str, Any] = {"step": start_step}
        self._batches: Positioned | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:  # a Batch, or what `collate` makes
        if self._batches is None:
            self._batches = self._read(self._position)
        batch, self._position = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON holds it; for a stream with the numbers of the records in its shuffle buffer."""
        return {"run": self._run, "position": self._position, "skipped": [skips.state_dict() for skips in self._skips]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `batches` called with the same arguments; only start_step and workers may differ.

        Raises:
            DataError: the state is of another seed, rank, batch size or data set.
            RuntimeError: a batch was handed out already.
        """
        if self._batches is not None:
            raise RuntimeError("load_state_dict: must be called before the first batch is taken")
        if wrong := [key for key in self._run if state["run"].get(key) != self._run[key]]:
            theirs = ", ".join(f"{key} {state['run'].get(key)}" for key in wrong)
            ours = ", ".join(f"{key} {self._run[key]}" for key in wrong)
            raise DataError(
                f"load_state_dict: the state was saved with {theirs}; this is {ours}. Give the same flags or arguments"
            )
        self._position = state["position"]
        for skips, found in zip(self._skips, state["skipped"], strict=True):
            skips.load_state_dict(found)

    def close(self) -> None:
        """Ends the iteration and its worker threads."""
        if self._batches is not None:
            self._batches.close()


@dataclass(frozen=True)
class _Plan:
    """The arguments of `batches` that do not depend on the kind of data set."""

    collate: Collate
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    epochs: int | None
    workers: int
    rank: int
    world_size: int

    def told(self) -> dict[str, Any]:
        """What must be the same where a state is loaded, as JSON holds it."""
        return {name: getattr(self, name) for name in ("seed", "batch_size", "shuffle", "rank", "world_size")}


def _map_reader(dataset: Any, plan: _Plan) -> Reader:
    n, seed, rank, world_size = len(dataset), plan.seed, plan.rank, plan.world_size
    together = plan.batch_size * world_size
    per_epoch = steps_per_epoch(n, together, plan.drop_last)
    if per_epoch == 0:
        of_ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise DataError(
            f"batches: the data set has {n} samples, too few for a batch of {plan.batch_size}{of_ranks}; use a smaller "
            "one"
        )
    draw = getattr(dataset, "draw", lambda index, seed, epoch: dataset[index])

    def read_all(indices: list[int], seed: int, epoch: int) -> list[Any]:
        return dataset.__getitems__(indices)

    at_once = hasattr(dataset, "__getitems__") and not hasattr(dataset, "draw")
    draw_all = getattr(dataset, "draw_all", read_all if at_once else None)

    @functools.lru_cache(maxsize=2)  # the current epoch, and the next where workers read ahead
    def order(epoch: int) -> np.ndarray:
        return permutation(n, seed, epoch) if plan.shuffle else np.arange(n)

    def others(step: int, index: int) -> list[int]:
        """Places to look for a sample in, instead of an unreadable one; no two ranks look in the same."""
        share = -(-(n - rank) // world_size)  # places rank, rank + world_size, ...
        drawn = random_bits(seed, step, index, np.arange(REDRAWS)) % np.uint64(share)
        return (drawn.astype(np.int64) * world_size + rank).tolist()

    def batch_at(step: int) -> tuple[int, Any]:
        epoch, place = divmod(step, per_epoch)
        of_all_ranks = order(epoch)[place * together : (place + 1) * together]
        indices = np.array_split(of_all_ranks, world_size)[rank].tolist()
        samples = draw_all(indices, seed, epoch) if draw_all else (draw(index, seed, epoch) for index in indices)
        rows = dict(zip(indices, samples, strict=True))
        if plan.shuffle:
            bad = [index for index, sample in rows.items() if sample is None]
            taken = set(of_all_ranks.tolist()) if bad else set()
            for index in bad:
                for other in others(step, index):
                    if other not in taken and (sample := draw(other, seed, epoch)) is not None:
                        rows[other] = sample
                        taken.add(other)
                        break
        rows = {index: sample for index, sample in rows.items() if sample is not None}
        if indices and not rows and plan.shuffle:
            raise DataError(
                f"batches: not one sample of step {step} could be read; skipped so far: {dict(dataset.skipped)}"
            )
        return step, plan.collate(list(rows.values()), list(rows)) if rows else None

    def read(position: dict[str, Any]) -> Positioned:
        start = position["step"]
        steps = itertools.count(start) if plan.epochs is None else range(start, plan.epochs * per_epoch)
        for step, batch in _in_order(batch_at, steps, plan.workers):
            if batch is not None:
                yield batch, {"step": step + 1}

    return read


def _stream_reader(sources: list[Any], weights: list[float], plan: _Plan) -> Reader:
    def stream() -> Stream:
        how: dict[str, Any] = {"seed": plan.seed, "shuffle": plan.shuffle, "epochs": plan.epochs}
        return Stream(sources, weights, rank=plan.rank, world_size=plan.world_size, **how)

    stream()  # refuses now what it would refuse at the first batch

    def decode(item: tuple[Record, Mark | None]) -> tuple[Record, Sample | None, Mark | None]:
        record, mark = item
        sample = sources[record.source].decode(record.data, record.index, plan.seed, record.epoch)
        return replace(record, data=None), sample, mark

    def read(position: dict[str, Any]) -> Positioned:
        records = stream()
        step, mark, since = position["step"], position.get("mark"), position.get("since", 0)
        passing = 0 if mark else step * plan.batch_size  # readable samples still to pass by
        if mark:
            records.load(mark)
            for _ in itertools.islice(records, since):
                pass
        met: dict[int, int] = {}  # data set without a readable sample so far -> the first of its epochs met here
        fruitful: set[int] = set()
        rows: list[tuple[int, Sample]] = []
        for record, sample, new in _in_order(decode, _marked(records), plan.workers):
            if new:
                mark, since = new, 0
            since += 1
            if sample is None:
                first = met.setdefault(record.source, record.epoch)
                if record.source not in fruitful and record.epoch > first + patience(plan.world_size):
                    raise nothing_readable(sources[record.source])
                continue
            fruitful.add(record.source)
            if passing > 0:
                passing -= 1
                continue
            rows.append((record.index, sample))
            if len(rows) == plan.batch_size:
                step += 1
                yield gathered(rows), {"step": step, "mark": mark, "since": since}
                rows = []
        if not fruitful and "mark" not in position:
            raise nothing_readable(sources[0])
        if rows and not plan.drop_last:
            yield gathered(rows), {"step": step + 1, "mark": mark, "since": since}

    def gathered(rows: list[tuple[int, Sample]]) -> Any:
        return plan.collate([sample for _, sample in rows], [index for index, _ in rows])

    return (lambda position: _one_ahead(read(position))) if plan.workers else read


def _one_ahead(items: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """The items, the next one made by a thread while the reader is busy with this one."""
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="vlmfast-data") as pool:
            coming = pool.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = pool.submit(next, items, None)
                yield item
    finally:
        items.close()


def _marked(stream: Stream) -> Iterator[tuple[Record, Mark | None]]:
    """The records, every MARK_EVERY-th of them with the stream's state before it."""
    for number in itertools.count():
        state = None if number % MARK_EVERY else stream.state()
        record = next(stream, None)
        if record is None:
            return
        yield record, state


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """function(item) of each item, in order; with workers > 0 computed ahead by that many threads."""
    if workers == 0:
        yield from map(function, items)
        return
    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="vlmfast-data") as pool:
        try:
            for item in items:
                coming.append(pool.submit(function, item))
                if len(coming) > 2 * workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # also when the reader stops early
            for future in coming:
                future.cancel()
