"""The rows of every rank: gathered, or on their way around a ring, and what is computed of them brought home again.

A loss over ranks runs through the blocks of a transport, own rows first, and hands what it computed of each block to a
home, which adds up what all ranks computed of this rank's rows:

    home = transport.home(torch.add)
    for ranks, (rows,) in transport.blocks([own]):   # ranks: whose rows these are
        home.add(ranks, contributions)               # one tensor a rank
    total = home.result()                            # of this rank's rows, from every rank

All that travels, travels as bytes: every dtype, on every backend of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import zip_longest
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: as default arguments it keeps the one that it finds
from torch import Tensor

from vlmfast.errors import BackendError, ShapeError
from vlmfast.ops import _check

JOIN = 8192
"""Rows up to which the blocks of several ranks are computed in one call: fewer leave most of a large GPU idle."""

RING_BYTES = 2**30
"""Gathered bytes from which transport="auto" takes the ring, for the memory: gathering holds three such buffers in the
backward (the rows, what is computed of them, and what comes home)."""

RING_RANKS, RING_ROWS = 4, 8192
"""Ranks and rows of a rank from which it takes the ring for the time: there a block takes longer to compute than the
next one to come, and a ring has enough of them to hide (docs/scaling.md)."""

Block: TypeAlias = tuple[list[int], list[Tensor]]  # whose rows these are, and the rows of each tensor that travels
Wait: TypeAlias = Callable[[], list[Tensor]]
Combine: TypeAlias = Callable[..., Tensor]  # torch.add or torch.logaddexp

# Before torch 2.13 all_gather_single had a longer name, which now warns.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
_compared: WeakKeyDictionary[Any, set[tuple]] = WeakKeyDictionary()  # group -> the shapes that all its ranks had


class Ranks:
    """A process group as one of its ranks sees it; every number is within the group.

    Args:
        group: None is the default group.
    Raises:
        BackendError: torch.distributed has not been started, or this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise BackendError(
                "torch.distributed has no process group: start the program with torchrun and call "
                "torch.distributed.init_process_group first, or use world_size=1"
            )
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise BackendError("this process is not in the process group that was given: call the loss on its ranks")

    def peer(self, rank: int) -> int:
        """The number that torch.distributed's messages know rank `rank` of this group by."""
        return dist.get_global_rank(self.group, rank % self.size)

    def back(self, steps: int) -> int:
        """The rank that is `steps` before this one, around the ring."""
        return (self.rank - steps) % self.size

    def counts(self, x: Tensor) -> list[list[int]]:
        """By rank: the rows of `x`, its width and the number of its dtype. A small message; on a GPU, a wait for it."""
        own = torch.tensor([[*x.shape, _DTYPES.index(x.dtype)]], device=x.device)
        every = own.new_empty(self.size, own.shape[1])
        _all_gather(every, own, group=self.group)
        return every.tolist()

    def rows(self, op: str, x: Tensor, uneven: bool = False) -> list[int]:
        """The rows of every rank's x [M, D]. Unless they may be uneven, a GPU is asked only for shapes new to it.

        Raises:
            ShapeError: a rank has none, or numbers that must be equal are not; on every rank alike.
        """
        if x.dim() != 2:
            _check.is_matrix(op, features=x)
        known = _compared.setdefault(self.group, set())
        shape = (*x.shape, x.dtype)
        if not uneven and x.device.type != "cpu" and shape in known:
            return [len(x)] * self.size
        counts = self.counts(x)
        rows = [each[0] for each in counts]
        if min(rows) == 0:
            raise ShapeError(f"{op}: every rank must have at least one row; got {rows} rows, by rank")
        if len({tuple(each[1:]) for each in counts}) > 1:
            got = ", ".join(f"[{n}, {width}] {_DTYPES[code]}" for n, width, code in counts)
            raise ShapeError(f"{op}: all ranks must have one embedding width and one dtype; got, by rank, {got}")
        if not uneven and len(set(rows)) > 1:
            raise ShapeError(
                f"{op}: all ranks must have as many rows; got {rows}, by rank. Drop the last, smaller batch, or pass "
                "uneven=True to a loss that has it"
            )
        if not uneven:
            known.add(shape)
        return rows


