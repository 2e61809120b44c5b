"""The flags that say where pairs come from, and what they open."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.data import digits, scenes
from vlmfast.data.batch import Sample, is_stream
from vlmfast.data.images import Fit, Interpolation
from vlmfast.data.mixture import Mixture
from vlmfast.data.order import random_bits
from vlmfast.data.pairs import CsvPairs, FolderPairs
from vlmfast.data.scenes.latents import SPLIT_SIZES
from vlmfast.data.scenes.samples import read
from vlmfast.data.synthetic import Synthetic
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError
from vlmfast.models import ClipConfig

DatasetType = Literal["digits", "scenes", "synthetic", "folder", "csv", "webdataset"]
Split = Literal["train", "val", "test"]
Level = Literal["L0", "L1", "L2", "L3", "L3-cooc"]
SceneSplit = Literal["train", "val", "test", "comp-test", "style-test"]
Granularity = Literal["word", "phrase", "sentence", "multi-sentence", "paragraph", "mixed"]

CAPTIONS = 20_000  # captions that a tokenizer is trained on, where they are read from a data set
NUDGED_SHARE = 0.3  # of the training scans, moved by up to one pixel


@dataclass(kw_only=True)
class DataFlags:
    """What kind of data it is, and how a CSV file is laid out."""

    dataset_type: DatasetType = "digits"
    """digits (real scans, which come with scikit-learn), scenes (made here, without end), synthetic (noise and words,
    for throughput), folder, csv or webdataset."""
    csv_img_key: str = "filepath"
    """CSV: column with the image's path."""
    csv_caption_key: str = "title"
    """CSV: column with the caption."""
    csv_separator: str = "\t"
    """CSV: one character."""


@dataclass(kw_only=True)
class TrainDataFlags(DataFlags):
    """How tars are read to train."""

    shuffle_buffer: int = 1000
    """Tars: encoded samples held for shuffling; 0 shuffles the tars alone."""
    train_data_upsampling_factors: str = ""
    """Tars: a factor for each part of --train-data between "::", such as 1::2: how many times as often as the others' a
    sample of that part is read, where all tars hold as many. Without it the parts are joined to one data set."""
    dataset_resampled: bool = False
    """Tars: draw them with replacement, instead of reading each once an epoch."""


def open_pairs(
    flags: DataFlags,
    where: str,
    split: Split,
    image_size: int,
    size: int | None = None,
    *,
    fit: Fit | None = None,
    interpolation: Interpolation = "bicubic",
) -> Any:
    """The data set that the flags name, as `vlmfast.data.batches` takes it.

    Args:
        flags: the kind of data.
        where: path, pattern of tars or file; the level of scenes (default L1); not looked at for digits and synthetic.
        split: "train" reads digits and images with small random changes; digits and scenes know "val" and "test".
        image_size: pixels a side, as the model takes them.
        size: how many scenes or synthetic samples; default: 100 000 to train, 5 000 else.
        fit, interpolation: how images on disk are brought to that size, see `load_image`; None: "random" to train, and
            "crop" else.
    Raises:
        DataError: a path is needed and missing, what it names cannot be read, or a flag speaks of tars where none are.
    """
    fit = fit or ("random" if split == "train" else "crop")
    if isinstance(flags, TrainDataFlags) and flags.dataset_type != "webdataset":
        for each in fields(TrainDataFlags)[len(fields(DataFlags)) :]:
            if getattr(flags, each.name) != each.default:
                flag = each.name.replace("_", "-")
                raise DataError(
                    f"--{flag} says how tars are read; leave it out with --dataset-type {flags.dataset_type}"
                )
    if flags.dataset_type == "digits":
        if image_size != 8:
            raise DataError(f"the digits are 8 x 8 pixels and the model takes {image_size}; use --model digits")
        scans = digits.digits(split)
        return Nudged(scans) if split == "train" else scans
    if flags.dataset_type == "scenes":
        return scenes.dataset(where or "L1", split, size, image_size)
    if flags.dataset_type == "synthetic":
        return Synthetic(size or SPLIT_SIZES[split], image_size)
    if not where:
        flag = "--train-data" if split == "train" else "--val-data"
        raise DataError(f"--dataset-type {flags.dataset_type} needs {flag} with a path")
    if flags.dataset_type == "folder":
        return FolderPairs(where, image_size=image_size, fit=fit, interpolation=interpolation)
    if flags.dataset_type == "csv":
        separator = flags.csv_separator.replace("\\t", "\t")  # what a shell makes of '\t'
        if len(separator) != 1:
            raise DataError(f"--csv-separator must be one character; got {flags.csv_separator!r}")
        return CsvPairs(
            where,
            image_key=flags.csv_img_key,
            caption_key=flags.csv_caption_key,
            separator=separator,
            image_size=image_size,
            fit=fit,
            interpolation=interpolation,
        )
    how: dict[str, Any] = {"image_size": image_size, "fit": fit, "interpolation": interpolation}
    if split == "train" and isinstance(flags, TrainDataFlags):
        return _tars_to_train(flags, where, how)
    return WebdatasetPairs(where, **how)


