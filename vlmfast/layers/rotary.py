"""Rotary position embeddings: pairs of a head's features turned by an angle that grows with the token's position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the angles of each position, as `apply_rotary` takes them.

    Equals, with angles in float32, as the released weights were trained:
        angles = positions[:, None] * theta ** (-arange(0, K, 2) / K)          # [tokens, K / 2]
        cat([angles, angles], 1).cos(), cat([-angles, angles], 1).sin()

    Args:
        positions: [tokens] int64, at least 0.
        head_width: K, even.
        theta: the base of the wavelengths, 10 000 for Llama, 1 000 000 for Qwen2.
        dtype: of the features that will be turned; the tables are float32 or wider.
    Returns: cos, sin: [tokens, 1, K].
    Source: Su et al. 2021, section 3.2.2; pairs are (k, k + K / 2), as in Hugging Face's Llama, not (2k, 2k + 1).
    """
    steps = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
    angles = positions.to(torch.float32)[:, None] * (1 / theta ** (steps / head_width))
    cos, sin = angles.cos(), angles.sin()
    wide = dtype if dtype == torch.float64 else torch.float32
    return torch.cat([cos, cos], 1)[:, None].to(wide), torch.cat([-sin, sin], 1)[:, None].to(wide)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads' features, each pair (k, k + K / 2) turned by its angle.

    Equals:
        x * cos + x.roll(K // 2, -1) * sin

    Args:
        x: [tokens, H, K] floating.
        cos, sin: [tokens, 1, K], of `rotary`.
    Returns: [tokens, H, K] in the dtype of `x`.
    Source: Su et al. 2021, eq. 34.
    """
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
