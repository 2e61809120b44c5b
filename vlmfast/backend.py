"""Which implementation of an op runs a call: the first that can, or the one that was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from vlmfast.errors import BackendError

# The order of trial on each kind of device; any other device runs the reference.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
NAMES = ("cuda", "triton", "cpu", "reference")


class _Block:
    """One `use_backend` that has been entered and not yet left."""

    def __init__(self, name: str) -> None:
        self.name = name


# A plain global: torch.compile can guard on it, which it cannot on a ContextVar. The last block entered counts.
_blocks: list[_Block] = []


def _known(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces every op of this process, inside the block, onto backend `name`, or a `BackendError` with the reason.

    Of blocks that overlap, in one thread or in several, the one entered last counts for all threads until it is left.

    Args:
        name: one of "reference", "cpu", "triton", "cuda". The variable VLMFAST_BACKEND does the same for a process.
    Raises:
        BackendError: the name is unknown (at entry), or the backend cannot run a call (at the call).
    """
    block = _Block(_known(name))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)  # its own entry: another thread may have entered a block since, and still be in it


def forced_backend() -> str | None:
    """The backend that `use_backend` or VLMFAST_BACKEND forces, or None."""
    last = _blocks[-1:]  # a slice: another thread may leave the last block at any moment
    if last:
        return last[0].name
    name = os.environ.get("VLMFAST_BACKEND")
    return _known(name) if name else None


def select(op: str, impls: Mapping[str, ModuleType], device: torch.device, *args: Any) -> str:
    """The name of the backend that runs this call of `op`.

    Args:
        op: name of the op, for the error.
        impls: backend name -> module with `unsupported(*args) -> str | None`.
        device: where the op's tensors lie.
        args: what `unsupported` looks at: devices, dtypes, shapes and strides, never values.
    Raises:
        BackendError: a forced backend cannot run the call.
    """
    name = forced_backend()
    if name is not None:
        why = impls[name].unsupported(*args) if name in impls else "this op has no such backend"
        if why is not None:
            raise BackendError(f"{op}: backend {name!r} cannot run this call: {why}")
        return name
    for name in PREFERENCE.get(device.type, ("reference",)):
        if name in impls and impls[name].unsupported(*args) is None:
            return name
    return "reference"


def explain(impls: Mapping[str, ModuleType], *args: Any) -> dict[str, str]:
    """Each backend's name -> "runs", or the reason why it cannot run this call."""
    return {name: impl.unsupported(*args) or "runs" for name, impl in impls.items()}
