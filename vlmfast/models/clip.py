"""CLIP: an image tower and a text tower that meet in one embedding space, built from open_clip's JSON configs."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DataError
from vlmfast.models.text import TextConfig, TextTower
from vlmfast.models.vit import VisionConfig, ViT

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ClipConfig:
    """A model's sizes, activation, starting scale and pixel statistics; the fields of open_clip's JSON configs."""

    embed_dim: int = 512  # D
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False  # in both towers, as OpenAI's weights need
    init_logit_scale: float = math.log(1 / 0.07)  # natural log of the multiplier
    init_logit_bias: float | None = None  # None: the model has no logit_bias
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1, R G B
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            got = f"{len(self.image_mean)} and {len(self.image_std)}"
            raise DataError(f"mean and std must have three numbers each, for R, G and B; got {got}")
        self.activation(self.vision_cfg)
        self.activation(self.text_cfg)

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
        """The config in the form of open_clip's `open_clip_config.json`, ready for JSON; `from_dict` reads it back."""
        model = asdict(self)
        preprocess = {"mean": list(model.pop("image_mean")), "std": list(model.pop("image_std"))}
        if isinstance(self.vision_cfg.image_size, tuple):
            model["vision_cfg"]["image_size"] = list(self.vision_cfg.image_size)
        for section in (model, model["vision_cfg"], model["text_cfg"]):
            for key in [key for key, value in section.items() if value is None]:
                del section[key]
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
        _refuse_unknown(name, "", model, _names(cls) - {"image_mean", "image_std"})
        _refuse_unknown(name, "vision_cfg.", vision, _names(VisionConfig))
        _refuse_unknown(name, "text_cfg.", text, _names(TextConfig))
        _refuse_unknown(name, "preprocess_cfg.", preprocess, {"mean", "std"})
        if isinstance(vision.get("image_size"), list):
            vision["image_size"] = tuple(vision["image_size"])
        statistics: dict[str, Any] = {f"image_{key}": tuple(value) for key, value in preprocess.items()}
        return cls(vision_cfg=VisionConfig(**vision), text_cfg=TextConfig(**text), **model, **statistics)


def _names(config: type[ClipConfig] | type[VisionConfig] | type[TextConfig]) -> set[str]:
    return {item.name for item in fields(config)}


def _refuse_other_towers(name: str, model: dict, vision: dict, text: dict) -> None:
    found = []
    if "timm_model_name" in vision:
        found.append(f"timm image tower {vision['timm_model_name']!r}")
    if isinstance(vision.get("layers"), list):
        found.append(f"ModifiedResNet image tower, layers {vision['layers']}")
    if "hf_model_name" in text:
        found.append(f"Hugging Face text tower {text['hf_model_name']!r}")
    if "multimodal_cfg" in model:
        found.append("CoCa's multimodal decoder")
    if found:
        raise DataError(
            f"{name}: not built here: {'; '.join(found)}. "
            f"Built: a ViT with a causal text tower, such as {', '.join(config_names())}"
        )


def _refuse_unknown(name: str, section: str, got: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(got) - known)
    if unknown:
        raise DataError(
            f"{name}: unknown or unsupported: {', '.join(section + key for key in unknown)}. "
            f"Supported: {', '.join(section + key for key in sorted(known))}"
        )


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
        visual = ViT(vision, config.embed_dim, config.activation(vision), config.image_mean, config.image_std)
        super().__init__(text, config.embed_dim, config.activation(text))
        self.config = config
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings [B, D], of unit length if `normalize`. Args and Raises: see `ViT`."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text embeddings [B, D], of unit length if `normalize`. Args and Raises: see `TextTower`."""
        features = super().forward(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward, which then runs each block a second time."""
        self.transformer.checkpointing = self.visual.transformer.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The matrices that take no weight decay, beside gains, biases and scalars: what is added to tokens."""
        return {"positional_embedding", "visual.positional_embedding", "visual.class_embedding"}


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
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return Clip(config)
