"""CLIP: an image tower and a text tower that meet in one embedding space, built from open_clip's JSON configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import ShapeError
from vlmfast.models.config import ClipConfig, load_config
from vlmfast.models.resnet import ModifiedResNet
from vlmfast.models.seeded import seeded
from vlmfast.models.text import TextTower
from vlmfast.models.vit import Group, ViT


class Clip(TextTower):
    """Image and text embeddings in one space, and the learned scale that their cosines are multiplied with.

    The text tower's parameters lie at the top level and the image tower's under `visual.`, as in the state dicts of
    OpenAI's CLIP and open_clip, which therefore load strictly: a Clip is a text tower that has an image tower.
    `logit_scale` holds the natural log of the multiplier; `logit_bias` exists only where the config starts one.

    Args:
        config: see `ClipConfig`, `load_config`.
    Source: Radford et al. 2021, Fig. 3.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ClipConfig) -> None:
        vision, text = config.vision_cfg, config.text_cfg
        # The image tower first: a seed then draws the weights that it draws in open_clip.
        if isinstance(vision.layers, tuple):
            visual: ViT | ModifiedResNet
            visual = ModifiedResNet(vision, config.embed_dim, config.image_mean, config.image_std)
        else:
            visual = ViT(vision, config.embed_dim, config.activation(vision), config.image_mean, config.image_std)
        super().__init__(text, config.embed_dim, config.activation(text))
        self.config = config
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def encode_image(self, image: Tensor | Sequence[Tensor], normalize: bool = False) -> Tensor:
        """Image embeddings [B, D], of unit length if `normalize`. Args and Raises: see `ViT`.

        A ViT takes a list of images of several sizes, too.
        """
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text embeddings [B, D], of unit length if `normalize`. Args and Raises: see `TextTower`."""
        features = super().forward(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | Sequence[Tensor], text: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """What a contrastive loss takes, under the names of open_clip's `output_dict`.

        Args:
            image: [B, 3, H, W], see `ViT`.
            text: [B, T], see `TextTower`.
        Returns:
            image_features, text_features: [B, D], rows of unit length.
            logit_scale: [], the multiplier itself.
            logit_bias: [], where the config starts one.
        """
        features = {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        return features if self.logit_bias is None else {**features, "logit_bias": self.logit_bias}

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of every image with every text: [M, N], and their transpose [N, M], as open_clip's method.

        Args:
            image: [M, 3, H, W], see `ViT`.
            text: [N, T], see `TextTower`.
        """
        out = self(image, text)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def probabilities(self, image: Tensor, text: Tensor) -> Tensor:
        """How likely each text is each image's: [M, N] in 0..1.

        A model with a logit_bias answers for each pair alone, by the sigmoid of its score, as SigLIP; the others choose
        among the texts, so that rows sum to 1, as CLIP.

        Args:
            image: [M, 3, H, W], see `ViT`.
            text: [N, T], see `TextTower`.
        """
        logits, _ = self.get_logits(image, text)
        return logits.softmax(-1) if self.logit_bias is None else logits.sigmoid()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward, which then runs each block a second time; not in a ResNet."""
        self.transformer.checkpointing = enable
        self.visual.set_grad_checkpointing(enable)

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Stops training the image tower, as LiT does.

        Args:
            unlocked_groups: how many groups from its end go on training: 1 the projection, 2 the last block and ln_post
                too, then one block each, last the embeddings. A ResNet is locked whole.
            freeze_bn_stats: a ResNet's batch norms stop following their batches, in training mode too.
        Raises:
            ShapeError: more groups than there are, or groups of a ResNet.
        Source: Zhai et al. 2022 (LiT); the groups are open_clip's.
        """
        self.visual.requires_grad_(False)
        if unlocked_groups:
            _unlock(self.visual.groups(), unlocked_groups, "lock_image_tower: unlocked_groups")
        if freeze_bn_stats:
            for module in self.visual.modules():
                if isinstance(module, nn.BatchNorm2d):
                    # Batch norms without `training` read their running statistics, and no .train() reaches this one.
                    module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
                    module.training = False

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Stops training the text tower.

        Args:
            unlocked_layers: how many groups from its end go on training: 1 the projection, 2 the last block and
                ln_final too, then one block each, last the embeddings.
            freeze_layer_norm: must be True, as in open_clip: norms are locked like all else.
        Raises:
            ShapeError: more groups than there are.
            ValueError: freeze_layer_norm is False.
        """
        if not freeze_layer_norm:
            raise ValueError("lock_text_tower: freeze_layer_norm must be True: norms are locked like all else")
        blocks: list[Group] = [[block] for block in self.transformer.resblocks]
        blocks[-1].append(self.ln_final)
        groups: list[Group] = [[self.token_embedding, self.positional_embedding], *blocks, [self.text_projection]]
        for part in (part for group in groups for part in group if part is not None):
            part.requires_grad_(False)
        if unlocked_layers:
            _unlock(groups, unlocked_layers, "lock_text_tower: unlocked_layers")

    def no_weight_decay(self) -> set[str]:
        """The matrices that take no weight decay, beside gains, biases and scalars: what is added to tokens."""
        return {"positional_embedding", *(f"visual.{name}" for name in self.visual.no_weight_decay())}


def _unlock(groups: list[Group], count: int, what: str) -> None:
    if not 0 <= count <= len(groups):
        raise ShapeError(f"{what} must be 0 .. {len(groups)}; got {count}")
    for group in groups[-count:]:
        for part in group:
            if part is not None:
                part.requires_grad_(True)


def build_clip(name_or_config: str | Path | ClipConfig, *, seed: int | None = None) -> Clip:
    """A freshly initialised model.

    Args:
        name_or_config: what `load_config` takes, or a config.
        seed: of the weights, which then depend on nothing else and leave PyTorch's CPU generator as it was; None: draws
            from that generator.
    Raises:
        DataError: see `load_config`.
    """
    config = name_or_config if isinstance(name_or_config, ClipConfig) else load_config(name_or_config)
    with seeded(seed):
        return Clip(config)
