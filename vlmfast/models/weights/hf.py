"""Hugging Face's names, config.json and image processor, for CLIPModel and SiglipModel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.models.config import ClipConfig
from vlmfast.models.text import TextConfig
from vlmfast.models.vit import VisionConfig
from vlmfast.models.weights.files import read_json
from vlmfast.models.weights.table import Row, module, row

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
CLIP_VOCABULARY, CLIP_EOT = 49408, 49407
ARGMAX_EOT = 2  # with this eos_token_id, CLIPModel pools at the highest id


def rows(config: ClipConfig) -> list[Row]:
    """The table between our tensors and those of CLIPModel, or of SiglipModel where images are pooled by attention.

    Args:
        config: a model that `config_file` can describe.
    """
    siglip = config.vision_cfg.pool_type == "map"
    table = [row("token_embedding.weight", "text_model.embeddings.token_embedding.weight")]
    table += [row("positional_embedding", "text_model.embeddings.position_embedding.weight")]
    table += _blocks("transformer", "text_model", config.text_cfg.layers)
    table += module("ln_final", "text_model.final_layer_norm")
    table += [row("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")]
    table += [row("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight")]
    assert isinstance(config.vision_cfg.layers, int)
    table += _blocks("visual.transformer", "vision_model", config.vision_cfg.layers)
    table += module("visual.ln_post", "vision_model.post_layernorm")
    if not siglip:
        table += [row("visual.class_embedding", "vision_model.embeddings.class_embedding")]
        table += module("visual.ln_pre", "vision_model.pre_layrnorm")  # spelt like this
        table += [row("visual.proj", "visual_projection.weight", form="transposed")]
        table += [row("text_projection", "text_projection.weight", form="transposed")]
        return [*table, row("logit_scale")]
    table += [row("visual.conv1.bias", "vision_model.embeddings.patch_embedding.bias")]
    table += module("text_projection", "text_model.head")
    table += [row("visual.attn_pool.probe", "vision_model.head.probe", form="[1, 1, ...]")]
    for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        table += [row(f"visual.attn_pool.{part}", f"vision_model.head.attention.{part}")]
    table += module("visual.attn_pool.ln", "vision_model.head.layernorm")
    table += module("visual.attn_pool.mlp.c_fc", "vision_model.head.mlp.fc1")
    table += module("visual.attn_pool.mlp.c_proj", "vision_model.head.mlp.fc2")
    return [*table, row("logit_scale", form="[1]"), row("logit_bias", form="[1]")]


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors without the position numbers that older versions saved.

    Args:
        weights: of a CLIPModel or SiglipModel.
    """
    return {name: value for name, value in weights.items() if not name.endswith(".embeddings.position_ids")}


