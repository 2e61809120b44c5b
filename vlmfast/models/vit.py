"""The image tower: a vision transformer pooled at its class token, at the mean of its patches, or by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DataError, DTypeError, ShapeError
from vlmfast.layers import LayerNorm, Mlp, PatchEmbedding, Transformer, looked_into
from vlmfast.ops.patch_embedding import interpolate_positions

POOLS = ("tok", "avg", "map")
Group: TypeAlias = list[nn.Module | nn.Parameter | None]  # of parameters that are frozen together


@dataclass(frozen=True)
class VisionConfig:
    """The image tower's sizes, under the names of open_clip's `vision_cfg`; four numbers as `layers` make a ResNet."""

    image_size: int | tuple[int, int] = 224  # pixels: the side of a square, or (H, W)
    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    patch_size: int = 16
    mlp_ratio: float = 4.0
    act_kwargs: dict[str, Any] | None = None  # {"approximate": "tanh"} or nothing
    norm_kwargs: dict[str, Any] | None = None  # {"eps": ...}; nothing: 1e-5
    ls_init_value: float | None = None  # of LayerScale; None: the blocks have none
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False  # the mean of the patches is normalised, not what it is the mean of
    pool_type: str = "tok"  # "tok" the class token, "avg" the mean of the patches, "map" SigLIP's attention pooling

    def __post_init__(self) -> None:
        height, width = self.image_hw
        if isinstance(self.layers, tuple):
            if len(self.layers) != 4 or height != width or height % 32:
                raise ShapeError(
                    f"vision_cfg: a ResNet has four numbers of layers and square images of a multiple of 32 pixels; "
                    f"got layers {list(self.layers)}, image_size {self.image_size}"
                )
            return
        if self.pool_type not in POOLS:
            raise DataError(f"vision_cfg: pool_type must be one of {', '.join(POOLS)}; got {self.pool_type!r}")
        if self.width % self.head_width:
            raise ShapeError(f"vision_cfg: width {self.width} must be a multiple of head_width {self.head_width}")
        # SigLIP's So400m at 384 pixels and patches of 14 leaves 6 pixels out; for the rest a remainder is a mistake.
        if self.pool_type != "map" and any(side % self.patch_size for side in self.image_hw):
            raise ShapeError(
                f"vision_cfg: image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """One a patch, and the class token; SigLIP's attention pooling has none."""
        return (self.pool_type != "map") + self.grid[0] * self.grid[1]

    @property
    def eps(self) -> float:
        """Of every normalisation."""
        return (self.norm_kwargs or {}).get("eps", 1e-5)


