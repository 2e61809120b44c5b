"""Scenes written to disk in the layouts that readers of image-text pairs know."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vlmfast.data.conversation import Conversation, write_llava
from vlmfast.data.scenes.render import render
from vlmfast.data.scenes.samples import Scenes, dataset, read
from vlmfast.data.scenes.tasks import SceneTask
from vlmfast.errors import DataError, missing_extra

FORMATS = ("webdataset", "folder", "csv")
IMAGE_TYPES: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},  # half the pixels of colour would be too few
}
CHUNK = 64  # scenes made at a time


class _Record(NamedTuple):
    name: str  # without suffix
    image: bytes
    text: str
    facts: dict[str, Any]


def export(
    folder: str | os.PathLike[str],
    format: str = "webdataset",
    *,
    level: str = "L1",
    split: str = "train",
    size: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    granularity: str = "sentence",
    image_type: str = "png",
    shard_size: int = 10_000,
) -> list[Path]:
    """The files written: scenes of a split, with their captions and latents, in a layout that other tools read.

    "webdataset" gives `00000.tar` and `00000_stats.json` with the members, names and fields that img2dataset writes
    (no parquet file); the .json member also has the caption's id and the scene; and `sizes.json`, from which open_clip
    and our readers know how many samples there are. "folder" gives the same files unpacked,
    `00000/000000000.png`, .txt and .json. "csv" gives `pairs.csv` as open_clip reads it (tabs, columns filepath and
    title, absolute paths; and the id) and the images. Each file appears whole or not at all; the CSV comes last.

    Args:
        folder: where to; made if it does not exist, and empty if it does.
        format: one of FORMATS.
        level: as `dataset`.
        split: as `dataset`.
        size: as `dataset`.
        image_size: as `dataset`.
        seed: as `dataset`.
        granularity: as `dataset`.
        image_type: "png" (exact) or "jpg" (quality 95).
        shard_size: samples in a tar, or in a folder of images.

    Raises:
        DataError: as `dataset`, the folder is not empty, or there is no such format or image type.
        MissingExtraError: Pillow is not installed.
    """
    scenes = dataset(level, split, size, image_size, seed, granularity)
    if format not in FORMATS or image_type not in IMAGE_TYPES or shard_size < 1:
        raise DataError(
            f"scenes: export wants a format of {', '.join(FORMATS)}, an image_type of {', '.join(IMAGE_TYPES)} and a "
            f"shard_size of at least 1; got {format!r}, {image_type!r} and {shard_size}"
        )
    root = _empty(folder)
    written: list[Path] = []
    rows: list[tuple[str, str, int]] = []
    for shard in range(-(-len(scenes) // shard_size)):
        start = time.time()
        records = _records(scenes, shard, shard_size, image_type)
        if format == "webdataset":
            written += [_tar(root / f"{shard:05d}.tar", records, image_type)]
            count = min(shard_size, len(scenes) - shard * shard_size)
            written += [_stats(root / f"{shard:05d}_stats.json", count, start)]
            continue
        (root / f"{shard:05d}").mkdir()
        for record in records:
            stem = root / f"{shard:05d}" / record.name
            parts = {image_type: record.image}
            if format == "folder":
                parts |= {"txt": record.text.encode(), "json": _json(record.facts)}
            for suffix, content in parts.items():
                written.append(_write(stem.with_suffix(f".{suffix}"), content))
            rows.append((f"{stem}.{image_type}", record.text, record.facts["id"]))
    if format == "webdataset":
        sizes = {path.name: min(shard_size, len(scenes) - i * shard_size) for i, path in enumerate(written[::2])}
        written.append(_write(root / "sizes.json", json.dumps(sizes).encode()))
    if format == "csv":
        table = io.StringIO()
        csv.writer(table, delimiter="\t", lineterminator="\n").writerows([("filepath", "title", "id"), *rows])
        written.append(_write(root / "pairs.csv", table.getvalue().encode()))
    return written


def export_task(folder: str | os.PathLike[str], data: SceneTask, image_type: str = "png") -> list[Path]:
    """The files written: conversations about scenes in LLaVA's format, for any tool that trains on it.

    `images/` has each scene once. `conversations.json` is LLaVA's list. `references.jsonl` has a line for each item,
    {"id", "reference", "group", "truth"}, as `vlmfast eval` reads it: all right answers to its first question, the
    kind of question, and all that `data.truth` tells. POPE's sets also come as `pope.json`, a line a question, as POPE
    publishes them.

    Args:
        folder: where to; made if it does not exist, and empty if it does.
        data: what `tasks.dataset` gives.
        image_type: "png" (exact) or "jpg" (quality 95).

    Raises:
        DataError: the folder is not empty, or there is no such image type.
        MissingExtraError: Pillow is not installed.
    """
    if image_type not in IMAGE_TYPES:
        raise DataError(f"scenes: image_type must be one of {', '.join(IMAGE_TYPES)}; got {image_type!r}")
    root = _empty(folder)
    (root / "images").mkdir()
    conversations: list[Conversation] = []
    references: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    written: dict[str, Path] = {}
    for first in range(0, len(data), CHUNK):
        places = range(first, min(first + CHUNK, len(data)))
        latents, items = data.read(places)
        for place, pixels, exchanges, scene in zip(
            places, render(latents, data.image_size), items, latents.index.tolist(), strict=True
        ):
            name = f"{scene}.{image_type}"
            conversations.append(replace(data.conversation(place, exchanges, scene), images=(name,)))
            truth = exchanges[0].truth()
            right = truth.pop("references", [exchanges[0].answer])
            group = truth.get("kind", truth.get("family", truth.get("granularity")))
            group = data.name.removeprefix("pope-") if group == "pope" else group
            line = {"id": conversations[-1].id, "reference": right, "group": group}
            references.append(line | {"truth": truth | {"question": exchanges[0].question, "scene": scene}})
            asked = {"text": exchanges[0].question, "label": exchanges[0].answer}
            questions.append({"question_id": place + 1, "image": name} | asked)
            if name not in written:
                written[name] = _write(root / "images" / name, _encoded(pixels, image_type))
    write_llava(root / "conversations.json", conversations)
    lines = {"references.jsonl": references} | ({"pope.json": questions} if data.name.startswith("pope-") else {})
    tables = [
        _write(root / name, "".join(json.dumps(row) + "\n" for row in rows).encode()) for name, rows in lines.items()
    ]
    return [*written.values(), root / "conversations.json", *tables]


def _empty(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it does not exist."""
    root = Path(folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise DataError(f"scenes: {root} is not empty; export into a new folder")
    return root


def _encoded(pixels: np.ndarray, image_type: str) -> bytes:
    """The file of an image [3, H, W]."""
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("Pillow", "data") from None
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(encoded, **IMAGE_TYPES[image_type])
    return encoded.getvalue()


def _records(scenes: Scenes, shard: int, shard_size: int, image_type: str) -> Iterator[_Record]:
    """The records of one shard. As img2dataset's, a name has the shard's digits, then as many as a full shard needs."""
    digits = len(str(shard_size - 1))
    first, last = shard * shard_size, min((shard + 1) * shard_size, len(scenes))
    for start in range(first, last, CHUNK):
        latents = scenes.latents(range(start, min(start + CHUNK, last)))
        for row, pixels in enumerate(render(latents, scenes.image_size)):
            scene = latents.scene(row)
            text, id = read(scene, scenes.granularity)
            encoded = _encoded(pixels, image_type)
            name = f"{shard:05d}{scene.index - first:0{digits}d}"
            facts = {
                "url": f"scenes:{scene.level}/{scene.split}/{scene.index}?seed={scene.seed}",
                "key": name,
                "caption": text,
                "status": "success",
                "error_message": None,
                "width": scenes.image_size,
                "height": scenes.image_size,
                "original_width": scenes.image_size,
                "original_height": scenes.image_size,
                "exif": "{}",
                "sha256": hashlib.sha256(encoded).hexdigest(),
                "id": id,
                "scene": asdict(scene),
            }
            yield _Record(name, encoded, text, facts)


def _tar(path: Path, records: Iterator[_Record], image_type: str) -> Path:
    with _whole(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            parts = {image_type: record.image, "txt": record.text.encode(), "json": _json(record.facts)}
            for suffix, content in parts.items():
                header = tarfile.TarInfo(f"{record.name}.{suffix}")  # time 0: the same scenes give the same bytes
                header.size, header.mode = len(content), 0o444
                tar.addfile(header, io.BytesIO(content))
    return path


def _stats(path: Path, count: int, start: float) -> Path:
    """img2dataset's account of a shard."""
    end = time.time()
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": end - start,
    }
    return _write(path, _json(stats | {"start_time": start, "end_time": end, "status_dict": {"success": count}}))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=4).encode()


def _write(path: Path, content: bytes) -> Path:
    with _whole(path) as file:
        file.write(content)
    return path


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete, and vanishes if it is not."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
