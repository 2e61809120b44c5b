"""Configs of CLIPs: open_clip's JSON format, read and written, and the released ones by name."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlmfast.errors import DataError
from vlmfast.models.text import TextConfig
from vlmfast.models.vit import VisionConfig

CONFIGS = Path(__file__).parent / "configs"

# Keys of open_clip's that change nothing at these values, and are not built at others.
INERT: dict[str, dict[str, tuple[Any, ...]]] = {
    "model_cfg": {"custom_text": (True, False), "nonscalar_logit_scale": (False,)},
    "vision_cfg": {
        "patch_dropout": (0,),
        "attentional_pool": (False,),
        "attn_pooler_queries": (256,),
        "attn_pooler_heads": (8,),
        "pos_embed_type": ("learnable",),
        "output_tokens": (False,),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False,)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False,)),
    },
    "text_cfg": {
        "embed_cls": (False,),
        "pad_id": (0,),
        "output_tokens": (False,),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False,)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False,)),
    },
    "preprocess_cfg": {"mode": ("RGB",), "fill_color": (0,)},
}

# SigLIP's image towers are timm's in open_clip: width, layers, heads, mlp_ratio.
TRUNKS = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# timm took the exact GELU for the first of them and the tanh form, in which all were trained, for these.
TANH_TRUNKS = r"base_patch32|large_\w+_512|so400m_patch16|giantopt"
SIGLIP_NAME = rf"vit_({'|'.join(TRUNKS)})_patch(\d+)_siglip_(\d+)"
TRUNK_FLAGS: dict[str, tuple[Any, ...]] = {
    "timm_model_pretrained": (False,),
    "timm_pool": ("map",),
    "timm_proj": ("none", None),
}
TRUNK_FLAGS |= {"timm_drop": (0,), "timm_drop_path": (0, None)}


@dataclass(frozen=True)
class ClipConfig:
    """A model's sizes, activation, starting scale and preprocessing; the fields of open_clip's JSON configs."""

    embed_dim: int = 512  # D
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False  # in both towers, as OpenAI's weights need
    init_logit_scale: float = math.log(1 / 0.07)  # natural log of the multiplier
    init_logit_bias: float | None = None  # None: the model has no logit_bias
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1, R G B
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"  # or "bilinear"
    resize_mode: str = "shortest"  # "shortest": the shorter side is resized and the middle taken; "squash": both sides

    def __post_init__(self) -> None:
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            got = f"{len(self.image_mean)} and {len(self.image_std)}"
            raise DataError(f"mean and std must have three numbers each, for R, G and B; got {got}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise DataError(f"interpolation must be bicubic or bilinear; got {self.interpolation!r}")
        if self.resize_mode not in ("shortest", "squash"):
            raise DataError(f"resize_mode must be shortest or squash; got {self.resize_mode!r}")
        for tower in (self.vision_cfg, self.text_cfg):
            self.activation(tower)
            if set(tower.norm_kwargs or {}) - {"eps"}:
                raise DataError(f'norm_kwargs must be {{"eps": ...}} or absent; got {tower.norm_kwargs}')

    def activation(self, tower: VisionConfig | TextConfig) -> str:
        """The tower's activation, a key of `vlmfast.layers.ACTIVATIONS`.

        Raises:
            DataError: act_kwargs is not {"approximate": "tanh" or "none"}, or stands beside quick_gelu.
        """
        approximate = (tower.act_kwargs or {}).get("approximate", "none")
        if set(tower.act_kwargs or {}) - {"approximate"} or approximate not in ("none", "tanh"):
            raise DataError(f'act_kwargs must be {{"approximate": "tanh"}} or absent; got {tower.act_kwargs}')
        if self.quick_gelu and tower.act_kwargs:
            raise DataError(f"quick_gelu has no act_kwargs; got {tower.act_kwargs}. Drop one of the two")
        return "quick_gelu" if self.quick_gelu else {"none": "gelu", "tanh": "gelu_tanh"}[approximate]

    def with_text(self, *, vocab_size: int, context_length: int) -> ClipConfig:
        """The same config for a tokenizer with this vocabulary and length."""
        return replace(self, text_cfg=replace(self.text_cfg, vocab_size=vocab_size, context_length=context_length))

    def to_dict(self) -> dict[str, Any]:
        """The config in the form of open_clip's `open_clip_config.json`, ready for JSON; `from_dict` reads it back.

        open_clip builds a model from it too, but for SigLIPs of sizes that timm has no name for.
        """
        model = _stated(self)
        preprocess = {"mean": list(model.pop("image_mean")), "std": list(model.pop("image_std"))}
        preprocess |= {key: model.pop(key) for key in ("interpolation", "resize_mode") if key in model}
        model["vision_cfg"], model["text_cfg"] = _stated(self.vision_cfg), _stated(self.text_cfg)
        if self.vision_cfg.pool_type == "map":
            model["custom_text"] = True
            if trunk := trunk_name(self.vision_cfg):
                model["vision_cfg"] = {
                    "image_size": self.vision_cfg.image_size,
                    "timm_model_name": trunk,
                    "timm_model_pretrained": False,
                    "timm_pool": "map",
                    "timm_proj": "none",
                }
        return {"model_cfg": model, "preprocess_cfg": preprocess}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "config") -> ClipConfig:
        """The config that a JSON object of open_clip's describes.

        Args:
            config: a model config ({"embed_dim", "vision_cfg", "text_cfg", ...}), or {"model_cfg", "preprocess_cfg"}.
            name: what errors call it.
        Raises:
            DataError: a key or a tower that is not built here, or a missing section; all are named.
        """
        whole = dict(config) if "model_cfg" in config else {"model_cfg": config}
        model, preprocess = dict(whole.pop("model_cfg")), dict(whole.pop("preprocess_cfg", {}))
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(model)
        if missing:
            raise DataError(
                f"{name}: a CLIP config needs embed_dim, vision_cfg and text_cfg; {sorted(missing)} missing"
            )
        vision, text = dict(model.pop("vision_cfg")), dict(model.pop("text_cfg"))
        _refuse_other_towers(name, model, vision, text)
        _refuse_unknown(name, "", whole, {"model_cfg", "preprocess_cfg"})
        image = {"image_mean", "image_std", "interpolation", "resize_mode"}
        model = _known(name, "model_cfg", model, _names(cls) - image, "")
        vision = _siglip_vision(vision) if "timm_model_name" in vision else vision
        vision = _known(name, "vision_cfg", vision, _names(VisionConfig), "vision_cfg.")
        text = _known(name, "text_cfg", text, _names(TextConfig), "text_cfg.")
        preprocess.pop("size", None)  # open_clip writes it; it is image_size again
        preprocess = _known(
            name, "preprocess_cfg", preprocess, {"mean", "std", "interpolation", "resize_mode"}, "preprocess_cfg."
        )
        for key in ("image_size", "layers"):
            if isinstance(vision.get(key), list):
                vision[key] = tuple(vision[key])
        for key in {"mean", "std"} & set(preprocess):
            preprocess[f"image_{key}"] = tuple(preprocess.pop(key))
        return cls(vision_cfg=VisionConfig(**vision), text_cfg=TextConfig(**text), **model, **preprocess)


def trunk_name(vision: VisionConfig) -> str | None:
    """timm's name of this SigLIP image tower, or None if timm has none."""
    for size, (width, *_) in TRUNKS.items():
        name = f"vit_{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
        if width == vision.width and VisionConfig(**_siglip_vision({"timm_model_name": name})) == vision:
            return name
    return None


