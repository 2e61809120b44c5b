"""Readers of tars: every pair is read, or counted with its reason."""

import gzip
import io
import itertools
import logging
import tarfile

import numpy as np
import pytest
import torch
from crawl import CRAWL, GOOD, HTML, REASONS, members_of, picture, shards, tar_bytes, texts_and_shades, tokenizer, write

from vlmfast.data import batches
from vlmfast.data.mixture import Mixture
from vlmfast.data.stream import SHARD_STRIDE, Stream
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError


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
    tar = urls.replace("{00000..00000}", "00000")
    for program in (f"exec cat {tar}", f"cat {tar} || exit 23"):  # killed by the pipe; curl's own word for it
        left = WebdatasetPairs(f"pipe:{program}")
        samples = iter(left)
        next(samples)
        samples.close()
        assert not left.skipped
    whole = WebdatasetPairs(f"pipe:cat {tar}; exit 1")
    assert [len(list(whole)) for _ in range(10)] == [200] * 10
    cut = WebdatasetPairs(f"pipe:head -c 100000 {tar}; exit 1")
    assert len({len(list(cut)) for _ in range(10)}) == 1
    assert dict(cut.skipped) == {"tar cut short": 1}


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
    def order(dataset, seed, epoch, shuffle=True):
        stream = Stream([dataset], [1.0], seed=seed, shuffle=shuffle, epochs=epoch + 1)
        return tuple(record.index for record in stream if record.epoch == epoch)

    whole = WebdatasetPairs(shards(tmp_path, 12, 2), shuffle_buffer=1)  # the shards alone are shuffled
    single = WebdatasetPairs(shards(tmp_path / "one", 1, 20), shuffle_buffer=8)
    for dataset in (whole, single):
        orders = [order(dataset, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
        assert len(set(orders)) == 3
        assert len({frozenset(each) for each in orders}) == 1
        assert tuple(sorted(orders[0])) == order(dataset, 0, 0, shuffle=False)
    assert len({order(single, seed, 0)[:12] for seed in range(3)}) == 3  # through the buffer
    assert all(place < 8 + turn for turn, place in enumerate(order(single, 0, 0)))  # none leaves before it has come


def test_evaluation_reads_a_tar_once_in_its_order(tmp_path):
    dataset = WebdatasetPairs(shards(tmp_path, 2, 5))
    seen = list(batches(dataset, tokenizer, 4, seed=0, shuffle=False, epochs=1))
    assert torch.cat([batch.image[:, 0, 0, 0] for batch in seen]).tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert [len(batch) for batch in seen] == [4, 4, 2]


def test_numbers_of_samples_are_told_by_files_beside_the_tars(tmp_path):
    a, b = shards(tmp_path / "a", 3, 2), shards(tmp_path / "b", 2, 2)
    assert WebdatasetPairs(a).num_samples is None
    write(tmp_path / "a", {"__len__": "6\n"})
    assert WebdatasetPairs(a).num_samples == 6
    write(tmp_path / "a", {"sizes.json": '{"00000.tar": 5, "00001.tar": 7, "00002.tar": 9, "00009.tar": 100}'})
    assert WebdatasetPairs(a).num_samples == 21
    assert WebdatasetPairs(a.replace("00002", "00001")).num_samples == 12  # of the tars that are read
    assert WebdatasetPairs(f"{a}::{b}").num_samples is None
    write(tmp_path / "b", {"__len__": "4"})
    assert WebdatasetPairs([a, b]).num_samples == 25
    assert Mixture([WebdatasetPairs(a), WebdatasetPairs(b)], [1, 9]).num_samples == 25
    assert WebdatasetPairs("pipe:cat x.tar").num_samples is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"00000.tar": 5}', r"sizes\.json: has no entry for '00001\.tar'"),
        ("[5, 7]", r"sizes\.json: does not tell numbers"),
        ("{", r"sizes\.json: does not tell numbers"),
        ('{"00000.tar": 5, "00001.tar": "many"}', r"sizes\.json: does not tell numbers"),
    ],
)
def test_a_count_that_cannot_be_read_is_told(tmp_path, content, message):
    dataset = WebdatasetPairs(shards(tmp_path, 2, 1))
    write(tmp_path, {"sizes.json": content})
    with pytest.raises(DataError, match=message):
        dataset.num_samples  # noqa: B018
