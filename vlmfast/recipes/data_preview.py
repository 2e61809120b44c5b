"""`vlmfast data preview`: a picture of scenes with their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmfast.data import scenes
from vlmfast.recipes.sources import Granularity, Level, SceneSplit


@dataclass(kw_only=True)
class Config:
    """Draws a grid of procedural scenes, each over its caption.

    For example:
        vlmfast data preview --level L2 --n 12 --out grid.png
    """

    level: Level = "L2"
    """L0: one object; L1: one or two, with sizes and places; L2: two to four, with textures, styles and relations;
    L3: three to nine, with distractors; L3-cooc: L3 where some shapes come together."""
    n: int = 12
    """How many scenes."""
    split: SceneSplit = "train"
    """comp-test: pairs of shape and colour that occur in no other split; style-test: a style that does not."""
    image_size: int | None = None
    """Pixels a side. Default: the level's."""
    seed: int = 0
    """Which world."""
    granularity: Granularity = "sentence"
    """How much a caption tells."""
    out: Path = Path("scenes.png")
    """The picture."""


def run(config: Config) -> None:
    """Writes the picture.

    Args:
        config: the flags.
    """
    picture = scenes.preview(
        config.level,
        config.n,
        config.split,
        config.image_size,
        config.seed,
        config.granularity,
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(config.out)
    print(f"{config.out}: {config.n} scenes of {config.level}, {picture.width} x {picture.height} pixels")
