"""Samples, batches, and the order in which a data set becomes batches.

The batch at step t is a pure function of (data set, seed, t): a run that resumes at step t, or reads with another
number of workers, sees the same batches. All randomness is counter-based (`random_int`): there is no state to save.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmfast.errors import DataError, ShapeError

Item = TypeVar("Item")
Result = TypeVar("Result")

BITS = 2**64 - 1
REDRAWS = 100  # draws for one unreadable sample before its row is left out


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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        image, text, index = (x.to(device, non_blocking=non_blocking) for x in (self.image, self.text, self.index))
        ids = None if self.ids is None else self.ids.to(device, non_blocking=non_blocking)
        return Batch(image, text, index, ids)


class MapDataset(Protocol):
    """What `batches` needs of a data set with places 0 .. len - 1.

    If it also has `draw(index, seed, epoch) -> Sample | None`, that is called instead of `dataset[index]`: randomness
    (crop, template) comes from the three numbers, and None says that the sample is unreadable and has been counted.
    Else, if it has `__getitems__(indices) -> list[Sample]`, a batch is read by one call of it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class StreamDataset(Protocol):
    """What `batches` needs of a data set that can only be read from its beginning, such as tar files."""

    def records(self, seed: int, epoch: int, shuffle: bool) -> Iterator[Any]:
        """The raw records of one epoch, in an order that depends on the arguments alone."""
        ...

    def decode(self, record: Any, seed: int, epoch: int) -> tuple[int, Sample] | None:
        """(index, sample) of a record, or None if it is unreadable; counted then. Called from several threads."""
        ...


def random_int(*words: int) -> int:
    """64 random bits, as an int, that depend on the words (modulo 2**64) and their order alone.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied after each word.
    """
    return _mixed(words)


def random_bits(*words: int | np.ndarray) -> np.ndarray:
    """uint64 array of `random_int` for each entry of the arrays among the words, of which there is at least one."""
    return _mixed(words)