class Gather:
    """Every rank's rows at once: one collective, and 1 / world size of what is then held is this rank's.

    Its blocks come in the ring's order, joined as the ring joins them: the same calls, and so the same bits.

    Args:
        ranks: the group.
        sizes: every rank's number of rows.
    """

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.kept: list[Tensor] = []  # [W, most, ...]: what `blocks` gathered of the first tensors, and need not again

    def blocks(self, own: list[Tensor]) -> Iterator[Block]:
        """This rank's rows while the others' are on their way; then the others', joined up to `JOIN` rows."""
        started = [_start_gather(self.ranks, x, max(self.sizes)) for x in own[len(self.kept) :]]
        yield [self.ranks.rank], own
        self.kept = self.kept + [wait() for wait in started]
        for steps in _groups(self.sizes, self.ranks.size - 1):
            ranks = [self.ranks.back(step) for step in steps]
            # A copy even of one rank's rows: a matrix product's last bits may hang on where a matrix begins.
            yield ranks, [torch.cat([every[k, : self.sizes[k]] for k in ranks]) for every in self.kept]

    def home(self, combine: Combine) -> _GatherHome:
        """Where the contributions to every rank's rows go."""
        return _GatherHome(self, combine)


class _GatherHome:
    def __init__(self, gather: Gather, combine: Combine) -> None:
        self.gather, self.combine = gather, combine
        self.to_send: Tensor | None = None  # [N, ...]

    def add(self, ranks: list[int], parts: Sequence[Tensor]) -> None:
        sizes = self.gather.sizes
        if self.to_send is None:
            self.to_send = parts[0].new_empty(sum(sizes), *parts[0].shape[1:])
        for rank, part in zip(ranks, parts, strict=True):
            self.to_send[sum(sizes[:rank]) :][: sizes[rank]] = part

    def result(self) -> Tensor:
        assert self.to_send is not None
        return _sum_of_ranks(self.gather.ranks, self.to_send, self.gather.sizes, self.combine)


class Ring:
    """Blocks of rows that go from neighbour to neighbour, the next on its way while one is computed.

    What is computed of a block goes along with it from rank to rank, and from the last one home. Two blocks and two
    such sums are held, whatever the world size.

    Args:
        ranks: the group.
        sizes: every rank's number of rows.
        step: 1: blocks go up, from rank to rank + 1; -1: down.
        last: the number of steps that a block goes; None: to every rank.
    """

    def __init__(self, ranks: Ranks, sizes: list[int], step: int = 1, last: int | None = None) -> None:
        self.ranks, self.sizes, self.step = ranks, sizes, step
        self.last = ranks.size - 1 if last is None else last
        self.kept: list[Tensor] = []  # nothing

    def blocks(self, own: list[Tensor]) -> Iterator[Block]:
        """This rank's rows; then those of the rank before it, and so on, joined up to `JOIN` rows."""
        arriving = self.pass_on(own, 1) if self.last else None
        yield [self.ranks.rank], own
        for steps in _groups(self.sizes, self.last):
            arrived = []
            for step in steps:
                assert arriving is not None
                tensors = arriving()
                arriving = self.pass_on(tensors, step + 1) if step < self.last else None
                arrived.append(tensors)
            joined = arrived[0] if len(arrived) == 1 else [torch.cat(parts) for parts in zip(*arrived, strict=True)]
            yield [self.owner(step) for step in steps], joined

    def home(self, combine: Combine) -> _RingHome:
        """Where the contributions to the blocks go as they pass."""
        return _RingHome(self, combine)

    def owner(self, step: int) -> int:
        """Whose block is here after `step` steps."""
        return self.ranks.back(self.step * step)

    def pass_on(self, tensors: list[Tensor], step: int) -> Wait:
        """Starts to send what lies here to the next rank, and to receive what comes at step `step` from the other."""
        rank = self.ranks.rank
        return self._exchange(tensors, rank + self.step, rank - self.step, self.sizes[self.owner(step)])

    def send_home(self, total: Tensor) -> Wait:
        """Starts to send the sum of this rank's last block to its owner, and to receive that of its own rows."""
        if self.last == 0:
            return lambda: [total]
        rank = self.ranks.rank
        far = self.step * self.last
        return self._exchange([total], rank - far, rank + far, self.sizes[rank])

    def _exchange(self, tensors: list[Tensor], to: int, source: int, rows: int) -> Wait:
        tensors = [x.contiguous() for x in tensors]
        received = [x.new_empty(rows, *x.shape[1:]) for x in tensors]
        to, source, group = self.ranks.peer(to), self.ranks.peer(source), self.ranks.group
        messages = [dist.P2POp(dist.isend, _bytes(x), to, group) for x in tensors]
        messages += [dist.P2POp(dist.irecv, _bytes(x), source, group) for x in received]
        works = dist.batch_isend_irecv(messages)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            messages.clear()  # what was sent may go
            return received

        return wait


