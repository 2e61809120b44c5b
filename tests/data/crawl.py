"""Pairs as a crawl leaves them, good and bad, and tars that hold them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch


def picture(shade, kind="PNG", size=4):
    """The content of an image file of one shade of grey."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((size, size, 3), shade, np.uint8)).save(file, kind)
    return file.getvalue()


HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"
# What a crawl leaves behind: image, caption (None: absent), the reason to skip it (None: a good pair).
CRAWL = {
    "good": (picture(10), b"a good one", None),
    "accents": (picture(20), "  une pêche\n".encode(), None),
    "html": (HTML, b"a page", "not an image"),
    "zero": (b"", b"nothing", "empty file"),
    "short": (picture(30, "JPEG", 64)[:300], b"half a picture", "corrupt image"),
    "alone": (picture(40), None, "missing caption"),
    "latin": (picture(50), "une pêche".encode("latin-1"), "caption not UTF-8"),
    "blank": (picture(60), b" \n", "empty caption"),
}
REASONS = {reason: 1 for _, _, reason in CRAWL.values() if reason}
GOOD = {"a good one": 10, "une pêche": 20}


def texts_and_shades(samples):
    return {sample.text: int(sample.image[0, 0, 0]) for sample in samples}


def read_all(dataset):
    """Every sample that can be read, and the counts."""
    samples = [dataset.draw(index, 0, 0) for index in range(len(dataset))]
    return [sample for sample in samples if sample is not None], dict(dataset.skipped)


def tokenizer(texts):
    return torch.tensor([[len(text)] for text in texts])


def write(folder: Path, files: dict):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar_bytes(members, kind="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def members_of(names):
    """What img2dataset writes for the samples of CRAWL."""
    for name in names:
        image, caption, _ = CRAWL[name]
        yield f"{name}.jpg", image
        if caption is not None:
            yield f"{name}.txt", caption
        yield f"{name}.json", json.dumps({"key": name, "caption": f"json {name}"}).encode()


def shards(tmp_path, count, each):
    """count tars of `each` good samples; sample n of shard s has the shade 10 s + n and the text "s n"."""
    for shard in range(count):
        pairs = [(f"{n:03}", picture(10 * shard + n), f"{shard} {n}".encode()) for n in range(each)]
        members = [member for key, image, text in pairs for member in ((f"{key}.png", image), (f"{key}.txt", text))]
        write(tmp_path, {f"{shard:05}.tar": tar_bytes(members)})
    return f"{tmp_path}/{{00000..{count - 1:05}}}.tar"
