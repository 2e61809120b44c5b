"""Pairs as a crawl leaves them, good and bad, and tars that hold them."""

import io
import json
import tarfile
from collections import Counter
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


def damaged_shards(folder: Path, count=6, each=200):
    """(url, shades of the good pairs by text, counts by reason) of tars in which some records have a fault.

    Sample n of shard s has the text "s n". Of 6 tars of 200 records, 1.4 % of the records have a fault, and the last
    tar is cut.
    """
    good, reasons = {}, Counter()
    for shard in range(count):
        faults = {3 * shard + 2: "corrupt image", 4 * shard + 4: "not an image", each - 1 - shard % 2: "empty caption"}
        members = []
        for n in range(each):
            shade, fault = (40 * shard + n) % 256, faults.get(n)
            image, text = picture(shade, "JPEG", 16), f"{shard} {n}".encode()
            image = {"corrupt image": image[:400], "not an image": HTML}.get(fault, image)
            if shard == count - 1 and n == each - 10:  # the last that is there, and only a part of it
                members.append((f"{n:05}.jpg", image))
                break
            members += [(f"{n:05}.jpg", image), (f"{n:05}.txt", b" " if fault == "empty caption" else text)]
            good |= {} if fault else {text.decode(): shade}
            reasons.update([fault] if fault else [])
        tar = tar_bytes(members)
        write(folder, {f"{shard:05}.tar": tar if shard < count - 1 else tar[: tar.rindex(b"JFIF") + 300]})
    reasons.update(["tar cut short"])
    return f"{folder}/{{00000..{count - 1:05}}}.tar", good, dict(reasons)
