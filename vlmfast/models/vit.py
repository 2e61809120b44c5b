"""The image tower: a vision transformer pooled at its class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.layers import LayerNorm, PatchEmbedding, Transformer


@dataclass(frozen=True)
class VisionConfig:
    """The image tower's sizes, under the names of open_clip's `vision_cfg`."""

    image_size: int | tuple[int, int] = 224  # pixels: the side of a square, or (H, W)
    layers: int = 12
    width: int = 768
    head_width: int = 64
    patch_size: int = 16
    mlp_ratio: float = 4.0
    act_kwargs: dict[str, Any] | None = None  # {"approximate": "tanh"} or nothing

    def __post_init__(self) -> None:
        if self.width % self.head_width:
            raise ShapeError(f"vision_cfg: width {self.width} must be a multiple of head_width {self.head_width}")
        if any(side % self.patch_size for side in self.image_hw):
            raise ShapeError(
                f"vision_cfg: image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def tokens(self) -> int:
        """The class token and one a patch."""
        height, width = self.image_hw
        return 1 + (height // self.patch_size) * (width // self.patch_size)


class ViT(nn.Module):
    """Image embeddings [B, D], not normalised: the class token after the last block, normalised and projected.

    Equals:
        x = ln_pre(cat([class_embedding, conv1(image)]) + positional_embedding)
        ln_post(transformer(x)[:, 0]) @ proj

    Args:
        config: sizes.
        embed_dim: D.
        activation: a key of `vlmfast.layers.ACTIVATIONS`.
        mean, std: of each channel, for pixels in 0..1.
        image: [B, 3, H, W]; uint8 in 0..255, or floating and already normalised with mean and std.
    Returns: [B, D].
    Raises:
        ShapeError: image is not [B, 3, H, W] of the configured size.
        DTypeError: image is neither uint8 nor floating.
    Source: Dosovitskiy et al. 2021; ln_pre and the initialisation as in OpenAI's CLIP.
    """

    def __init__(
        self, config: VisionConfig, embed_dim: int, activation: str, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        C, scale = config.width, config.width**-0.5
        self.image_hw = config.image_hw
        self.conv1 = PatchEmbedding(C, config.patch_size, mean, std)
        self.class_embedding = nn.Parameter(scale * torch.randn(C))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.tokens, C))
        self.ln_pre = LayerNorm(C)
        # The blocks keep PyTorch's own initialisation: OpenAI's CLIP sets none in the image tower.
        self.transformer = Transformer(config.layers, C, C // config.head_width, config.mlp_ratio, activation)
        self.ln_post = LayerNorm(C)
        self.proj = nn.Parameter(scale * torch.randn(C, embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        return self.ln_post(self.tokens(image)[:, 0]) @ self.proj

    def tokens(self, image: Tensor) -> Tensor:
        """The last block's output [B, 1 + P, C], not normalised: the class token, then patches in reading order."""
        self._check(image)
        x = self.conv1(image)  # [B, P, C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.transformer(self.ln_pre(x + self.positional_embedding))

    def _check(self, image: Tensor) -> None:
        H, W = self.image_hw
        if image.dim() != 4 or image.shape[1:] != (3, H, W) or not len(image):
            raise ShapeError(
                f"encode_image: image must be [B, 3, {H}, {W}], B >= 1; got {tuple(image.shape)}. "
                f"Resize and crop to {H} x {W} pixels, channels first, or build a model with another image_size"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise DTypeError(
                f"encode_image: image must be uint8 in 0..255, or floating and normalised with the config's mean and "
                f"std; got {image.dtype}. Use .to(torch.uint8)"
            )
