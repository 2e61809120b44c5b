"""One step of training, as a function: at once, or in micro-batches with the same gradients in less memory.

`cached_step` is for losses that compare all samples of a batch with one another, `accumulated_step` for those that are
sums over its samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.errors import ShapeError, VlmfastError
from vlmfast.train.world import inner

# (model, batch) -> scalars [] by name: the sum of those that end in "_loss" is minimised, the rest is reported.
LossFn = Callable[[nn.Module, Any], Mapping[str, Tensor]]

PRECISIONS = ("fp32", "amp_bf16")
MAX_LOG_SCALE = math.log(100)


class NonFiniteError(VlmfastError, FloatingPointError):
    """A loss or a gradient is infinite or not a number; the message names the step."""


@dataclass(frozen=True)
class SplitLoss:
    """A loss in two parts, of which the first can be computed piece by piece: what `cached_step` takes.

    It is a LossFn, too, and can be given to `plain_step` as it is.
    """

    embed: Callable[[nn.Module, Any], Mapping[str, Tensor]]
    """(model, batch) -> outputs by name: rows [B, ...], of which row i depends on sample i alone, and scalars [] or [1]
    that depend on no sample, such as "logit_scale". It calls `model(...)`, so that the hooks of DDP and FSDP run."""
    loss: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]]
    """(outputs, batch) -> scalars by name, as a LossFn gives them. It touches no parameter of the model."""

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return self.loss(self.embed(model, batch), batch)


@dataclass(frozen=True)
class SummedLoss:
    """A loss that is a sum over the parts of a batch, divided by a count of the whole: what `accumulated_step` takes.

    It is a LossFn, too, and can be given to `plain_step` as it is, for one process.
    """

    loss: Callable[[nn.Module, Any, Tensor], Mapping[str, Tensor]]
    """(model, batch or a piece of it, count []) -> scalars by name, each a sum over the batch's samples / count. It
    calls `model(...)`, so that the hooks of DDP and FSDP run, and every parameter that is trained takes part in it."""
    count: Callable[[Any], Tensor]
    """batch -> [] float32, how many terms the sums have over the whole batch (supervised tokens, say)."""

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return self.loss(model, batch, self.count(batch).clamp(min=1))


def plain_step(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    step: int,
    precision: str = "fp32",
    grad_clip_norm: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The metrics of one step of training, which changes the model and the optimizer.

    Forward, loss, backward, clipping, optimizer, and logit_scale clamped to [1, 100] if the model has one. The values
    are read back from the device once, before the optimizer: a loss or gradient that is not finite never reaches the
    weights.

    Args:
        model: in training mode; plain, compiled, or wrapped by DDP or FSDP2, which average gradients over ranks. A
            parameter `model.logit_scale`, if there is one, holds the logarithm.
        loss_fn: (model, batch) -> scalars by name; the sum of those whose name ends in "_loss" is minimised.
        batch: what loss_fn takes, on the model's device.
        optimizer: over the model's parameters.
        lr: learning rate of this step, set in every group; a group with an "lr_scale" takes so many times it.
        step: the number of this step, from 1, for the error.
        precision: "fp32", or "amp_bf16" for bfloat16 autocast around loss_fn.
        grad_clip_norm: longest gradient, all parameters together; None for no clipping.
        group: the ranks that take this step together; None for one process.

    Returns:
        What loss_fn gave; "loss", the sum, if it gave more than one loss; "logit_scale" (the multiplier that this step
        used), "lr", and "grad_norm" (length of the gradient before clipping). With a group, means over its ranks.

    Raises:
        NonFiniteError: the loss or the gradient is not finite, on any rank; it is raised on all of them.
        ValueError: loss_fn gave no "_loss", or precision is unknown.
    """
    mixed = _autocast(model, precision)
    optimizer.zero_grad(set_to_none=True)
    with mixed():
        scalars = dict(loss_fn(model, batch))
    _total(scalars).backward()
    return _finish(model, optimizer, scalars, lr, step, grad_clip_norm, group)


