"""Softmax contrastive losses: CLIP's symmetric loss and InfoNCE with labels, groups of positives and smoothing."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vlmfast.backend import select
from vlmfast.errors import ShapeError
from vlmfast.ops import _check, _library, _limits
from vlmfast.ops._lazy import Lazy
from vlmfast.ops._unit import accumulator
from vlmfast.ops.softmax_loss import _cpu, reference

__all__ = ["clip_loss", "info_nce_loss"]

IMPLS: dict[str, ModuleType] = {"triton": Lazy(f"{__name__}._triton"), "cpu": _cpu, "reference": reference}


def clip_loss(
    image: Tensor,  # [B, D]
    text: Tensor,  # [B, D]
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    precision: str | None = None,
    max_workspace: int | None = None,
) -> Tensor:
    """Mean symmetric cross-entropy of matching each image to its text, in nats.

    Equals, without ever holding the [B, B] logits:
        z = logit_scale * normalize(image) @ normalize(text).T
        (cross_entropy(z, arange(B)) + cross_entropy(z.T, arange(B))) / 2
    with `label_smoothing` passed on to cross_entropy. The backward keeps the inputs and two vectors [B].
    Differentiable once, backwards: double backward, forward mode and torch.func raise.

    Args:
        image: [B, D] embeddings. float32, bfloat16, float16, or float64 (on the reference). Sums are float32 (float64).
        text: [B, D], row i belongs to image i; its dtype may differ from image's.
        logit_scale: [] or [1], the multiplier itself (1 / temperature), not its log; its gradient has its shape. Or a
            number.
        label_smoothing: in [0, 1): the part of the target that is spread over all B, as in ALIGN.
        normalize: divide each row by its length first, as F.normalize (lengths are clamped at 1e-12).
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
        max_workspace: bytes of tiles that a GPU's call may hold at one time, in the backward and from forward to
            backward; None is 2**27, or VLMFAST_MAX_WORKSPACE. More of it spares computing tiles a second time.
    Returns: [] float32 (float64 for float64 embeddings).
    Raises:
        ShapeError: image and text are not matrices of one shape, one has no rows, or logit_scale is not one number.
        DTypeError: a tensor is not floating.
        BackendError: a backend was forced that cannot run this call.
        ValueError: the tensors lie on different devices, label_smoothing or max_workspace is out of range, or precision
            is unknown.
    Source: Radford et al. 2021, Fig. 3; smoothing as in Jia et al. 2021. We clamp lengths at 1e-12; the paper does not.
    """
    op = "clip_loss"
    logit_scale = _checked(op, label_smoothing, normalize, logit_scale, image=image, text=text)
    _check.same_shape(op, image=image, text=text)
    backend = select(op, IMPLS, image.device, image, text)
    B = image.shape[0]
    ids = torch.arange(B, device=image.device)
    weight = torch.full((B,), 0.5 / B, dtype=accumulator(image, text), device=image.device)
    plan = (ids, ids, weight, weight, None, None, "index", float(label_smoothing), normalize)
    limits = _limited(op, precision, max_workspace, image, text, logit_scale)
    return _softmax_loss(image, text, logit_scale, *plan, *limits, backend)[0]


def info_nce_loss(
    query: Tensor,  # [M, D]
    key: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    labels: Tensor | None = None,  # [M] int64
    *,
    offset: int = 0,
    query_ids: Tensor | None = None,  # [M] int64
    key_ids: Tensor | None = None,  # [N] int64
    positives: str = "out",
    directions: str = "rows",
    label_smoothing: float = 0.0,
    normalize: bool = True,
    precision: str | None = None,
    max_workspace: int | None = None,
) -> Tensor:
    """Mean cross-entropy of finding each query's positive keys among all keys, in nats.

    Equals, with one positive a query (`labels`, by default arange(M) + offset) and without ever holding the logits:
        z = logit_scale * normalize(query) @ normalize(key).T  # [M, N]
        cross_entropy(z, labels, ignore_index=-1, label_smoothing=label_smoothing)
    With `query_ids` and `key_ids`, P = query_ids[:, None] == key_ids are the positives and m = P.sum(1) their numbers;
    a query's loss is then, by `positives` (all three are the above where m = 1):
        "out", "soft": -(P * log_softmax(z, 1)).sum(1) / m  # SupCon's "out" and soft targets P / m: one formula
        "in":          -(P * softmax(z, 1)).sum(1).log()    # MIL-NCE
    The mean runs over the queries that have a positive; with none at all the loss is 0. The backward keeps the inputs
    and the log-sum-exps. Differentiable once, backwards: double backward, forward mode and torch.func raise.

    Args:
        query: [M, D] embeddings. float32, bfloat16, float16, or float64 (on the reference). Sums are float32 (float64).
        key: [N, D]; its dtype may differ from query's.
        logit_scale: [] or [1], the multiplier itself (1 / temperature), not its log; its gradient has its shape. Or a
            number.
        labels: [M] int64, the key of each query, in [0, N), or -1 for a query without one.
        offset: without labels or ids, query i belongs to key i + offset (rank * M when keys come from all ranks).
        query_ids: [M] int64 group ids, any values. Query i and key j are positives where the ids are equal.
        key_ids: [N] int64. Given with query_ids, instead of labels and offset.
        positives: "out", "in" or "soft": what several positives mean.
        directions: "rows" (queries among keys), "columns" (keys among queries: the same with z.T and P.T), or "both",
            half of each.
        label_smoothing: in [0, 1): the part of a target that is spread over all keys (columns: all queries). Not with
            "in", which has no target distribution.
        normalize: divide each row by its length first, as F.normalize (lengths are clamped at 1e-12).
        precision: how a GPU multiplies float32 embeddings: "bf16x3" (two bfloat16 parts each, three products; None
            means this, or VLMFAST_PRECISION), "tf32" (11 bits) or "ieee" (float32, without the matrix unit).
        max_workspace: bytes of tiles that a GPU's call may hold at one time, in the backward and from forward to
            backward; None is 2**27, or VLMFAST_MAX_WORKSPACE. More of it spares computing tiles a second time.
    Returns: [] float32 (float64 for float64 embeddings).
    Raises:
        ShapeError: query or key is not a matrix with rows, their widths differ, logit_scale is not one number, labels
            or ids have a wrong length, or offset + M passes N.
        DTypeError: an embedding or the scale is not floating, or labels or ids are not int64.
        BackendError: a backend was forced that cannot run this call.
        ValueError: the tensors lie on different devices, an option or a combination is unknown, or a label is out of
            range (looked at on the CPU outside torch.compile; elsewhere under VLMFAST_DEBUG=1 only, else it counts as
            -1).
    Source: van den Oord et al. 2018, eq. 4; "out" Khosla et al. 2020, eq. 2; "in" Miech et al. 2020, eq. 1; "soft" Yang
        et al. 2022 (UniCL), eq. 3-4. They skip no query; we skip those without a positive.
    """
    op = "info_nce_loss"
    logit_scale = _checked(op, label_smoothing, normalize, logit_scale, query=query, key=key)
    _check_options(op, labels, offset, query_ids, key_ids, positives, directions, label_smoothing)
    backend = select(op, IMPLS, query.device, query, key)
    M, N, device, dtype = query.shape[0], key.shape[0], query.device, accumulator(query, key)

    form = "index"
    if query_ids is not None and key_ids is not None:
        _check.is_integer(op, query_ids=query_ids, key_ids=key_ids)
        _check.is_vector(op, M, query_ids=query_ids)
        _check.is_vector(op, N, key_ids=key_ids)
        _check.same_device(op, query=query, query_ids=query_ids, key_ids=key_ids)
        form = "in" if positives == "in" else "out"
        row_ids, col_ids = query_ids.contiguous(), key_ids.contiguous()  # kernels read them one after the other
    elif labels is not None:
        _check.is_integer(op, labels=labels)
        _check.is_vector(op, M, labels=labels)
        _check.same_device(op, query=query, labels=labels)
        _check_labels(op, labels, N)
        row_ids = torch.where((labels >= 0) & (labels < N), labels, -1)
        # Seen from the columns several queries may have one label, or none: that is the form "out".
        form = "index" if directions == "rows" else "out"
        col_ids = torch.arange(N, device=device)
    else:
        if offset < 0 or offset + M > N:
            raise ShapeError(
                f"{op}: query i belongs to key i + offset, so offset must be in [0, N - M = {N - M}]; got {offset} "
                f"with {M} queries and {N} keys. Pass labels for any other pairing"
            )
        row_ids = torch.arange(offset, offset + M, device=device)
        col_ids = torch.arange(-offset, N - offset, device=device)
        col_ids = torch.where((col_ids >= 0) & (col_ids < M), col_ids, -1)

    row_weight = col_weight = row_share = col_share = None
    part = 0.5 if directions == "both" else 1.0
    if directions != "columns":
        row_weight, row_share = _weights(row_ids, col_ids, form, part, dtype)
    if directions != "rows":
        col_weight, col_share = _weights(col_ids, row_ids, form, part, dtype)
    plan = (row_ids, col_ids, row_weight, col_weight, row_share, col_share, form, float(label_smoothing), normalize)
    limits = _limited(op, precision, max_workspace, query, key, logit_scale)
    return _softmax_loss(query, key, logit_scale, *plan, *limits, backend)[0]


def _weights(
    ids: Tensor, other_ids: Tensor, form: str, part: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(part / number of rows with a positive, or 0 for a row without; 1 / number of its positives for "out")."""
    if form == "index":
        positives = (ids >= 0).to(dtype)
    else:
        other = other_ids.sort().values
        positives = (torch.searchsorted(other, ids, right=True) - torch.searchsorted(other, ids)).to(dtype)
    has = (positives > 0).to(dtype)
    return has * (part / has.sum().clamp_min(1)), has / positives.clamp_min(1) if form == "out" else None


