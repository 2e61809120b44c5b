"""Models, each one file with its config on top, under the parameter names of the checkpoints that exist."""

from vlmfast.models.clip import Clip, ClipConfig, build_clip, config_names, load_config
from vlmfast.models.text import TextConfig, TextTower
from vlmfast.models.vit import VisionConfig, ViT

__all__ = [
    "Clip",
    "ClipConfig",
    "TextConfig",
    "TextTower",
    "ViT",
    "VisionConfig",
    "build_clip",
    "config_names",
    "load_config",
]