def _siglip_vision(vision: dict[str, Any]) -> dict[str, Any]:
    """The sizes behind timm's name of a SigLIP image tower; keys that say something else stay, to be refused."""
    name = vision["timm_model_name"]
    size, patch, pixels = re.fullmatch(SIGLIP_NAME, name).groups()  # type: ignore[union-attr]
    width, layers, heads, mlp_ratio = TRUNKS[size]
    rest = {key: value for key, value in vision.items() if value not in TRUNK_FLAGS.get(key, ())}
    del rest["timm_model_name"]
    return {
        "image_size": int(pixels),
        "layers": layers,
        "width": width,
        "head_width": width // heads,
        "patch_size": int(patch),
        "mlp_ratio": mlp_ratio,
        "act_kwargs": {"approximate": "tanh"} if re.search(TANH_TRUNKS, name) else None,
        "norm_kwargs": {"eps": 1e-6},
        "pool_type": "map",
        **rest,
    }


def _stated(config: ClipConfig | VisionConfig | TextConfig) -> dict[str, Any]:
    """The fields as a dict: numbers always, all else where it is not the default."""
    stated = {}
    for item in fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default is not MISSING else None
        if value is not None and (value != default or (isinstance(value, int | float) and value is not False)):
            stated[item.name] = (
                list(value) if item.name in ("image_size", "layers") and isinstance(value, tuple) else value
            )
    if isinstance(config, ClipConfig):
        stated["image_mean"], stated["image_std"] = config.image_mean, config.image_std
    return stated


def _known(name: str, section: str, got: Mapping[str, Any], known: set[str], prefix: str) -> dict[str, Any]:
    """`got` without nulls and without keys that say what is so anyway; an unknown key raises."""
    inert = INERT[section]
    kept = {
        key: value
        for key, value in got.items()
        if value is not None and (key in known or value not in inert.get(key, ()))
    }
    _refuse_unknown(name, prefix, kept, known)
    return kept


def _names(config: type[ClipConfig] | type[VisionConfig] | type[TextConfig]) -> set[str]:
    return {item.name for item in fields(config)}


def _refuse_other_towers(name: str, model: dict, vision: dict, text: dict) -> None:
    found = []
    if not re.fullmatch(SIGLIP_NAME, vision.get("timm_model_name", "vit_base_patch16_siglip_224")):
        found.append(f"timm image tower {vision['timm_model_name']!r}")
    if "hf_model_name" in text:
        found.append(f"Hugging Face text tower {text['hf_model_name']!r}")
    if "multimodal_cfg" in model:
        found.append("CoCa's multimodal decoder")
    if found:
        raise DataError(
            f"{name}: not built here: {'; '.join(found)}. "
            f"Built: ViT, ResNet and SigLIP image towers with a CLIP text tower, such as {', '.join(config_names())}"
        )


def _refuse_unknown(name: str, section: str, got: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(got) - known)
    if unknown:
        raise DataError(
            f"{name}: unknown or unsupported: {', '.join(section + key for key in unknown)}. "
            f"Supported: {', '.join(section + key for key in sorted(known))}"
        )


def config_names() -> tuple[str, ...]:
    """The names that `load_config` knows, sorted."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


def load_config(name_or_path: str | Path) -> ClipConfig:
    """The config of this name, or in this JSON file.

    Args:
        name_or_path: one of `config_names()`, or a path that ends in .json, in open_clip's format.
    Raises:
        DataError: no such name or file, no JSON in it, or a model that is not built here.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = CONFIGS / f"{name_or_path}.json"
        if not path.is_file():
            nearest = difflib.get_close_matches(str(name_or_path), config_names(), n=1, cutoff=0)[0]
            raise DataError(f"no config {str(name_or_path)!r}; nearest: {nearest}; known: {', '.join(config_names())}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no config file {path}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return ClipConfig.from_dict(config, str(name_or_path))
