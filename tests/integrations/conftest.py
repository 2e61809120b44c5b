"""Shards of image-text pairs in which there is something to learn, for the loops of other libraries."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

KINDS = 50


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A brace pattern for four webdataset shards, each of 800 noisy pictures; captions are the kind."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (KINDS, 8, 8, 3))
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(800):
                kind = rng.integers(KINDS)
                noisy = np.clip(pictures[kind] + rng.normal(0, 32, (8, 8, 3)), 0, 255).astype("uint8")
                file = io.BytesIO()
                Image.fromarray(noisy).save(file, "png")
                for suffix, content in ("png", file.getvalue()), ("txt", f"number {kind}".encode()):
                    info = tarfile.TarInfo(f"{shard}{number:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "{0..3}.tar")
