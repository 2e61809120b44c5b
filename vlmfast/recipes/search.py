"""`vlmfast search`: the images or captions of an index that are most similar to a caption or an image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmfast.data.images import load_image
from vlmfast.errors import DataError
from vlmfast.eval.embed import embed_images, embed_texts
from vlmfast.eval.gallery import Found, Hit, contact_sheet, printable
from vlmfast.eval.index import Index, read_index
from vlmfast.ops.similarity import similarity_topk
from vlmfast.recipes.embed import read_captions
from vlmfast.recipes.pretrained import ModelFlags, Pretrained, open_pretrained
from vlmfast.train.checkpoint import replace_text


@dataclass(kw_only=True)
class Config(ModelFlags):
    """Finds the images (or captions) of an index that are most similar to a caption or an image, by exact search.

    For example:
        vlmfast search --pretrained logs/pairs --index photos.safetensors --text "a red square" --html sheet.html
        vlmfast search --pretrained logs/pairs --index photos.safetensors --image query.png --k 5 --json
        vlmfast search --pretrained logs/pairs --index photos.safetensors --image query.png --find captions

    The index is what vlmfast embed wrote, with the same model.
    """

    index: Path
    """File that vlmfast embed wrote."""
    text: tuple[str, ...] = ()
    """One caption or several."""
    texts: Path | None = None
    """File of captions in UTF-8, one a line: as many queries."""
    image: tuple[Path, ...] = ()
    """One image file or several."""
    find: Literal["images", "captions"] = "images"
    """What to look for; captions are those of vlmfast embed --texts."""
    k: int = 10
    """How many."""
    images: Path | None = None
    """Where the images lie now, for the sheet (default: where vlmfast embed found them)."""
    html: Path | None = None
    """Write a contact sheet: one page with thumbnails, names and scores."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> None:
    """Prints what was found, and writes the sheet.

    Args:
        config: the flags.
    Raises:
        DataError: no query, an index that is missing, empty or another model's, or an image that cannot be read.
    """
    texts = [*config.text, *(read_captions(config.texts) if config.texts else ())]
    if not texts and not config.image:
        raise DataError("nothing to look for: give --text, --texts or --image")
    if config.k < 1:
        raise DataError(f"--k must be at least 1; got {config.k}")
    index = read_index(config.index)
    items, names = (index.images, index.names) if config.find == "images" else (index.texts, index.captions)
    if not names:
        flag = "--images" if config.find == "images" else "--texts"
        raise DataError(f"{config.index}: holds no {config.find}; make it with vlmfast embed {flag}")
    pretrained = open_pretrained(config)
    check_model(config.index, index, pretrained)
    query = _embed(config, pretrained, texts)
    scores, rows = similarity_topk(query, items.to(query.device), min(config.k, len(names)))
    root = config.images or Path(index.root)
    asked: list[tuple[str, Path | None]] = [*((text, None) for text in texts), *((str(p), p) for p in config.image)]
    found = [
        Found(
            said,
            [
                Hit(names[row], s, root / names[row] if config.find == "images" else None)
                for s, row in zip(*hits, strict=True)
            ],
            path,
        )
        for (said, path), *hits in zip(asked, scores.tolist(), rows.tolist(), strict=True)
    ]
    if config.html is not None:
        facts = [f"{pretrained.name}, {pretrained.source}", f"{len(names):,} {config.find} in {config.index}"]
        config.html.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config.html, contact_sheet(found, facts))
    _show(config, found)


def check_model(path: Path, index: Index, pretrained: Pretrained) -> None:
    """Raises DataError if the index was made by another model.

    Args:
        path: of the index.
        index: what it holds.
        pretrained: the model that is to search it.
    """
    digest = pretrained.digest()
    if digest != index.model:
        raise DataError(
            f"{path}: was made by another model: {index.pretrained} (SHA-256 {index.model[:12]}...), not by "
            f"{pretrained.source} ({digest[:12]}...); search with that one, or embed again"
        )


def _embed(config: Config, pretrained: Pretrained, texts: list[str]) -> Tensor:
    """[M, D]: the queries' embeddings, captions first."""
    rows = []
    if texts:
        tokenizer = pretrained.tokenizer(config.long_captions)
        rows.append(embed_texts(pretrained.model, tokenizer, texts, config.batch_size))
    if config.image:
        how: dict[str, Any] = {"interpolation": pretrained.interpolation}
        size, fit = pretrained.image_size, pretrained.fit
        images = [load_image(path.read_bytes(), size, fit, where=path, **how) for path in config.image]
        rows.append(embed_images(pretrained.model, torch.stack(images).split(config.batch_size)))
    return torch.cat(rows)


def _show(config: Config, found: list[Found]) -> None:
    if config.json:
        queries = [
            {
                "text" if each.image is None else "image": each.query,
                "found": [{"name" if hit.image else "caption": hit.text, "score": hit.score} for hit in each.hits],
            }
            for each in found
        ]
        print(json.dumps({"index": str(config.index), "find": config.find, "queries": queries}))
        return
    for each in found:
        print(printable(each.query))
        for hit in each.hits:
            print(f"  {hit.score:7.4f}  {printable(hit.text)}")
    if config.html is not None:
        print(config.html)
