"""`vlmfast embed`: the embeddings of a folder of images and of a file of captions, in one file."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.data.batch import Sample, batches
from vlmfast.data.pairs import ImageFolder
from vlmfast.errors import DataError
from vlmfast.eval.embed import evaluating
from vlmfast.eval.index import Index, read_safetensors, save_atomically, write_index
from vlmfast.recipes.pretrained import ModelFlags, Pretrained, open_pretrained
from vlmfast.recipes.progress import counted
from vlmfast.recipes.sources import tell_skipped

PART = 16384  # images between two savings: a run that was stopped goes on from the last one
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(kw_only=True)
class Config(ModelFlags):
    """Embeds all images under a folder, and all lines of a file, into one file that vlmfast search reads.

    For example:
        vlmfast embed --pretrained logs/pairs --images photos --out photos.safetensors
        vlmfast embed --pretrained clip-vit-b32 --images photos --texts captions.txt --out photos.safetensors

    Images that cannot be read are left out and counted. A run that was stopped goes on where it was when the same
    command is given again.
    """

    images: Path | None = None
    """Folder; images in sub-folders count too."""
    texts: Path | None = None
    """File of captions in UTF-8, one a line."""
    out: Path
    """The file to write, .safetensors: images [N, D] and texts [M, D], rows of unit length, with their names."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the rows; float16 takes half the space and moves a cosine by less than 0.001."""
    force: bool = False
    """Replace the file if it is there already."""


def run(config: Config) -> None:
    """Writes the file.

    Args:
        config: the flags.
    Raises:
        DataError: the file exists already, there is nothing to embed or nothing that can be read, or the model is
            missing, not whole or broken.
    """
    if config.images is None and config.texts is None:
        raise DataError("nothing to embed: give --images with a folder, --texts with a file, or both")
    if config.out.suffix != ".safetensors":
        raise DataError(f"--out {config.out}: must end in .safetensors")
    if config.out.exists() and not config.force:
        raise DataError(f"{config.out}: exists already; name another file, or replace it with --force")
    captions = [] if config.texts is None else read_captions(config.texts)
    pretrained = open_pretrained(config)
    dtype, digest = DTYPES[config.dtype], pretrained.digest()
    tokenizer = pretrained.tokenizer(config.long_captions) if captions else None
    texts = embed_captions(pretrained, tokenizer, captions, config.batch_size).to(dtype) if tokenizer else None
    names, images = ([], None) if config.images is None else _embed_folder(config, pretrained, digest, dtype)
    root = "" if config.images is None else str(config.images.resolve())
    width = next(rows.shape[1] for rows in (images, texts) if rows is not None)
    none = torch.empty(0, width, dtype=dtype)
    images, texts = (none if rows is None else rows for rows in (images, texts))
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise DataError(f"{pretrained.source}: gives embeddings that are not finite; its weights are broken")
    write_index(config.out, Index(images, names, texts, captions, root, digest, pretrained.source))
    shutil.rmtree(_parts(config.out), ignore_errors=True)
    print(f"{config.out}: {len(names):,} images, {len(captions):,} captions, {width} numbers each in {config.dtype}")


def read_captions(path: Path) -> list[str]:
    """The lines of the file that hold something.

    Args:
        path: the file, in UTF-8.
    Raises:
        DataError: no such file, not UTF-8, or no caption in it.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from None
    if not any(lines):
        raise DataError(f"{path}: holds no caption")
    return [line for line in lines if line]


def embed_captions(
    pretrained: Pretrained, tokenizer: Callable[[list[str]], Tensor], captions: list[str], batch_size: int
) -> Tensor:
    """The captions' embeddings, of unit length.

    Args:
        pretrained: the model.
        tokenizer: its own.
        captions: M of them, at least one.
        batch_size: captions at a time.
    Returns: [M, D] float32, on the CPU.
    """
    groups = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
    with evaluating(pretrained.model) as device:
        rows = [
            _unit(pretrained.model.encode_text(tokenizer(group).to(device)))
            for group in counted(groups, "captions", len(captions))
        ]
    return torch.cat(rows)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1).cpu()


@dataclass(frozen=True)
class _Range:
    """Some of the images, as `batches` takes them."""

    folder: ImageFolder
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Sample:
        return self.folder[self.start + index]

    def draw(self, index: int, seed: int, epoch: int) -> Sample | None:
        return self.folder.draw(self.start + index, seed, epoch)


def _no_tokens(texts: list[str]) -> Tensor:
    return torch.empty(len(texts), 0, dtype=torch.int64)


def _embed_folder(config: Config, pretrained: Pretrained, digest: str, dtype: torch.dtype) -> tuple[list[str], Tensor]:
    """Names and embeddings [N, D] of the images that can be read; what an earlier run saved is not made again."""
    assert config.images is not None
    size, fit, interpolation = pretrained.image_size, pretrained.fit, pretrained.interpolation
    folder = ImageFolder(config.images, image_size=size, fit=fit, interpolation=interpolation)
    what = json.dumps([digest, size, fit, interpolation, config.dtype, str(config.images.resolve()), folder.names])
    key = {"key": hashlib.sha256(what.encode()).hexdigest()}
    rows, features = [], []
    total = len(folder)
    for start in range(0, total, PART):
        part, saved = _Range(folder, start, min(start + PART, total)), _parts(config.out) / f"{start}.safetensors"
        found = _read_part(saved, key)
        if found is None:
            found = _embed_part(
                pretrained, part, dtype, config, f"images from {start:,} of {total:,}:" * (total > PART)
            )
            if total > PART:
                save_atomically(saved, found, key)
        if len(found["rows"]):
            rows.append(found["rows"] + start)
            features.append(found["features"])
    tell_skipped(folder)
    embedded = torch.cat(rows).tolist() if rows else []
    if missing := total - len(embedded) - sum(folder.skipped.values()):
        print(f"skipped {missing} more in the run before", file=sys.stderr)
    if not embedded:
        raise DataError(f"not one image under {config.images} could be read; {folder.describe_skipped()}")
    return [folder.names[row] for row in embedded], torch.cat(features)


def _embed_part(
    pretrained: Pretrained, part: _Range, dtype: torch.dtype, config: Config, what: str
) -> dict[str, Tensor]:
    stream = batches(part, _no_tokens, config.batch_size, seed=0, shuffle=False, epochs=1, workers=config.workers)
    rows, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=dtype)]
    with evaluating(pretrained.model) as device:
        for batch in counted(stream, what or "images", len(part)):
            rows.append(batch.index)
            features.append(_unit(pretrained.model.encode_image(batch.image.to(device))).to(dtype))
    return {"rows": torch.cat(rows), "features": torch.cat(features)}


def _parts(out: Path) -> Path:
    """Where parts wait until the file is whole."""
    return out.with_name(f".{out.name}.parts")


def _read_part(path: Path, key: dict[str, str]) -> dict[str, Tensor] | None:
    """The part that an earlier run saved, if it is of the same images and the same model."""
    try:
        tensors, metadata = read_safetensors(path)
    except DataError:
        return None
    return tensors if metadata == key else None