def read_config(folder: Path) -> ClipConfig:
    """The model and the preprocessing that a folder's config.json and preprocessor_config.json describe.

    Args:
        folder: of a CLIPModel or SiglipModel.
    Raises:
        DataError: another kind of model, or one that is not built here.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "align":
        raise DataError(f"{path}: an ALIGN has transformers' own towers; load_clip loads it, and nothing converts it")
    if kind not in ("clip", "siglip"):
        raise DataError(f"{path}: model_type {kind!r} is not built here; built: clip, siglip, align")
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    if kind == "clip":
        # Old files have each section twice: transformers lets the second win, with defaults for what it leaves out.
        text, vision = config.get("text_config_dict") or text, config.get("vision_config_dict") or vision
        model = _clip_config(path, config, {**CLIP_TEXT, **text}, {**CLIP_VISION, **vision})
    else:
        model = _siglip_config(path, {**SIGLIP_TEXT, **text}, {**SIGLIP_VISION, **vision})
    statistics = _read_processor(folder, kind, model["vision_cfg"].image_size)
    return ClipConfig(**model, **statistics)


def vision_tower(path: Path, config: Mapping[str, Any]) -> tuple[VisionConfig, str]:
    """The sizes of a CLIP's image tower and its activation, a key of `vlmfast.layers.ACTIVATIONS`.

    Args:
        path: what errors call the file.
        config: a "vision_config"; what it does not say is CLIP's.
    Raises:
        DataError: one that is not built here.
    """
    vision = {**CLIP_VISION, **config}
    _, _, act = _activations(path, vision, vision)
    return VisionConfig(**_vision_sizes(path, vision), act_kwargs=act, norm_kwargs=_eps(vision)), ACTIVATIONS[
        vision["hidden_act"]
    ]


def config_file(config: ClipConfig) -> dict[str, Any]:
    """What config.json holds.

    Args:
        config: the model.
    Raises:
        DataError: neither CLIPModel nor SiglipModel is such a model; every reason is listed.
    """
    text, vision = config.text_cfg, config.vision_cfg
    siglip = vision.pool_type == "map"
    _check_writable(config, siglip)
    assert isinstance(vision.layers, int)
    shared = {
        "text_config": {
            "model_type": "siglip_text_model" if siglip else "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "hidden_act": _hidden_act(config, text),
            "layer_norm_eps": (text.norm_kwargs or {}).get("eps", 1e-5),
        },
        "vision_config": {
            "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "hidden_act": _hidden_act(config, vision),
            "layer_norm_eps": vision.eps,
        },
    }
    if siglip:
        shared["text_config"]["projection_size"] = config.embed_dim
        return {"architectures": ["SiglipModel"], "model_type": "siglip", **shared}
    for tower in shared.values():
        tower["projection_dim"] = config.embed_dim
    # Any other id than 2 is looked for itself, and would not be found in a smaller vocabulary.
    known = CLIP_EOT if text.vocab_size == CLIP_VOCABULARY else ARGMAX_EOT
    shared["text_config"]["eos_token_id"] = text.eos_id if text.pool_type == "eos" else known
    shared["text_config"]["bos_token_id"] = CLIP_EOT - 1 if text.vocab_size == CLIP_VOCABULARY else None
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        **shared,
    }


def processor_file(config: ClipConfig) -> dict[str, Any]:
    """What preprocessor_config.json holds.

    Args:
        config: the model and its preprocessing.
    """
    squash = config.resize_mode == "squash"
    siglip = squash and config.vision_cfg.pool_type == "map"  # SiglipImageProcessor crops nothing
    height, width = config.vision_cfg.image_hw
    processor = {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": next(number for number, name in RESAMPLE.items() if name == config.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    return (
        processor
        if siglip
        else {**processor, "do_center_crop": not squash, "crop_size": {"height": height, "width": width}}
    )


CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # what transformers takes where config.json is silent
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SIGLIP |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_TEXT = {**SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64}
SIGLIP_VISION = {**SIGLIP, "num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True}


def _blocks(ours: str, theirs: str, layers: int) -> list[Row]:
    table = []
    for i in range(layers):
        a, b = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
        table += module(f"{a}.ln_1", f"{b}.layer_norm1") + module(f"{a}.ln_2", f"{b}.layer_norm2")
        for part in ("weight", "bias"):
            split = [f"{b}.self_attn.{letter}_proj.{part}" for letter in "qkv"]
            table.append(row(f"{a}.attn.in_proj_{part}", *split, form="q|k|v"))
        table += module(f"{a}.attn.out_proj", f"{b}.self_attn.out_proj")
        table += module(f"{a}.mlp.c_fc", f"{b}.mlp.fc1") + module(f"{a}.mlp.c_proj", f"{b}.mlp.fc2")
    return table


def _clip_config(path: Path, config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    quick, text_act, vision_act = _activations(path, text, vision)
    eos = text["eos_token_id"]
    by_argmax = eos == ARGMAX_EOT or eos == text["vocab_size"] - 1  # the highest id is the highest in its row
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": quick,
        "init_logit_scale": config.get("logit_scale_init_value", 2.6592),
        "text_cfg": TextConfig(
            **_text_sizes(text),
            act_kwargs=text_act,
            norm_kwargs=_eps(text),
            pool_type="argmax" if by_argmax else "eos",
            eos_id=None if by_argmax else eos,
        ),
        "vision_cfg": VisionConfig(**_vision_sizes(path, vision), act_kwargs=vision_act, norm_kwargs=_eps(vision)),
    }


def _siglip_config(path: Path, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    quick, text_act, vision_act = _activations(path, text, vision)
    if not vision["vision_use_head"]:
        raise DataError(f"{path}: a SigLIP without its attention pooling (vision_use_head false) is not built here")
    return {
        "embed_dim": text.get("projection_size") or text["hidden_size"],
        "quick_gelu": quick,
        "init_logit_bias": 0.0,
        "init_logit_scale": 0.0,
        "text_cfg": TextConfig(
            **_text_sizes(text),
            act_kwargs=text_act,
            norm_kwargs=_eps(text),
            no_causal_mask=True,
            pool_type="last",
            proj_bias=True,
            tokenizer_kwargs={"clean": "canonicalize"},
        ),
        "vision_cfg": VisionConfig(
            **_vision_sizes(path, vision), act_kwargs=vision_act, norm_kwargs=_eps(vision), pool_type="map"
        ),
    }


def _activations(path: Path, text: dict[str, Any], vision: dict[str, Any]) -> tuple[bool, Any, Any]:
    """Whether both are QuickGELU, and both towers' act_kwargs."""
    names = [tower["hidden_act"] for tower in (text, vision)]
    kinds = [ACTIVATIONS.get(name) for name in names]
    if None in kinds or (kinds[0] == "quick_gelu") != (kinds[1] == "quick_gelu"):
        raise DataError(
            f"{path}: hidden_act {names[0]!r} of the text and {names[1]!r} of the image tower are not built here; "
            f"built: {', '.join(ACTIVATIONS)}, quick_gelu only in both"
        )
    text_act, vision_act = ({"approximate": "tanh"} if kind == "gelu_tanh" else None for kind in kinds)
    return kinds[0] == "quick_gelu", text_act, vision_act


