"""The flags that say which vision-language model is trained, and what they build: from sizes, or from folders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

import torch

from vlmfast.data.conversation import Aspect
from vlmfast.data.lm_tokenizer import LmTokenizer, load_lm_tokenizer
from vlmfast.errors import DataError
from vlmfast.models.clip import Clip, build_clip
from vlmfast.models.config import ClipConfig, config_names, load_config
from vlmfast.models.decoder import Decoder, DecoderConfig, build_decoder
from vlmfast.models.llava import Llava, llava_from
from vlmfast.models.patch_lm import PatchLmConfig, build_patch_lm
from vlmfast.models.vlm import Vlm
from vlmfast.models.weights.decoder import load_decoder
from vlmfast.models.weights.vlm import load_vlm
from vlmfast.recipes.pretrained import ModelFlags, open_pretrained
from vlmfast.recipes.vlm_data import Pixels
from vlmfast.recipes.vlm_predict import MODEL_FOLDER, check_vocabulary

Task = Literal["patch-lm", "llava", "lm"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a small model: of its decoder, and of the images that a PatchLm reads."""

    decoder: str = "llama"
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int | None = None  # None: as many as heads
    mlp_width: int | None = None  # None: as the decoder's family has it
    context_length: int = 256
    image_size: int | None = None  # None: as the scenes have it, else 64
    patch_size: int = 8
    stem: str = "conv"
    prefix_lm: bool = False

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The decoder's config.

        Args:
            vocab_size: V.
        """
        sizes = {"vocab_size": vocab_size, "width": self.width, "layers": self.layers, "heads": self.heads}
        optional = {"kv_heads": self.kv_heads, "mlp_width": self.mlp_width}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        make = {"llama": DecoderConfig.llama, "qwen2": DecoderConfig.qwen2, "gpt2": DecoderConfig.gpt2}[self.decoder]
        return make(**sizes, context_length=self.context_length)


PRESETS = {
    "PatchLm-tiny": Sizes(),
    "PatchLm-small": Sizes(width=384, layers=6, heads=6, context_length=512),
    "Lm-tiny": Sizes(layers=6, width=256, heads=4, context_length=256),
}


@dataclass(kw_only=True)
class VlmModelFlags:
    """What is trained: a name or sizes for a model from nothing, folders for one that is there."""

    model: str = ""
    """patch-lm, lm: PatchLm-tiny, PatchLm-small, Lm-tiny, or a .json with the sizes below; each size that is given
    counts more. Default: PatchLm-tiny, or Lm-tiny for lm."""
    decoder: Literal["llama", "qwen2", "gpt2"] | None = None
    """Whose language model's shape it has."""
    width: int | None = None
    """Features of a token."""
    layers: int | None = None
    """Blocks."""
    heads: int | None = None
    """Of attention."""
    kv_heads: int | None = None
    """Of keys and values. Default: as many as --heads."""
    mlp_width: int | None = None
    """Hidden features of the perceptrons. Default: as the decoder's family has it."""
    context_length: int | None = None
    """Tokens of the longest conversation, those of its images included."""
    image_size: int | None = None
    """patch-lm: pixels a side. Default: as the scenes have it, else 64."""
    patch_size: int | None = None
    """patch-lm: pixels a side."""
    stem: Literal["conv", "patch"] | None = None
    """patch-lm: how patches become tokens: by small convolutions, or by one linear map."""
    prefix_lm: bool = False
    """patch-lm: image and question see each other, not only what comes before; on one question a conversation."""
    vision_tower: str = ""
    """llava: a run of vlmfast train, a folder or name as vlmfast eval --pretrained takes it; or CLIP-tiny and such,
    from nothing."""
    language_model: str = ""
    """llava: a folder of a Llama or Qwen2 (of Hugging Face's, or a run of vlmfast train --task lm); or Lm-tiny, from
    nothing."""
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """llava: LLaVA 1.5's projector, or LLaVA 1's."""
    vision_feature_layer: int = -2
    """llava: which block of the tower features come from; -1 is the last."""
    init_from: Path | None = None
    """A vision-language model to go on training: a run of vlmfast train --task (stage 1's, for stage 2), or a folder of
    Hugging Face's LLaVA."""
    pretrain_projector: Path | None = None
    """llava: such a model, of which only the projector is taken."""


