"""The flags that name a model, and what they open: weights, tokenizer, and how images are prepared for it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vlmfast.data.images import Fit, Interpolation
from vlmfast.data.tokenize import CONFIG_FILE, Tokenizer, load_tokenizer
from vlmfast.errors import DataError
from vlmfast.models import Align, Clip, ClipConfig, build_clip, config_names, load_clip, load_config, read_checkpoint
from vlmfast.recipes.sources import image_side, pick_device
from vlmfast.train import latest_checkpoint, load_weights

MODEL_FILE, TOKENIZER_FILE = "open_clip_config.json", "tokenizer.json"  # in a run's folder, beside checkpoints/
PROCESSOR_FILE = "preprocessor_config.json"  # of Hugging Face's
OPENAI_VOCABULARY, OPENAI_MERGES = 49408, "bpe_simple_vocab_16e6.txt.gz"
OWNERS_OF_MERGES = ("open_clip", "clip")  # packages that bring the file
ALIGN_TOKENS = 64  # the length that transformers' AlignProcessor cuts captions to
RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

Model = TypeVar("Model", Clip, Align)


@dataclass(kw_only=True)
class ModelFlags:
    """Which model, and where it runs."""

    pretrained: str
    """A folder of a run, of Hugging Face or of open_clip; a run's checkpoint; a file of weights; or a Hugging Face name
    to download."""
    model: str = ""
    """The released model's name, or a .json of open_clip's: for a bare file, which does not tell its activation."""
    tokenizer: str = ""
    """Folder or file of the tokenizer, where none lies beside the weights."""
    long_captions: Literal["truncate", "refuse"] = "truncate"
    """What becomes of a caption of more tokens than the model takes."""
    ema: bool = False
    """Of a run that kept one (vlmfast train --ema): the mean of its weights, instead of the last ones."""
    batch_size: int = 256
    """Images and captions at a time."""
    workers: int = 2
    """Threads that read images ahead."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclass(frozen=True)
class Pretrained:
    """A model that is ready for images and captions."""

    model: Clip | Align
    name: str  # of the released model that it is built like, else of its folder or file
    source: str  # the path that was given, or the checkpoint found there
    image_size: int  # pixels a side
    fit: Fit
    interpolation: Interpolation
    tokenizers: Callable[[], Tokenizer]  # opened only where captions are read

    def tokenizer(self, long_captions: str = "truncate") -> Callable[[list[str]], Tensor]:
        """Captions -> [B, T] int64, long ones cut off; with "refuse" a caption that is too long raises DataError.

        Raises:
            DataError: there is no tokenizer, or it is another model's.
        """
        tokenizer = self.tokenizers()
        return tokenizer if long_captions == "truncate" else partial(_refuse_long, tokenizer)

    def digest(self) -> str:
        """SHA-256 of what makes two models the same: weights in float32, activations, mean and deviation of pixels.

        It does not depend on the form of the checkpoint: a converted one has the digest of its origin.
        """
        model, total = self.model, hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            total.update(f"{name} {list(tensor.shape)}".encode())
            total.update(tensor.float().cpu().contiguous().view(-1).numpy().data)
        if isinstance(model, Clip):
            config = model.config
            towers = [config.activation(config.vision_cfg), config.activation(config.text_cfg)]
            total.update(f"{towers} {config.image_mean} {config.image_std}".encode())
        return total.hexdigest()


def open_pretrained(flags: ModelFlags) -> Pretrained:
    """The model that the flags name, in evaluation mode on its device.

    Args:
        flags: path, and what the path does not tell.
    Raises:
        DataError: nothing of the kind at the path; a checkpoint that is not whole or not what its config says; images
            that are not square; no such device.
    """
    device = pick_device(flags.device)
    path = Path(flags.pretrained)
    is_run = path.name.startswith("step_") or (path / "checkpoints").is_dir()
    if flags.model and (is_run or _is_align(path)):
        raise DataError(f"--model {flags.model}: is for bare files of weights; {path} says itself what model it is")
    if flags.ema and not is_run:
        raise DataError(f"--ema: is for runs of vlmfast train, and {path} is none")
    if is_run:
        config, model, checkpoint = _load_run(path, flags.ema)
        path = folder = checkpoint.parent.parent
        fit, source = _fit(config, "vlmfast"), str(checkpoint)
    elif _is_align(path):
        return _open_align(flags, path, device)
    else:
        found = read_checkpoint(flags.pretrained, flags.model or None)
        config, folder, fit, source = found.config, found.folder, _fit(found.config, found.source), flags.pretrained
        with torch.device("meta"):
            model = Clip(config)
        model.load_state_dict(found.weights, assign=True)
        model = model.float()  # counts stay whole numbers
    text = config.text_cfg
    return Pretrained(
        _frozen(model, device),
        _name(config) or (path.stem if path.is_file() else path.resolve().name),
        source,
        image_side(config),
        fit,
        "bilinear" if config.interpolation == "bilinear" else "bicubic",
        partial(find_tokenizer, flags.tokenizer, folder, text.vocab_size, text.context_length),
    )


