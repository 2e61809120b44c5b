"""OpenAI's files: open_clip's names and half precision, without a config, which the shapes tell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlmfast.models.config import ClipConfig
from vlmfast.models.text import TextConfig
from vlmfast.models.vit import VisionConfig

MARKS = {"input_resolution", "context_length", "vocab_size"}  # numbers that stand among the weights


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are those of one of OpenAI's own files, and the activation therefore QuickGELU.

    Args:
        weights: a checkpoint's tensors.
    """
    return set(weights) >= MARKS


def config_from_shapes(weights: Mapping[str, Tensor]) -> ClipConfig:
    """The config of one of OpenAI's models.

    Args:
        weights: its tensors.
    Raises:
        KeyError: a tensor is missing that says how large the model is.
    """
    width = len(weights["ln_final.weight"])
    text = TextConfig(
        context_length=len(weights["positional_embedding"]),
        vocab_size=len(weights["token_embedding.weight"]),
        width=width,
        heads=width // 64,
        layers=_count(weights, "transformer.resblocks."),
    )
    if "visual.proj" in weights:
        vision_width, _, patch_size, _ = weights["visual.conv1.weight"].shape
        vision = VisionConfig(
            image_size=patch_size * _side(weights["visual.positional_embedding"]),
            layers=_count(weights, "visual.transformer.resblocks."),
            width=vision_width,
            patch_size=patch_size,
        )
    else:
        vision = VisionConfig(
            image_size=32 * _side(weights["visual.attnpool.positional_embedding"]),
            layers=tuple(_count(weights, f"visual.layer{i}.") for i in (1, 2, 3, 4)),
            width=len(weights["visual.layer1.0.conv1.weight"]),
        )
    return ClipConfig(weights["text_projection"].shape[1], vision, text, quick_gelu=True)


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _side(positions: Tensor) -> int:
    """Side of the square grid of [1 + side², C] positions."""
    return round((len(positions) - 1) ** 0.5)
