"""Scenes: samples depend on nothing but their number, images and captions show the latents, files come back."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from vlmfast.data import batches, scenes
from vlmfast.data.pairs import CsvPairs, FolderPairs
from vlmfast.data.scenes import files, samples
from vlmfast.data.scenes import render as module
from vlmfast.data.scenes.latents import MAX_INDEX, STYLES, TEXTURES, UNIT, sample
from vlmfast.data.scenes.render import render, render_torch
from vlmfast.data.scenes.shapes import SHAPES
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError

LEVELS = tuple(scenes.LEVELS)
WORLDS = [
    (level, split)
    for level, facts in scenes.LEVELS.items()
    for split in scenes.SPLITS
    if (split != "style-test" or facts.rich) and (split != "comp-test" or not facts.company)
]
NUMBERS = [700, 3, 0, 4999, 41, 1, 2500, 2]  # any order, with gaps

# CRC32 of the first 256 training samples: latents, images at the level's size, paragraphs.
GOLDEN = {
    "L0": (3605600426, 1239923928, 1146735469),
    "L1": (2829852318, 3001392689, 2603625470),
    "L2": (587686058, 4244104656, 3203278104),
    "L3": (3210724174, 1891165720, 3217355976),
    "L3-cooc": (2591212218, 3112219316, 4022912517),
}
CHECKSUMS = """
import zlib
import numpy as np
from vlmfast.data import scenes
from vlmfast.data.scenes.latents import sample
from vlmfast.data.scenes.render import render

def checksums(level):
    latents = sample(level, "train", np.arange(256))
    numbers = b"".join(array.astype("<i8").tobytes() for array in latents.arrays().values())
    texts = "\\n".join(scenes.caption(latents.scene(k), "paragraph") for k in range(256))
    images = render(latents, scenes.LEVELS[level].image_size)
    return zlib.crc32(numbers), zlib.crc32(images.tobytes()), zlib.crc32(texts.encode())
