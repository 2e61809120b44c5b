"""The image tower of CLIP's RN50 .. RN50x64: a ResNet with a deeper stem, blurred strides and attention pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import ShapeError
from vlmfast.models.vit import Group, VisionConfig, check_image


class ModifiedResNet(nn.Module):
    """Image embeddings [B, D], not normalised, from a ResNet under the parameter names of OpenAI's CLIP.

    It differs from He et al.'s: three convolutions as stem and an average instead of a maximum after them; every stride
    is an average before a convolution; the last map is pooled by attention, whose query is the map's mean.

    Args:
        config: `layers` blocks in each of the four stages, `width` channels after the stem.
        embed_dim: D.
        mean, std: of each channel, for pixels in 0..1.
        image: [B, 3, H, W]; uint8 in 0..255, or floating and already normalised with mean and std.
    Returns: [B, D].
    Raises:
        ShapeError: image is not [B, 3, H, W] of the configured size.
        DTypeError: image is neither uint8 nor floating.
    Source: Radford et al. 2021, section 2.4; the initialisation as in OpenAI's CLIP.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        assert isinstance(config.layers, tuple)
        self.config = config
        self.mean, self.std = mean, std
        C = config.width
        for i, (into, out, stride) in enumerate([(3, C // 2, 2), (C // 2, C // 2, 1), (C // 2, C, 1)], 1):
            self.add_module(f"conv{i}", nn.Conv2d(into, out, 3, stride, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
        into = C
        for i, blocks in enumerate(config.layers):
            planes = C * 2**i
            stage = [
                Bottleneck(into if n == 0 else 4 * planes, planes, 2 if i and n == 0 else 1) for n in range(blocks)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            into = 4 * planes
        heads = C * 32 // config.head_width
        self.attnpool = MapPool((config.image_hw[0] // 32) ** 2, 32 * C, heads, embed_dim)
        for name, p in self.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(p)  # every block starts as the identity

    def forward(self, image: Tensor) -> Tensor:
        return self.attnpool(self.tokens(image))

    def tokens(self, image: Tensor) -> Tensor:
        """The last stage's map [B, 32 C, H / 32, W / 32]."""
        check_image(image, self.config.image_hw)
        x = image.to(self.attnpool.positional_embedding.dtype)
        if not image.is_floating_point():
            # Not folded into conv1: its padding is zeros of normalised pixels.
            mean, std = (x.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
            x = (x / 255 - mean) / std
        for i in (1, 2, 3):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
        x = F.avg_pool2d(x, 2)
        for i in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return x

    def groups(self) -> list[Group]:
        """Raises ShapeError: as in open_clip, a ResNet is locked whole."""
        raise ShapeError("lock_image_tower: a ResNet is locked whole; use unlocked_groups=0")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing, as in open_clip: a batch norm that ran twice would count its batch twice."""

    def no_weight_decay(self) -> set[str]:
        """No matrix but those that AdamW's groups leave out already."""
        return set()


class Bottleneck(nn.Module):
    """A residual block of three convolutions: 1 x 1, 3 x 3 and 1 x 1 to four times the channels.

    Args:
        into: channels of x.
        planes: channels within.
        stride: 2 halves height and width, by averages.
        x: [B, into, H, W].
    Returns: [B, 4 planes, H / stride, W / stride].
    """

    def __init__(self, into: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(into, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or into != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(into, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class MapPool(nn.Module):
    """One vector a map: the attention of the map's mean over itself and all places, projected.

    Args:
        places: H W of the map.
        width: C, its channels.
        heads: attention heads.
        embed_dim: D.
        x: [B, C, H, W].
    Returns: [B, D].
    """

    def __init__(self, places: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT  # [B, HW, C]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
