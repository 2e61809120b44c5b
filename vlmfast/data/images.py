"""Bytes of an image file -> uint8 [3, H, W], by Pillow alone."""

from __future__ import annotations

import io
import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.order import random_bits
from vlmfast.data.skips import UnreadableError
from vlmfast.errors import missing_extra

Image = Any  # PIL.Image.Image; Pillow is imported where it is used
Fit = Literal["crop", "crop_floor", "squash", "random"]
Interpolation = Literal["bicubic", "bilinear"]

CROP_AREA = (0.9, 1.0)  # of a random crop, as a share of the image; open_clip's default
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_DRAWS = 10  # before a random crop gives up and takes the middle, as torchvision's


def load_image(
    data: bytes,
    size: int | None = None,
    fit: Fit = "crop",
    *,
    interpolation: Interpolation = "bicubic",
    key: tuple[int, ...] = (),
    where: object = "image",
) -> Tensor:
    """[3, H, W] uint8 RGB pixels of an encoded image, brought to size × size if a size is given.

    Args:
        data: the content of a JPEG, PNG, WebP, ... file. Its EXIF orientation is not applied, as in open_clip.
        size: pixels a side; None leaves the image as it is.
        fit: "crop" resizes the shorter side and takes the middle, to the pixel as open_clip does, and "crop_floor" as
            transformers does, which halves an odd remainder downwards; "squash" resizes both sides; "random" resizes a
            random part, 90-100 % of the area, that depends on `key` alone: for training. An image too wide or high for
            that gives its middle.
        interpolation: "bicubic" or "bilinear", both over the area that a new pixel covers.
        key: numbers such as (seed, epoch, index).
        where: the file's name, for the error.

    Returns:
        [3, H, W] uint8.

    Raises:
        UnreadableError: "empty file", "not an image", "corrupt image", or "too many pixels": more than Pillow's own
            limit, `PIL.Image.MAX_IMAGE_PIXELS`, which guards against files that unpack to gigabytes.
        MissingExtraError: Pillow is not installed.
    """
    image = decode_image(data, where)
    if size is not None:
        image = fit_image(image, size, fit, key, interpolation)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode_image(data: bytes, where: object = "image") -> Image:
    """The RGB Pillow image in `data`, all its pixels decoded.

    Raises:
        UnreadableError: "empty file", "not an image", "corrupt image", or "too many pixels": more than Pillow's own
            limit, `PIL.Image.MAX_IMAGE_PIXELS`, which guards against files that unpack to gigabytes.
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise missing_extra("Pillow", "data") from error
    if not data:
        raise UnreadableError("empty file", where)
    try:
        image: Image = PIL.Image.open(io.BytesIO(data))
        pixels, limit = image.width * image.height, PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:  # Pillow itself only warns of up to twice as many
            raise PIL.Image.DecompressionBombError(f"{image.width} x {image.height}; at most {limit} are read")
        if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits to 255, leaving a white image
            image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("not an image", where, f"starts with {data[:16]!r}") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnreadableError("too many pixels", where, str(error)) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error
        raise UnreadableError("corrupt image", where, str(error)) from error


def fit_image(
    image: Image, size: int, fit: Fit = "crop", key: tuple[int, ...] = (), interpolation: Interpolation = "bicubic"
) -> Image:
    """The image in size × size pixels; `fit`, `key` and `interpolation` as in `load_image`.

    Source: the rounding is torchvision's Resize, CenterCrop and RandomResizedCrop, so pixels equal open_clip's; with
    "crop_floor" and "squash" they equal those of transformers' CLIPImageProcessor and SiglipImageProcessor.
    """
    from PIL.Image import Resampling

    resample = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}[interpolation]

    check_fit(size, fit)
    width, height = image.size
    if fit == "squash":
        return image.resize((size, size), resample)
    if fit == "random":
        box = random_box(width, height, key)
        return image.crop(box).resize((size, size), resample)
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    if fit == "crop_floor":
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def check_fit(size: int | None, fit: Fit) -> None:
    """Raises ValueError for a size below 1, an unknown fit, or a random crop without a size."""
    if fit not in get_args(Fit):
        raise ValueError(f"image_size and fit: fit must be 'crop', 'squash' or 'random', or 'crop_floor'; got {fit!r}")
    if (fit == "random" and size is None) or (size is not None and size < 1):
        raise ValueError(f"image_size and fit: image_size must be at least 1 for fit={fit!r}; got {size}")


def random_box(width: int, height: int, key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a part of the image: CROP_AREA of its area, CROP_ASPECT; depends on `key` alone."""
    bits = random_bits(*key, np.arange(4 * CROP_DRAWS)).reshape(CROP_DRAWS, 4)
    for area, aspect, x, y in ((bits >> np.uint64(11)) * 2.0**-53).tolist():  # uniform in [0, 1)
        area = width * height * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = CROP_ASPECT[0] * (CROP_ASPECT[1] / CROP_ASPECT[0]) ** aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_ASPECT[1])))  # the widest and highest middle part of a legal aspect
    h = min(height, max(1, round(width / CROP_ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
