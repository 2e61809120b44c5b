"""What the data flags open."""

import pytest
from crawl import shards, write

from vlmfast.data.batch import is_stream
from vlmfast.data.mixture import Mixture
from vlmfast.data.synthetic import Synthetic
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError
from vlmfast.recipes.sources import DataFlags, TrainDataFlags, captions, open_pairs, train_samples


def tars(**flags):
    return TrainDataFlags(dataset_type="webdataset", **flags)


def test_flags_of_tars_reach_the_reader_to_train_and_no_other(tmp_path):
    urls = shards(tmp_path, 2, 3)
    flags = tars(shuffle_buffer=7, dataset_resampled=True)
    train = open_pairs(flags, urls, "train", 8)
    assert (train.shuffle_buffer, train.resampled) == (7, True)
    val = open_pairs(tars(train_data_upsampling_factors="1::2"), urls, "val", 8)
    assert isinstance(val, WebdatasetPairs)


def test_flags_of_tars_are_refused_where_there_are_none():
    with pytest.raises(DataError, match=r"--dataset-resampled says how tars are read; leave it out with .* digits"):
        open_pairs(TrainDataFlags(dataset_resampled=True), "", "train", 8)


def test_captions_are_read_without_decoding_an_image(tmp_path, monkeypatch):
    urls = shards(tmp_path, 2, 3)
    texts = [sample.text for sample in open_pairs(tars(), urls, "train", 8)]
    monkeypatch.setattr("vlmfast.data.webdataset.load_image", lambda *args, **kwargs: pytest.fail("decoded"))
    assert captions(open_pairs(tars(), urls, "train", 8)) == texts
    mixed = open_pairs(tars(train_data_upsampling_factors="1::1"), f"{urls}::{urls}", "train", 8)
    assert sorted(captions(mixed)) == sorted(2 * texts)


def test_factors_make_a_mixture_in_which_a_tar_counts_as_often_as_its_factor_says(tmp_path):
    urls = f"{shards(tmp_path / 'a', 4, 3)}::{shards(tmp_path / 'b', 2, 3)}"
    joined = open_pairs(tars(), urls, "train", 8)
    assert joined.shards == 6
    mixed = open_pairs(tars(train_data_upsampling_factors="1::4", shuffle_buffer=5), urls, "train", 8)
    assert isinstance(mixed, Mixture)
    assert is_stream(mixed)
    assert mixed.weights == [4, 8]  # 4 tars at 1, 2 tars at 4
    assert [source.shuffle_buffer for source in mixed.sources] == [5, 5]


@pytest.mark.parametrize("factors", ["1", "1::2::3", "1::x", "1::0", "1::-2", "1::inf", "::"])
def test_impossible_factors_are_refused(tmp_path, factors):
    urls = f"{shards(tmp_path / 'a', 1, 1)}::{shards(tmp_path / 'b', 1, 1)}"
    with pytest.raises(DataError, match="a number > 0 for each of the 2 parts of --train-data, such as 1::2; got"):
        open_pairs(tars(train_data_upsampling_factors=factors), urls, "train", 8)


def test_what_an_epoch_is_comes_from_the_flag_or_from_the_files_beside_the_tars(tmp_path):
    dataset = open_pairs(tars(), shards(tmp_path, 2, 3), "train", 8)
    with pytest.raises(DataError, match=r"needs --train-num-samples, or sizes\.json or __len__"):
        train_samples(dataset, None)
    write(tmp_path, {"__len__": "6"})
    assert train_samples(dataset, None) == 6
    assert train_samples(dataset, 5) == 5
    assert train_samples(Synthetic(9, 8), 5) == 9


def test_synthetic_pairs_need_no_path(tmp_path):
    dataset = open_pairs(DataFlags(dataset_type="synthetic"), "", "train", 16, 30)
    assert len(dataset) == 30
    assert dataset[0].image.shape == (3, 16, 16)
    assert captions(dataset) == [dataset[index].text for index in range(30)]
    assert len(open_pairs(DataFlags(dataset_type="synthetic"), "", "val", 16)) == 5_000
