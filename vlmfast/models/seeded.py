"""Fresh weights that depend on a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """What is drawn inside depends on the seed alone, and PyTorch's CPU generator is afterwards as it was.

    Args:
        seed: None: draws from that generator, which moves on.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