class ViT(nn.Module):
    """Image embeddings [B, D], not normalised: the class token after the last block, normalised and projected.

    Equals, with `pool_type` "tok":
        x = ln_pre(cat([class_embedding, conv1(image)]) + positional_embedding)
        ln_post(transformer(x)[:, 0]) @ proj

    With "avg" the patches' mean takes the class token's place; "map" is SigLIP's tower: a bias in conv1, no class
    token, no ln_pre, no projection, and `attn_pool` over ln_post of all patches.

    Args:
        config: sizes.
        embed_dim: D, with "map" the width.
        activation: a key of `vlmfast.layers.ACTIVATIONS`.
        mean, std: of each channel, for pixels in 0..1.
        image: [B, 3, H, W]; uint8 in 0..255, or floating and already normalised with mean and std. Or a list of B
            images [3, H, W], each of its own size in whole patches: positions are interpolated, and the tokens of all
            lie in one stream without padding.
    Returns: [B, D].
    Raises:
        ShapeError: image is not [B, 3, H, W] of the configured size, one of a list is not [3, H, W] in whole patches,
            or D is not the width that "map" ends with.
        DTypeError: image is neither uint8 nor floating.
    Source: Dosovitskiy et al. 2021; ln_pre and the initialisation as in OpenAI's CLIP; "map": Zhai et al. 2022.
    """

    def __init__(
        self, config: VisionConfig, embed_dim: int, activation: str, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        assert isinstance(config.layers, int)
        C, scale, eps = config.width, config.width**-0.5, config.eps
        mapped = config.pool_type == "map"
        if mapped and embed_dim != C:
            raise ShapeError(f"vision_cfg: pool_type 'map' ends with the width {C}, and embed_dim is {embed_dim}")
        self.config = config
        self.conv1 = PatchEmbedding(C, config.patch_size, mean, std, bias=mapped)
        self.class_embedding = None if mapped else nn.Parameter(scale * torch.randn(C))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.tokens, C))
        self.ln_pre = nn.Identity() if mapped or config.no_ln_pre else LayerNorm(C, eps)
        # The blocks keep PyTorch's own initialisation: OpenAI's CLIP sets none in the image tower.
        self.transformer = Transformer(
            config.layers,
            C,
            C // config.head_width,
            config.mlp_ratio,
            activation,
            eps=eps,
            layer_scale=config.ls_init_value,
        )
        self.ln_post = LayerNorm(C, eps)
        heads = C // config.head_width
        self.attn_pool = AttentionPool(C, heads, config.mlp_ratio, activation, eps) if mapped else None
        self.proj = None if mapped else nn.Parameter(scale * torch.randn(C, embed_dim))

    def forward(self, image: Tensor | Sequence[Tensor]) -> Tensor:
        if not isinstance(image, Tensor):
            return self._of_their_own_sizes(image)
        if (
            self.config.pool_type == "tok"
            and self.attn_pool is None
            and not looked_into(self.transformer, self.ln_post)
        ):
            x = self._embed(image)
            first = torch.arange(0, x.shape[:2].numel(), x.shape[1], device=x.device)  # of each image: the class token
            return self.ln_post(self.transformer(x, pooled=first)) @ self.proj
        return self._pooled(self.tokens(image))

    def _pooled(self, x: Tensor) -> Tensor:
        """[B, D] from the last block's output [B, T, C]."""
        if self.attn_pool is not None:
            return self.attn_pool(self.ln_post(x))
        if self.config.pool_type == "tok":
            pooled = self.ln_post(x[:, 0])
        elif self.config.final_ln_after_pool:
            pooled = self.ln_post(x[:, 1:].mean(1))
        else:
            pooled = self.ln_post(x[:, 1:]).mean(1)
        return pooled @ self.proj

    def _of_their_own_sizes(self, images: Sequence[Tensor]) -> Tensor:
        """[B, D] of images [3, H, W]: those of one size are embedded together, and lie side by side in the stream."""
        check_images(images, self.config.patch_size)
        p = self.config.patch_size
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(tuple(image.shape[1:]), []).append(i)
        # Short sequences first, as they lie best on the CPU.
        sizes = sorted(groups, key=lambda size: (size[0] * size[1], size))
        embedded = []
        for H, W in sizes:
            positions = interpolate_positions(
                self.positional_embedding,
                (H // p, W // p),
                old_grid=self.config.grid,
                class_token=self.class_embedding is not None,
            )
            batch = torch.stack([images[i] for i in groups[H, W]])
            embedded.append(self.ln_pre(self.conv1(batch, self.class_embedding, positions)))
        lengths = [x.shape[1] for x in embedded for _ in x]
        ends = torch.tensor([0, *lengths], device=embedded[0].device).cumsum(0, dtype=torch.int32)
        stream = self.transformer(torch.cat([x.flatten(0, 1) for x in embedded]), ends, max(lengths))
        parts = stream.split([x.shape[:2].numel() for x in embedded])
        pooled = torch.cat([self._pooled(part.view_as(x)) for part, x in zip(parts, embedded, strict=True)])
        order = torch.tensor([i for size in sizes for i in groups[size]], device=pooled.device)
        return pooled[order.argsort()]

    def tokens(self, image: Tensor, blocks: int | None = None) -> Tensor:
        """What the blocks give [B, 1 + P, C], not normalised: the class token, then patches in reading order.

        Args:
            image: [B, 3, H, W], see `ViT`.
            blocks: how many of them run, from the first on; None: all.
        """
        return self.transformer(self._embed(image), blocks=blocks)

    def _embed(self, image: Tensor) -> Tensor:
        """What the first block takes [B, 1 + P, C]."""
        check_image(image, self.config.image_hw)
        rows, columns = self.config.grid
        p = self.config.patch_size
        image = image[:, :, : rows * p, : columns * p]
        if self.conv1._forward_hooks:  # somebody looks at the patches alone, [B, P, C]
            x = self.conv1(image)
            if self.class_embedding is not None:
                x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
            x = x + self.positional_embedding
        else:
            x = self.conv1(image, self.class_embedding, self.positional_embedding)
        return self.ln_pre(x)

    def groups(self) -> list[Group]:
        """What `Clip.lock_image_tower` unlocks from the end, as open_clip groups it: embeddings, blocks, projection."""
        stem: Group = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        blocks: list[Group] = [[block] for block in self.transformer.resblocks]
        blocks[-1].append(self.ln_post)
        return [stem, *blocks, [self.attn_pool, self.proj]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward, which then runs each block a second time."""
        self.transformer.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The matrices that take no weight decay: what is added to tokens."""
        return {"positional_embedding", "class_embedding"} if self.attn_pool is None else {"positional_embedding"}


class AttentionPool(nn.Module):
    """One vector an image: a learned query's attention over its tokens, and a perceptron on the outcome.

    Equals:
        y = nn.MultiheadAttention(width, heads)(probe, x, x)
        y + mlp(ln(y))

    Args:
        width, heads, mlp_ratio, activation, eps: as for `vlmfast.layers.Block`.
        x: [B, T, C].
    Returns: [B, C].
    Source: Zhai et al. 2022 (multihead attention pooling), as in SigLIP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(width**-0.5 * torch.randn(width))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.ln = LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor) -> Tensor:
        C = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(self.probe, weight[:C], bias[:C]).view(1, self.heads, 1, -1).expand(len(x), -1, -1, -1)
        k, v = F.linear(x, weight[C:], bias[C:]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.out_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))  # q [B, H, 1, K]; k, v [B, H, T, K]
        return y + self.mlp(self.ln(y))


def check_images(images: Sequence[Tensor], patch_size: int) -> None:
    """Nothing, if an image tower can take a list of images, each in its own size.

    Args:
        images: anything.
        patch_size: in pixels.
    Raises:
        ShapeError: there is none, or one is not [3, H, W] with H and W in whole patches.
        DTypeError: they are not of one dtype, uint8 or floating.
    """
    if len(images) == 0:
        raise ShapeError("encode_image: a list of images must hold at least one")
    for i, image in enumerate(images):
        if image.dim() != 3 or len(image) != 3 or image.numel() == 0 or any(n % patch_size for n in image.shape[1:]):
            raise ShapeError(
                f"encode_image: images[{i}] must be [3, H, W] with H and W multiples of {patch_size}, the patch size; "
                f"got {tuple(image.shape)}. Resize or crop it to whole patches"
            )
    dtypes = {image.dtype for image in images}
    if len(dtypes) > 1 or not (images[0].dtype == torch.uint8 or images[0].is_floating_point()):
        names = ", ".join(sorted(map(str, dtypes)))
        raise DTypeError(
            f"encode_image: images of a list must all be uint8 in 0..255, or all floating of one dtype and normalised; "
            f"got {names}"
        )


def check_image(image: Tensor, image_hw: tuple[int, int]) -> None:
    """Nothing, if an image tower can take the image.

    Args:
        image: anything.
        image_hw: (H, W) that the tower takes, in pixels.
    Raises:
        ShapeError: it is not a tensor [B, 3, H, W].
        DTypeError: it is neither uint8 nor floating.
    """
    H, W = image_hw
    if not isinstance(image, Tensor):
        raise ShapeError(
            f"encode_image: this tower takes images of one size, [B, 3, {H}, {W}]; got a {type(image).__name__}"
        )
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
