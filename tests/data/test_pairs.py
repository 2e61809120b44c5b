"""Readers of folders, CSV files and tars: every pair is read, or counted with its reason."""

import gzip
import io
import itertools
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from vlmfast.data import batches
from vlmfast.data.pairs import SHARD_STRIDE, CsvPairs, FolderPairs, WebdatasetPairs
from vlmfast.data.skips import UnreadableError
from vlmfast.errors import DataError


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


# Tars


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


def test_a_tar_gives_its_good_pairs_and_counts_the_others(tmp_path):
    dataset = WebdatasetPairs(str(write(tmp_path, {"0.tar": tar_bytes(members_of(CRAWL))}) / "0.tar"))
    assert texts_and_shades(dataset) == GOOD
    assert dict(dataset.skipped) == REASONS
    list(dataset)
    assert dict(dataset.skipped) == REASONS
    assert "0.tar: alone: missing caption (no member .txt)" in dataset.describe_skipped()


def test_captions_may_come_from_a_field_of_the_json_member(tmp_path):
    members = [
        *members_of(["good", "alone"]),
        ("broken.png", picture(1)),
        ("broken.json", b"{"),
        ("null.png", picture(1)),
        ("null.json", b'{"caption": null}'),
        ("list.png", picture(1)),
        ("list.json", b"[]"),
    ]
    dataset = WebdatasetPairs(str(write(tmp_path, {"0.tar": tar_bytes(members)}) / "0.tar"), caption_key="json:caption")
    assert texts_and_shades(dataset) == {"json good": 10, "json alone": 40}
    assert dict(dataset.skipped) == {"bad JSON": 1, "missing caption": 2}


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "png", "jpeg", "webp"])
def test_every_image_key_is_read(tmp_path, suffix):
    write(tmp_path, {"0.tar": tar_bytes([(f"d/1.{suffix}", picture(9)), ("d/1.txt", b"text")])})
    assert texts_and_shades(WebdatasetPairs(str(tmp_path / "0.tar"))) == {"text": 9}


