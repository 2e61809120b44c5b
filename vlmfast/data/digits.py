"""Handwritten digits with captions: 1797 real scans of 8 × 8 pixels, which come with scikit-learn.

Split by sample, 65 / 10 / 25 % of each class. Captions are made from templates, those for testing never seen in
training. scikit-learn keeps no writer's name: one writer's scans may lie in both training and test.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.batch import Sample
from vlmfast.data.order import permutation, random_int
from vlmfast.errors import missing_extra

Split = Literal["train", "val", "test"]

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASS_DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

TRAIN_TEMPLATES = (
    "a handwritten {}",
    "a scan of the number {}",
    "the digit {} on paper",
    "somebody wrote the number {}",
    "a small grey picture of a handwritten {}",
    "this is the digit {}",
    "the number {} written by hand",
    "a photo of a {}",
    "a pen drew the digit {}",
    "{}",
)
# Only words of the training templates, put together in other ways.
TEST_TEMPLATES = (
    "a photo of the handwritten digit {}",
    "a scan of a {} on paper",
    "somebody wrote a {} by hand",
    "this is a picture of the number {}",
    "the handwritten number {}",
)

SPLIT_KEY = 1797  # of the permutation within each class: changing it changes every published number
SPLIT_SHARES = {"train": (0.0, 0.65), "val": (0.65, 0.75), "test": (0.75, 1.0)}


class Digits:
    """Scans of digits with captions from templates, as a data set for `batches`.

    Args:
        split: "train" (1168 scans), "val" (179) or "test" (450).
        templates: sentences with {} for the digit; default: TEST_TEMPLATES for test, else TRAIN_TEMPLATES.

    Raises:
        ValueError: unknown split, no template, or a template without {}.
        MissingExtraError: scikit-learn is not installed.
    """

    def __init__(self, split: Split = "train", templates: Sequence[str] | None = None) -> None:
        if split not in SPLIT_SHARES:
            raise ValueError(f"Digits: split must be one of {', '.join(SPLIT_SHARES)}; got {split!r}")
        self.templates = tuple(templates or (TEST_TEMPLATES if split == "test" else TRAIN_TEMPLATES))
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong:
            raise ValueError(f"Digits: every template must have {{}} where the digit goes; got {wrong[0]!r}")
        images, labels = scans()
        self.split = split
        self.rows = split_rows(labels)[split]  # [n] int64, the rows of scikit-learn's arrays
        self.images = images[self.rows]  # [n, 3, 8, 8] uint8
        self.labels = labels[self.rows]  # [n] int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place, with the caption of epoch 0 and seed 0."""
        return self.draw(index, 0, 0)

    def draw(self, index: int, seed: int, epoch: int) -> Sample:
        """The sample at a place; (seed, epoch, index) choose its template, and word or figure. Its id is the digit."""
        label = int(self.labels[index])
        place = random_int(seed, epoch, index) % (2 * len(self.templates))
        names = CLASS_NAMES if place % 2 else CLASS_DIGITS
        return Sample(self.images[index], self.templates[place // 2].format(names[label]), label)


def digits(split: Split = "train", templates: Sequence[str] | None = None) -> Digits:
    """The data set of one split; see `Digits`."""
    return Digits(split, templates)


def all_captions(templates: Sequence[str] = TRAIN_TEMPLATES) -> list[str]:
    """Every caption that the templates can make, to train a tokenizer on."""
    return [template.format(name) for template in templates for name in (*CLASS_NAMES, *CLASS_DIGITS)]


@functools.lru_cache(maxsize=1)
def scans() -> tuple[Tensor, Tensor]:
    """(images [1797, 3, 8, 8] uint8, labels [1797] int64): scikit-learn's, 0 .. 16 made 0 .. 255, grey as RGB.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "demo") from error
    bunch = load_digits()
    grey = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))  # [1797, 8, 8]
    return grey[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target.astype(np.int64))


def split_rows(labels: Tensor) -> dict[str, Tensor]:
    """Split -> its rows [n] int64, ascending: the same shares of every class, by a fixed permutation of each."""
    rows: dict[str, list[Tensor]] = {split: [] for split in SPLIT_SHARES}
    for label in range(len(CLASS_NAMES)):
        of_class = (labels == label).nonzero()[:, 0]
        of_class = of_class[torch.from_numpy(permutation(len(of_class), SPLIT_KEY, label))]
        for split, (start, end) in SPLIT_SHARES.items():
            rows[split].append(of_class[round(start * len(of_class)) : round(end * len(of_class))])
    return {split: torch.cat(parts).sort().values for split, parts in rows.items()}
