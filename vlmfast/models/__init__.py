"""Models, each one file with its config on top, under the parameter names of the checkpoints that exist."""

from vlmfast.models.align import Align
from vlmfast.models.clip import Clip, build_clip
from vlmfast.models.config import ClipConfig, config_names, load_config
from vlmfast.models.hidden_states import taps
from vlmfast.models.resnet import ModifiedResNet
from vlmfast.models.text import TextConfig, TextTower
from vlmfast.models.vit import VisionConfig, ViT
from vlmfast.models.weights import Checkpoint, load_clip, read_checkpoint, with_image_size, write_checkpoint

__all__ = [
    "Align",
    "Checkpoint",
    "Clip",
    "ClipConfig",
    "ModifiedResNet",
    "TextConfig",
    "TextTower",
    "ViT",
    "VisionConfig",
    "build_clip",
    "config_names",
    "load_clip",
    "load_config",
    "read_checkpoint",
    "taps",
    "with_image_size",
    "write_checkpoint",
]
