"""Models, each one file with its config on top, under the parameter names of the checkpoints that exist."""

from vlmfast.models.align import Align
from vlmfast.models.cache import KvCache
from vlmfast.models.clip import Clip, build_clip
from vlmfast.models.config import ClipConfig, config_names, load_config
from vlmfast.models.decoder import Decoder, DecoderConfig, build_decoder
from vlmfast.models.generation import Generation, generate, score
from vlmfast.models.hidden_states import taps
from vlmfast.models.llava import Llava, LlavaConfig, build_llava, llava_from
from vlmfast.models.patch_lm import PatchLm, PatchLmConfig, build_patch_lm
from vlmfast.models.resnet import ModifiedResNet
from vlmfast.models.session import Session
from vlmfast.models.text import TextConfig, TextTower
from vlmfast.models.vit import VisionConfig, ViT
from vlmfast.models.vlm import Vlm
from vlmfast.models.weights import Checkpoint, load_clip, read_checkpoint, with_image_size, write_checkpoint
from vlmfast.models.weights.decoder import load_decoder, save_decoder
from vlmfast.models.weights.vlm import load_vlm, save_vlm

__all__ = [
    "Align",
    "Checkpoint",
    "Clip",
    "ClipConfig",
    "Decoder",
    "DecoderConfig",
    "Generation",
    "KvCache",
    "Llava",
    "LlavaConfig",
    "ModifiedResNet",
    "PatchLm",
    "PatchLmConfig",
    "Session",
    "TextConfig",
    "TextTower",
    "ViT",
    "VisionConfig",
    "Vlm",
    "build_clip",
    "build_decoder",
    "build_llava",
    "build_patch_lm",
    "config_names",
    "generate",
    "llava_from",
    "load_clip",
    "load_config",
    "load_decoder",
    "load_vlm",
    "read_checkpoint",
    "save_decoder",
    "save_vlm",
    "score",
    "taps",
    "with_image_size",
    "write_checkpoint",
]
