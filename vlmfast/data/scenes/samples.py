"""Scenes as a map-style data set, as a stream of batches, and as a picture to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.batch import Sample
from vlmfast.data.scenes.captions import GRANULARITIES, caption, caption_id, claims
from vlmfast.data.scenes.latents import MAX_INDEX, SPLIT_SIZES, Latents, Scene, check, sample
from vlmfast.data.scenes.render import render, render_torch
from vlmfast.errors import DataError, missing_extra

MIXED = "mixed"  # each scene's own granularity


class Scenes:
    """The first `size` scenes of a split, made when they are asked for. `dataset` makes one."""

    def __init__(self, level: str, split: str, size: int, image_size: int, seed: int, granularity: str) -> None:
        self.level, self.split, self.size, self.image_size = level, split, size, image_size
        self.seed, self.granularity = seed, granularity

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of many places, several times faster than one by one; torch's DataLoader calls it too."""
        latents = self.latents(indices)
        images = torch.from_numpy(render(latents, self.image_size))
        scenes = zip(images, latents.scenes(), strict=True)
        return [Sample(image, *read(scene, self.granularity)) for image, scene in scenes]

    def scene(self, index: int) -> Scene:
        """What sample `index` shows."""
        return self.latents([index]).scene(0)

    def latents(self, indices: Sequence[int]) -> Latents:
        """The latents of the samples `indices`, in their order."""
        places = range(self.size)
        return sample(self.level, self.split, [places[index] for index in indices], self.seed)


def dataset(
    level: str = "L1",
    split: str = "train",
    size: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    granularity: str = "sentence",
) -> Scenes:
    """A map-style data set of procedural scenes with captions; samples with one `id` have captions that say the same.

    Args:
        level: "L0" (one object), "L1" (one or two, with sizes and places) or "L2" (two to four, with textures, styles,
            occlusion and relations); docs/data.md has the table.
        split: "train", "val", "test", "comp-test" ((shape, colour) pairs that occur in no other split) or "style-test"
            (L2 in a style that occurs in no other split).
        size: how many samples, at most 2**31; default: 100 000 for train, 5 000 for the others. The first samples of a
            larger data set are those of a smaller one.
        image_size: side in pixels; default: the level's, 32, 64 or 96.
        seed: which world.
        granularity: "word", "phrase", "sentence", "multi-sentence", "paragraph", or "mixed" for each scene its own.

    Returns:
        Scenes: len(), [i] -> Sample(image uint8 [3, S, S], text, id), scene(i), latents(indices).

    Raises:
        DataError: there is no such level, split or granularity, or a size is out of range.
    """
    facts = check(level, split)
    size = SPLIT_SIZES[split] if size is None else size
    image_size = facts.image_size if image_size is None else image_size
    if granularity not in (*GRANULARITIES, MIXED):
        raise DataError(f"scenes: granularity must be one of {', '.join((*GRANULARITIES, MIXED))}; got {granularity!r}")
    if not 1 <= size <= MAX_INDEX:
        raise DataError(f"scenes: size must be 1 .. 2**31 samples; got {size}")
    if not 16 <= image_size <= 2048:
        raise DataError(f"scenes: image_size must be 16 .. 2048 pixels; got {image_size}")
    return Scenes(level, split, size, image_size, seed, granularity)


def read(scene: Scene, granularity: str) -> tuple[str, int]:
    """(caption, caption id) of a scene in its own paraphrase."""
    granularity = GRANULARITIES[scene.wording[1]] if granularity == MIXED else granularity
    return caption(scene, granularity), caption_id(claims(scene, granularity))


def stream(
    level: str = "L2",
    split: str = "train",
    batch: int = 1024,
    device: torch.device | str = "cpu",
    *,
    image_size: int | None = None,
    seed: int = 0,
    granularity: str = "sentence",
    start: int = 0,
) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """Batches (image, text, id) of the split in order: without end for train, one pass over the other splits.

    Args:
        level: as `dataset`.
        split: as `dataset`.
        batch: B, scenes at a time.
        device: where images are made and ids lie: numpy makes them on the CPU, torch elsewhere.
        image_size: as `dataset`.
        seed: as `dataset`.
        granularity: as `dataset`.
        start: the first sample.

    Yields:
        image uint8 [B, 3, S, S], B captions, id int64 [B]; fewer than B at the end of a split.

    Raises:
        DataError: as `dataset`, or batch < 1.
    """
    size = MAX_INDEX if split == "train" else None
    scenes = dataset(level, split, size, image_size, seed, granularity)
    if batch < 1:
        raise DataError(f"scenes: batch must be at least 1; got {batch}")
    return _stream(scenes, batch, torch.device(device), start)


def _stream(scenes: Scenes, batch: int, device: torch.device, start: int) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    for first in range(start, len(scenes), batch):
        latents = scenes.latents(range(first, min(first + batch, len(scenes))))
        if device.type == "cpu":
            image = torch.from_numpy(render(latents, scenes.image_size))
        else:
            image = render_torch(latents, scenes.image_size, device)
        texts, ids = zip(*(read(scene, scenes.granularity) for scene in latents.scenes()), strict=True)
        yield image, list(texts), torch.tensor(ids, dtype=torch.int64, device=device)


def preview(
    level: str = "L2",
    n: int = 12,
    split: str = "train",
    image_size: int | None = None,
    seed: int = 0,
    granularity: str = "sentence",
    columns: int = 6,
) -> Any:
    """A picture of the first n scenes of a split, each over its caption.

    Args:
        level: as `dataset`.
        n: how many scenes.
        split: as `dataset`.
        image_size: as `dataset`.
        seed: as `dataset`.
        granularity: as `dataset`.
        columns: scenes in a row.

    Returns:
        PIL.Image.Image in RGB.

    Raises:
        DataError: as `dataset`, or n or columns < 1.
        MissingExtraError: Pillow is not installed.
    """
    if n < 1 or columns < 1:
        raise DataError(f"scenes: a preview needs n and columns of at least 1; got {n} and {columns}")
    scenes = dataset(level, split, n, image_size, seed, granularity)
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise missing_extra("Pillow", "data") from None
    zoom = max(1, 192 // scenes.image_size)
    side, line, gap, font = zoom * scenes.image_size, 13, 10, ImageFont.load_default()
    samples = scenes.__getitems__(range(n))
    texts = [_wrapped(entry.text, lambda words: font.getlength(words) <= side) for entry in samples]
    height = side + gap + line * max(map(len, texts))
    columns = min(columns, n)
    grid = Image.new("RGB", (columns * (side + gap) + gap, -(-n // columns) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for k, (entry, lines) in enumerate(zip(samples, texts, strict=True)):
        x, y = gap + k % columns * (side + gap), gap + k // columns * (height + gap)
        image = Image.fromarray(np.ascontiguousarray(entry.image.permute(1, 2, 0).numpy()))
        grid.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for row, words in enumerate(lines):
            draw.text((x, y + side + 4 + line * row), words, fill="black", font=font)
    return grid


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if fits(longer) else [*lines, word]
    return lines
