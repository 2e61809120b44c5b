"""Shards as streams: each rank's order, its position that is saved and found again, mixtures, and damaged tars."""

import itertools
import json
import random
import threading
import time
from collections import Counter

import pytest
import torch
from crawl import damaged_shards, picture, shards, tar_bytes, tokenizer, write

from vlmfast.data import batches
from vlmfast.data.mixture import Mixture
from vlmfast.data.stream import SHARD_STRIDE, SOURCE_STRIDE, Stream
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError


class Watched(WebdatasetPairs):
    """Tells which tars are opened, and how many records are read."""

    opened, read, decoded = (), 0, 0

    def records(self, shard):
        self.opened += (shard,)
        for record in super().records(shard):
            self.read += 1
            yield record

    def decode(self, *record):
        self.decoded += 1
        return super().decode(*record)


class Words:
    """Stands where `batches` wants a tokenizer: a text's number, and the texts for the test."""

    def __init__(self):
        self.numbers = {}

    def __call__(self, texts):
        return torch.tensor([[self.numbers.setdefault(text, len(self.numbers))] for text in texts])

    def of(self, batch):
        names = list(self.numbers)
        return [names[number] for number in batch.text[:, 0].tolist()]


def contents(batch):
    return batch.index.tolist(), batch.text.tolist(), batch.image[:, :, 0, 0].tolist(), batch.ids.tolist()


def taken(dataset, count, state=None, size=5, words=tokenizer, **how):
    """(contents of the next batches, the last state as a file would hold it)"""
    stream = batches(dataset, words, size, **{"seed": 3, **how})
    if state is not None:
        stream.load_state_dict(state)
    found = [contents(batch) for batch in itertools.islice(stream, count)]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    return found, state


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return damaged_shards(tmp_path_factory.mktemp("damaged"), 4, 14)


@pytest.fixture
def mixture(damaged, tmp_path):
    def made():
        # Not all of one size: the epochs of the two drift apart.
        large = WebdatasetPairs(damaged[0], image_size=8, fit="random", shuffle_buffer=13)
        return Mixture([WebdatasetPairs(clean, image_size=8, shuffle_buffer=4), large], [1, 2])

    clean = shards(tmp_path, 3, 7)
    return made


# Ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_of_the_ranks_together_has_every_good_sample_once_and_counts_every_fault(damaged, world_size, workers):
    url, good, reasons = damaged
    dataset = WebdatasetPairs(url, shuffle_buffer=20)
    words, seen, shards_of = Words(), Counter(), []
    for rank in range(world_size):
        how = {"epochs": 1, "drop_last": False, "rank": rank, "world_size": world_size, "workers": workers}
        found = list(batches(dataset, words, 7, seed=0, **how))
        for batch in found:
            seen.update(zip(words.of(batch), batch.image[:, 0, 0, 0].tolist(), strict=True))
        shards_of.append({index // SHARD_STRIDE for b in found for index in b.index.tolist()})
    assert seen == Counter(good.items())
    assert dict(dataset.skipped) == reasons
    assert sorted(itertools.chain(*shards_of)) == list(range(4))  # no tar is read by two


def test_epochs_join_without_losing_or_doubling_a_sample(damaged):
    url, good, reasons = damaged
    dataset, words = WebdatasetPairs(url, shuffle_buffer=20), Words()
    stream = batches(dataset, words, 11, seed=0)
    seen = Counter()
    while seen.total() < 3 * len(good):
        seen.update(words.of(next(stream)))
    late = seen.total() - 3 * len(good)  # those of the fourth epoch
    assert seen.keys() == good.keys()
    assert sum(abs(count - 3) for count in seen.values()) == late
    assert dict(dataset.skipped) == reasons


def test_ranks_of_a_resampled_set_may_be_more_than_its_tars(tmp_path):
    dataset = WebdatasetPairs(shards(tmp_path, 2, 6), resampled=True, shuffle_buffer=3)
    orders = [taken(dataset, 12, rank=rank, world_size=3)[0] for rank in range(3)]
    assert len({str(order) for order in orders}) == 3
    assert orders[1] == taken(dataset, 12, rank=1, world_size=3, workers=2)[0]
    drawn = [Stream([dataset], [1], seed=seed, shuffle=True, epochs=1) for seed in range(20)]
    assert any(len({record.index // SHARD_STRIDE for record in stream}) == 1 for stream in drawn)  # one tar twice


def test_fewer_shards_than_ranks_are_refused_at_once(tmp_path):
    dataset = WebdatasetPairs(shards(tmp_path, 2, 3))
    with pytest.raises(
        DataError, match="3 ranks need at least 3 shards, and the data set has 2; split it into more shards, or"
    ):
        batches(dataset, tokenizer, 2, seed=0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        batches(dataset, tokenizer, 2, seed=0, rank=2, world_size=2)


def test_a_rank_whose_shards_are_all_dead_goes_on_with_those_of_the_next_epoch(tmp_path):
    good = shards(tmp_path, 1, 4)
    write(tmp_path, {"dead.tar": b"", "page.tar": tar_bytes([("1.jpg", b"<html>"), ("1.txt", b"a page")])})
    for other in ("dead", "page"):
        for seed, rank in itertools.product(range(6), (0, 1)):  # some meet it several times on end
            dataset = WebdatasetPairs([good, f"{tmp_path}/{other}.tar"])
            (found,), _ = taken(dataset, 1, size=4, seed=seed, rank=rank, world_size=2)
            assert sorted(found[0]) == [0, 1, 2, 3]
    for rank in (0, 1):
        with pytest.raises(DataError, match=r"no readable sample; skipped: {'not an image': 2}"):
            taken(WebdatasetPairs([f"{tmp_path}/page.tar"] * 2), 1, rank=rank, world_size=2)


def test_the_next_batch_is_made_while_the_reader_is_busy_and_no_thread_is_left(tmp_path):
    dataset = Watched(shards(tmp_path, 4, 10), shuffle_buffer=4)
    stream = batches(dataset, tokenizer, 5, seed=0, workers=1)
    next(stream)
    deadline = time.monotonic() + 60
    while dataset.decoded < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset.decoded >= 10  # nobody has asked for the second batch yet
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfast-data")]


# Position


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loaded_state_goes_on_with_the_very_samples(damaged, monkeypatch, workers, rank):
    monkeypatch.setattr("vlmfast.data.batch.MARK_EVERY", 8)
    url, _, _ = damaged
    how = {"rank": rank, "world_size": 2, "workers": workers}

    def dataset():
        return WebdatasetPairs(url, image_size=8, fit="random", shuffle_buffer=9)

    count = 12  # about three epochs of a rank
    whole, _ = taken(dataset(), count, **how)
    for stop in [0, 1, *random.Random(workers).sample(range(2, count), 5)]:
        first, state = taken(dataset(), stop, **how)
        again = dataset()
        rest, end = taken(again, count - stop, state, **{**how, "workers": 3 - workers})
        assert first + rest == whole, stop
        assert end["position"]["step"] == count


def test_a_position_within_the_emptying_of_the_buffer_is_found_again(tmp_path):
    # The buffer is larger than the epoch: all of it leaves in the order of the end.
    def dataset():
        return WebdatasetPairs(shards(tmp_path, 2, 6), shuffle_buffer=50)

    whole, _ = taken(dataset(), 17, size=1)
    for stop in (1, 6, 11, 12, 13):
        _, state = taken(dataset(), stop, size=1)
        assert taken(dataset(), 17 - stop, state, size=1)[0] == whole[stop:]


def test_every_mark_is_a_position(tmp_path):
    def stream():
        dataset = WebdatasetPairs(shards(tmp_path, 4, 6), shuffle_buffer=7)
        return Stream([dataset], [1.0], seed=5, shuffle=True)

    whole = stream()
    order, states = [], []
    for _ in range(54):
        states.append(json.loads(json.dumps(whole.state())))
        order.append(next(whole).index)
    for number, state in list(enumerate(states))[::3]:
        again = stream()
        again.load(state)
        assert [record.index for record in itertools.islice(again, 54 - number)] == order[number:]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_mixture_goes_on_with_the_very_samples(mixture, monkeypatch, workers):
    monkeypatch.setattr("vlmfast.data.batch.MARK_EVERY", 10)
    whole, _ = taken(mixture(), 30, workers=workers)
    for stop in (1, 7, 25):
        _, state = taken(mixture(), stop, workers=workers)
        assert taken(mixture(), 30 - stop, state, workers=workers)[0] == whole[stop:]


def test_loading_opens_few_tars_and_decodes_nothing_that_was_handed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmfast.data.batch.MARK_EVERY", 50)
    urls = shards(tmp_path, 20, 10)  # 200 records an epoch
    whole, _ = taken(WebdatasetPairs(urls, shuffle_buffer=12), 75)
    _, state = taken(WebdatasetPairs(urls, shuffle_buffer=12), 72)  # 10 records after a mark in the second epoch
    assert state["position"]["since"] == 10
    again = Watched(urls, shuffle_buffer=12)
    assert taken(again, 3, state)[0] == whole[72:]
    # The buffer's 12 records are of few tars, one tar is read on, and 25 records more lie in three at most.
    assert len(again.opened) <= 9
    assert again.read < 90
    assert again.decoded == 15


def test_a_state_is_small(tmp_path):
    urls = shards(tmp_path, 20, 10)
    _, state = taken(WebdatasetPairs(urls, shuffle_buffer=100), 30)
    assert len(json.dumps(state)) < 100 * 20 + 1000


def test_counts_of_the_unreadable_go_on_and_nothing_counts_twice(damaged):
    url, _, reasons = damaged
    _, state = taken(WebdatasetPairs(url), 9)  # more than one epoch
    again = WebdatasetPairs(url)
    stream = batches(again, tokenizer, 5, seed=3)
    stream.load_state_dict(state)
    assert dict(again.skipped) == reasons
    assert "not an image, such as" in again.describe_skipped()
    for _ in range(10):
        next(stream)
    assert dict(again.skipped) == reasons


def test_a_state_of_another_run_is_refused(tmp_path):
    urls = shards(tmp_path, 4, 6)
    _, state = taken(WebdatasetPairs(urls), 2, rank=1, world_size=2)
    for how, message in [
        ({"world_size": 3, "rank": 1}, "saved with world_size 2; this is world_size 3"),
        ({"world_size": 2, "rank": 0}, "saved with rank 1; this is rank 0"),
        ({"world_size": 2, "rank": 1, "seed": 8}, "saved with seed 3; this is seed 8"),
        ({"world_size": 2, "rank": 1, "size": 6}, "saved with batch_size 5; this is batch_size 6"),
    ]:
        with pytest.raises(DataError, match=message):
            taken(WebdatasetPairs(urls), 1, state, **how)
    with pytest.raises(DataError, match=r"\[\[4, 1000, False\]\]; this is .* \[\[3, 1000, False\]\]"):
        taken(WebdatasetPairs(urls.replace("00003", "00002")), 1, state, rank=1, world_size=2)
    stream = batches(WebdatasetPairs(urls), tokenizer, 5, seed=3, rank=1, world_size=2)
    next(stream)
    with pytest.raises(RuntimeError, match="before the first batch"):
        stream.load_state_dict(state)


def test_data_that_changed_since_the_state_was_saved_are_told(tmp_path):
    urls = shards(tmp_path, 2, 10)
    _, state = taken(WebdatasetPairs(urls, shuffle_buffer=5), 1, size=1)
    shards(tmp_path, 2, 1)
    place = {"epoch": 0, "came": 8, "place": 0, "number": 8, "buffer": [7, 2]}
    state["position"]["mark"] = {"taken": [3], "sources": [place]}
    with pytest.raises(DataError, match="needs record 2 of shard 0, which is not there; the data have changed"):
        taken(WebdatasetPairs(urls, shuffle_buffer=5), 1, state, size=1)


# Mixtures


def test_a_mixture_gives_each_source_its_share_and_every_source_its_own_epochs(tmp_path):
    first = WebdatasetPairs(shards(tmp_path / "a", 3, 4), shuffle_buffer=3)
    second = WebdatasetPairs(shards(tmp_path / "b", 2, 5), shuffle_buffer=3)
    stream = Stream([first, second], [1, 2.5], seed=0, shuffle=True)
    records = list(itertools.islice(stream, 140))
    for number in range(1, 141):
        assert abs(sum(record.source for record in records[:number]) - number * 2.5 / 3.5) < 1
    for source, size in ((0, 12), (1, 10)):
        own = [record.index for record in records if record.source == source]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 3
        assert {frozenset(epoch) for epoch in epochs} == {frozenset(epochs[0])}
        assert len(frozenset(epochs[0])) == size
        assert all(index // SOURCE_STRIDE == source for index in own)


def test_samples_of_a_mixture_are_told_apart(mixture):
    found, _ = taken(mixture(), 20)
    assert all(index == ids for index, _, _, ids in found)
    assert {place // SOURCE_STRIDE for index, _, _, _ in found for place in index} == {0, 1}


def test_a_mixture_counts_and_reads_once_through(mixture, damaged):
    both = mixture()
    assert len(list(both)) == len(damaged[1]) + 21
    assert dict(both.skipped) == damaged[2]
    taken(both, 50)  # the stream meets the same records
    assert dict(both.skipped) == damaged[2]
    assert both.describe_skipped().count("\n") == 0  # nothing was skipped in the first
    assert both.num_samples is None


def test_impossible_mixtures_are_refused(tmp_path):
    one = WebdatasetPairs(shards(tmp_path, 1, 2))
    for sources, weights in (([], None), ([one], [1, 2]), ([one], [0]), ([one, one], [1, -1])):
        with pytest.raises(ValueError, match="needs a weight > 0 for each"):
            Mixture(sources, weights)
    with pytest.raises(ValueError, match="each data set of a mixture has its own epochs"):
        batches(Mixture([one, one]), tokenizer, 1, seed=0, epochs=1)


def test_a_source_without_a_readable_sample_is_told_though_the_others_have_some(tmp_path):
    write(tmp_path, {"bad.tar": tar_bytes([("1.png", picture(1)), ("2.png", picture(2))])})
    both = Mixture([WebdatasetPairs(shards(tmp_path, 1, 5)), WebdatasetPairs(f"{tmp_path}/bad.tar")])
    with pytest.raises(DataError, match=r"no readable sample; skipped: {'missing caption': 2}"):
        taken(both, 100)


def test_pipes_resume_too(tmp_path):
    shards(tmp_path, 4, 10)
    urls = [f"pipe:cat {tmp_path}/{number:05}.tar" for number in range(4)]
    whole, _ = taken(WebdatasetPairs(urls, shuffle_buffer=7), 20)
    _, state = taken(WebdatasetPairs(urls, shuffle_buffer=7), 9)
    again = WebdatasetPairs(urls, shuffle_buffer=7)
    assert taken(again, 11, state)[0] == whole[9:]
    assert not again.skipped