class _RingHome:
    def __init__(self, ring: Ring, combine: Combine) -> None:
        self.ring, self.combine = ring, combine
        self.arriving: Wait | None = None  # the sum that the ranks before this one have of the next block

    def add(self, ranks: list[int], parts: Sequence[Tensor]) -> None:
        ring = self.ring
        for rank, part in zip(ranks, parts, strict=True):
            step = ring.step * (ring.ranks.rank - rank) % ring.ranks.size
            if self.arriving is None:
                total = _wide(part)
            else:
                (total,) = self.arriving()
                self.combine(total, part, out=total)
            self.arriving = ring.pass_on([total], step + 1) if step < ring.last else ring.send_home(total)

    def result(self) -> Tensor:
        assert self.arriving is not None
        return self.arriving()[0]


class BothWays:
    """Two rings, in opposite directions: half as many steps, where both directions of a link carry data at once.

    Args:
        ranks: the group.
        sizes: every rank's number of rows.
    """

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.up = Ring(ranks, sizes, 1, ranks.size // 2)
        self.down = Ring(ranks, sizes, -1, (ranks.size - 1) // 2)

    def blocks(self, own: list[Tensor]) -> Iterator[Block]:
        """This rank's rows; then those of its neighbours on both sides, and so on."""
        up, down = self.up.blocks(own), self.down.blocks(own)
        first = next(up)
        next(down)  # on its way, too
        yield first
        for pair in zip_longest(up, down):
            yield from (block for block in pair if block is not None)

    def home(self, combine: Combine) -> _BothWaysHome:
        """Where the contributions to the blocks go as they pass."""
        return _BothWaysHome(self, combine)


class _BothWaysHome:
    def __init__(self, ways: BothWays, combine: Combine) -> None:
        self.ways, self.combine = ways, combine
        self.up, self.down = ways.up.home(combine), ways.down.home(combine)

    def add(self, ranks: list[int], parts: Sequence[Tensor]) -> None:
        up = self.ways.up
        # A group of blocks comes from one side.
        (self.up if (up.ranks.rank - ranks[0]) % up.ranks.size <= up.last else self.down).add(ranks, parts)

    def result(self) -> Tensor:
        total = self.up.result()
        return self.combine(total, self.down.result()) if self.ways.down.last else total


class Broadcast:
    """Every rank's rows in turn, from it to all; what all computed of them is reduced to it.

    Args:
        ranks: the group.
        sizes: every rank's number of rows.
    """

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes

    def blocks(self, own: list[Tensor]) -> Iterator[Block]:
        """The rows of rank 0, then those of rank 1, and so on: on all ranks the same at one time."""
        arriving = self._send(0, own)
        for rank in range(self.ranks.size):
            tensors = arriving()
            if rank + 1 < self.ranks.size:
                arriving = self._send(rank + 1, own)
            yield [rank], tensors

    def home(self, combine: Combine) -> _BroadcastHome:
        """Where the contributions to every rank's rows go; `combine` must be torch.add."""
        return _BroadcastHome(self.ranks)

    def _send(self, rank: int, own: list[Tensor]) -> Wait:
        mine = rank == self.ranks.rank
        tensors = [x.contiguous() if mine else x.new_empty(self.sizes[rank], *x.shape[1:]) for x in own]
        source, group = self.ranks.peer(rank), self.ranks.group
        works = [dist.broadcast(_bytes(x), source, group=group, async_op=True) for x in tensors]

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return tensors

        return wait


class _BroadcastHome:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.total: Tensor | None = None
        self.work: Any = None

    def add(self, ranks: list[int], parts: Sequence[Tensor]) -> None:
        (rank,), (part,) = ranks, parts
        total = _wide(part)
        self._finish()
        self.work = dist.reduce(total, self.ranks.peer(rank), group=self.ranks.group, async_op=True)
        if rank == self.ranks.rank:
            self.total = total

    def result(self) -> Tensor:
        self._finish()
        assert self.total is not None
        return self.total

    def _finish(self) -> None:
        if self.work is not None:
            self.work.wait()


Transport: TypeAlias = Gather | Ring | BothWays | Broadcast


def transport(name: str, ranks: Ranks, sizes: list[int], row_bytes: int) -> Gather | Ring:
    """The transport of that name; "auto": the ring from `RING_RANKS` of `RING_ROWS` on, or from `RING_BYTES` in all.

    Args:
        name: "auto", "gather" or "ring".
        ranks: the group.
        sizes: every rank's number of rows.
        row_bytes: of one row.
    Raises:
        ValueError: the name is unknown.
    """
    if name not in ("auto", "gather", "ring"):
        raise ValueError(f"transport must be 'auto', 'gather' or 'ring'; got {name!r}")
    if name == "auto":
        hidden = ranks.size >= RING_RANKS and max(sizes) >= RING_ROWS
        name = "ring" if hidden or sum(sizes) * row_bytes >= RING_BYTES else "gather"
    return Ring(ranks, sizes) if name == "ring" else Gather(ranks, sizes)


def outside_compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which torch.compile leaves as it is: what is compiled stops before it and goes on behind it.

    As torch.compiler.disable, which cannot be had without importing all of torch.compile.
    """

    @wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call


@outside_compile
def gather_rows(
    x: Tensor,  # [M, D]
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The rows of all ranks, in the order of the ranks, with their gradient.

    The gradient of a row is the sum of what every rank's loss says of it, added up in one order: that of the sum of all
    ranks' losses, which DistributedDataParallel's and FSDP's averaging makes that of their mean. Every rank must take
    part in the backward. Differentiable once.

    Args:
        x: [M, D], any dtype.
        group: the process group; None is the default one.
        sizes: every rank's number of rows, where they differ (`row_counts` tells them); None: all have as many.
    Returns: [N, D] in x's dtype, N the rows of all ranks.
    Raises:
        ShapeError: x is no matrix, a rank has no rows, the ranks' rows differ and no sizes say so, or sizes do not fit.
        BackendError: there is no process group, or this process is not in it.
    """
    ranks = Ranks(group)
    if sizes is None:
        sizes = ranks.rows("gather_rows", x)
    elif len(sizes) != ranks.size or sizes[ranks.rank] != len(x):
        raise ShapeError(
            f"gather_rows: sizes must hold the rows of each of {ranks.size} ranks, and {len(x)} for rank {ranks.rank}; "
            f"got {list(sizes)}"
        )
    return _GatherRows.apply(x, ranks, list(sizes))


def row_counts(x: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """The number of rows of every rank's `x`, for `gather_rows`: a small message, and on a GPU a wait for it.

    Args:
        x: [M, D].
        group: the process group; None is the default one.
    """
    return [each[0] for each in Ranks(group).counts(x)]


def refuse_again(op: str) -> None:
    """Called in the backward of `op`, whose gradient has none of its own.

    Raises:
        RuntimeError: the gradient is to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: its gradient cannot be differentiated again; call without create_graph=True")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, sizes):  # type: ignore[override]
        ctx.ranks, ctx.sizes = ranks, sizes
        every = _start_gather(ranks, x, max(sizes))()
        if min(sizes) == max(sizes):
            return every.flatten(0, 1)
        return torch.cat([rows[:size] for rows, size in zip(every, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        refuse_again("gather_rows")
        return _sum_of_ranks(ctx.ranks, grad, ctx.sizes, torch.add).to(grad.dtype), None, None


def _start_gather(ranks: Ranks, x: Tensor, most: int) -> Callable[[], Tensor]:
    """Starts to gather x [M, ...] of every rank into [W, most, ...]; rows beyond a rank's own hold nothing."""
    if len(x) < most:
        x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    x = x.contiguous()
    every = x.new_empty(ranks.size, *x.shape)
    work = _all_gather(_bytes(every.flatten(0, 1)), _bytes(x), group=ranks.group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return every

    return wait


def _sum_of_ranks(ranks: Ranks, parts: Tensor, sizes: list[int], combine: Combine) -> Tensor:
    """What all ranks have in `parts` [N, ...] of this rank's rows, combined: its own first, then the next one's."""
    own = sizes[ranks.rank]
    parts = parts.contiguous()
    received = parts.new_empty(ranks.size, own, *parts.shape[1:])
    flat = received.flatten(0, 1)
    dist.all_to_all_single(_bytes(flat), _bytes(parts), [own] * ranks.size, sizes, group=ranks.group)
    total = _wide(received[ranks.rank])
    for step in range(1, ranks.size):
        combine(total, received[ranks.back(-step)], out=total)
    return total


def _wide(x: Tensor) -> Tensor:
    """A copy in the dtype that sums are made in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes, [rows, bytes of a row]."""
    return x.view(len(x), -1).view(torch.uint8)


def _groups(sizes: list[int], last: int) -> Iterator[range]:
    """The steps 1 ... last in groups of up to `JOIN` rows; the same steps make a group on every rank."""
    count = max(1, JOIN // max(sizes))
    return (range(first, min(first + count, last + 1)) for first in range(1, last + 1, count))
