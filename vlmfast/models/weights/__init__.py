"""Checkpoints of OpenAI, open_clip and Hugging Face: recognised, checked tensor by tensor, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.models.align import Align
from vlmfast.models.clip import Clip
from vlmfast.models.config import ClipConfig, load_config
from vlmfast.models.weights import hf, open_clip, openai
from vlmfast.models.weights.align import load_align
from vlmfast.models.weights.files import read_json, read_tensors, read_weights, write_folder
from vlmfast.models.weights.table import inward, outward, row
from vlmfast.ops.patch_embedding import interpolate_positions

Format: TypeAlias = Literal["hf", "open_clip"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, its tensors under our names and in the precision of the file, and where they lay."""

    config: ClipConfig
    weights: Mapping[str, Tensor]
    source: str  # "openai", "open_clip", "hf" or "vlmfast", the folder of a run
    folder: Path  # of tokenizer and other files


def load_clip(
    path: str | Path,
    config: str | Path | ClipConfig | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Clip | Align:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: a folder of open_clip's (open_clip_config.json), of Hugging Face's (config.json of CLIPModel, SiglipModel
            or AlignModel), or of a `vlmfast train` run; or a file of weights (.safetensors, .pt, .bin). A Hugging Face
            name ("openai/clip-vit-base-patch32") is downloaded first, where no such path exists.
        config: what `load_config` takes, or a config: needed for a bare file of open_clip's, whose tensors do not say
            which activation they need. Where the checkpoint says what the model is, this must say the same.
        image_size: pixels of a side, or (H, W), that images will have, if not the checkpoint's; not of an ALIGN, which
            takes its own.
        device: where the model goes.
        dtype: what floating tensors become.
    Raises:
        ShapeError: images of that size are not whole patches.
        DataError: nothing of the kind at `path`; tensors missing, unknown or of another shape, all listed; a config
            that the checkpoint contradicts, in its activation for example; a file that only running code could read.
        MissingExtraError: an ALIGN, and transformers is not installed.
    """
    folder = _local(path)
    if _is_align(folder):
        return load_align(folder, dtype).to(device)
    checkpoint = read_checkpoint(folder, config)
    if image_size is not None:
        checkpoint = with_image_size(checkpoint, image_size)
    with torch.device("meta"):
        model = Clip(checkpoint.config)
    model = model.to_empty(device=device).to(dtype)
    model.load_state_dict(checkpoint.weights)
    return model.eval()


def read_checkpoint(path: str | Path, config: str | Path | ClipConfig | None = None) -> Checkpoint:
    """The checkpoint at a path, with every name and shape checked.

    Args:
        path, config: as for `load_clip`; not of an ALIGN.
    Raises:
        DataError: as `load_clip` says.
    """
    folder = _local(path)
    source: str
    found: ClipConfig | None
    asked = config if isinstance(config, ClipConfig) or config is None else load_config(config)
    if folder.is_dir():
        source, found, weights, where = _read_folder(folder)
    else:
        source, found, weights, where = _read_file(folder, asked)
    if found is None and asked is None:
        raise DataError(
            f"{where}: has no config beside it, and tensors do not say which activation they need. "
            "Name one: config='ViT-B-32', or 'ViT-B-32-quickgelu' for weights trained from OpenAI's"
        )
    if found is not None and asked is not None:
        _same_model(where, found, asked)
    chosen = found or asked
    assert chosen is not None
    with torch.device("meta"):
        built = Clip(chosen).state_dict()
    if source == "hf":
        ours = inward(hf.plain(weights), hf.rows(chosen), built, str(where))
    else:
        table = [row(name) for name in built] if open_clip.has_our_names(weights) else open_clip.rows(chosen, [*built])
        ours = inward(open_clip.plain(weights, chosen), table, built, str(where))
    return Checkpoint(chosen, ours, source, folder if folder.is_dir() else folder.parent)


def with_image_size(checkpoint: Checkpoint, image_size: int | tuple[int, int]) -> Checkpoint:
    """The checkpoint for images of another size: the image tower's positions are interpolated, as open_clip does.

    Args:
        checkpoint: what `read_checkpoint` returned.
        image_size: pixels of a side, or (H, W).
    Raises:
        ShapeError: such images are not whole patches.
    """
    old = checkpoint.config.vision_cfg
    new = replace(old, image_size=image_size)
    if isinstance(old.layers, tuple):
        name, class_token = "visual.attnpool.positional_embedding", True
        grids = [(vision.image_hw[0] // 32,) * 2 for vision in (old, new)]
    else:
        name, class_token = "visual.positional_embedding", old.pool_type != "map"
        grids = [old.grid, new.grid]
    positions = interpolate_positions(checkpoint.weights[name], grids[1], old_grid=grids[0], class_token=class_token)
    weights = {**checkpoint.weights, name: positions}
    return replace(checkpoint, config=replace(checkpoint.config, vision_cfg=new), weights=weights)


def write_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, to: Format, *, extra: Mapping[str, Any] | None = None
) -> Path:
    """The folder, which now holds the checkpoint in that library's form, whole.

    Tensors keep their bits and their precision. Files of the tokenizer that lie beside the checkpoint are copied.

    Args:
        checkpoint: what `read_checkpoint` returned.
        folder: must not exist, or be empty.
        to: "hf": config.json, model.safetensors, preprocessor_config.json; "open_clip": open_clip_config.json and
            open_clip_model.safetensors, which open_clip loads as "local-dir:FOLDER".
        extra: more files of JSON, by name.
    Raises:
        DataError: the library has no such model, or the folder is not empty.
    """
    config, folder = checkpoint.config, Path(folder)
    copies = {name: checkpoint.folder / name for name in hf.TOKENIZER_FILES if (checkpoint.folder / name).is_file()}
    copies = {name: path for name, path in copies.items() if name not in (extra or {})}
    if to == "hf":
        texts = {hf.CONFIG_FILE: hf.config_file(config), hf.PROCESSOR_FILE: hf.processor_file(config)}
        tensors = {hf.WEIGHTS_FILE: outward(checkpoint.weights, hf.rows(config))}
    else:
        open_clip.check_writable(config)
        if copies and not config.text_cfg.hf_tokenizer_name and config.text_cfg.vocab_size != hf.CLIP_VOCABULARY:
            # Without a name open_clip takes OpenAI's vocabulary; with any, it reads tokenizer.json in the folder.
            config = replace(config, text_cfg=replace(config.text_cfg, hf_tokenizer_name=folder.name))
        texts = {open_clip.CONFIG_FILE: config.to_dict()}
        tensors = {
            open_clip.WEIGHTS_FILE: outward(checkpoint.weights, open_clip.rows(config, list(checkpoint.weights)))
        }
    write_folder(folder, tensors, {**texts, **(extra or {})}, copies)
    return folder


def _local(path: str | Path) -> Path:
    """The path, or where a Hugging Face repository of that name was downloaded to."""
    folder = Path(path)
    if folder.exists() or str(path).count("/") != 1 or folder.is_absolute() or str(path).startswith("."):
        if not folder.exists():
            raise DataError(f"{folder}: there is no such file or folder")
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(f"{folder}: there is no such file or folder, and huggingface_hub is not installed") from None
    wanted = ["*.json", "*.safetensors", "merges.txt", "spiece.model"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # no network, no such repository, no permission: each library version has its own kinds
        raise DataError(f"{folder}: there is no such folder here, nor could it be downloaded: {error}") from error


def _is_align(folder: Path) -> bool:
    path = folder / hf.CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") == "align"


def _read_folder(folder: Path) -> tuple[str, ClipConfig, dict[str, Tensor], Path]:
    """(source, config, tensors, the file they came from)."""
    ours = folder / open_clip.CONFIG_FILE
    if ours.is_file():
        for name in (open_clip.WEIGHTS_FILE, "open_clip_pytorch_model.bin"):
            if (folder / name).is_file():
                return "open_clip", load_config(ours), read_tensors(folder / name), folder / name
        pointer = folder / "checkpoints" / "latest"
        if pointer.is_file():
            path = pointer.parent / Path(pointer.read_text(encoding="utf-8").strip()).name / "model.safetensors"
            return "vlmfast", load_config(ours), read_tensors(path), path
    if (folder / hf.CONFIG_FILE).is_file():
        config = hf.read_config(folder)
        return "hf", config, *read_weights(folder)
    raise DataError(
        f"{folder}: holds no checkpoint that is known here: neither {open_clip.CONFIG_FILE} with "
        f"{open_clip.WEIGHTS_FILE} or checkpoints/latest, nor {hf.CONFIG_FILE} with {hf.WEIGHTS_FILE}"
    )


def _read_file(path: Path, asked: ClipConfig | None) -> tuple[str, ClipConfig | None, dict[str, Tensor], Path]:
    weights = read_tensors(path)
    if any(name.startswith("vision_model.") for name in weights):
        return "hf", hf.read_config(path.parent) if asked is None else None, weights, path
    if openai.is_openai(weights):
        weights = {name: value for name, value in weights.items() if name not in openai.MARKS}
        try:
            return "openai", openai.config_from_shapes(weights), weights, path
        except KeyError as error:
            raise DataError(f"{path}: looks like one of OpenAI's files, and lacks the tensor {error}") from None
    beside = path.parent / open_clip.CONFIG_FILE
    return "open_clip", load_config(beside) if beside.is_file() else None, weights, path


def _same_model(where: Path, found: ClipConfig, asked: ClipConfig) -> None:
    """Raises DataError with every way in which the model that was asked for is not the checkpoint's."""
    differences = []
    for section, mine, theirs in (
        ("", asked, found),
        ("vision_cfg.", asked.vision_cfg, found.vision_cfg),
        ("text_cfg.", asked.text_cfg, found.text_cfg),
    ):
        for item in fields(mine):
            a, b = getattr(mine, item.name), getattr(theirs, item.name)
            if a != b and item.name not in NOT_THE_MODEL:
                differences.append(f"{section}{item.name} is {b} in the checkpoint, {a} asked for")
    if differences:
        raise DataError(f"{where}: is another model: {'; '.join(differences)}")


# What may differ between a config that is asked for and a checkpoint's: where training starts, and names.
NOT_THE_MODEL = {"vision_cfg", "text_cfg", "init_logit_scale", "hf_tokenizer_name", "tokenizer_kwargs"}
NOT_THE_MODEL |= {"image_mean", "image_std", "interpolation", "resize_mode"}
