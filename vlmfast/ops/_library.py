"""How an op is registered with torch: as by torch.library.custom_op, for less time a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("vlmfast", "FRAGMENT")


class Op:
    """torch.ops.vlmfast.<name>, with `register_fake` and `register_autograd` as torch.library.custom_op has them.

    custom_op reads the schema anew for every argument of every differentiable call: with a dozen arguments that takes
    longer than a small loss. A call that only autograd wants to see goes to the body without the dispatcher, for the
    same reason. Autocast is off inside the body, whatever it is outside. An op without a registered gradient raises
    when it is asked for one, and every op when it is asked for a derivative in forward mode.
    """

    def __init__(self, name: str, body: Callable) -> None:
        self._name = f"vlmfast::{name}"
        schema = torch.library.infer_schema(body, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.vlmfast, name).default
        body = _outside_autocast(body)
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self._setup_context: Callable | None = None
        self._backward: Callable | None = None
        self._direct = self._autograd(body)
        _LIBRARY.impl(name, self._autograd(self._below_autograd), "Autograd")

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if _watched(args) else self._direct(*args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def register_fake(self, fake: Callable) -> Callable:
        """Decorates the function that tells shapes and dtypes without computing."""
        torch.library.register_fake(self._name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """The gradient: backward(ctx, *gradients), after setup_context(ctx, inputs, output) in the forward."""
        self._backward, self._setup_context = backward, setup_context

    def _autograd(self, below: Callable) -> Callable:
        """`below` with the gradient around it, where an input wants one."""
        op = self

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):  # type: ignore[override]
                output = below(*inputs)
                if op._setup_context is not None:
                    op._setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):  # type: ignore[override]
                if op._backward is None:
                    raise RuntimeError(f"{op._name} has no gradient: call without create_graph=True")
                return op._backward(ctx, *gradients)

        def kernel(*inputs):
            # Autograd would take the tangents of a function without a jvp to be zero.
            if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
                raise RuntimeError(f"{op._name} has no derivative in forward mode: use backward, not jvp")
            tracked = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
            return Node.apply(*inputs) if tracked else below(*inputs)

        return kernel


def op(name: str) -> Callable[[Callable], Op]:
    """Decorates the body of an op: its annotations are the schema, and it changes none of its arguments."""
    return lambda body: Op(name, body)


def _watched(args: tuple) -> bool:
    """Whether somebody besides autograd may want to see the call: a compiler, a transform, a mode, a kind of tensor."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    return any(type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _outside_autocast(body: Callable) -> Callable:
    def run(*inputs):
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return body(*inputs)
        with torch.autocast(device, enabled=False):
            return body(*inputs)

    return run
