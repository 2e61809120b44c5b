"""`vlmfast data export`: scenes as files that other tools read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmfast.data import scenes
from vlmfast.recipes.sources import Granularity, Level, SceneSplit


@dataclass(kw_only=True)
class Config:
    """Writes procedural scenes with captions as webdataset tars, a folder or a CSV file with images.

    For example:
        vlmfast data export --out scenes --level L1 --size 20000
        vlmfast data export --out scenes-csv --format csv --level L0 --split val --size 1000
        vlmfast train --dataset-type webdataset --train-data 'scenes/{00000..00001}.tar' --name scenes
    """

    out: Path
    """The folder; made if it does not exist, and empty if it does."""
    format: Literal["webdataset", "folder", "csv"] = "webdataset"
    """webdataset: tars as img2dataset writes them; folder: the same, unpacked; csv: as open_clip reads it."""
    level: Level = "L1"
    """L0: one object; L1: one or two, with sizes and places; L2: two to four, with textures, styles and relations."""
    split: SceneSplit = "train"
    """comp-test: pairs of shape and colour that occur in no other split; style-test: a style that does not."""
    size: int = 10_000
    """How many scenes."""
    image_size: int | None = None
    """Pixels a side. Default: the level's."""
    seed: int = 0
    """Which world."""
    granularity: Granularity = "sentence"
    """How much a caption tells."""
    image_type: Literal["png", "jpg"] = "png"
    """How images are encoded."""
    shard_size: int = 10_000
    """Scenes a tar."""


def run(config: Config) -> None:
    """Writes the files.

    Args:
        config: the flags.
    """
    files = scenes.export(
        config.out,
        config.format,
        level=config.level,
        split=config.split,
        size=config.size,
        image_size=config.image_size,
        seed=config.seed,
        granularity=config.granularity,
        image_type=config.image_type,
        shard_size=config.shard_size,
    )
    print(f"{config.out}: {config.size} scenes of {config.level} in {len(files)} files")
