"""What tests and benchmarks share: derived tolerances, pairs whose gradients are alive, and traps for wrong kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# (B, D): alone | two | under, on, over a tile of 64 | over 96 | over 256, narrow | over 384, wide
SHAPES = [(1, 1), (2, 3), (63, 64), (64, 64), (65, 33), (97, 100), (257, 3), (385, 640)]


def draw(make: Callable[..., Tensor], *args: Any, generator: torch.Generator, **options: Any) -> Tensor:
    """make(*args, generator=generator, **options) on torch's default device: the same numbers on a GPU as on a CPU.

    Args:
        make: torch.randn, torch.randint or another function that draws numbers.
        args: what it takes.
        generator: of the CPU.
        options: what it takes by name, but no device.
    Returns: what it drew on the CPU.
    """
    return make(*args, generator=generator, device="cpu", **options).to(torch.get_default_device())


def pairs(
    B: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1 / 0.07,
    match: float = 0.2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weakly matched embeddings of many lengths and a scale: pairs that are nearly solved have no gradient to test.

    Args:
        B: number of pairs.
        D: embedding width.
        dtype: of the embeddings.
        scale: the logit scale.
        match: the cosine that a pair has on average; 1 makes text a copy of image.
        seed: of the generator.
    Returns: image [B, D], text [B, D], logit_scale [] float32, on torch's default device, with the same numbers on any.
        Lengths lie between 0.5 and 2.
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    image, noise = torch.randn(2, B, D, generator=generator, **options)
    text = match * image + math.sqrt(1 - match**2) * noise
    lengths = 0.5 + 1.5 * torch.rand(2, B, 1, generator=generator, **options)
    image, text = lengths * torch.nn.functional.normalize(torch.stack([image, text]), dim=2)
    here = torch.get_default_device()
    return image.to(here, dtype), text.to(here, dtype), torch.tensor(scale)


def assert_accurate(
    ours: Tensor,
    exact: Tensor,
    *,
    size: Tensor | float = 1.0,
    cond: Tensor | float = 1.0,
    acc: torch.dtype = torch.float32,
    name: str = "value",
) -> None:
    """Raises when `ours` is further from `exact` than rounding explains. The derivation is in docs/numerics.md.

    Equals, with eps(out) for the dtype of `ours`:
        (ours - exact).abs() <= 4 * cond * eps(acc) * size + eps(out) * exact.abs() + tiny     # each element
        ((ours * exact).sum() / (exact * exact).sum() - 1).abs() <= the part of those that all elements can share

    Args:
        ours: any shape; its dtype is the output's.
        exact: the same shape: the reference in float64 on the same rounded inputs.
        size: natural size of the quantity, the same for all elements or one that broadcasts against them.
        cond: what multiplies rounding on the way: max |logit| for softmaxes of logits, at least 1.
        acc: the dtype that the computation accumulates in.
        name: what is compared, for the message.
    Raises:
        AssertionError: shapes differ, a value is not finite where the exact one is, or an error is too large.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if ours.numel() == 0:
        return
    out = torch.finfo(ours.dtype)
    eps_acc, eps_out = torch.finfo(acc).eps, out.eps
    tiny = max(out.tiny * out.eps, torch.finfo(torch.float32).tiny)  # the spacing of subnormals, or what flushes to 0
    cond = max(1.0, float(cond))
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    size = torch.as_tensor(size, dtype=torch.float64).detach().cpu()

    error = (ours - exact).abs()
    allowed = 4 * cond * eps_acc * size + eps_out * exact.abs() + tiny
    wrong = ~(error <= allowed)  # a NaN is wrong
    if wrong.any():
        excess = torch.where(wrong, (error / allowed).nan_to_num(math.inf, math.inf), 0)
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {ours.numel()} elements are wrong, the worst at {where}: "
            f"got {ours[where]:.9g}, exact {exact[where]:.9g}, error {error[where]:.3g}, "
            f"allowed {allowed.expand_as(error)[where]:.3g}"
        )

    square = exact.square()
    if ours.numel() == 1 or square.sum() == 0:
        return  # one number's gain is its error; without a signal there is no gain
    norm = square.sum().sqrt()
    gain = float((ours * exact).sum() / square.sum() - 1)
    independent = norm**2 / square.square().sum().sqrt()  # sqrt of how many elements carry the signal
    share = 4 * cond * eps_acc * (1 + size.max() / norm) + 2 * eps_out / independent + tiny / norm
    assert abs(gain) <= share, f"{name}: all elements share a gain of {gain:+.3g}; rounding explains {float(share):.3g}"


class Watch(TorchDispatchMode):
    """A mode that records the largest tensor any call returned and fails at one with `limit` elements or more.

    Args:
        limit: elements, B * B for "nothing of the size of the logits".
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() < self.limit, (
                    f"{func} returned {tuple(tensor.shape)}: {tensor.numel()} elements, the limit is {self.limit}"
                )
        return result


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, memory that was allocated and never written holds NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
