"""`vlmfast data export`: scenes, and tasks about them, as files that other tools read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmfast.data import scenes
from vlmfast.data.scenes import tasks
from vlmfast.data.scenes.files import export_task
from vlmfast.data.scenes.instruct import summary
from vlmfast.data.scenes.tasks import CHUNK
from vlmfast.errors import DataError
from vlmfast.recipes.sources import Granularity, Level, SceneSplit


@dataclass(kw_only=True)
class Config:
    """Writes procedural scenes with captions as webdataset tars, a folder or a CSV file with images, or conversations.

    For example:
        vlmfast data export --out scenes --level L1 --size 20000
        vlmfast data export --out scenes-csv --format csv --level L0 --split val --size 1000
        vlmfast data export --out questions --format llava --task vqa --level L2 --size 1000
        vlmfast data export --out pope --format llava --task pope-adversarial --level L3 --split val --cooc --size 3000
        vlmfast train --dataset-type webdataset --train-data 'scenes/{00000..00001}.tar' --name scenes
    """

    out: Path
    """The folder; made if it does not exist, and empty if it does."""
    format: Literal["webdataset", "folder", "csv", "llava"] = "webdataset"
    """webdataset: tars as img2dataset writes them; folder: the same, unpacked; csv: as open_clip reads it; llava:
    LLaVA's JSON of conversations, with images and a file of what is right."""
    task: Literal["caption", "vqa", "instruct", "pope-random", "pope-popular", "pope-adversarial"] = "caption"
    """llava: what the conversations are about. vqa and instruct need L1 or higher, pope L2."""
    questions_per_image: int = 1
    """llava, vqa: questions about each image."""
    cooc: bool = False
    """llava, L3: the world in which some shapes come together, for POPE."""
    level: Level = "L1"
    """L0: one object; L1: one or two, with sizes and places; L2: two to four, with textures, styles and relations;
    L3: three to nine, with distractors; L3-cooc: L3 where some shapes come together."""
    split: SceneSplit = "train"
    """comp-test: pairs of shape and colour that occur in no other split; style-test: a style that does not."""
    size: int = 10_000
    """How many scenes, or conversations."""
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
    Raises:
        DataError: a flag of the format llava with another one, or as `scenes.export` and `scenes.export_task`.
    """
    if config.format == "llava":
        if config.questions_per_image != 1 and config.task != "vqa":
            raise DataError(f"--questions-per-image is for --task vqa; got --task {config.task}")
        if config.granularity != "sentence" and config.task != "caption":
            raise DataError(f"--granularity is of captions; got --task {config.task}")
        if config.shard_size != Config.shard_size:
            raise DataError("--shard-size is for the other formats; --format llava writes one file of conversations")
        data = tasks.dataset(
            config.level,
            config.split,
            config.task,
            config.size,
            config.image_size,
            config.seed,
            granularity=config.granularity,
            questions_per_image=config.questions_per_image,
            cooc=config.cooc,
        )
        files = export_task(config.out, data, config.image_type)
        print(f"{config.out}: {len(data)} conversations ({config.task}) about {config.level} in {len(files)} files")
        if config.task == "instruct":
            print(json.dumps(_summary(data), indent=2))
        return
    if (config.task, config.questions_per_image, config.cooc) != ("caption", 1, False):
        raise DataError("--task, --questions-per-image and --cooc say what conversations are about; add --format llava")
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


def _summary(data: tasks.SceneTask) -> dict[str, Any]:
    """What the instructions are like: kinds, repeats, lengths, entropy."""
    items = (
        item for first in range(0, len(data), CHUNK) for item in data.read(range(len(data))[first : first + CHUNK])[1]
    )
    return summary((each[0].truth()["kind"], [(turn.question, turn.answer) for turn in each]) for each in items)
