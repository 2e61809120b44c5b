"""ALIGN: transformers' EfficientNet and BERT towers behind the methods of `Clip`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DTypeError, ShapeError, missing_extra
from vlmfast.models.vit import check_image


class Align(nn.Module):
    """Image and text embeddings in one space, under the parameter names of transformers' AlignModel.

    The scale is the inverse of a learned `temperature`, which is not kept from reaching 0: train with a small step.

    Args:
        config: transformers' AlignConfig, as a dict.
        mean, std: of each channel, for pixels in 0..1.
    Raises:
        MissingExtraError: transformers is not installed.
    Source: Jia et al. 2021; EfficientNet-B7 and BERT-base as released in kakaobrain/align-base.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        try:
            from transformers import AlignConfig, AlignModel
        except ImportError as error:
            raise missing_extra("transformers", "hf") from error
        known = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        model: Any = AlignModel(AlignConfig(**known))
        self.config = model.config
        self.mean, self.std = mean, std
        self.vision_model, self.text_model = model.vision_model, model.text_model
        self.text_projection, self.temperature = model.text_projection, model.temperature
        size = self.config.vision_config.image_size
        self.image_hw: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.context_length: int = self.config.text_config.max_position_embeddings
        self.vocab_size: int = self.config.text_config.vocab_size

    @property
    def logit_scale(self) -> Tensor:
        """[], the natural log of the multiplier: minus the log of `temperature`."""
        return -self.temperature.log()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings [B, D], of unit length if `normalize`.

        Args:
            image: [B, 3, H, W]; uint8 in 0..255, or floating and already normalised with mean and std. The network
                takes any size; the config's is what it was trained with, and what is checked.
            normalize: whether to divide by the length.
        Raises:
            ShapeError, DTypeError: as `ViT`.
        """
        check_image(image, self.image_hw)
        x = image.to(self.temperature.dtype)
        if not image.is_floating_point():
            mean, std = (x.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
            x = (x / 255 - mean) / std
        features = self.vision_model(pixel_values=x).pooler_output
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text embeddings [B, D], of unit length if `normalize`: BERT's first token, projected.

        Args:
            text: [B, T] int64 token ids, padded with the config's pad_token_id, which nothing attends to.
            normalize: whether to divide by the length.
        Raises:
            ShapeError: text is not [B, T], or is longer than the context length.
            DTypeError: text is not int64.
        """
        if text.dim() != 2 or not text.numel() or text.shape[1] > self.context_length:
            raise ShapeError(
                f"encode_text: text must be token ids [B, T], T <= {self.context_length}; got {tuple(text.shape)}"
            )
        if text.dtype != torch.int64:
            raise DTypeError(f"encode_text: text must be int64 token ids; got {text.dtype}. Use .long()")
        mask = text.ne(self.config.text_config.pad_token_id).long()
        tokens = self.text_model(input_ids=text, attention_mask=mask).last_hidden_state
        features = self.text_projection(tokens[:, 0])
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """What a contrastive loss takes, under the names of open_clip's `output_dict`.

        Args:
            image: [B, 3, H, W], see `encode_image`.
            text: [B, T], see `encode_text`.
        Returns:
            image_features, text_features: [B, D], rows of unit length.
            logit_scale: [], the multiplier itself, 1 / temperature.
        """
        return {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": 1 / self.temperature,
        }
