"""Checks that every op shares: each raises with the op, the argument's name, what it expected and what it got."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vlmfast.errors import DTypeError, ShapeError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_matrix(op: str, **tensors: Tensor) -> None:
    """Each tensor is [rows, D] with at least one row and one column."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ShapeError(f"{op}: {name} must be a matrix [rows, D]; got shape {tuple(tensor.shape)}")
        if tensor.numel() == 0:
            raise ShapeError(f"{op}: {name} must have at least one row and one column; got {tuple(tensor.shape)}")


def same_shape(op: str, **tensors: Tensor) -> None:
    """All tensors are [B, D] with the same B and D."""
    first, *rest = tensors.values()
    # Each against the first: a set would hash a symbolic size, and so pin it to one number.
    if any(tensor.shape != first.shape for tensor in rest):
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(
            f"{op}: {' and '.join(tensors)} must have one shape [B, D], row i of each making pair i; got {got}"
        )


def same_width(op: str, **tensors: Tensor) -> None:
    """All matrices have the same number of columns, the embedding width D."""
    first, *rest = tensors.values()
    if any(tensor.shape[1] != first.shape[1] for tensor in rest):
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"{op}: {' and '.join(tensors)} must have one embedding width D (columns); got {got}")


def same_device(op: str, **tensors: Tensor) -> None:
    """All tensors lie on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {got}. Move them with .to(device)")


def floating(op: str, **tensors: Tensor) -> None:
    """Each tensor's dtype is float32, bfloat16, float16, or float64 (the reference only)."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise DTypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}. Use .float()"
            )


def is_integer(op: str, **tensors: Tensor) -> None:
    """Each tensor's dtype is int64."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise DTypeError(f"{op}: {name} must be int64; got {tensor.dtype}. Use .long()")


def is_vector(op: str, length: int, **tensors: Tensor) -> None:
    """Each tensor is [length]."""
    for name, tensor in tensors.items():
        if tensor.shape != (length,):
            raise ShapeError(f"{op}: {name} must be [{length}], one entry a row; got {tuple(tensor.shape)}")


def is_scalar(op: str, **tensors: Tensor) -> None:
    """Each tensor holds one number, in shape [] or [1]."""
    for name, tensor in tensors.items():
        if tensor.numel() != 1 or tensor.dim() > 1:
            raise ShapeError(f"{op}: {name} must hold one number, in shape [] or [1]; got {tuple(tensor.shape)}")


def debugging() -> bool:
    """Whether VLMFAST_DEBUG=1 asks for checks of values, which cost a pass and a device synchronisation."""
    return os.environ.get("VLMFAST_DEBUG") == "1"


def sound_values(op: str, normalize: bool, **tensors: Tensor) -> None:
    """Under VLMFAST_DEBUG=1: no NaN or infinity, and no zero row where rows are to be normalised."""
    if not debugging():
        return
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            where = tuple(int(i) for i in (~finite).nonzero()[0])
            raise ValueError(f"{op}: {name} must be finite; got {tensor[where].item()} at {where}")
        if normalize and tensor.dim() == 2:
            zero = (tensor == 0).all(1)
            if bool(zero.any()):
                row = int(zero.nonzero()[0])
                raise ValueError(
                    f"{op}: {name} row {row} is all zeros and has no direction to normalise; drop it from the batch"
                )


def labels_in_range(op: str, name: str, labels: Tensor, below: int) -> None:
    """Under VLMFAST_DEBUG=1: every label is in [0, below), or -1 for none."""
    if debugging():
        wrong = (labels < -1) | (labels >= below)
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            raise ValueError(f"{op}: {name} must be in [0, {below}) or -1 (none); got {int(labels[where])} at {where}")