def _mixed(words: tuple[int | np.ndarray, ...]) -> Any:
    state: Any = 0x9E3779B97F4A7C15
    for word in words:
        word = word.astype(np.uint64) if isinstance(word, np.ndarray) else int(word) & BITS  # negative ones wrap
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & BITS
        state = state ^ (state >> 31)
    return state


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64, the numbers 0 .. n - 1 in an order that depends on n and the key alone."""
    return np.argsort(random_bits(*key, np.arange(n)), kind="stable")


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


def batches(
    dataset: MapDataset | StreamDataset,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    drop_last: bool | None = None,
    epochs: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, ...; without end if `epochs` is None.

    The batch at step t is a pure function of (dataset, seed, t), whatever start_step and workers are. A data set with
    places is read in a new permutation each epoch. A data set of tars is read as one stream of epochs, and a batch may
    lie across the border of two; to start at a later step it reads and decodes what lies before, at most two epochs.

    An unreadable sample is counted by its data set (`dataset.skipped`). With `shuffle`, another sample, drawn from
    (seed, t), takes its row, so that batches keep their size; without, its row is left out.

    Args:
        dataset: MapDataset or StreamDataset.
        tokenizer: maps B texts to int64 [B, T].
        batch_size: B, at least 1.
        seed: any integer.
        start_step: the first step, counted from 0.
        shuffle: False reads in the data set's own order: for evaluation.
        drop_last: leave out the last batch of an epoch (of the stream, for tars) if it is short; default: `shuffle`.
        epochs: how many passes over the data.
        workers: threads that prepare batches ahead, 0 for none. Threads, not processes: decoding and resizing an image
            release Python's lock, and the counts of unreadable samples stay in one place.

    Yields:
        Batch of batch_size rows, or fewer at the end of an epoch without `drop_last`.

    Raises:
        ValueError: batch_size < 1, or start_step, epochs or workers < 0.
        DataError: the data set is empty, or smaller than one batch with `drop_last`, or a whole batch is unreadable.
    """
    if batch_size < 1 or start_step < 0 or workers < 0 or (epochs is not None and epochs < 0):
        raise ValueError(
            "batches: batch_size must be at least 1, start_step, epochs and workers at least 0; "
            f"got {batch_size}, {start_step}, {epochs}, {workers}"
        )
    drop_last = shuffle if drop_last is None else drop_last
    read = _stream_batches if hasattr(dataset, "records") else _map_batches
    return read(dataset, tokenizer, batch_size, seed, start_step, shuffle, drop_last, epochs, workers)


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool = True) -> int:
    """How many batches one pass over `samples` samples gives."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


def _map_batches(
    dataset: Any,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    seed: int,
    start_step: int,
    shuffle: bool,
    drop_last: bool,
    epochs: int | None,
    workers: int,
) -> Iterator[Batch]:
    n = len(dataset)
    per_epoch = steps_per_epoch(n, batch_size, drop_last)
    if per_epoch == 0:
        raise DataError(
            f"batches: the data set has {n} samples, too few for a batch of {batch_size}; use a smaller one"
        )
    draw = getattr(dataset, "draw", lambda index, seed, epoch: dataset[index])
    together = None if hasattr(dataset, "draw") else getattr(dataset, "__getitems__", None)

    @functools.lru_cache(maxsize=2)  # the current epoch, and the next where workers read ahead
    def order(epoch: int) -> np.ndarray:
        return permutation(n, seed, epoch) if shuffle else np.arange(n)

    def batch_at(step: int) -> Batch | None:
        epoch, place = divmod(step, per_epoch)
        indices = order(epoch)[place * batch_size : (place + 1) * batch_size].tolist()
        samples = together(indices) if together else (draw(index, seed, epoch) for index in indices)
        rows = dict(zip(indices, samples, strict=True))
        if shuffle:
            _redraw(rows, lambda index: draw(index, seed, epoch), n, seed, step)
        rows = {index: sample for index, sample in rows.items() if sample is not None}
        if not rows and shuffle:
            raise DataError(
                f"batches: not one sample of step {step} could be read; skipped so far: {dict(dataset.skipped)}"
            )
        return collate(list(rows.values()), list(rows), tokenizer) if rows else None

    steps = itertools.count(start_step) if epochs is None else range(start_step, epochs * per_epoch)
    return (batch for batch in _in_order(batch_at, steps, workers) if batch is not None)


def _redraw(rows: dict[int, Sample | None], draw: Callable[[int], Sample | None], n: int, seed: int, step: int) -> None:
    """Add to `rows` one readable sample from outside the batch for each unreadable one, as far as there are any."""
    for bad in [index for index, sample in rows.items() if sample is None]:
        for other in (random_bits(seed, step, bad, np.arange(REDRAWS)) % np.uint64(n)).tolist():
            if other not in rows and (sample := draw(other)) is not None:
                rows[other] = sample
                break


def _stream_batches(
    dataset: Any,
    tokenizer: Callable[[list[str]], Tensor],
    batch_size: int,
    seed: int,
    start_step: int,
    shuffle: bool,
    drop_last: bool,
    epochs: int | None,
    workers: int,
) -> Iterator[Batch]:
    passing = start_step * batch_size  # readable samples still to pass by
    rows: list[tuple[int, Sample]] = []
    epoch = 0
    while epochs is None or epoch < epochs:
        readable = 0
        decode = functools.partial(dataset.decode, seed=seed, epoch=epoch)
        for row in _in_order(decode, dataset.records(seed, epoch, shuffle), workers):
            if row is None:
                continue
            readable += 1
            if passing > 0:
                passing -= 1
                continue
            rows.append(row)
            if len(rows) == batch_size:
                yield collate([sample for _, sample in rows], [index for index, _ in rows], tokenizer)
                rows = []
        if readable == 0:
            raise DataError(f"batches: the data set holds no readable sample; skipped: {dict(dataset.skipped)}")
        epoch += 1 + passing // readable  # every epoch has the same readable samples, so whole ones need no reading
        passing %= readable
    if rows and not drop_last:
        yield collate([sample for _, sample in rows], [index for index, _ in rows], tokenizer)


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """function(item) of each item, in order; with workers > 0 computed ahead by that many threads."""
    if workers == 0:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="vlmfast-data") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also when the reader stops early
            for future in ahead:
                future.cancel()