def _limited(op: str, precision: str | None, max_workspace: int | None, *inputs: Tensor) -> tuple[str, int, int]:
    """(precision, bytes that the forward may keep for the backward, bytes of the backward's own)."""
    chosen, most = _limits.precision(op, precision), _limits.workspace(op, max_workspace)
    x, y, _ = inputs
    whole = x.shape[0] * y.shape[0] * max(x.element_size(), y.element_size())
    own = min(most, _limits.MAX_WORKSPACE, whole)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    # A compiler plans with sizes that it knows: what is kept depends on the backend.
    return chosen, most - own if wanted and not torch.compiler.is_compiling() else 0, own


def _checked(op: str, label_smoothing: float, normalize: bool, logit_scale: Tensor | float, **sides: Tensor) -> Tensor:
    """The logit scale as a [] tensor of the loss's dtype, once all that the two ops share is fit for them."""
    _check.is_matrix(op, **sides)
    _check.floating(op, **sides)
    _check.same_width(op, **sides)
    first = next(iter(sides.values()))
    dtype = accumulator(*sides.values())
    if not isinstance(logit_scale, Tensor):
        logit_scale = torch.full((), logit_scale, dtype=dtype, device=first.device)
    _check.is_scalar(op, logit_scale=logit_scale)
    _check.floating(op, logit_scale=logit_scale)
    _check.same_device(op, **sides, logit_scale=logit_scale)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1); got {label_smoothing}")
    _check.sound_values(op, normalize, **sides, logit_scale=logit_scale)
    return logit_scale.to(dtype).reshape(())


