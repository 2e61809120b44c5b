"""Embeddings of images and captions in one file, with their names and the model that made them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmfast.errors import DataError

FORMAT = "vlmfast-index-1"


@dataclass(frozen=True, eq=False)
class Index:
    """What can be searched: rows of unit length, and what they are."""

    images: Tensor  # [N, D] float32 or float16
    names: list[str]  # of the N images, from root
    texts: Tensor  # [M, D]
    captions: list[str]  # M
    root: str  # the folder of the images, absolute
    model: str  # digest of the model
    pretrained: str  # where the model lay

    @property
    def width(self) -> int:
        """D."""
        return self.images.shape[1]


def write_index(path: Path, index: Index) -> None:
    """Nothing; the file holds the index, whole, or what it held before.

    A .safetensors file with the tensors images and texts; names and captions are JSON lists in UTF-8, as uint8 tensors,
    because a header of safetensors ends at 100 MB.

    Args:
        path: the file; folders above it are made.
        index: what it is to hold.
    Raises:
        OSError: the disk refused.
    """
    lists = {"image_names": index.names, "captions": index.captions}
    tensors = {"images": index.images.contiguous(), "texts": index.texts.contiguous()}
    tensors |= {
        key: torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) for key, value in lists.items()
    }
    metadata = {"format": FORMAT, "root": index.root, "model": index.model, "pretrained": index.pretrained}
    save_atomically(path, tensors, metadata)


def read_index(path: Path) -> Index:
    """The index in a file that `write_index` wrote.

    Args:
        path: the file.
    Raises:
        DataError: no such file, one that is not whole, or another kind of file.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path}: is no index of vlmfast embed (its format is {metadata.get('format')!r})")
    names, captions = (json.loads(tensors[key].numpy().tobytes()) for key in ("image_names", "captions"))
    root, model, pretrained = (metadata[key] for key in ("root", "model", "pretrained"))
    return Index(tensors["images"], names, tensors["texts"], captions, root, model, pretrained)


def save_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Nothing; the .safetensors file holds these, and at no moment only some of them.

    Args:
        path: the file; folders above it are made.
        tensors: by name.
        metadata: by name.
    Raises:
        OSError: the disk refused; what the file held before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.

    Args:
        path: the file.
    Returns: tensors by name, metadata by name.
    Raises:
        DataError: no such file, or one that is not whole.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: is not a whole safetensors file: {error}") from None
