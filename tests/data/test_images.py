"""Bytes of image files become pixels, or an error of a countable kind."""

import contextlib
import io
import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmfast.data.images import check_fit, decode_image, fit_image, load_image, random_box
from vlmfast.data.skips import UnreadableError

RNG = np.random.default_rng(0)


def encoded(pixels, kind="PNG", mode=None, **options):
    """The content of a file of that kind; `mode` converts the pixels first."""
    file, image = io.BytesIO(), PIL.Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


NOISE = RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8)


def test_a_lossless_file_gives_its_pixels():
    assert torch.equal(load_image(encoded(NOISE)), torch.from_numpy(NOISE).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = load_image(encoded(NOISE, "TIFF", mode))
    assert (image.shape, image.dtype) == ((3, 30, 50), torch.uint8)


def test_a_palette_with_transparency_becomes_rgb():
    assert load_image(encoded(NOISE, "PNG", "P", transparency=b"\x00\x80")).shape == (3, 30, 50)


def test_sixteen_bits_keep_their_shades():
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    assert torch.equal(load_image(encoded(grey))[1].flatten().long(), torch.arange(256))


STRIPES = np.zeros((100, 300, 3), dtype=np.uint8)  # red, green, blue, each a square
for channel in range(3):
    STRIPES[:, 100 * channel : 100 * (channel + 1), channel] = 255


def test_crop_takes_the_middle_squash_takes_all():
    cropped = load_image(encoded(STRIPES), 100, "crop")
    assert torch.equal(cropped, torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].expand(3, 100, 100))
    squashed = load_image(encoded(STRIPES), 30, "squash")
    assert squashed.shape == (3, 30, 30)
    assert squashed[:, 15, [5, 15, 25]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("fit", ["crop", "squash", "random"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 40), (40, 5), (33, 32)])
def test_any_shape_fits_and_one_colour_stays(fit, shape):
    image = load_image(encoded(np.full((*shape, 3), 77, np.uint8)), 16, fit, key=(1, 2, 3))
    assert torch.equal(image, torch.full((3, 16, 16), 77, dtype=torch.uint8))


def test_a_random_crop_depends_on_its_key_alone():
    file = encoded(NOISE[:, :30])
    crops = [load_image(file, 16, "random", key=(0, epoch, 5)) for epoch in (0, 1, 2, 0)]
    assert torch.equal(crops[0], crops[3])
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[1], crops[2])


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers())
def test_a_random_box_lies_within_the_image(width, height, key):
    left, top, right, bottom = random_box(width, height, (key,))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(st.integers())
def test_a_random_box_of_a_square_has_its_share_of_the_area_and_aspect(key):
    left, top, right, bottom = random_box(1000, 1000, (key,))
    width, height = right - left, bottom - top
    assert 0.9 - 0.002 <= width * height / 1e6 <= 1  # half a pixel a side of 1000
    assert 3 / 4 <= width / height <= 4 / 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"\x00" * 100, "not an image"),
        (encoded(NOISE, "JPEG")[:400], "corrupt image"),
        (encoded(NOISE, "PNG")[:400], "corrupt image"),
        (encoded(NOISE, "WEBP")[:400], "corrupt image"),
    ],
)
def test_what_is_no_image_has_a_reason_and_a_name(data, reason):
    with pytest.raises(UnreadableError, match=f"^here.jpg: {reason}") as caught:
        load_image(data, where="here.jpg")
    assert caught.value.reason == reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_unpacks_to_gigabytes_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    for pixels in (1024, 4096):  # Pillow warns of the first and refuses the second
        with pytest.raises(UnreadableError, match=r"^bomb\.png: too many pixels \(") as caught:
            load_image(encoded(np.zeros((32, pixels // 32, 3), np.uint8)), where="bomb.png")
        assert caught.value.reason == "too many pixels"
    assert load_image(encoded(np.zeros((32, 31, 3), np.uint8))).shape == (3, 32, 31)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(encoded(np.zeros((32, 128, 3), np.uint8))).shape == (3, 32, 128)


# To the pixel, what open_clip and transformers make of an image of any shape and mode.
SHAPES = [(30, 50), (50, 30), (24, 24), (24, 27), (25, 24), (100, 301), (17, 9), (24, 51)]


def a_pillow_image(shape, mode="RGB"):
    noise = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def file_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "fit"), [("shortest", "crop"), ("squash", "squash")])
def test_pixels_are_open_clips(open_clip, mode, fit, interpolation):
    half = (0.5, 0.5, 0.5)
    theirs = open_clip.transform.image_transform(
        24, is_train=False, mean=half, std=half, resize_mode=mode, interpolation=interpolation
    )
    for shape, kind in itertools.product(SHAPES, ("RGB", "L")):  # palettes it resizes before it looks up their colours
        image = a_pillow_image(shape, kind)
        expected = ((theirs(image) * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert torch.equal(load_image(file_of(image), 24, fit, interpolation=interpolation), expected), (shape, kind)


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("fit", ["crop_floor", "squash"])
def test_pixels_are_transformers(transformers, fit, resample):
    if fit == "squash":
        theirs = transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=resample)
    else:
        theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24, resample=resample)
    interpolation = {2: "bilinear", 3: "bicubic"}[resample]
    for shape, kind in itertools.product(SHAPES, ("RGB", "L", "P", "1")):
        image = a_pillow_image(shape, kind)
        expected = theirs(image, do_rescale=False, do_normalize=False, do_convert_rgb=True, return_tensors="pt")
        got = load_image(file_of(image), 24, fit, interpolation=interpolation)
        assert torch.equal(got, expected.pixel_values[0].to(torch.uint8)), (shape, kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@settings(suppress_health_check=[HealthCheck.too_slow])  # the work is Pillow's, between the draws
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(kind, data):
    damaged = bytearray(encoded(NOISE[:9, :9], kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableError):
        assert decode_image(bytes(damaged[: data.draw(st.integers(0, len(damaged)))])).mode == "RGB"


@pytest.mark.parametrize(("size", "fit"), [(8, "stretch"), (0, "crop"), (None, "random")])
def test_an_impossible_fit_is_refused(size, fit):
    with pytest.raises(ValueError, match="image_size and fit"):
        check_fit(size, fit)


def test_fitting_leaves_the_image_as_it_was():
    image = decode_image(encoded(NOISE))
    fit_image(image, 8)
    assert np.array_equal(np.asarray(image), NOISE)