def _check_options(
    op: str,
    labels: Tensor | None,
    offset: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    positives: str,
    directions: str,
    label_smoothing: float,
) -> None:
    if positives not in ("out", "in", "soft"):
        raise ValueError(f"{op}: positives must be 'out', 'in' or 'soft'; got {positives!r}")
    if directions not in ("rows", "columns", "both"):
        raise ValueError(f"{op}: directions must be 'rows', 'columns' or 'both'; got {directions!r}")
    if positives == "in" and label_smoothing > 0:
        raise ValueError(f"{op}: positives='in' has no target to smooth; use 'out', or label_smoothing=0")
    if (query_ids is None) != (key_ids is None):
        raise ValueError(f"{op}: query_ids and key_ids go together; got only one of them")
    if (labels is not None) + (query_ids is not None) + (offset != 0) > 1:
        raise ValueError(f"{op}: give the positives once: by labels, by offset, or by query_ids and key_ids")


def _check_labels(op: str, labels: Tensor, N: int) -> None:
    """Values are looked at where that costs no device synchronisation, or where it was asked for."""
    if _check.debugging() or (labels.device.type == "cpu" and not torch.compiler.is_compiling()):
        low, high = (int(value) for value in labels.aminmax())
        if low < -1 or high >= N:
            raise ValueError(f"{op}: labels must be in [0, {N}), or -1 for none; got {low if low < -1 else high}")


