"""Vision-language models on disk: a `Llava` as transformers' own directory, a `PatchLm` in one of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmfast.errors import DataError
from vlmfast.models.llava import Llava
from vlmfast.models.patch_lm import MODEL_TYPE, PatchLm, PatchLmConfig
from vlmfast.models.vlm import Vlm
from vlmfast.models.weights import hf, llava
from vlmfast.models.weights.files import read_json, read_weights, write_folder
from vlmfast.models.weights.table import inward, row


def save_vlm(
    model: Vlm,
    folder: str | Path,
    tokenizer_files: Mapping[str, Path] | None = None,
    *,
    eos: Collection[int] = (),
) -> Path:
    """The folder, which now holds the model whole, every tensor bit for bit: config.json, model.safetensors and more.

    A `Llava` becomes what transformers' LlavaForConditionalGeneration.from_pretrained loads, its image processor
    included; a `PatchLm` has a config.json of our own, as no other library has such a model.

    Args:
        model: a `Llava` or a `PatchLm`.
        folder: must not exist, or be empty.
        tokenizer_files: file name -> a file that is copied.
        eos: ids that end an answer, at which transformers' `generate` of a `Llava` then stops.
    Raises:
        DataError: transformers has no such model, or the folder is not empty.
    """
    folder = Path(folder)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    texts: dict[str, Any]
    if isinstance(model, Llava):
        dtype = str(model.decoder.head_weight.dtype).removeprefix("torch.")
        texts = {hf.CONFIG_FILE: {**llava.config_file(model.config), "dtype": dtype}}
        texts |= llava.processor_files(model.config)
        texts |= {"generation_config.json": {"eos_token_id": sorted(eos)}} if eos else {}
        weights = llava.to_theirs(model.config, weights)
    else:
        texts = {hf.CONFIG_FILE: model.describe()}
    write_folder(folder, {hf.WEIGHTS_FILE: weights}, texts, tokenizer_files or {})
    return folder


def load_vlm(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> Vlm:
    """The model of a folder, in evaluation mode; a `Llava`'s image tower is frozen.

    Args:
        folder: what `save_vlm` wrote, or one of transformers' LlavaForConditionalGeneration, of any version, its
            tensors in one file or in several.
        device: where the model goes.
        dtype: what floating tensors become; None: as they are on disk.
    Raises:
        DataError: nothing of the kind in the folder; a model that is not built here; tensors missing, unknown or of
            another shape, all listed.
    """
    folder = Path(folder)
    path = folder / hf.CONFIG_FILE
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in (MODEL_TYPE, "llava"):
        raise DataError(
            f"{path}: model_type {kind!r} is no vision-language model that is built here: {MODEL_TYPE}, llava"
        )
    weights, where = read_weights(folder)
    with torch.device("meta"):
        model = (
            PatchLm(PatchLmConfig.from_dict(config, str(path)))
            if kind == MODEL_TYPE
            else Llava(llava.read_config(folder))
        )
    built = model.state_dict()
    if isinstance(model, Llava):
        weights = llava.to_ours(model.config, weights, built, str(where))
    else:
        weights = inward(weights, [row(name) for name in built], built, str(where))
    placed = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in weights.items()}
    model.load_state_dict(placed, assign=True)
    return model.eval()