@dataclass(frozen=True)
class Foundation:
    """What of a model is there before its tokenizer is."""

    task: Task
    sizes: Sizes
    vlm: Vlm | None = None
    clip: Clip | None = None
    lm: Decoder | None = None
    tokenizer: LmTokenizer | None = None

    def pixels(self, aspect: Aspect | None) -> Pixels | None:
        """How images are prepared; None: as the data says.

        Args:
            aspect: --image-aspect-ratio.
        """
        if self.vlm is not None:
            return Pixels(self.vlm.image_hw, self.vlm.image_mean, aspect or cast(Aspect, self.vlm.aspect))
        if self.clip is not None:
            return Pixels(self.clip.config.vision_cfg.image_hw, self.clip.config.image_mean, aspect or "pad")
        if self.task == "lm":
            return Pixels((16, 16), (0.5, 0.5, 0.5))  # nobody looks at them
        side = self.sizes.image_size
        return None if side is None else Pixels((side, side), (0.5, 0.5, 0.5), aspect or "square")

    def build(self, flags: VlmModelFlags, tokenizer: LmTokenizer, pixels: Pixels, seed: int) -> Vlm:
        """The model, on the CPU.

        Args:
            flags: the projector's kind and its weights.
            tokenizer: what it reads and writes.
            pixels: how images are prepared for it.
            seed: of new weights.
        Raises:
            DataError: --pretrain-projector is no LLaVA, or of another shape.
        """
        image_token_id, V = tokenizer.image_token_id, tokenizer.vocab_size
        if self.vlm is not None:
            model = self.vlm
        elif self.task == "lm":
            decoder = self.lm or build_decoder(self.sizes.decoder_config(V), seed=seed)
            model = text_only(decoder, image_token_id)
        elif self.task == "patch-lm":
            config = PatchLmConfig(
                self.sizes.decoder_config(V),
                image_token_id,
                image_size=pixels.image_hw,
                patch_size=self.sizes.patch_size,
                stem=self.sizes.stem,
                prefix_lm=self.sizes.prefix_lm,
                aspect=pixels.aspect,
            )
            model = build_patch_lm(config, seed=seed)
        else:
            assert self.clip is not None
            model = llava_from(
                self.clip,
                self.lm or build_decoder(self.sizes.decoder_config(V), seed=seed),
                image_token_id=image_token_id,
                projector=flags.projector_type,
                feature_layer=flags.vision_feature_layer,
                aspect=pixels.aspect,
                seed=seed,
            )
        if flags.pretrain_projector is not None:
            _take_projector(model, flags.pretrain_projector)
        return model


def open_foundation(task: Task, flags: VlmModelFlags, seed: int) -> Foundation:
    """What the flags name of a model, read from the disk or made anew.

    Args:
        task: what is trained.
        flags: its parts.
        seed: of a tower from nothing.
    Raises:
        DataError: a flag of another task, a part that is missing or not whole, or a size that does not fit.
    """
    _check_flags(task, flags)
    if flags.init_from is not None:
        folder = model_folder(flags.init_from)
        vlm, tokenizer = load_vlm(folder), load_lm_tokenizer(folder)
        check_vocabulary(vlm, tokenizer, folder)
        if (task == "llava") != isinstance(vlm, Llava):
            raise DataError(f"--init-from {flags.init_from}: is a {type(vlm).__name__}, and --task is {task}")
        return Foundation(task, Sizes(), vlm=vlm, tokenizer=tokenizer)
    if task != "llava":
        return Foundation(task, _sizes(flags, "Lm-tiny" if task == "lm" else "PatchLm-tiny"))
    clip = _tower(flags.vision_tower, seed)
    if flags.language_model in PRESETS:
        return Foundation(task, _sizes(flags, flags.language_model), clip=clip)
    if not flags.language_model:
        raise DataError(f"--task llava needs --language-model: a folder, or one of {', '.join(PRESETS)} from nothing")
    if given := _given(flags):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(f"--language-model {flags.language_model}: is there already; leave out {named}")
    folder = model_folder(Path(flags.language_model))
    return Foundation(task, Sizes(), clip=clip, lm=load_decoder(folder), tokenizer=load_lm_tokenizer(folder))


