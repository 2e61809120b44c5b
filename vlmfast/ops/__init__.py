"""The ops, a folder each; here only what looks at all of them."""

from __future__ import annotations

import torch

from vlmfast.backend import NAMES, PREFERENCE


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that run a float32 `clip_loss` on a device: those that calls try, best first, then any other.

    Args:
        device: where the embeddings would lie.
    Returns: names for `vlmfast.use_backend`. For a single call of any op, `vlmfast.backend.explain` gives reasons too.
    """
    from vlmfast.ops.softmax_loss import IMPLS

    sample = torch.empty(1, 1, dtype=torch.float32, device=device)
    order = PREFERENCE.get(sample.device.type, ("reference",))
    order += tuple(name for name in NAMES if name not in order)
    return tuple(name for name in order if name in IMPLS and IMPLS[name].unsupported(sample, sample) is None)