@_library.op("softmax_loss")
def _softmax_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_share: Tensor | None,
    col_share: Tensor | None,
    form: str,
    label_smoothing: float,
    normalize: bool,
    precision: str,
    keep: int,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = (row_ids, col_ids, row_weight, col_weight, row_share, col_share, form, label_smoothing, normalize)
    return IMPLS[backend].forward(x, y, logit_scale, *plan, precision, keep)


@_softmax_loss.register_fake
def _(x, y, logit_scale, row_ids, col_ids, row_weight, col_weight, row_share, col_share, form, *options):
    dtype = accumulator(x, y)
    M = 0 if row_weight is None else x.shape[0]
    N = 0 if col_weight is None else y.shape[0]
    positive = (M, N) if form == "in" else (0, 0)
    lses = (x.new_empty(size, dtype=torch.float64) for size in (M, N, *positive))
    return x.new_empty((), dtype=dtype), *lses, x.new_empty(0, dtype=torch.uint8)


@_library.op("softmax_loss_backward")
def _softmax_loss_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    row_share: Tensor | None,
    col_share: Tensor | None,
    form: str,
    label_smoothing: float,
    normalize: bool,
    row_lse: Tensor,
    col_lse: Tensor,
    row_pos_lse: Tensor,
    col_pos_lse: Tensor,
    kept: Tensor,
    need_x: bool,
    need_y: bool,
    precision: str,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = (row_ids, col_ids, row_weight, col_weight, row_share, col_share, form, label_smoothing, normalize)
    saved = (row_lse, col_lse, row_pos_lse, col_pos_lse, kept)
    return IMPLS[backend].backward(grad, x, y, logit_scale, *plan, *saved, need_x, need_y, precision, workspace)


@_softmax_loss_backward.register_fake
def _(grad, x, y, *rest):
    need_x, need_y = rest[-5:-3]
    dx = x.new_empty(x.shape if need_x else 0)
    dy = y.new_empty(y.shape if need_y else 0)
    return dx, dy, x.new_empty((), dtype=accumulator(x, y))


def _keep(ctx, inputs, output) -> None:
    *tensors, form, label_smoothing, normalize, precision, _, workspace, backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.plan = (form, label_smoothing, normalize)
    ctx.limits = (precision, workspace, backend)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 16
    tensors, saved = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    dx, dy, dscale = _softmax_loss_backward(grad, *tensors, *ctx.plan, *saved, need_x, need_y, *ctx.limits)
    return dx if need_x else None, dy if need_y else None, dscale if need_scale else None, *(None,) * 13


_softmax_loss.register_autograd(_backward, setup_context=_keep)
