"""Pixels to tokens."""

from torch import Tensor, nn

from vlmfast.ops.patch_embedding import patch_embed


class PatchEmbedding(nn.Conv2d):
    """One token a patch: a linear map of its pixels, which may be uint8.

    Equals:
        x = (image / 255 - mean) / std if image.dtype == torch.uint8 else image        # mean, std: one a channel
        x = F.conv2d(x, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
        torch.cat([class_token.expand(B, 1, -1), x], 1) + positions

    `vlmfast.ops.patch_embedding` does it without a float copy of a uint8 image, which is all that backward needs.

    Args:
        width: C, features of a token.
        patch_size: p, side of a patch in pixels.
        mean, std: of each of the three channels, for pixels in 0..1.
        bias: whether a bias is added, as in SigLIP and not in CLIP.
        image: [B, 3, H, W], H and W multiples of p; uint8 in 0..255, or floating and normalised already.
        class_token: [C], put first, or None.
        positions: [P, C], or [1 + P, C] with a class token; or None.
    Returns: [B, P, C] or [B, 1 + P, C] in the weight's dtype, P = H W / p², patches in reading order.
    Source: Dosovitskiy et al. 2021, eq. 1; the weight and bias are named and initialised as nn.Conv2d's.
    """

    def __init__(
        self, width: int, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...], *, bias: bool = False
    ) -> None:
        super().__init__(3, width, patch_size, stride=patch_size, bias=bias)
        # Plain floats: a buffer outside the state dict would hold garbage after `to_empty`.
        self.mean = mean
        self.std = std

    def forward(self, image: Tensor, class_token: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        mean, std = (None, None) if image.is_floating_point() else (self.mean, self.std)
        return patch_embed(
            image, self.weight, self.bias, class_token=class_token, positions=positions, mean=mean, std=std
        )
