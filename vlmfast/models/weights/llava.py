"""Transformers' names, config.json and image processor, for LlavaForConditionalGeneration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.models.config import ClipConfig
from vlmfast.models.llava import LlavaConfig
from vlmfast.models.weights import decoder, hf
from vlmfast.models.weights.files import read_json
from vlmfast.models.weights.table import Row, inward, module, outward

# The names of every version of transformers -> those of the first, which every version loads.
RENAMED = (
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.|language_model\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
TEXTS = ("llama", "qwen2", "mistral")
PROJECTOR = "multi_modal_projector"
ACTS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # our projector -> their projector_hidden_act


def read_config(folder: Path) -> LlavaConfig:
    """The model that a folder's config.json and preprocessor_config.json describe.

    Args:
        folder: of a LlavaForConditionalGeneration.
    Raises:
        DataError: another kind of model, or one that is not built here.
    """
    path = folder / hf.CONFIG_FILE
    config = read_json(path)
    if config.get("model_type") != "llava":
        raise DataError(f"{path}: model_type must be 'llava'; got {config.get('model_type')!r}")
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise DataError(f"{path}: an image tower {vision['model_type']!r} is not built here; built: clip_vision_model")
    if text.get("model_type", "llama") not in TEXTS:
        raise DataError(f"{path}: a language model {text['model_type']!r} is not built here; built: {', '.join(TEXTS)}")
    act, layer = config.get("projector_hidden_act", "gelu"), config.get("vision_feature_layer", -2)
    if act not in ACTS.values():
        raise DataError(f"{path}: projector_hidden_act {act!r} is not built here; built: {', '.join(ACTS.values())}")
    if not isinstance(layer, int):
        raise DataError(
            f"{path}: features of several layers, {layer}, are not built here; built: one vision_feature_layer"
        )
    tied = config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    vision_cfg, activation = hf.vision_tower(path, vision or VISION)
    return LlavaConfig(
        vision_cfg,
        decoder.config_from_hf({"model_type": "llama", **text, "tie_word_embeddings": tied}, str(path)),
        config.get("image_token_index", config.get("image_token_id", 32000)),
        activation=activation,
        feature_layer=layer,
        select=config.get("vision_feature_select_strategy", "default"),
        projector=next(ours for ours, theirs in ACTS.items() if theirs == act),
        projector_bias=config.get("multimodal_projector_bias", True),
        **_read_processor(folder),
    )


def config_file(config: LlavaConfig) -> dict[str, Any]:
    """What config.json holds.

    Args:
        config: the model.
    Raises:
        DataError: LlavaForConditionalGeneration is no such model.
    """
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": ACTS[config.projector],
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": config.select,
        "tie_word_embeddings": config.decoder.tied,
        "vision_config": hf.config_file(_clip(config))["vision_config"],
        "text_config": decoder.config_to_hf(config.decoder),
    }


def processor_files(config: LlavaConfig) -> dict[str, dict[str, Any]]:
    """What preprocessor_config.json and processor_config.json hold, by name.

    Args:
        config: the model and its preprocessing.
    """
    image = hf.processor_file(_clip(config))
    if config.aspect == "pad":
        image |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which "default" takes away again
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": config.select,
    }
    return {hf.PROCESSOR_FILE: {**image, "processor_class": "LlavaProcessor"}, "processor_config.json": processor}


def to_theirs(config: LlavaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, bit for bit, under the names that every version of transformers loads.

    A linear projector is theirs with an identity behind it.

    Args:
        config: the model.
        weights: its state dict.
    """
    text = decoder.to_theirs(config.decoder, _part(weights, "decoder."))
    theirs = {f"language_model.{name}": value for name, value in text.items()}
    theirs |= outward(weights, rows(config))
    if config.projector == "linear":
        theirs |= _identity(weights[f"{PROJECTOR}.linear_1.weight"], config.projector_bias)
    return theirs


def to_ours(
    config: LlavaConfig, weights: Mapping[str, Tensor], built: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Our tensors from theirs, bit for bit, of any version of transformers.

    Args:
        config: the model.
        weights: theirs.
        built: what the model's state dict holds, on any device (meta will do).
        where: what errors call the checkpoint.
    Raises:
        DataError: tensors are missing, unknown or of another shape; or a linear projector has a second linear map.
    """
    theirs = hf.plain({_plain_name(name): value for name, value in weights.items()})
    text = _part(theirs, "language_model.")
    theirs = {name: value for name, value in theirs.items() if not name.startswith("language_model.")}
    if config.projector == "linear":
        for name, value in _identity(theirs.get(f"{PROJECTOR}.linear_1.weight"), config.projector_bias).items():
            if not torch.equal(theirs.pop(name, value), value):
                raise DataError(f"{where}: {name}: a projector of two linear maps, nothing between, is not built here")
    built = {name: value for name, value in built.items() if not name.startswith("decoder.")}
    ours = inward(theirs, rows(config), built, where)
    return ours | {f"decoder.{name}": x for name, x in decoder.from_theirs(config.decoder, text, where).items()}


def rows(config: LlavaConfig) -> list[Row]:
    """The table between our image tower and projector and those of LlavaForConditionalGeneration.

    Args:
        config: a model that `config_file` can describe.
    """
    table = [
        Row(f"vision_tower.{ours.removeprefix('visual.')}", tuple(f"vision_tower.{name}" for name in theirs), form)
        for ours, theirs, form in hf.rows(_clip(config))
        if ours.startswith("visual.") and ours != "visual.proj"
    ]
    parts = ("weight", "bias") if config.projector_bias else ("weight",)
    maps = ("linear_1",) if config.projector == "linear" else ("linear_1", "linear_2")
    return table + [each for name in maps for each in module(f"{PROJECTOR}.{name}", f"{PROJECTOR}.{name}", parts)]


VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}  # what transformers takes where config.json has no vision_config


def _clip(config: LlavaConfig) -> ClipConfig:
    """A CLIP with this image tower and preprocessing."""
    return ClipConfig(
        vision_cfg=config.vision,
        quick_gelu=config.activation == "quick_gelu",
        image_mean=config.image_mean,
        image_std=config.image_std,
        resize_mode="squash" if config.aspect == "squash" else "shortest",
    )


def _read_processor(folder: Path) -> dict[str, Any]:
    """The preprocessing that the folder names, or CLIP's."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", hf.PROCESSOR_FILE):
        if (folder / name).is_file():
            content = read_json(folder / name)
            found |= content.get("image_processor", content)
    cut = "square" if found.get("do_center_crop", True) else "squash"
    statistics = {key: tuple(found[key]) for key in ("image_mean", "image_std") if found.get(key)}
    return {"aspect": "pad" if found.get("do_pad") else cut, **statistics}


def _plain_name(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _identity(first: Tensor | None, bias: bool) -> dict[str, Tensor]:
    """The second linear map, which changes nothing, behind a first one with this weight."""
    if first is None:
        return {}
    out = {f"{PROJECTOR}.linear_2.weight": torch.eye(len(first), dtype=first.dtype)}
    return out | ({f"{PROJECTOR}.linear_2.bias": torch.zeros(len(first), dtype=first.dtype)} if bias else {})