def _text_sizes(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": _ratio(text),
    }


def _vision_sizes(path: Path, vision: dict[str, Any]) -> dict[str, Any]:
    if vision["num_channels"] != 3:
        raise DataError(f"{path}: images of {vision['num_channels']} channels are not built here; built: 3")
    size = vision["image_size"]
    return {
        "image_size": tuple(size) if isinstance(size, list) else size,
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "layers": vision["num_hidden_layers"],
        "mlp_ratio": _ratio(vision),
    }


def _ratio(tower: dict[str, Any]) -> float:
    """The mlp_ratio that gives exactly this many hidden features."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _eps(tower: dict[str, Any]) -> dict[str, Any] | None:
    return None if tower["layer_norm_eps"] == 1e-5 else {"eps": tower["layer_norm_eps"]}


def _hidden_act(config: ClipConfig, tower: TextConfig | VisionConfig) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation(tower))


def _check_writable(config: ClipConfig, siglip: bool) -> None:
    text, vision = config.text_cfg, config.vision_cfg
    reasons = {
        "a ResNet": not isinstance(vision.layers, int),
        "LayerScale": vision.ls_init_value is not None or text.ls_init_value is not None,
        "no ln_pre": vision.no_ln_pre,
        "image pooling 'avg'": vision.pool_type == "avg",
        "images that are not square": not isinstance(vision.image_size, int),
    }
    if siglip:
        reasons |= {
            "a causal text tower": not text.no_causal_mask,
            f"text pooling {text.pool_type!r}": text.pool_type != "last",
            "no bias in the text projection": not text.proj_bias or text.proj_type == "none",
            "no logit_bias": config.init_logit_bias is None,
        }
    else:
        reasons |= {
            "a text tower that is not causal": text.no_causal_mask,
            f"text pooling {text.pool_type!r}": text.pool_type not in ("argmax", "eos"),
            "a bias in, or no, text projection": text.proj_bias or text.proj_type == "none",
            "a logit_bias": config.init_logit_bias is not None,
        }
    if found := [reason for reason, holds in reasons.items() if holds]:
        name = "SiglipModel" if siglip else "CLIPModel"
        raise DataError(f"to hf: transformers' {name} has no place for: {', '.join(found)}")


def _read_processor(folder: Path, kind: str, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """The preprocessing that the folder names, or what its kind of model was trained with."""
    path = next(
        (folder / name for name in (PROCESSOR_FILE, "processor_config.json") if (folder / name).is_file()), None
    )
    processor = {} if path is None else read_json(path)
    processor = processor.get("image_processor", processor)
    if not processor:
        half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "resize_mode": "squash"}
        return half if kind == "siglip" else {}
    size, crop = processor.get("size", image_size), processor.get("crop_size", image_size)
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    side = crop if isinstance(crop, int | tuple) else (crop["height"], crop["width"])
    hw = (image_size, image_size) if isinstance(image_size, int) else image_size
    if processor.get("do_center_crop", kind == "clip") and shortest is not None:
        fits = shortest == min(hw) and side in (image_size, hw)
        mode = "shortest"
    else:
        fits = isinstance(size, dict) and (size.get("height"), size.get("width")) == hw
        mode = "squash"
    if not fits or not processor.get("do_resize", True) or processor.get("resample", 3) not in RESAMPLE:
        told = {key: processor.get(key) for key in ("do_resize", "size", "do_center_crop", "crop_size", "resample")}
        raise DataError(
            f"{path}: its preprocessing is not built here, for images of {hw[0]} x {hw[1]} pixels: {json.dumps(told)}. "
            "Built: the shorter side resized and the middle cropped, or both sides resized, bilinear or bicubic"
        )
    default = ClipConfig()
    return {
        "image_mean": tuple(processor.get("image_mean") or default.image_mean),
        "image_std": tuple(processor.get("image_std") or default.image_std),
        "interpolation": RESAMPLE[processor.get("resample", 3)],
        "resize_mode": mode,
    }
