"""Files of weights, read without running any code that they may hold, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmfast.errors import DataError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, without the wrappings of training scripts.

    Args:
        path: .safetensors, or what torch.save wrote: a state dict, or {"state_dict": ...} as open_clip's checkpoints.
    Raises:
        DataError: not such a file, not whole, or one that could only be read by running code.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except SafetensorError as error:
        raise DataError(f"{path}: is not a whole safetensors file: {error}") from None
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"{path}: is no state dict: it must map names to tensors")
    tensors = {str(name): value for name, value in content.items()}
    for prefix in (
        "module.",
        "_orig_mod.",
        "module.",
    ):  # DistributedDataParallel, torch.compile, either around the other
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that a Hugging Face index (`*.index.json`) names.

    Args:
        index: its path.
    Raises:
        DataError: it names none, or as `read_tensors` says.
    """
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names:
        raise DataError(f"{index}: names no file: it must hold a weight_map from tensors to files")
    return {key: value for name in names for key, value in read_tensors(index.parent / Path(name).name).items()}


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a Hugging Face folder, whole or in shards, and the file that holds or lists them.

    Args:
        folder: with model.safetensors or pytorch_model.bin, or an index of shards of either.
    Raises:
        DataError: there is none of them, or as `read_tensors` says.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return read_tensors(path), path
        if index.is_file():
            return read_sharded(index), index
    raise DataError(f"{folder}: holds no weights: neither model.safetensors nor pytorch_model.bin, nor their index")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
    Raises:
        DataError: there is none, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


def write_folder(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any], copies: Mapping[str, Path]
) -> None:
    """Nothing; the folder holds these files, and at no moment only some of them.

    Args:
        folder: must not exist, or be empty.
        tensors: file name -> tensors, for safetensors.
        texts: file name -> what JSON can hold.
        copies: file name -> a file that is copied.
    Raises:
        DataError: the folder holds something already.
        OSError: the disk refused; no folder is left then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is not an empty folder; nothing is overwritten. Name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        for name, content in tensors.items():
            save_file(
                {key: value.contiguous().clone() for key, value in content.items()}, partial / name, {"format": "pt"}
            )
        for name, text in texts.items():
            (partial / name).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, source in copies.items():
            shutil.copyfile(source, partial / name)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, folder)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.partition("/")[2].startswith("code/") for name in archive.namelist()):
                raise DataError(
                    f"{path}: is a TorchScript archive, which holds code. Where you trust it, take its weights out: "
                    "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise DataError(f"{path}: holds more than tensors, and loading it could run code: {error}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is not a whole file of torch.save: {error}") from None
