"""Pixels to tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv2d):
    """One token a patch: a linear map of its pixels, which may be uint8.

    Equals:
        x = (image / 255 - mean) / std if image.dtype == torch.uint8 else image        # mean, std: one a channel
        F.conv2d(x, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)

    For uint8 pixels 1 / 255, mean and std are folded into the weight, so that no normalised image is ever held.

    Args:
        width: C, features of a token.
        patch_size: p, side of a patch in pixels.
        mean, std: of each of the three channels, for pixels in 0..1.
        bias: whether a bias is added, as in SigLIP and not in CLIP.
        image: [B, 3, H, W], H and W multiples of p; uint8 in 0..255, or floating and normalised already.
    Returns: [B, P, C] in the weight's dtype, P = H W / p², patches in reading order.
    Source: Dosovitskiy et al. 2021, eq. 1; the weight and bias are named and initialised as nn.Conv2d's.
    """

    def __init__(
        self, width: int, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...], *, bias: bool = False
    ) -> None:
        super().__init__(3, width, patch_size, stride=patch_size, bias=bias)
        # Plain floats: a buffer outside the state dict would hold garbage after `to_empty`.
        self.mean = mean
        self.std = std

    def forward(self, image: Tensor) -> Tensor:
        p = self.kernel_size[0]
        patches = image.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, 3, H/p, p, W/p, p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(self.weight.dtype)  # [B, P, 3pp]
        weight, bias = (self.weight, self.bias) if image.is_floating_point() else self._for_uint8()
        return F.linear(patches, weight.flatten(1), bias)

    def _for_uint8(self) -> tuple[Tensor, Tensor]:
        """Weight [C, 3, p, p] and bias [C] that give from pixels in 0..255 what `weight` gives from normalised ones."""
        channels = list(zip(self.weight.unbind(1), self.mean, self.std, strict=True))
        weight = torch.stack([w / (255 * std) for w, _, std in channels], 1)
        bias = torch.stack([w.sum((1, 2)) * (-mean / std) for w, mean, std in channels]).sum(0)
        return weight, bias if self.bias is None else bias + self.bias