def load_run(path: Path) -> tuple[Clip, Tokenizer, Path]:
    """The model of a run of `vlmfast train` with its weights, its tokenizer, and the checkpoint that they came from.

    Args:
        path: a run's folder (its latest checkpoint is taken), or a checkpoint in one.
    Raises:
        DataError: there is no whole checkpoint, model config or tokenizer.
    """
    config, model, checkpoint = _load_run(path)
    length = config.text_cfg.context_length
    return model, load_tokenizer(checkpoint.parent.parent / TOKENIZER_FILE, length), checkpoint


def find_tokenizer(named: str, folder: Path, vocab_size: int, context_length: int) -> Tokenizer:
    """The tokenizer that is named, or lies in the model's folder, or that came with OpenAI's vocabulary.

    Args:
        named: --tokenizer, or "".
        folder: of the weights.
        vocab_size, context_length: the model's.
    Raises:
        DataError: there is none, or it has ids that the model has not.
    """
    place = Path(named) if named else next(_tokenizers(folder, vocab_size), None)
    if place is None:
        raise DataError(
            f"{folder}: holds no {TOKENIZER_FILE}; name the model's tokenizer with --tokenizer, a folder of Hugging "
            f"Face's or a file (OpenAI's {OPENAI_MERGES} lies in the open_clip package)"
        )
    tokenizer = load_tokenizer(place, context_length)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{place}: is another model's tokenizer: it has {tokenizer.vocab_size} ids, the model has {vocab_size}"
        )
    return tokenizer


def _tokenizers(folder: Path, vocab_size: int) -> Iterator[Path]:
    """Where the model's tokenizer may be, best first."""
    if (folder / TOKENIZER_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        yield folder
    if vocab_size == OPENAI_VOCABULARY:
        for package in OWNERS_OF_MERGES:
            spec = importlib.util.find_spec(package)
            for place in (spec and spec.submodule_search_locations) or ():
                if (Path(place) / OPENAI_MERGES).is_file():
                    yield Path(place) / OPENAI_MERGES


def _refuse_long(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    try:
        return tokenizer(texts, truncate=False)
    except ValueError as error:
        said = str(error).partition(". Shorten it")[0]
        raise DataError(f"{said}. Shorten it, or have it cut with --long-captions truncate") from None


def _load_run(path: Path, ema: bool = False) -> tuple[ClipConfig, Clip, Path]:
    checkpoint = path if path.name.startswith("step_") else latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{path}: holds no checkpoint; give a run's folder, such as logs/NAME, or a checkpoint in it")
    config = load_config(checkpoint.parent.parent / MODEL_FILE)
    model = build_clip(config, seed=0)
    load_weights(checkpoint, model, ema=ema)
    return config, model, checkpoint


def _is_align(path: Path) -> bool:
    file = path / "config.json"
    try:
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "align"
    except (ValueError, AttributeError):  # read_checkpoint says what is wrong with it
        return False


def _open_align(flags: ModelFlags, path: Path, device: torch.device) -> Pretrained:
    model = load_clip(path)
    assert isinstance(model, Align)
    height, width = model.image_hw
    if height != width:
        raise DataError(f"{path}: takes images of {height} x {width} pixels; the readers make square ones")
    file = path / PROCESSOR_FILE
    processor = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Pretrained(
        _frozen(model, device),
        path.resolve().name,
        flags.pretrained,
        height,
        "squash",
        RESAMPLE.get(processor.get("resample", 2), "bilinear"),
        partial(find_tokenizer, flags.tokenizer, path, model.vocab_size, min(ALIGN_TOKENS, model.context_length)),
    )


def _frozen(model: Model, device: torch.device) -> Model:
    return model.eval().requires_grad_(False).to(device)


def _fit(config: ClipConfig, source: str) -> Fit:
    """How images reach the model's size: as the library does that the checkpoint belongs to."""
    if config.resize_mode == "squash":
        return "squash"
    return "crop_floor" if source == "hf" else "crop"


def _name(config: ClipConfig) -> str | None:
    """The released model that this one is built like, if there is one."""
    return next((name for name in config_names() if _built(load_config(name)) == _built(config)), None)


def _built(config: ClipConfig) -> ClipConfig:
    """The config without what may differ between two checkpoints of one model: preprocessing, start, tokenizer."""
    default = ClipConfig()
    return replace(
        config,
        text_cfg=replace(config.text_cfg, hf_tokenizer_name=None, tokenizer_kwargs=None),
        init_logit_scale=default.init_logit_scale,
        image_mean=default.image_mean,
        image_std=default.image_std,
        interpolation=default.interpolation,
        resize_mode=default.resize_mode,
    )