def _tars_to_train(flags: TrainDataFlags, where: str, how: dict[str, Any]) -> WebdatasetPairs | Mixture:
    """The tars with the flags' way of shuffling; a mixture if there are factors."""
    how |= {"shuffle_buffer": flags.shuffle_buffer, "resampled": flags.dataset_resampled}
    if not flags.train_data_upsampling_factors:
        return WebdatasetPairs(where, **how)
    parts, words = where.split("::"), flags.train_data_upsampling_factors.split("::")
    try:
        factors = [float(word) for word in words]
    except ValueError:
        factors = []
    if len(factors) != len(parts) or not all(0 < factor < math.inf for factor in factors):
        raise DataError(
            f"--train-data-upsampling-factors must be a number > 0 for each of the {len(parts)} parts of --train-data, "
            f"such as 1::2; got {flags.train_data_upsampling_factors!r}"
        )
    sources = [WebdatasetPairs(part, **how) for part in parts]
    return Mixture(sources, [factor * source.shards for factor, source in zip(factors, sources, strict=True)])


def train_samples(dataset: Any, told: int | None) -> int:
    """How many samples count as one epoch.

    Args:
        dataset: what `open_pairs` returned.
        told: --train-num-samples, which tars take before what the files beside them tell.
    Raises:
        DataError: nothing tells how many samples the tars hold.
    """
    if not is_stream(dataset):
        return len(dataset)
    count = dataset.num_samples if told is None else told
    if count is None:
        raise DataError(
            "--dataset-type webdataset needs --train-num-samples, or sizes.json or __len__ beside the tars: only a "
            "whole reading would count them"
        )
    return count


def image_side(config: ClipConfig) -> int:
    """Pixels a side of the model's square images.

    Raises:
        DataError: the model takes images that are not square, which the readers do not make.
    """
    size = config.vision_cfg.image_size
    if not isinstance(size, int):
        raise DataError(f"the readers make square images; this model takes {size}. Give it one image_size")
    return size


def captions(dataset: Any) -> list[str]:
    """Captions to train a tokenizer on: all that the templates make for digits, else the first 20 000.

    Args:
        dataset: what `open_pairs` returned.
    """
    if isinstance(dataset, Nudged):
        return digits.all_captions()
    if isinstance(dataset, scenes.Scenes):  # without drawing them
        latents = dataset.latents(range(min(len(dataset), CAPTIONS)))
        return [read(latents.scene(row), dataset.granularity)[0] for row in range(len(latents))]
    if isinstance(dataset, Synthetic):
        return [dataset.caption(index) for index in range(min(len(dataset), CAPTIONS))]
    texts = dataset.texts() if hasattr(dataset, "texts") else (sample.text for sample in readable(dataset))
    return list(islice(texts, CAPTIONS))


def readable(dataset: Any) -> Iterator[Sample]:
    """The samples of `dataset` in its own order, without those that cannot be read (it counts them)."""
    if is_stream(dataset):
        yield from dataset
        return
    draw: Callable[[int, int, int], Sample | None] = getattr(dataset, "draw", lambda index, seed, epoch: dataset[index])
    for index in range(len(dataset)):
        if (sample := draw(index, 0, 0)) is not None:
            yield sample


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" the GPU, where there is one.

    Args:
        name: cpu, cuda, cuda:1, ... or auto.
    Raises:
        DataError: there is no such device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None


def tell_skipped(dataset: Any, group: Any = None) -> None:
    """Prints, on stderr, what of the data set could not be read and was left out, if anything.

    Args:
        dataset: what `open_pairs` returned.
        group: the process group of the ranks that read the data set together, which all call this; the first of them
            prints what all met, each thing once.
    """
    if group is not None:
        skips = [source.skips for source in getattr(dataset, "sources", [dataset]) if hasattr(source, "skips")]
        states: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(states, [each.state_dict() for each in skips], group)
        for state in states:
            for each, found in zip(skips, state, strict=True):
                each.load_state_dict(found)
        if torch.distributed.get_rank(group) > 0:
            return
    if line := getattr(dataset, "describe_skipped", str)():
        print(line, file=sys.stderr)


def nudge(image: Tensor, right: int, down: int) -> Tensor:
    """[C, H, W]: the image moved by `right` and `down` pixels, each -1, 0 or 1; what comes in is black."""
    H, W = image.shape[1:]
    return F.pad(image, (1, 1, 1, 1))[:, 1 - down : 1 - down + H, 1 - right : 1 - right + W]


class Nudged:
    """The digits with some scans moved by up to one pixel, chosen by (seed, epoch, index).

    1168 scans of 64 pixels are soon learned by heart. Without this the demo's runs of seeds 0, 1 and 2 named 97.1, 97.3
    and 96.4 % of the test scans right; with it 97.8, 97.3 and 98.0 %.
    """

    def __init__(self, scans: digits.Digits) -> None:
        self.scans = scans

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, 0, 0)

    def draw(self, index: int, seed: int, epoch: int) -> Sample:
        """The sample at a place, moved or not as (seed, epoch, index) say."""
        sample = self.scans.draw(index, seed, epoch)
        chance, right, down = random_bits(seed, epoch, index, np.arange(3)).tolist()
        if chance >= NUDGED_SHARE * 2**64:
            return sample
        return Sample(nudge(sample.image, right % 3 - 1, down % 3 - 1), sample.text, sample.id)
