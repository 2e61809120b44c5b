"""The language-model head: logits over a vocabulary and their cross-entropy, of the supervised rows alone."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vlmfast.backend import select
from vlmfast.errors import ShapeError
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops._unit import accumulator
from vlmfast.ops.linear_cross_entropy import _cpu, reference

__all__ = ["linear_cross_entropy"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def linear_cross_entropy(
    hidden: Tensor,  # [M, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [M]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_supervised: Tensor | float | None = None,
    precision: str | None = None,
    max_workspace: int | None = None,
) -> Tensor:
    """Cross-entropy of each supervised row's softmax over the vocabulary with its label, in nats.

    Equals, without the logits of all rows at one time, and without those of ignored rows at all:
        on = labels != ignore_index
        z = F.linear(hidden[on], weight, bias).float()
        loss = F.cross_entropy(z, labels[on], label_smoothing=label_smoothing, reduction="none")
        (loss + z_loss * z.logsumexp(1) ** 2).sum() / (on.sum() if num_supervised is None else num_supervised)

    With "mean" and "sum" the gradients are computed in the forward pass and kept for backward in float32, the weight's
    summed in it; with "none" the backward pass computes the logits again. Of all ignored rows the loss is 0, and so are
    the gradients. Under autocast hidden and weight are multiplied in autocast's dtype. Second derivatives and forward
    mode are refused. On a GPU a call waits once, for the number of supervised rows.

    Args:
        hidden: [M, D], the head's input: row i predicts labels[i], so shift the labels by one first. float32, bfloat16
            or float16; float64 runs on the reference. hidden and weight may differ in dtype.
        weight: [V, D], a row for each token of the vocabulary.
        labels: [M] int64, each in [0, V) or `ignore_index`.
        bias: [V], added to the logits.
        ignore_index: the label of rows that are not supervised.
        label_smoothing: the share, in [0, 1), of the target that is spread over the whole vocabulary.
        z_loss: weight of the square of each row's log-sum-exp, in nats, which keeps logits from drifting; at least 0.
        reduction: "mean" over supervised rows, their "sum", or "none": [M] losses, 0 where a row is ignored.
        num_supervised: what "mean" divides by instead: the supervised rows of all micro-batches together; under DDP,
            which averages over ranks, those of all ranks divided by the number of ranks.
        precision: how a GPU multiplies float32: "bf16x3" (two bfloat16 parts each, three products; None means this, or
            VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
        max_workspace: bytes of logits, on a GPU of their gradients, that a call may hold at one time; None is 2**27 on
            a GPU, or VLMFAST_MAX_WORKSPACE, and on the CPU 48 MiB, or a quarter of the float32 weight if that is more.
    Returns:
        [] float32, or [M] with "none" (float64 for float64 inputs).
    Raises:
        ShapeError: hidden and weight differ in width, are no matrices or are empty; labels are not [M], bias not [V].
        DTypeError: a tensor is not floating, or labels are not int64.
        ValueError: a label is out of range; an option is; num_supervised comes without "mean"; several devices.
        BackendError: a forced backend cannot run the call.
    Source: the fused and chunked form of Hsu et al. 2024, "Liger Kernel", section 3.2; z-loss as in Chowdhery et al.
        2022, "PaLM", section 5. PyTorch's mean of no supervised row is NaN; ours is 0.
    """
    op = "linear_cross_entropy"
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    _check.is_matrix(op, hidden=hidden, weight=weight)
    _check.same_width(op, hidden=hidden, weight=weight)
    _check.floating(op, **given)
    _check.is_integer(op, labels=labels)
    _check.is_vector(op, hidden.shape[0], labels=labels)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{op}: bias must be [{weight.shape[0]}], one entry a token; got {tuple(bias.shape)}")
    _check.same_device(op, **given, labels=labels)
    _check_options(op, label_smoothing, z_loss, reduction, num_supervised)
    _check.sound_values(op, False, **given)

    wanted = torch.is_grad_enabled()
    needs = [wanted and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    products = None  # the dtype of the logits' factors; None: as they came
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        products = torch.get_autocast_dtype(hidden.device.type)
    limits = _limits.precision(op, precision), _workspace(op, weight, max_workspace)
    backend = select(op, IMPLS, hidden.device, hidden, weight)
    plan = (ignore_index, float(label_smoothing), float(z_loss), products)
    if reduction == "none":
        return _losses(hidden, weight, bias, labels, *plan, *limits, backend)[0]
    acc = accumulator(hidden, weight)
    if reduction == "sum":
        factor = torch.ones((), dtype=acc, device=hidden.device)
    else:
        count = (labels != ignore_index).sum() if num_supervised is None else num_supervised
        count = torch.as_tensor(count, dtype=acc, device=hidden.device).detach().reshape(())
        factor = torch.where(count > 0, 1 / count, 0)
    return _loss(hidden, weight, bias, labels, factor, *plan, *needs, *limits, backend)[0]


def _check_options(
    op: str, label_smoothing: float, z_loss: float, reduction: str, num_supervised: Tensor | float | None
) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1); got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss must be at least 0; got {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if num_supervised is None:
        return
    if reduction != "mean":
        raise ValueError(f"{op}: num_supervised is what 'mean' divides by; leave it out with reduction={reduction!r}")
    if isinstance(num_supervised, Tensor):
        _check.is_scalar(op, num_supervised=num_supervised)
    elif num_supervised < 0:
        raise ValueError(f"{op}: num_supervised must be at least 0; got {num_supervised}")


def _workspace(op: str, weight: Tensor, value: int | None) -> int:
    """The bytes of a call. The CPU's own choice is small beside the gradient of a large weight."""
    if value is None and weight.device.type == "cpu":
        return max(48 * 2**20, weight.numel())
    return _limits.workspace(op, value)


def _supervised(labels: Tensor, ignore_index: int, V: int) -> Tensor | None:
    """The rows with a label, in order; None for all. Raises ValueError for a label that is no token."""
    on = labels != ignore_index
    wrong = on & ((labels < 0) | (labels >= V))
    count, bad = torch.stack([on.sum(), wrong.sum()]).tolist()  # the one wait for a GPU
    if bad:
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: labels must be in [0, {V}) or ignore_index ({ignore_index}); got "
            f"{int(labels[row])} in row {row}, one of {bad}"
        )
    return None if count == len(labels) else torch.nonzero_static(on, size=count)[:, 0]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _taken(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """[count, ...]: the values in their rows, zeros elsewhere."""
    return values if rows is None else values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


# ---- mean and sum: gradients in the forward pass


@_library.op("linear_cross_entropy")
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    products: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, D), V = hidden.shape, weight.shape[0]
    acc = accumulator(hidden, weight)
    rows = _supervised(labels, ignore_index, V)
    if rows is not None and len(rows) == 0:
        shapes = (), (M, D) if need_hidden else 0, (V, D) if need_weight else 0, V if need_bias else 0
        loss, dhidden, dweight, dbias = (hidden.new_zeros(shape, dtype=acc) for shape in shapes)
        return loss, dhidden, dweight, dbias
    x, w = _cast(_taken(hidden, rows), products), _cast(weight, products)
    options = (label_smoothing, z_loss, need_hidden, need_weight, need_bias, precision, workspace)
    losses, _, dx, dw, dbias = IMPLS[backend].forward(x, w, bias, _taken(labels, rows), factor, *options)
    loss = (factor * losses.sum()).to(acc)
    return loss, _spread(dx, rows, M) if need_hidden else dx, dw, dbias