def model_folder(path: Path) -> Path:
    """The folder of a finished run's model; any other path itself.

    Args:
        path: a run's folder or a model's.
    """
    return path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path


def text_only(decoder: Decoder, image_token_id: int) -> Vlm:
    """A language model as a Vlm without eyes, to be trained on conversations without images.

    Args:
        decoder: the model.
        image_token_id: which occurs in none of them.
    """
    return Vlm(
        decoder,
        image_token_id=image_token_id,
        image_tokens=1,
        image_hw=(16, 16),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        aspect="pad",
    )


def _check_flags(task: Task, flags: VlmModelFlags) -> None:
    """Nothing, if no flag speaks of another task's model."""
    of = {"vision_tower": "llava", "language_model": "llava", "pretrain_projector": "llava"}
    if flags.model and task == "llava":
        raise DataError(
            "--model is for --task patch-lm and lm; a llava's parts are --vision-tower and --language-model"
        )
    of |= dict.fromkeys(("image_size", "patch_size", "stem", "prefix_lm"), "patch-lm")
    for name, owner in of.items():
        if getattr(flags, name) and task != owner:
            raise DataError(f"--{name.replace('_', '-')} is for --task {owner}; this is --task {task}")
    if flags.init_from is not None:
        made = ("model", "vision_tower", "language_model", *_given(flags))
        if clash := [name for name in made if getattr(flags, name)]:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
            raise DataError(f"--init-from says what the model is; leave out {named}")


def _given(flags: VlmModelFlags) -> dict[str, object]:
    """The sizes that the flags name."""
    names = [item.name for item in fields(Sizes)]
    return {name: getattr(flags, name) for name in names if getattr(flags, name) not in (None, False)}


def _sizes(flags: VlmModelFlags, default: str) -> Sizes:
    """The preset's or the file's sizes, changed by the flags."""
    name = flags.model or default
    if name in PRESETS:
        base = asdict(PRESETS[name])
    elif Path(name).is_file():
        base = json.loads(Path(name).read_text(encoding="utf-8"))
    else:
        raise DataError(f"--model must be one of {', '.join(PRESETS)}, or a .json with sizes; got {name!r}")
    known = {item.name for item in fields(Sizes)}
    if unknown := sorted(set(base) - known):
        raise DataError(f"{name}: unknown sizes {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return Sizes(**{**base, **_given(flags)})


def _tower(name: str, seed: int) -> Clip:
    """The CLIP whose image tower a LLaVA sees through."""
    if not name:
        raise DataError("--task llava needs --vision-tower: a CLIP's folder or run, or a name such as CLIP-tiny")
    if not Path(name).exists() and name in config_names():
        return build_clip(load_config(name), seed=seed)
    clip = open_pretrained(ModelFlags(pretrained=name, device="cpu")).model
    if not isinstance(clip, Clip) or not isinstance(clip.config, ClipConfig):
        raise DataError(f"--vision-tower {name}: is a {type(clip).__name__}; a LLaVA sees through a CLIP's ViT")
    return clip


def _take_projector(model: Vlm, path: Path) -> None:
    """Gives the model the projector of another."""
    other = load_vlm(model_folder(path))
    if not isinstance(other, Llava) or not isinstance(model, Llava):
        raise DataError(f"--pretrain-projector {path}: is a {type(other).__name__}, which has no projector")
    ours, theirs = model.multi_modal_projector.state_dict(), other.multi_modal_projector.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise DataError(f"--pretrain-projector {path}: has {shapes[1]}; this model takes {shapes[0]}")
    with torch.no_grad():
        model.multi_modal_projector.load_state_dict(theirs)