def test_what_belongs_to_no_sample_is_counted(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        for info in (folder, link):
            tar.addfile(info)
        for name, content in [
            ("README", b""),
            ("1.png", picture(9)),
            ("1.txt", b"t"),
            ("1.TXT", b"t2"),
            ("2.txt", b"t"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    dataset = WebdatasetPairs(str(write(tmp_path, {"0.tar": file.getvalue()}) / "0.tar"))
    assert texts_and_shades(dataset) == {"t": 9}
    assert dict(dataset.skipped) == {
        "link in a tar": 1,
        "member without a suffix": 1,
        "second member of one name": 1,
        "missing image": 1,
    }


def test_wherever_a_tar_is_cut_what_precedes_is_used_and_the_cut_is_told(tmp_path, caplog):
    keys = ["000", "001", "002"]
    members = [(f"{key}.{kind}", data) for key in keys for kind, data in (("png", picture(7)), ("txt", key.encode()))]
    whole = tar_bytes(members)
    contents_end = [1024 * n + 512 + len(content) for n, (_, content) in enumerate(members)]  # header, content, padding
    end = 1024 * len(members)  # the end mark follows
    for cut in [*range(0, end + 512, 256), *range(5, end, 1000)]:
        write(tmp_path, {"0.tar": whole[:cut]})
        dataset = WebdatasetPairs(str(tmp_path / "0.tar"))
        caplog.clear()
        texts = [sample.text for sample in dataset]
        read = sum(content_end <= cut for content_end in contents_end)  # members whose content is there
        assert texts == keys[: read // 2], cut
        reason = "tar cut short" if read else "tar not readable"
        half = {"missing caption": 1} if read % 2 else {}  # the image is there, its text is not
        assert dict(dataset.skipped) == {reason: 1, **half}, cut
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"0.tar: {reason}" in caplog.text
    write(tmp_path, {"0.tar": whole[: end + 512]})
    dataset = WebdatasetPairs(str(tmp_path / "0.tar"))
    assert [sample.text for sample in dataset] == keys
    assert not dataset.skipped


@pytest.mark.parametrize(
    ("spoil", "reason", "kept"),
    [
        (lambda tar: tar[:1024] + b"\xff" * 512 + tar[1536:], "tar cut short", 0),  # the second header
        (lambda tar: tar + tar, "tar cut short", 2),
        (lambda tar: HTML * 40, "tar not readable", 0),
        (lambda tar: b"", "tar not readable", 0),
        (lambda tar: gzip.compress(tar)[:-200], "tar cut short", None),
    ],
    ids=["damaged header", "two tars in one", "a web page", "empty", "gzip cut short"],
)
def test_other_damage_is_told_and_the_next_tar_is_read(tmp_path, spoil, reason, kept):
    noise = np.random.default_rng(0).bytes(3000).hex().encode()  # so that gzip has something to cut
    one = tar_bytes([("1.png", picture(1)), ("1.txt", b"one"), ("2.png", picture(2)), ("2.txt", b"two " + noise)])
    write(tmp_path, {"0.tar": spoil(one), "1.tar": tar_bytes([("3.png", picture(3)), ("3.txt", b"three")])})
    dataset = WebdatasetPairs(f"{tmp_path}/0.tar::{tmp_path}/1.tar")
    texts = [sample.text for sample in dataset]
    assert texts[-1] == "three"
    assert dataset.skipped[reason] == 1
    assert kept is None or len(texts) == kept + 1


def test_compressed_tars_pipes_and_lists_are_read(tmp_path):
    members = [("1.png", picture(5)), ("1.txt", b"t")]
    write(tmp_path, {"a.tar.gz": tar_bytes(members, "w:gz"), "b.tar": tar_bytes(members), "c.tar": tar_bytes(members)})
    dataset = WebdatasetPairs([f"{tmp_path}/a.tar.gz", f"pipe:cat {tmp_path}/b.tar", f"file:{tmp_path}/c.tar"])
    assert len(list(dataset)) == 3
    assert not dataset.skipped


def test_a_pipe_that_fails_is_told_and_one_that_is_left_early_is_no_fault(tmp_path):
    urls = shards(tmp_path, 1, 200)
    failing = WebdatasetPairs("pipe:exit 3")
    assert list(failing) == []
    assert dict(failing.skipped) == {"tar not readable": 1}
    left = WebdatasetPairs(f"pipe:exec cat {urls.replace('{00000..00000}', '00000')}")
    next(iter(left))
    assert not left.skipped


def test_a_tar_that_does_not_exist_is_refused_at_once(tmp_path):
    urls = shards(tmp_path, 2, 1)
    with pytest.raises(DataError, match=r"no such tar: .*00002\.tar, .*00003\.tar \(2 absent\)"):
        WebdatasetPairs(urls.replace("00001", "00003"))
    with pytest.raises(DataError, match="no such tar"):
        WebdatasetPairs([])


def test_a_stream_of_tars_is_a_function_of_seed_and_step(tmp_path):
    dataset = WebdatasetPairs(shards(tmp_path, 3, 7), shuffle_buffer=5)
    write(tmp_path, {"00001.tar": (tmp_path / "00001.tar").read_bytes()[:9000]})  # one tar cut short

    def read(count, **options):
        return list(itertools.islice(batches(dataset, tokenizer, 4, **{"seed": 1, **options}), count))

    whole = read(20)
    for options in ({"start_step": 3}, {"start_step": 11, "workers": 2}, {"workers": 3}):
        again = read(20 - options.get("start_step", 0), **options)
        for ours, theirs in zip(again, whole[options.get("start_step", 0) :], strict=True):
            assert torch.equal(ours.index, theirs.index)
            assert torch.equal(ours.image, theirs.image)
    assert [batch.index.tolist() for batch in read(5, seed=2)] != [batch.index.tolist() for batch in whole[:5]]
    readable = 21 - 7 + 4  # 9000 bytes hold four samples of 2048
    epoch = torch.cat([batch.index for batch in whole])[:readable]
    assert len(set(epoch.tolist())) == readable
    assert set((epoch // SHARD_STRIDE).tolist()) == {0, 1, 2}
    shades = torch.cat([batch.image[:, 0, 0, 0] for batch in whole])[:readable].long()
    assert torch.equal(shades, 10 * (epoch // SHARD_STRIDE) + epoch % SHARD_STRIDE)


def test_shards_and_records_each_come_in_an_order_of_seed_and_epoch(tmp_path):
    whole = WebdatasetPairs(shards(tmp_path, 12, 2), shuffle_buffer=1)  # the shards alone are shuffled
    single = WebdatasetPairs(shards(tmp_path / "one", 1, 20), shuffle_buffer=8)
    for dataset in (whole, single):
        orders = [
            tuple(index for index, _ in dataset.records(seed, epoch, True)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]
        ]
        assert len(set(orders)) == 3
        assert len({frozenset(order) for order in orders}) == 1
        assert sorted(orders[0]) == [index for index, _ in dataset.records(0, 0, False)]
    early = {tuple(index for index, _ in single.records(seed, 0, True))[:12] for seed in range(3)}  # through the buffer
    assert len(early) == 3
    places = [index for index, _ in single.records(0, 0, True)]
    assert all(place < 8 + index for index, place in enumerate(places))  # none leaves before it has come


def test_evaluation_reads_a_tar_once_in_its_order(tmp_path):
    dataset = WebdatasetPairs(shards(tmp_path, 2, 5))
    seen = list(batches(dataset, tokenizer, 4, seed=0, shuffle=False, epochs=1))
    assert torch.cat([batch.image[:, 0, 0, 0] for batch in seen]).tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert [len(batch) for batch in seen] == [4, 4, 2]


@pytest.mark.parametrize("reader", ["folder", "csv", "tar"])
def test_readers_size_and_crop_images_as_seed_and_epoch_say(tmp_path, reader):
    noise = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 60, 3), dtype=np.uint8)).save(noise, "PNG")
    write(tmp_path, {"a.png": noise.getvalue(), "a.txt": "text", "a.csv": f"filepath\ttitle\n{tmp_path}/a.png\ttext"})
    write(tmp_path, {"a.tar": tar_bytes([("a.png", noise.getvalue()), ("a.txt", b"text")])})

    def image(seed, epoch, fit="random"):
        if reader == "tar":
            dataset = WebdatasetPairs(str(tmp_path / "a.tar"), image_size=32, fit=fit)
            (record,) = dataset.records(seed, epoch, shuffle=True)
            return dataset.decode(record, seed, epoch)[1].image
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
