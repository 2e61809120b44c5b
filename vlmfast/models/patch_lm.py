"""A language model that reads patches: raw pixels embedded straight among its tokens, without an image tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.errors import DataError, ShapeError
from vlmfast.layers import PatchEmbedding
from vlmfast.models.decoder import Decoder, DecoderConfig
from vlmfast.models.seeded import seeded
from vlmfast.models.vit import check_image
from vlmfast.models.vlm import Vlm

MODEL_TYPE = "vlmfast_patch_lm"
STEMS = ("patch", "conv")
START = 0.02  # deviation of what makes tokens, as in the decoder: what is far larger than words is slow to change


@dataclass(frozen=True)
class PatchLmConfig:
    """A `PatchLm`'s decoder, the images it takes, and how they become tokens."""

    decoder: DecoderConfig
    image_token_id: int  # stands in ids where a patch goes
    image_size: int | tuple[int, int] = 64  # pixels: the side of a square, or (H, W)
    patch_size: int = 8
    stem: str = "patch"  # "patch": one linear map; "conv": 3x3 convolutions of stride 2, to the same grid
    prefix_lm: bool = False  # whether the tokens before the answer see each other, or only those before them
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in 0..1, R G B
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    aspect: str = "square"  # how images are made this size: "pad", "square" or "squash", see `vlmfast.data.LlavaJson`

    def __post_init__(self) -> None:
        if self.stem not in STEMS:
            raise DataError(f"PatchLm: stem must be one of {', '.join(STEMS)}; got {self.stem!r}")
        if self.patch_size < 1 or any(side % self.patch_size or side < 1 for side in self.image_hw):
            raise ShapeError(
                f"PatchLm: image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, at least 1"
            )
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ShapeError(f"PatchLm: with stem 'conv' patch_size must be 2, 4, 8 ...; got {self.patch_size}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it; `from_dict` reads it back."""
        return {"model_type": MODEL_TYPE, **asdict(self), "decoder": self.decoder.to_dict()}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "config") -> PatchLmConfig:
        """The config that `to_dict` wrote.

        Args:
            config: a JSON object.
            name: what errors call it.
        Raises:
            DataError: another kind of model, or a key that is unknown or missing.
        """
        values: dict[str, Any] = dict(config)
        kind = values.pop("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise DataError(f"{name}: model_type must be {MODEL_TYPE!r}; got {kind!r}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise DataError(f"{name}: unknown: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")
        if missing := sorted({"decoder", "image_token_id"} - set(values)):
            raise DataError(f"{name}: {', '.join(missing)} missing")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**{**values, "decoder": DecoderConfig.from_dict(values["decoder"])})


class PatchLm(Vlm):
    """A decoder over patches and text in one stream, all of it trained by the loss on the text.

    Equals, for one image and the ids that follow it, with stem "patch":
        x = (image / 255 - mean) / std
        patches = F.conv2d(x, stem.weight, stem.bias, stride=patch_size).flatten(2).transpose(1, 2) + positions
        decoder(torch.cat([patches, decoder.embed(ids)], 1))

    Args:
        config: sizes.
    Source: Fuyu (Bavishi et al. 2023) for patches straight into the decoder; stem "conv": Xiao et al. 2021, "Early
        convolutions help transformers see better", with GELU and without batch norm; the prefix: Beyer et al. 2024,
        "PaliGemma".
    """

    def __init__(self, config: PatchLmConfig) -> None:
        super().__init__(
            Decoder(config.decoder),
            image_token_id=config.image_token_id,
            image_tokens=math.prod(config.grid),
            image_hw=config.image_hw,
            image_mean=config.image_mean,
            image_std=config.image_std,
            aspect=config.aspect,
            prefix_lm=config.prefix_lm,
        )
        C = config.decoder.width
        self.config = config
        self.stem: PatchEmbedding | ConvStem
        if config.stem == "patch":
            self.stem = PatchEmbedding(C, config.patch_size, config.image_mean, config.image_std, bias=True)
            _start(self.stem, START)
        else:
            self.stem = ConvStem(C, config.patch_size, config.image_mean, config.image_std)
        self.positions = nn.Parameter(START * torch.randn(self.image_tokens, C))

    def encode_image(self, image: Tensor) -> Tensor:
        """Tokens of patches [N, P, C], in reading order. Args and Raises: see `Vlm.encode_image`."""
        check_image(image, self.image_hw)
        return self.stem(image, positions=self.positions)

    def describe(self) -> dict[str, Any]:
        """The config as JSON can hold it, with "model_type": "vlmfast_patch_lm"."""
        return self.config.to_dict()

    def no_weight_decay(self) -> set[str]:
        """The matrices that take no weight decay: what is added to tokens."""
        return {"positions"}


class ConvStem(nn.Module):
    """One token a patch, by 3x3 convolutions of stride 2 with GELU behind each, and a 1x1 convolution at the end.

    Args:
        width: C, features of a token. The convolutions have C / 2**(n - 1), ..., C / 2, C features, at least 8.
        patch_size: 2**n pixels, n convolutions.
        mean, std: of each of the three channels, for pixels in 0..1.
        image: [N, 3, H, W], H and W multiples of patch_size; uint8 in 0..255, or floating and normalised already.
        positions: [P, C], added to the tokens.
    Returns: [N, P, C], patches in reading order.
    Source: Xiao et al. 2021.
    """

    def __init__(self, width: int, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        count = patch_size.bit_length() - 1
        widths = [3, *(max(8, width >> (count - i)) for i in range(1, count)), width]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU()]
            # PyTorch's own start halves the signal in each layer, until the biases alone are left of it.
            _start(parts[-2], math.sqrt(2 / (9 * a)))
        parts.append(nn.Conv2d(width, width, 1))
        _start(parts[-1], START)
        self.convs = nn.Sequential(*parts)
        # Plain floats: a buffer outside the state dict would hold garbage after `to_empty`.
        self.mean = mean
        self.std = std

    def forward(self, image: Tensor, positions: Tensor) -> Tensor:
        if not image.is_floating_point():
            mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (self.mean, self.std))
            image = (image / 255 - mean) / std
        return self.convs(image.to(positions.dtype)).flatten(2).transpose(1, 2) + positions


def _start(conv: nn.Module, std: float) -> None:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=std)
    nn.init.zeros_(conv.bias)


def build_patch_lm(config: PatchLmConfig, *, seed: int | None = None) -> PatchLm:
    """A freshly initialised model.

    Args:
        config: sizes.
        seed: of the weights, which then depend on nothing else and leave PyTorch's CPU generator as it was; None: draws
            from that generator.
    """
    with seeded(seed):
        return PatchLm(config)
