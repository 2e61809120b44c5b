"""Readers of folders and CSV files: every pair is read, or counted with its reason."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from crawl import CRAWL, GOOD, HTML, REASONS, picture, read_all, tar_bytes, texts_and_shades, write

from vlmfast.data.pairs import CsvPairs, FolderPairs
from vlmfast.data.skips import UnreadableError
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError

# Folders


def test_a_folder_gives_its_good_pairs_and_counts_the_others(tmp_path):
    for name, (image, caption, _) in CRAWL.items():
        write(tmp_path, {f"{name}.jpg": image, **({f"{name}.txt": caption} if caption is not None else {})})
    dataset = FolderPairs(tmp_path)
    samples, skipped = read_all(dataset)
    assert texts_and_shades(samples) == GOOD
    assert skipped == REASONS
    read_all(dataset)  # a second epoch meets the same files and counts them no more
    assert dict(dataset.skipped) == REASONS
    line = dataset.describe_skipped()
    assert line.startswith("skipped 6: ")
    assert "1 not an image, such as " in line
    assert f"{tmp_path}/html.jpg: not an image (starts with b'<!DOCTYPE html><')" in line


def test_indexing_an_unreadable_sample_raises_its_reason(tmp_path):
    write(tmp_path, {"a.jpg": HTML, "a.txt": "x"})
    with pytest.raises(UnreadableError, match=r"a\.jpg: not an image"):
        FolderPairs(tmp_path)[0]
    assert FolderPairs(write(tmp_path / "fine", {"a.jpg": picture(1), "a.txt": "x"})).describe_skipped() == ""


def test_subfolders_count_and_captions_without_an_image_are_told(tmp_path):
    write(tmp_path, {"b/deep/x.PNG": picture(1), "b/deep/x.txt": "deep", "a.webp": picture(2, "WEBP"), "a.txt": "top"})
    write(tmp_path, {"lost.txt": "no image", "notes.md": "not data"})
    dataset = FolderPairs(tmp_path)
    assert [dataset[i].text for i in range(len(dataset))] == ["top", "deep"]  # by name
    assert [dataset[i].id for i in range(len(dataset))] == [0, 1]
    assert dict(dataset.skipped) == {"missing image": 1}


def test_a_linked_folder_is_read(tmp_path):
    write(tmp_path / "elsewhere", {"a.png": picture(1), "a.txt": "linked"})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert FolderPairs(tmp_path / "root")[0].text == "linked"


CAPTION_FILES = {
    "captions.json": json.dumps(
        {"a.png": ["one", "two"], "s/b.png": "three\u2028lines", "gone.png": "four", "none.png": []}
    ),
    "captions.txt": "\ufeffa.png\tone\r\na.png\ttwo\r\ns/b.png\tthree\u2028lines\r\n\r\n"
    "gone.png\tfour\r\nno tab here\r\n",
}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_a_caption_file_may_give_an_image_several_captions(tmp_path, name):
    write(tmp_path, {"a.png": picture(1), "s/b.png": picture(2), "none.png": picture(3), name: CAPTION_FILES[name]})
    dataset = FolderPairs(tmp_path)
    samples, skipped = read_all(dataset)
    assert [(sample.text, int(sample.image[0, 0, 0])) for sample in samples] == [
        ("one", 1),
        ("two", 1),
        ("three\u2028lines", 2),
    ]
    assert samples[0].id == samples[1].id != samples[2].id
    also = {"line without a tab": 1} if name == "captions.txt" else {}
    assert skipped == {"missing image": 1, "missing caption": 1, **also}


def test_captions_of_a_wrong_kind_are_counted(tmp_path):
    write(tmp_path, {"a.png": picture(1), "b.png": picture(2), "captions.json": '{"a.png": 7, "b.png": null}'})
    assert read_all(FolderPairs(tmp_path)) == ([], {"caption not a text": 1, "missing caption": 1})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no image under"),
        ({"a.png": b"", "captions.json": '{"a.png": "x"'}, r"captions\.json is not JSON in UTF-8"),
        ({"a.png": b"", "captions.json": "[]"}, "must hold .* got a list"),
        ({"a.png": b"", "captions.json": "{}", "captions.txt": ""}, "both captions.json and captions.txt"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        FolderPairs(write(tmp_path, files))
    with pytest.raises(DataError, match="is not a folder"):
        FolderPairs(tmp_path / "absent")


# CSV


def write_csv(tmp_path, lines, separator="\t", header=("filepath", "title")):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\n".join(separator.join(header).encode() if i < 0 else lines[i] for i in range(-1, len(lines))))
    return path


def test_a_csv_gives_its_good_pairs_and_counts_the_others(tmp_path):
    lines = []
    for name, (image, caption, _) in CRAWL.items():
        write(tmp_path, {f"{name}.jpg": image})
        lines.append(f"{name}.jpg".encode() + (b"" if caption is None else b"\t" + caption.strip()))
    lines += [b"absent.jpg\tno file", b"", b"good.jpg\tthe same image"]
    dataset = CsvPairs(write_csv(tmp_path, lines), root=tmp_path)
    samples, skipped = read_all(dataset)
    assert texts_and_shades(samples) == {**GOOD, "the same image": 10}
    assert samples[0].id == samples[-1].id != samples[1].id
    others = {reason: 1 for reason in REASONS if reason != "missing caption"}  # a row without one is a short row
    assert skipped == {**others, "short row": 1, "missing image": 1}


def test_a_csv_without_the_column_names_it_and_those_that_exist(tmp_path):
    path = write_csv(tmp_path, [b"x,y"], ",", ("image", "caption"))
    with pytest.raises(DataError, match=r"no column 'filepath'; it has \['image,caption'\] with separator '\\t'"):
        CsvPairs(path)
    with pytest.raises(DataError, match=r"no column 'title'; it has \['image', 'caption'\].* Set caption_key"):
        CsvPairs(path, image_key="image", separator=",")
    with pytest.raises(DataError, match="is not a file"):
        CsvPairs(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"no row that can be used\. skipped 1: 1 short row"):
        CsvPairs(write_csv(tmp_path, [b"only one cell"]))


def test_a_csv_takes_other_columns_a_byte_order_mark_and_quotes(tmp_path):
    write(tmp_path, {"a.png": picture(1)})
    path = write_csv(tmp_path, [b'a.png,1,"big, and\nred"'], ",", ("\ufeffimage", "n", "caption"))
    (sample,) = read_all(CsvPairs(path, image_key="image", caption_key="caption", separator=",", root=tmp_path))[0]
    assert sample.text == "big, and\nred"


@pytest.mark.parametrize(
    ("stray", "lost"),
    [
        ([b'a.png\t"never closed', b"a.png\tthree", b"a.png\tfour"], 3),  # runs to the end of the file
        ([b'a.png\t"opened', b"a.png\tthree", b'a.png\t"opened too', b"a.png\tfive"], 3),  # to the next quote
        ([b"a.png\t" + b"x" * 200_000, b"a.png\tthree"], 1),  # a cell beyond the csv module's limit
    ],
)
def test_lines_that_a_stray_quote_swallows_are_counted(tmp_path, stray, lost):
    write(tmp_path, {"a.png": picture(1)})
    lines = [b"a.png\tone", *stray]
    dataset = CsvPairs(write_csv(tmp_path, lines), root=tmp_path)
    assert dict(dataset.skipped) == {"bad row": lost}
    assert len(dataset) + lost == len(lines)


def test_paths_of_a_csv_start_at_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, {"images/a.png": picture(1)})
    path = write_csv(tmp_path, [b"images/a.png\ttext"])
    monkeypatch.chdir(tmp_path)
    assert CsvPairs(path)[0].text == "text"


@pytest.mark.parametrize("reader", ["folder", "csv", "tar"])
def test_readers_size_and_crop_images_as_seed_and_epoch_say(tmp_path, reader):
    noise = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 60, 3), dtype=np.uint8)).save(noise, "PNG")
    write(tmp_path, {"a.png": noise.getvalue(), "a.txt": "text", "a.csv": f"filepath\ttitle\n{tmp_path}/a.png\ttext"})
    write(tmp_path, {"a.tar": tar_bytes([("a.png", noise.getvalue()), ("a.txt", b"text")])})

    def image(seed, epoch, fit="random"):
        if reader == "tar":
            dataset = WebdatasetPairs(str(tmp_path / "a.tar"), image_size=32, fit=fit)
            (record,) = dataset.records(0)
            return dataset.decode(record, 0, seed, epoch).image
        kind = {"folder": lambda **o: FolderPairs(tmp_path, **o), "csv": lambda **o: CsvPairs(tmp_path / "a.csv", **o)}
        return kind[reader](image_size=32, fit=fit).draw(0, seed, epoch).image

    assert image(0, 0).shape == (3, 32, 32)
    assert torch.equal(image(0, 0), image(0, 0))
    assert not torch.equal(image(0, 0), image(0, 1))
    assert not torch.equal(image(0, 0), image(1, 0))
    assert torch.equal(image(0, 0, "crop"), image(1, 1, "crop"))


def test_an_impossible_fit_is_refused_before_reading(tmp_path):
    write(tmp_path, {"a.png": picture(1), "a.txt": "text"})
    with pytest.raises(ValueError, match="fit must be 'crop', 'squash' or 'random'"):
        FolderPairs(tmp_path, image_size=8, fit="stretch")


def test_a_file_that_cannot_be_opened_is_counted(tmp_path):
    (tmp_path / "a.png").mkdir()
    dataset = CsvPairs(write_csv(tmp_path, [b"a.png\ta folder"]), root=tmp_path)
    assert read_all(dataset) == ([], {"file not readable": 1})
