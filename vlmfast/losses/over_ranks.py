"""The contrastive losses of a batch that lies on several ranks, exact, and without ever holding the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from vlmfast.backend import select
from vlmfast.distributed import BothWays, Broadcast, Gather, Ranks, Ring, Transport, outside_compile, refuse_again
from vlmfast.distributed import transport as chosen_transport
from vlmfast.ops import _check, _limits
from vlmfast.ops._unit import accumulator
from vlmfast.ops.sigmoid_loss import IMPLS as SIGMOID
from vlmfast.ops.softmax_loss import IMPLS as SOFTMAX

SIGLIP_TRANSPORTS = {"bidir": BothWays, "shift": Ring, "reduce": Broadcast, "gather": Gather}


@outside_compile
def clip_loss_over_ranks(
    image: Tensor,  # [M, D]
    text: Tensor,  # [M, D]
    logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    transport: str = "auto",
    uneven: bool = False,
    normalize: bool = True,
    whole: bool = False,
    tower_factor: float = 1.0,
) -> Tensor:
    """This rank's part of the symmetric cross-entropy of matching each image to its text, among those of all ranks.

    Equals, where DistributedDataParallel's and FSDP's averaging over W ranks is applied to it and to its gradients,
        clip_loss(torch.cat(images of all ranks), torch.cat(texts of all ranks), logit_scale)
    This rank computes its images against all texts once, which serves both directions. The gradients are those of the
    sum of all ranks' losses; each rank must multiply its loss by the same number, and call backward. The backward keeps
    the inputs, two vectors [M], and with "gather" the texts of all ranks. Differentiable once.

    Args:
        image: [M, D] embeddings of this rank.
        text: [M, D], row i belongs to image i. They travel.
        logit_scale: [] or [1], the multiplier itself, the same on all ranks; or a number.
        group: the process group; None is the default one.
        transport: "gather": the texts of all ranks at once; "ring": from rank to rank, in memory that does not grow
            with the number of ranks; "auto": the ring where it hides behind the computing, or gathering takes more
            than `vlmfast.distributed.RING_BYTES`. Both give the same bits.
        uneven: ranks may differ in M. Costs an exchange of the sizes, and on a GPU a wait for it; the parts are
            weighted so that their mean over ranks is the mean over pairs.
        normalize: divide each row by its length first.
        whole: return the mean over ranks, the loss of the whole batch, instead of this rank's part; likewise
            logit_scale's gradient.
        tower_factor: multiplies the gradients of the embeddings, not logit_scale's.
    Returns: [] float32 (float64 for float64 embeddings), in nats.
    Raises:
        ShapeError: as `vlmfast.clip_loss`; or ranks differ in M without uneven, or in D.
        DTypeError: a tensor is not floating.
        BackendError: there is no process group, this process is not in it, or a forced backend cannot run the call.
        ValueError: transport is unknown, or the tensors lie on different devices.
    Source: Radford et al. 2021, Fig. 3, over ranks; the ring as in Liu et al. 2023, "Ring Attention".
    """
    op = "clip_loss_over_ranks"
    ranks = Ranks(group)
    sizes = ranks.rows(op, text, uneven)
    (scale,) = _checked(op, image, text, logit_scale=logit_scale)
    columns = chosen_transport(transport, ranks, sizes, text.shape[1] * text.element_size())
    plan = _Softmax(
        columns=columns,
        ranks=ranks,
        impl=SOFTMAX[select(op, SOFTMAX, image.device, image, text)],
        weight=ranks.size / (2 * sum(sizes)),
        options=("index", 0.0, normalize),
        precision=_limits.precision(op, None),
        workspace=_limits.workspace(op, None),
        whole=whole,
        tower_factor=tower_factor,
    )
    return _ClipOverRanks.apply(image, text, scale, plan)


@outside_compile
def siglip_loss_over_ranks(
    image: Tensor,  # [M, D]
    text: Tensor,  # [M, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    transport: str = "bidir",
    uneven: bool = False,
    normalize: bool = True,
) -> Tensor:
    """This rank's part of the pairwise sigmoid loss: its images against the texts of all ranks.

    Equals, where DistributedDataParallel's and FSDP's averaging over W ranks is applied to it and to its gradients,
        siglip_loss(torch.cat(images of all ranks), torch.cat(texts of all ranks), logit_scale, logit_bias)
    The gradients are computed in the forward, text's on the way from rank to rank, and kept in float32 [M, D] for each
    side that needs one: nothing is sent in the backward. They are those of the sum of all ranks' losses; each rank must
    multiply its loss by the same number. Differentiable once.

    Args:
        image: [M, D] embeddings of this rank.
        text: [M, D], row i belongs to image i. They travel.
        logit_scale: [] or [1], the multiplier itself, the same on all ranks; or a number.
        logit_bias: [] or [1], added to every logit; or a number.
        group: the process group; None is the default one.
        transport: how the texts travel: "bidir": around the ring in both directions; "shift": in one; "reduce": from
            one rank to all, in turn; "gather": all at once. The first three hold as much for any number of ranks.
        uneven: ranks may differ in M. Costs an exchange of the sizes, and on a GPU a wait for it; the parts are
            weighted so that their mean over ranks is the sum over all pairs, divided by the number of images.
        normalize: divide each row by its length first.
    Returns: [] float32 (float64 for float64 embeddings), in nats.
    Raises:
        ShapeError: as `vlmfast.siglip_loss`; or ranks differ in M without uneven, or in D.
        DTypeError: a tensor is not floating.
        BackendError: there is no process group, this process is not in it, or a forced backend cannot run the call.
        ValueError: transport is unknown, or the tensors lie on different devices.
    Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training", section 3.3: the "shift".
    """
    op = "siglip_loss_over_ranks"
    if transport not in SIGLIP_TRANSPORTS:
        raise ValueError(f"{op}: transport must be one of {', '.join(SIGLIP_TRANSPORTS)}; got {transport!r}")
    ranks = Ranks(group)
    sizes = ranks.rows(op, text, uneven)
    scale, bias = _checked(op, image, text, logit_scale=logit_scale, logit_bias=logit_bias)
    grad = torch.is_grad_enabled()
    plan = _Sigmoid(
        columns=SIGLIP_TRANSPORTS[transport](ranks, sizes),
        rank=ranks.rank,
        impl=SIGMOID[select(op, SIGMOID, image.device, image, text)],
        weight=ranks.size * len(image) / sum(sizes),
        needs=tuple(grad and x.requires_grad for x in (image, text, scale, bias)),
        normalize=normalize,
        limits=(_limits.precision(op, None), _limits.workspace(op, None)),
    )
    return _SiglipOverRanks.apply(image, text, scale, bias, plan)


@dataclass(frozen=True)
class _Softmax:
    columns: Gather | Ring
    ranks: Ranks
    impl: ModuleType
    weight: float  # of every row's and every column's cross-entropy
    options: tuple[str, float, bool]
    precision: str
    workspace: int
    whole: bool
    tower_factor: float


class _ClipOverRanks(torch.autograd.Function):
    """Rows are images of this rank, columns the texts of all: a row's log-sum-exp grows over the blocks of columns, a
    column's over the ranks."""

    @staticmethod
    def forward(ctx, x, y, scale, plan):  # type: ignore[override]
        rank, combine = plan.ranks.rank, torch.logaddexp
        home = plan.columns.home(combine)
        with _outside_autocast(x):
            for ranks, (columns,) in plan.columns.blocks([y]):
                ids, weights = _targets(x, columns, plan, pairs=ranks == [rank])
                loss, row_part, col_part, *_ = plan.impl.forward(
                    x, columns, scale, *ids, *weights, None, None, *plan.options, plan.precision, 0
                )
                if ranks == [rank]:  # the first
                    total, row_own, col_own, row_lse = loss.double(), row_part, col_part, row_part
                else:
                    row_lse = combine(row_lse, row_part)
                home.add(ranks, col_part.split([plan.columns.sizes[k] for k in ranks]))
            col_lse = home.result()
        # The pairs are in this rank's own block: its loss lacks what the other blocks add to the log-sum-exps.
        total = total + plan.weight * ((row_lse - row_own).sum() + (col_lse - col_own).sum())
        ctx.plan = plan
        ctx.save_for_backward(x, y, scale, row_lse, col_lse, *plan.columns.kept)
        plan.columns.kept = []  # so that they go when autograd lets go
        return _mean(total, plan.ranks).to(loss.dtype) if plan.whole else total.to(loss.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        refuse_again("clip_loss_over_ranks")
        x, y, scale, row_lse, col_lse, *kept = ctx.saved_tensors
        plan, (need_x, need_y, need_scale, _) = ctx.plan, ctx.needs_input_grad
        plan.columns.kept = kept
        home = plan.columns.home(torch.add)
        none = row_lse.new_empty(0)
        dx, dscale = None, torch.zeros_like(row_lse[0])
        with _outside_autocast(x):
            for ranks, (columns, lse) in plan.columns.blocks([y, col_lse]):
                ids, weights = _targets(x, columns, plan, pairs=ranks == [plan.ranks.rank])
                saved = (row_lse, lse, none, none, torch.empty_like(none, dtype=torch.uint8))
                dx_part, dy_part, dscale_part = plan.impl.backward(
                    *(grad, x, columns, scale, *ids, *weights, None, None, *plan.options, *saved),
                    *(need_x, need_y, plan.precision, plan.workspace),
                )
                dscale += dscale_part
                if need_x:
                    dx = _added(dx, dx_part)
                if need_y:
                    home.add(ranks, dy_part.split([plan.columns.sizes[k] for k in ranks]))
                del dx_part, dy_part  # before the next block's are made
        plan.columns.kept = []
        dy = home.result() if need_y else None
        if plan.tower_factor != 1:
            dx, dy = (None if d is None else d.mul_(plan.tower_factor) for d in (dx, dy))
        dx, dy = (None if d is None else d.to(v.dtype) for d, v in ((dx, x), (dy, y)))
        if need_scale and plan.whole:
            dscale = _mean(dscale, plan.ranks)
        return dx, dy, dscale.to(scale.dtype) if need_scale else None, None


def _targets(
    x: Tensor, columns: Tensor, plan: _Softmax, pairs: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ids and weights of the rows and of the columns: row i's positive is column i of this rank's own block."""
    M, N, device = len(x), len(columns), x.device
    ids = torch.arange(M, device=device)
    row_ids, col_ids = (ids, ids) if pairs else (torch.full((size,), -1, device=device) for size in (M, N))
    dtype = accumulator(x, columns)
    row_weight, col_weight = (torch.full((size,), plan.weight, dtype=dtype, device=device) for size in (M, N))
    return (row_ids, col_ids), (row_weight, col_weight)


@dataclass(frozen=True)
class _Sigmoid:
    columns: Transport
    rank: int
    impl: ModuleType
    weight: float  # of this rank's part: 1 where all have as many rows
    needs: tuple[bool, ...]  # which of image, text, scale, bias need a gradient
    normalize: bool
    limits: tuple[str, int]


class _SiglipOverRanks(torch.autograd.Function):
    """Rows and columns are not coupled: the gradients of a block are known as soon as it has come."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, plan):  # type: ignore[override]
        need_x, need_y, *need_scalars = plan.needs
        home = plan.columns.home(torch.add)
        total, dscale, dbias = (torch.zeros((), dtype=torch.float64, device=x.device) for _ in range(3))
        dx = None
        with _outside_autocast(x):
            for ranks, (columns,) in plan.columns.blocks([y]):
                offset = 0 if ranks == [plan.rank] else len(columns)  # where no row's pair is
                needs = (need_x, need_y, any(need_scalars))
                results = plan.impl.forward(x, columns, scale, bias, offset, plan.normalize, *needs, *plan.limits)
                if plan.weight != 1:
                    results = [plan.weight * each for each in results]
                loss, dx_part, dy_part, dscale_part, dbias_part = results
                total += loss
                dscale += dscale_part
                dbias += dbias_part
                if need_x:
                    dx = _added(dx, dx_part)
                if need_y:
                    home.add(ranks, dy_part.split([plan.columns.sizes[k] for k in ranks]))
                del results, dx_part, dy_part  # before the next block's are made
        dy = home.result() if need_y else None
        gradients = [dx, dy, dscale if need_scalars[0] else None, dbias if need_scalars[1] else None]
        ctx.dtypes = [v.dtype for v in (x, y, scale, bias)]
        ctx.save_for_backward(*gradients)
        return total.to(loss.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        refuse_again("siglip_loss_over_ranks")
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else (grad * d).to(dtype) for d, dtype in gradients), None


def _checked(op: str, image: Tensor, text: Tensor, **scalars: Tensor | float) -> list[Tensor]:
    """The scalars as [] tensors in the loss's dtype, once all is fit for the backends."""
    _check.is_matrix(op, image=image, text=text)
    _check.same_shape(op, image=image, text=text)
    _check.floating(op, image=image, text=text)
    dtype = accumulator(image, text)
    found = []
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            _check.is_scalar(op, **{name: value})
            _check.floating(op, **{name: value})
            found.append(value.to(dtype).reshape(()))
        else:
            found.append(torch.full((), value, dtype=dtype, device=image.device))
    _check.same_device(op, image=image, text=text, **dict(zip(scalars, found, strict=True)))
    return found


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum so far, in float32 or float64."""
    return part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)


def _mean(value: Tensor, ranks: Ranks) -> Tensor:
    """The mean over ranks of a number."""
    value = value.clone()
    dist.all_reduce(value, group=ranks.group)
    return value / ranks.size


@contextmanager
def _outside_autocast(x: Tensor) -> Iterator[None]:
    with torch.autocast(x.device.type, enabled=False):
        yield