def cached_step(
    model: nn.Module,
    loss_fn: SplitLoss,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    step: int,
    micro_batch_size: int,
    precision: str = "fp32",
    grad_clip_norm: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The metrics of one step of training in the memory of a micro-batch; the loss and its gradient are `plain_step`'s.

    Equals, but for the order of sums:
        plain_step(model, loss_fn, batch, optimizer, lr, step=step, ...)

    The micro-batches are embedded without a graph; one loss of the whole batch's outputs gives the gradient of each
    output; then each micro-batch is embedded again, with the random numbers of the first time, and sends its outputs'
    gradient backward. The graph of the last micro-batch is kept from the first pass: a single one is the plain step.
    An embedding costs a third of its step, so this costs at most 4/3 of the plain step's time.

    Gradients travel between ranks with the last backward alone: one round of all-reduce a step with DDP, one
    reduce-scatter with FSDP2, which until then holds whole gradients.

    Args:
        model: as for `plain_step`. Batch norms in training mode are refused, as their statistics are not the batch's.
        loss_fn: embeds and compares in two parts.
        batch: on the model's device, with `len(batch)` and `batch.split(size)` -> its pieces in order.
        optimizer: over the model's parameters.
        lr: learning rate of this step, set in every group.
        step: the number of this step, from 1, for the error.
        micro_batch_size: samples whose activations are held at one time; the last micro-batch may have fewer.
        precision: "fp32", or "amp_bf16" for bfloat16 autocast around both parts of loss_fn.
        grad_clip_norm: longest gradient, all parameters together; None for no clipping.
        group: the ranks that take this step together, each with as many micro-batches; None for one process.

    Returns:
        As `plain_step`.

    Raises:
        NonFiniteError: the loss or the gradient is not finite, on any rank; the weights are untouched.
        TypeError: loss_fn is not a SplitLoss, or an output of embed is not a tensor.
        ShapeError: an output of embed is neither rows, one a sample, nor a scalar.
        ValueError: micro_batch_size < 1, a batch norm is in training mode, a scalar of embed depends on the samples,
            loss_fn gave no "_loss", or precision is unknown.
    Source: Gao et al. 2021 (GradCache), algorithm 1; keeping the last graph and taking scalars once are ours.
    """
    if not isinstance(loss_fn, SplitLoss):
        raise TypeError(
            f"cached_step: loss_fn must be a SplitLoss(embed, loss), so that micro-batches can be embedded one by one; "
            f"got {type(loss_fn).__name__}. Split it, or use plain_step"
        )
    if micro_batch_size < 1:
        raise ValueError(f"cached_step: micro_batch_size must be at least 1; got {micro_batch_size}")
    mixed = _autocast(model, precision)
    device = next(model.parameters()).device
    pieces = batch.split(micro_batch_size)
    if len(pieces) > 1:
        _refuse_batch_norm(model)

    def embed(piece: Any) -> dict[str, Tensor]:
        with mixed():
            outputs = dict(loss_fn.embed(model, piece))
        _check_outputs(outputs, len(piece))
        return outputs

    optimizer.zero_grad(set_to_none=True)
    states: list[list[Tensor]] = []
    cached: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for piece in pieces[:-1]:
            states.append(_random_state(device))
            cached.append(embed(piece))
    # Under an outer autocast, weights cast without a graph would stay; older PyTorch gives those no gradient.
    torch.clear_autocast_cache()
    with _reducing(model, len(pieces) == 1):
        kept = embed(pieces[-1])
    cached.append({name: value.detach() for name, value in kept.items()})

    moving = _moving(cached)
    leaves = {name: _leaf([each[name] for each in cached], kept[name]) for name in kept}
    cached.clear()
    with mixed():
        scalars = dict(loss_fn.loss(leaves, batch))
    _total(scalars).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    end = _random_state(device)

    for i in (len(pieces) - 1, *range(len(pieces) - 1)):
        last = i == max(len(pieces) - 2, 0)
        with _reducing(model, last):
            if i < len(states):
                _set_random_state(device, states[i])
                kept = embed(pieces[i])
            sent = [name for name in gradients if last or not _is_scalar(kept[name])]
            rows = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
            torch.autograd.backward(
                [kept[name] for name in sent],
                [gradients[name] if _is_scalar(kept[name]) else gradients[name][rows] for name in sent],
            )
    _set_random_state(device, end)
    _refuse_moving(moving)
    return _finish(model, optimizer, scalars, lr, step, grad_clip_norm, group)


def accumulated_step(
    model: nn.Module,
    loss_fn: SummedLoss,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    step: int,
    micro_batch_size: int | None = None,
    precision: str = "fp32",
    grad_clip_norm: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The metrics of one step of training whose loss is the mean over all terms of all ranks, taken piece by piece.

    Equals, for one process and but for the order of sums and for random numbers inside the model:
        plain_step(model, loss_fn, batch, optimizer, lr, step=step, ...)

    Each piece's sums are divided by the count of the whole batch (over ranks: by the mean count of a rank, so that the
    ranks' mean, as DDP and FSDP2 take it, is the mean over all terms): the gradients of the pieces simply add up,
    however unevenly the terms lie on pieces and ranks. Dividing each piece by its own count would weigh a term of a
    short answer more than one of a long answer.

    Gradients travel between ranks with the last backward alone.

    Args:
        model: as for `plain_step`.
        loss_fn: the sums of a piece, and the count of a batch.
        batch: on the model's device, with `len(batch)` and `batch.split(size)` -> its pieces in order.
        optimizer: over the model's parameters.
        lr: learning rate of this step; a group with an "lr_scale" takes so many times it.
        step: the number of this step, from 1, for the error.
        micro_batch_size: samples whose activations are held at one time; None: all of them.
        precision: "fp32", or "amp_bf16" for bfloat16 autocast around loss_fn.
        grad_clip_norm: longest gradient, all parameters together; None for no clipping.
        group: the ranks that take this step together, each with as many pieces; None for one process.

    Returns:
        As `plain_step`; every scalar of loss_fn is added up over the pieces.

    Raises:
        NonFiniteError: the loss or the gradient is not finite, on any rank; the weights are untouched.
        ShapeError: a rank has more pieces than another; it is raised on all of them.
        ValueError: micro_batch_size < 1, loss_fn gave no "_loss", or precision is unknown.
    Source: the count over all pieces is what transformers' Trainer passes as `num_items_in_batch`.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"accumulated_step: micro_batch_size must be at least 1; got {micro_batch_size}")
    mixed = _autocast(model, precision)
    pieces = [batch] if micro_batch_size is None else batch.split(micro_batch_size)
    count, ranks = loss_fn.count(batch), 1
    if group is not None:
        ranks = dist.get_world_size(group)
        count = _over_ranks(count, len(pieces), group)
    count = count.clamp(min=1) / ranks  # without a single term the sums are 0, and so is the loss

    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        with _reducing(model, i == len(pieces) - 1):
            with mixed():
                scalars = dict(loss_fn.loss(model, piece, count))
            _total(scalars).backward()
        sums = {name: sums.get(name, 0) + value.detach() for name, value in scalars.items()}
    return _finish(model, optimizer, sums, lr, step, grad_clip_norm, group)


def _over_ranks(count: Tensor, pieces: int, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' counts [], once they are found to have as many pieces: else one would wait without end."""
    totals = count.new_zeros(1 + dist.get_world_size(group))
    totals[0] = count
    totals[1 + dist.get_rank(group)] = pieces
    dist.all_reduce(totals, group=group)
    found = [int(each) for each in totals[1:].tolist()]
    if len(set(found)) > 1:
        raise ShapeError(
            f"accumulated_step: all ranks must have as many pieces; got {', '.join(map(str, found))}. Give each rank "
            "as many samples and the same micro_batch_size"
        )
    return totals[0]


def _autocast(model: nn.Module, precision: str) -> Callable[[], AbstractContextManager]:
    """A context for what runs in that precision, new at each call."""
    if precision not in PRECISIONS:
        raise ValueError(f"train: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    device = next(model.parameters()).device.type
    return lambda: torch.autocast(device, torch.bfloat16, enabled=precision == "amp_bf16")


def _total(scalars: dict[str, Tensor]) -> Tensor:
    """The sum of the losses, which joins the scalars as "loss" if there are several."""
    losses = [value for name, value in scalars.items() if name.endswith("_loss")]
    if not losses:
        raise ValueError(f"train: loss_fn must return at least one '..._loss'; got {sorted(scalars)}")
    total = torch.stack(losses).sum()
    if len(losses) > 1:
        scalars["loss"] = total
    return total


def _is_scalar(value: Tensor) -> bool:
    return value.dim() == 0 or value.shape == (1,)


def _check_outputs(outputs: Mapping[str, Tensor], rows: int) -> None:
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"cached_step: embed gave {name!r} as {type(value).__name__}; leave out what is no tensor")
        if not _is_scalar(value) and (value.dim() < 2 or len(value) != rows):
            raise ShapeError(
                f"cached_step: embed gave {name!r} of shape {tuple(value.shape)} for {rows} samples; it must be "
                f"[{rows}, ...] with one row a sample and at least two dimensions, or a scalar, [] or [1]"
            )


def _moving(cached: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Whether each scalar, all of them finite, differs between micro-batches; left on the device."""
    scalars = {n: torch.stack([each[n].reshape(()) for each in cached]) for n, v in cached[0].items() if _is_scalar(v)}
    return {name: each.isfinite().all() & (each.amax() > each.amin()) for name, each in scalars.items()}


def _refuse_moving(moving: Mapping[str, Tensor]) -> None:
    if moving and any(found := torch.stack(list(moving.values())).tolist()):
        raise ValueError(
            f"cached_step: embed's scalar {list(moving)[found.index(True)]!r} differs between micro-batches, so it "
            "depends on the samples, and its gradient would be wrong. Give it as rows, or use plain_step"
        )


def _leaf(parts: list[Tensor], like: Tensor) -> Tensor:
    """The whole batch's output, cut from any graph; it gets a gradient where the model's own output has one."""
    whole = parts[-1].clone() if _is_scalar(like) else torch.cat(parts)
    return whole.requires_grad_(like.requires_grad)


def _refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"cached_step: {name or type(module).__name__} is a batch norm in training mode: it would take each "
                "micro-batch's statistics for the batch's. Freeze it (.eval(), or freeze_bn_stats of a locked image "
                "tower), take micro_batch_size=len(batch), or train a model without batch norms"
            )


@contextmanager
def _reducing(model: Any, wanted: bool) -> Iterator[None]:
    """Where DDP and FSDP2 bring gradients together over ranks, or let them pile up on each."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(wanted)
        model.set_is_last_backward(wanted)
        try:
            yield
        finally:  # what follows a micro-batch that failed is no part of this step
            model.set_requires_gradient_sync(True)
            model.set_is_last_backward(True)
    elif hasattr(model, "no_sync") and not wanted:
        with model.no_sync():
            yield
    else:
        yield


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of the device's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _finish(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scalars: dict[str, Tensor],
    lr: float,
    step: int,
    grad_clip_norm: float | None,
    group: dist.ProcessGroup | None,
) -> dict[str, float]:
    """What every step ends with, once the gradients are there: look at them, clip, step, clamp."""
    logit_scale = getattr(inner(model), "logit_scale", None)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    if isinstance(logit_scale, nn.Parameter):
        scalars["logit_scale"] = logit_scale.detach().exp()
    metrics = _read({**scalars, "grad_norm": grad_norm}, group)
    for name, value in metrics.items():
        if (name.endswith("loss") or name == "grad_norm") and not math.isfinite(value):
            raise NonFiniteError(
                f"train: step {step}: {name} is {value}. The weights are still those after step {step - 1}. "
                "Resume from the last checkpoint with a lower lr, a longer warm-up or grad_clip_norm"
            )

    if grad_clip_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip_norm, grad_norm)
    for each in optimizer.param_groups:
        each["lr"] = lr * each.get("lr_scale", 1.0)
    optimizer.step()
    torch.clear_autocast_cache()  # under an outer autocast, casts of the old weights would be taken for the new ones
    if isinstance(logit_scale, nn.Parameter):
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOG_SCALE)
    return {**metrics, "lr": lr}


def _read(scalars: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, float]:
    """The scalars' values, means over the group's ranks, in one copy from the device."""
    whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in scalars.values()]
    values = torch.stack([value.detach().float().reshape(()) for value in whole])
    if group is not None:
        # In float64 the mean of equal float32 values is that value.
        values = values.double()
        dist.all_reduce(values, group=group)
        values /= dist.get_world_size(group)
    return dict(zip(scalars, values.tolist(), strict=True))