@_loss.register_fake
def _(hidden, weight, bias, labels, factor, a, b, c, d, need_hidden, need_weight, need_bias, *limits):
    loss = hidden.new_empty((), dtype=accumulator(hidden, weight))
    dhidden = loss.new_empty(hidden.shape if need_hidden else 0)
    dweight = loss.new_empty(weight.shape if need_weight else 0)
    return loss, dhidden, dweight, loss.new_empty(weight.shape[0] if need_bias else 0)


def _keep_gradients(ctx, inputs, output):
    hidden, weight, bias, *_ = inputs
    ctx.needs = inputs[9:12]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _refuse_second(op: str = "linear_cross_entropy") -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: its gradient cannot be differentiated again; call without create_graph=True")


def _scaled(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * gradient; the gradient itself where that is the same and known without a wait."""
    if grad.device.type == "cpu" and not torch.compiler.is_compiling() and type(grad) is Tensor and grad.item() == 1:
        return gradient.to(dtype)
    return (grad * gradient).to(dtype)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 15
    _refuse_second()
    saved = zip(ctx.needs, ctx.saved_tensors, ctx.dtypes, strict=True)
    return *(_scaled(grad, gradient, dtype) if need else None for need, gradient, dtype in saved), *(None,) * 12


_loss.register_autograd(_backward, setup_context=_keep_gradients)


# ---- none: a loss for each row, and its gradients from the log-sum-exp


@_library.op("linear_cross_entropy_losses")
def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    products: torch.dtype | None,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    M, acc = len(hidden), accumulator(hidden, weight)
    rows = _supervised(labels, ignore_index, len(weight))
    if rows is not None and len(rows) == 0:
        return hidden.new_zeros(M, dtype=acc), hidden.new_zeros(M, dtype=torch.float64)
    x, w = _cast(_taken(hidden, rows), products), _cast(weight, products)
    options = (label_smoothing, z_loss, False, False, False, precision, workspace)
    factor = torch.ones((), dtype=acc, device=hidden.device)
    losses, lse, *_ = IMPLS[backend].forward(x, w, bias, _taken(labels, rows), factor, *options)
    return _spread(losses.to(acc), rows, M), _spread(lse, rows, M)


@_losses.register_fake
def _(hidden, weight, *rest):
    M = hidden.shape[0]
    return hidden.new_empty(M, dtype=accumulator(hidden, weight)), hidden.new_empty(M, dtype=torch.float64)


@_library.op("linear_cross_entropy_backward")
def _losses_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    products: torch.dtype | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    M = len(hidden)
    rows = _supervised(labels, ignore_index, len(weight))
    wanted = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
    like = [tensor if need and tensor is not None else hidden[:0, 0] for tensor, need in wanted]
    if rows is not None and len(rows) == 0:
        dhidden, dweight, dbias = map(torch.zeros_like, like)
        return dhidden, dweight, dbias
    x, w = _cast(_taken(hidden, rows), products), _cast(weight, products)
    inputs = _taken(grad, rows), x, w, bias, _taken(labels, rows), _taken(lse, rows)
    options = (label_smoothing, z_loss, need_hidden, need_weight, need_bias, precision, workspace)
    found = IMPLS[backend].backward(*inputs, *options)
    dx, dw, dbias = (gradient.to(tensor.dtype) for gradient, tensor in zip(found, like, strict=True))
    return _spread(dx, rows, M) if need_hidden else dx, dw, dbias


@_losses_backward.register_fake
def _(grad, hidden, weight, bias, labels, lse, a, b, c, d, need_hidden, need_weight, need_bias, *limits):
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    return dhidden, dweight, torch.empty_like(bias) if need_bias else hidden.new_empty(0)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:8], inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_of_losses(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    _refuse_second()
    plan, limits = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = _losses_backward(grad, *ctx.saved_tensors, *plan, *needs, *limits)
    return *(gradient if need else None for need, gradient in zip(needs, gradients, strict=True)), *(None,) * 8


_losses.register_autograd(_backward_of_losses, setup_context=_keep_inputs)