"""


def same(a, b):
    """Whether two samples are equal, bit by bit."""
    return torch.equal(a.image, b.image) and (a.text, a.id) == (b.text, b.id)


# Every sample is a function of (seed, level, split, index) alone.


@pytest.mark.parametrize(("level", "split"), WORLDS)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_any_order(level, split):
    data = scenes.dataset(level, split, size=5000, granularity="mixed")
    together = data.__getitems__(NUMBERS)
    backwards = data.__getitems__(NUMBERS[::-1])[::-1]
    assert all(
        same(data[i], one) and same(one, other) for i, one, other in zip(NUMBERS, together, backwards, strict=True)
    )


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_256_samples_have_their_checksums(level):
    names = {}
    exec(CHECKSUMS, names)
    assert names["checksums"](level) == GOLDEN[level]


@pytest.mark.slow
def test_another_process_without_vector_instructions_makes_the_same_bits():
    wide = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR AVX2 FMA3 X86_V3 X86_V4"
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": wide, "PYTHONWARNINGS": "ignore"}
    program = CHECKSUMS + f"print([checksums(level) for level in {LEVELS}])"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(list(GOLDEN.values()))


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "val"}, {"level": "L2"}])
def test_seed_split_and_level_each_give_another_world(change):
    arguments = {"level": "L1", "split": "train", "seed": 0}
    one, other = (scenes.dataset(**each, size=8, image_size=32) for each in (arguments, arguments | change))
    assert not any(torch.equal(a.image, b.image) for a, b in zip(one, other, strict=True))


def test_size_and_stream_only_cut_the_same_sequence():
    small, large = scenes.dataset("L1", size=10), scenes.dataset("L1", size=10_000)
    images, texts, ids = next(scenes.stream("L1", batch=7, start=3))
    for k in range(7):
        image, text, id = images[k], texts[k], int(ids[k])
        assert same(small[3 + k], large[3 + k])
        assert torch.equal(image, large[3 + k].image)
        assert (text, id) == (large[3 + k].text, large[3 + k].id)
    assert scenes.dataset("L1", size=MAX_INDEX)[MAX_INDEX - 1].image.shape == (3, 64, 64)


def test_streams_of_test_splits_end_and_the_training_stream_does_not():
    sizes = [len(texts) for _, texts, _ in scenes.stream("L0", "val", 2048)]
    assert sizes == [2048, 2048, 904]
    assert len(list(islice(scenes.stream("L0", "train", 2, start=100_000), 3))) == 3


# Images show the latents.


@pytest.mark.parametrize(("level", "split"), WORLDS)
def test_torch_and_numpy_render_the_same_image(level, split):
    latents = sample(level, split, np.arange(96))
    ours, theirs = render(latents, 48), render_torch(latents, 48).numpy()
    assert ours.shape == theirs.shape == (96, 3, 48, 48)
    assert abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def alone(shape, **changes):
    """Latents with one object of a shape in the middle: black, solid, large and flat on white, unless changed."""
    latents = sample("L2", "train", np.arange(1))
    values = {
        "count": 1, "style": 0, "background": 0, "background_rgb": 255, "shape": SHAPES.index(shape), "texture": 0,
        "orientation": 0, "x": 512, "y": 512, "radius": 400, "rgb": 0, **changes,
    }  # fmt: skip
    return replace(latents, **{name: np.full_like(getattr(latents, name), value) for name, value in values.items()})


def darkness(image):
    """[H, W] in 0 .. 1 of a [1, 3, H, W] image of a black thing on white."""
    return 1 - image[0, 0] / 255


AREAS = {  # in squared radii
    "circle": np.pi * 0.88**2,
    "square": 1.4**2,
    "triangle": 3 * np.sqrt(3) / 4,
    "pentagon": 5 * 0.76**2 * np.tan(np.pi / 5),
    "star": 5 * np.sin(np.pi / 5) * 0.309 / np.cos(np.pi / 5),
    "cross": 4 * (2 * 0.92 * 0.29) - 4 * 0.29**2,
    "ring": np.pi * (0.92**2 - 0.42**2),
    "heart": 1 + np.pi * 0.25,
    "diamond": 2 * 0.5268 / 0.85,
}


@pytest.mark.parametrize("shape", AREAS)
def test_a_shape_covers_its_area(shape):
    covered = darkness(render(alone(shape), 128)).sum() / 128**2
    assert covered == pytest.approx(AREAS[shape] * (400 / UNIT) ** 2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", range(len(TEXTURES)))
def test_a_shape_stays_inside_its_circle_and_textures_differ(shape, texture):
    image = darkness(render(alone(shape, texture=texture, orientation=0), 96))
    y, x = np.mgrid[:96, :96] + 0.5 - 48
    assert image[x**2 + y**2 > (400 / UNIT * 96 + 1) ** 2].max() == 0
    solid = darkness(render(alone(shape), 96))
    assert (image.sum() < 0.93 * solid.sum()) == (texture > 0)


@pytest.mark.parametrize("shape", ["arrow", "crescent", "heart"])
def test_two_eighths_of_a_turn_are_a_quarter_turn(shape):
    upright, turned = (render(alone(shape, orientation=k), 64)[0, 0].astype(int) for k in (0, 2))
    assert abs(np.rot90(upright) - turned).max() <= 1


def test_a_car_that_faces_left_is_the_mirror_image():
    right, left = (render(alone("car", orientation=k), 64)[0, 0].astype(int) for k in (0, 4))
    assert abs(right[:, ::-1] - left).max() <= 1
    assert abs(right - left).max() > 100


def test_a_larger_image_shows_the_same_scene():
    latents = sample("L1", "test", np.arange(40))
    small, large = render(latents, 48).astype(float), render(latents, 192).astype(float)
    pooled = large.reshape(40, 3, 48, 4, 48, 4).mean((3, 5))
    assert abs(pooled - small).mean() < 0.2


def test_flat_objects_have_their_colour_and_the_rest_is_background():
    latents = sample("L1", "train", np.arange(60))
    for k, image in enumerate(render(latents, 64)):
        scene, (y, x) = latents.scene(k), (np.mgrid[:64, :64] + 0.5) / 64
        inside = [(x - t.x) ** 2 + (y - t.y) ** 2 <= (t.radius + 2 / 64) ** 2 for t in scene.objects]
        ground = image[:, ~np.any(inside, 0)]
        assert (ground == ground[:, :1]).all()
        for thing, circle in zip(scene.objects, inside, strict=True):
            exact = (image[:, circle] == np.array(thing.rgb)[:, None]).all(0)
            assert exact.sum() >= 5, thing


@pytest.mark.parametrize("style", STYLES)
def test_styles_look_different(style):
    latents = sample("L2", "train", np.arange(6))
    image, flat = (render(replace(latents, style=np.full(6, k)), 64).astype(int) for k in (STYLES.index(style), 0))
    assert (abs(image - flat).mean() > 3) == (style != "flat")


@pytest.mark.parametrize("size", [16, 40, 96])
@pytest.mark.parametrize("style", range(4))
def test_no_object_reaches_beyond_its_window(size, style, monkeypatch):
    latents = sample("L3", "train", np.arange(60))
    latents = replace(latents, style=np.full(60, style))
    cut = render(latents, size)
    monkeypatch.setattr(
        module._Canvas, "window", lambda canvas, centre, radius: np.tile(np.arange(size), (len(centre), 1))
    )
    assert np.array_equal(cut, render(latents, size))


# Captions, beyond what the acceptance tests read back.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("granularity", scenes.GRANULARITIES)
def test_paraphrases_share_an_id_and_differ(level, granularity):
    data = scenes.dataset(level, size=40)
    for k in range(40):
        scene = data.scene(k)
        texts = [scenes.caption(scene, granularity, p) for p in range(5)]
        assert granularity == "word" or len(set(texts)) == 5
        assert all(text.isascii() and "  " not in text and "None" not in text for text in texts)
    lengths = [len(scenes.caption(scene, each).split()) for each in scenes.GRANULARITIES]
    assert lengths == sorted(lengths)


def test_an_id_does_not_depend_on_the_order_of_mention():
    scene = next(scene for k in range(99) if len((scene := scenes.dataset("L1").scene(k)).objects) == 2)
    other = replace(scene, order=scene.order[::-1])
    assert scenes.caption(scene) != scenes.caption(other)
    assert scenes.caption_id(scenes.claims(scene, "sentence")) == scenes.caption_id(scenes.claims(other, "sentence"))
    scene = scenes.dataset("L2").scene(0)
    other = replace(scene, order=scene.order[::-1])
    ids = {scenes.caption_id(scenes.claims(each, "multi-sentence")) for each in (scene, other)}
    assert len(ids) == 1  # "a is above b" is "b is below a"


# The two right sentences about two things that lie side by side, in all their wordings.
SIDE_BY_SIDE = {
    "There is a large solid red star to the left of a small dotted gray ring.",
    "A big solid red star is to the left of a little dotted gray ring.",
    "The picture shows a large solid red star to the left of a small dotted grey ring.",
    "You can see a tiny dotted grey ring to the right of a huge solid red star.",
    "A small dotted gray hoop is to the right of a large solid red star.",
    "There is a small dotted gray ring to the right of a large solid red star.",
    "A little dotted gray ring is to the right of a big solid red star.",
    "The picture shows a small dotted grey ring to the right of a large solid red star.",
    "You can see a huge solid red star to the left of a tiny dotted grey ring.",
    "A large solid red star is to the left of a small dotted gray hoop.",
}


def test_references_are_all_right_sentences():
    scene = next(scene for k in range(99) if len((scene := scenes.dataset("L2").scene(k)).objects) == 2)
    star = {"shape": "star", "colour": "red", "size": "large", "texture": "solid", "x": 0.2, "y": 0.5, "place": "left"}
    ring = {"shape": "ring", "colour": "gray", "size": "small", "texture": "dotted", "x": 0.8, "y": 0.5}
    a, b = scene.objects
    scene = replace(scene, objects=(replace(a, **ring, place="right"), replace(b, **star)))
    found = scenes.references(scene)
    assert set(found) == SIDE_BY_SIDE
    assert found[0] == "There is a large solid red star to the left of a small dotted gray ring."
    assert set(scenes.references(scene, "word")) == {"red", "gray", "grey", "star", "ring", "hoop"}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("granularity", scenes.GRANULARITIES)
def test_references_hold_the_canonical_caption_and_the_scenes_own(level, granularity):
    data = scenes.dataset(level, size=12)
    for scene in map(data.scene, range(12)):
        found = scenes.references(scene, granularity)
        assert len(found) == len(set(found))
        assert found[0] == scenes.caption(scene, granularity, 0, "reading")
        # Of many objects that must all be named, only the reading order is listed.
        if len(scene.objects) <= 4 or granularity in ("word", "phrase", "sentence"):
            assert scenes.caption(scene, granularity) in found


def test_a_canonical_caption_does_not_depend_on_wording_and_order():
    for scene in map(scenes.dataset("L2").scene, range(20)):
        other = replace(scene, order=scene.order[::-1], wording=(3, 1, scene.wording[2] + 1))
        for granularity in scenes.GRANULARITIES:
            one, two = (scenes.caption(each, granularity, 0, "reading") for each in (scene, other))
            assert one == two
            assert scenes.references(scene, granularity) == scenes.references(other, granularity)


def test_a_swapped_caption_needs_two_objects():
    assert scenes.swapped(scenes.dataset("L0").scene(0)) is None
    scene = scenes.dataset("L2").scene(0)
    for granularity in ("sentence", "multi-sentence", "paragraph"):
        assert scenes.swapped(scene, granularity) not in (None, scenes.caption(scene, granularity))


# The data set and its errors.


@pytest.mark.parametrize("level", LEVELS)
def test_a_data_set_is_a_sequence_of_samples(level):
    data = scenes.dataset(level, "test", size=3)
    every = list(data)
    assert len(every) == len(data) == 3
    assert same(data[-1], every[2])
    image = every[0].image
    assert image.dtype == torch.uint8
    assert image.shape == (3, *[scenes.LEVELS[level].image_size] * 2)
    assert 0 <= every[0].id < 2**63
    with pytest.raises(IndexError):
        data[3]


def test_batches_take_scenes():
    def lengths(texts):
        return torch.tensor([[len(text)] for text in texts])

    data = scenes.dataset("L0", size=8)
    batch = next(iter(batches(data, lengths, 4, seed=0)))
    rows = [data[i] for i in batch.index.tolist()]
    assert torch.equal(batch.image, torch.stack([row.image for row in rows]))
    assert batch.ids.tolist() == [row.id for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "L9"}, "level must be one of L0, L1, L2, L3, L3-cooc; got 'L9'"),
        ({"split": "dev"}, "split must be one of train, val"),
        ({"level": "L1", "split": "style-test"}, "L1 has one style.*L2"),
        ({"level": "L3-cooc", "split": "comp-test"}, "L3-cooc has no split 'comp-test'"),
        ({"granularity": "essay"}, "granularity must be one of word.*mixed; got 'essay'"),
        ({"size": 0}, "size must be 1 .. 2"),
        ({"size": 2**31 + 1}, "size must be 1 .. 2"),
        ({"image_size": 8}, "image_size must be 16 .. 2048"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        scenes.dataset(**arguments)
    if "size" not in arguments:
        with pytest.raises(DataError, match=message):
            scenes.stream(**arguments)


def test_more_bad_arguments_are_named():
    with pytest.raises(DataError, match=r"index must be 0 .. 2\*\*31 - 1; got -1"):
        sample("L0", "train", [-1])
    with pytest.raises(DataError, match="batch must be at least 1"):
        scenes.stream("L0", batch=0)
    with pytest.raises(DataError, match=r"paraphrase must be 0 .. 4; got 5"):
        scenes.caption(scenes.dataset("L0").scene(0), paraphrase=5)
    with pytest.raises(DataError, match="granularity must be one of"):
        scenes.caption(scenes.dataset("L0").scene(0), "essay")
    with pytest.raises(DataError, match="order must be one of own, reading; got 'size'"):
        scenes.caption(scenes.dataset("L0").scene(0), order="size")
    with pytest.raises(DataError, match="n and columns"):
        scenes.preview(n=0)


# Files.


def test_webdataset_tars_come_back_as_img2dataset_writes_them(tmp_path):
    written = scenes.export(tmp_path / "out", level="L1", split="val", size=25, shard_size=10)
    names = ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "00002.tar", "00002_stats.json"]
    names.append("sizes.json")
    assert [path.name for path in written] == names == sorted(os.listdir(tmp_path / "out"))
    with tarfile.open(written[2]) as tar:
        assert tar.getnames()[:4] == ["000010.png", "000010.txt", "000010.json", "000011.png"]
        facts = json.load(tar.extractfile("000013.json"))
    data = scenes.dataset("L1", "val", size=25)
    assert facts["caption"] == data[13].text
    assert facts["id"] == data[13].id
    assert (facts["key"], facts["status"], facts["width"]) == ("000013", "success", 64)
    assert facts["scene"]["objects"][0]["shape"] == data.scene(13).objects[0].shape
    stats = json.loads(written[5].read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})

    back = list(WebdatasetPairs([str(path) for path in written if path.suffix == ".tar"]))
    assert len(back) == 25 == WebdatasetPairs(f"{tmp_path}/out/{{00000..00002}}.tar").num_samples
    assert all(torch.equal(a.image, b.image) and a.text == b.text for a, b in zip(back, data, strict=True))


def test_names_have_nine_digits_at_img2datasets_shard_size(tmp_path):
    with tarfile.open(scenes.export(tmp_path / "out", level="L0", size=2)[0]) as tar:
        assert tar.getnames()[0] == "000000000.png"


def test_a_tar_is_a_function_of_its_scenes(tmp_path):
    first, second = (scenes.export(tmp_path / name, level="L0", size=5)[0].read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("image_type", ["png", "jpg"])
def test_folders_and_csv_files_come_back(tmp_path, image_type):
    arguments = {"level": "L0", "split": "test", "size": 6, "image_type": image_type}
    scenes.export(tmp_path / "folder", "folder", **arguments)
    table = scenes.export(tmp_path / "csv", "csv", **arguments)[-1]
    data = scenes.dataset("L0", "test", size=6)
    for back in (FolderPairs(tmp_path / "folder"), CsvPairs(table)):
        assert len(back) == 6
        for a, b in zip((back[k] for k in range(6)), data, strict=True):
            assert a.text == b.text
            error = abs(a.image.int() - b.image.int()).float().mean()
            assert error < 3 if image_type == "jpg" else error == 0


def test_an_interrupted_export_leaves_no_half_tar(tmp_path, monkeypatch):
    calls = iter(range(9))

    def failing(latents, image_size):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return render(latents, image_size)

    monkeypatch.setattr(files, "render", failing)
    with pytest.raises(KeyboardInterrupt):
        scenes.export(tmp_path, level="L0", size=100)
    assert os.listdir(tmp_path) == []


def test_export_refuses(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="is not empty"):
        scenes.export(tmp_path, size=1)
    with pytest.raises(DataError, match=r"format of webdataset, folder, csv.*'coco'"):
        scenes.export(tmp_path / "out", "coco")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_preview_shows_each_scene_over_its_caption():
    picture = scenes.preview("L0", n=4, columns=2)
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)
    image = scenes.dataset("L0", size=4)[3].image.permute(1, 2, 0).numpy()
    zoomed = image.repeat(6, 0).repeat(6, 1)
    height = picture.size[1] // 2 + 5
    tile = pixels[height : height + 192, 212:404]
    assert np.array_equal(tile, zoomed)
    assert (pixels[height + 192 :, 212:404] < 128).any()  # the caption's ink
    assert scenes.preview("L0", n=1).size[0] == 212


def test_long_captions_wrap():
    assert samples._wrapped("a bb ccc dddd", lambda line: len(line) <= 5) == ["a bb", "ccc", "dddd"]
    assert samples._wrapped("endless", lambda line: len(line) <= 5)[-1] == "endless"
