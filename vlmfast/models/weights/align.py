"""Folders that transformers' AlignModel wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmfast.errors import DataError
from vlmfast.models.align import Align
from vlmfast.models.weights.files import read_json, read_weights
from vlmfast.models.weights.table import inward, row


def load_align(folder: Path, dtype: torch.dtype) -> Align:
    """The model of a folder that transformers' AlignModel wrote, in evaluation mode.

    Args:
        folder: with config.json, model.safetensors (whole or in shards) and perhaps preprocessor_config.json.
        dtype: what floating tensors become.
    Raises:
        DataError: files are missing or not whole, or tensors missing, unknown or of another shape; all are listed.
        MissingExtraError: transformers is not installed.
    """
    processor = folder / "preprocessor_config.json"
    mean, std = _statistics(read_json(processor)) if processor.is_file() else ((0.5,) * 3, (0.5,) * 3)
    model = Align(read_json(folder / "config.json"), mean, std).to(dtype)
    weights, _ = read_weights(folder)
    weights = {name: value for name, value in weights.items() if not name.endswith(".embeddings.position_ids")}
    built = model.state_dict()
    model.load_state_dict(inward(weights, [row(name) for name in built], built, str(folder)))
    return model.eval()


def _statistics(processor: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation, for pixels in 0..1, that do at once what an EfficientNetImageProcessor does in steps."""
    factor, offset = processor.get("rescale_factor", 1 / 255), processor.get("rescale_offset", False)
    means, stds = processor.get("image_mean") or (0.5,) * 3, processor.get("image_std") or (0.5,) * 3
    mean, std = [], []
    for m, s in zip(means, stds, strict=True):
        black, white = (value * factor - offset for value in (0, 255))
        if processor.get("do_normalize", True):
            black, white = (black - m) / s, (white - m) / s
        if processor.get("include_top", True):
            black, white = black / s, white / s
        std.append(1 / (white - black))
        mean.append(-black / (white - black))
    if processor.get("do_rescale", True) is not True:
        raise DataError("preprocessor_config.json: do_rescale false is not built here")
    return tuple(mean), tuple(std)
