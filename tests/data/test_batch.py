"""The batch at step t is a pure function of (data set, seed, t)."""

import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from vlmfast.data import Batch, Sample, batches, collate
from vlmfast.data.batch import steps_per_epoch
from vlmfast.data.order import permutation, random_bits, random_int
from vlmfast.data.stream import SHARD_STRIDE
from vlmfast.errors import DataError, ShapeError


def tokenizer(texts):
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


def sample(index, epoch=0):
    return Sample(torch.full((3, 2, 2), index, dtype=torch.uint8), f"{index} {epoch}", index // 2)


class Listed:
    """n samples of which some are unreadable; the text tells the epoch."""

    def __init__(self, n, bad=()):
        self.n, self.bad, self.skipped = n, set(bad), Counter()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return sample(index)

    def draw(self, index, seed, epoch):
        if index in self.bad:
            self.skipped["bad"] += 1
            return None
        return sample(index, epoch)


class Streamed(Listed):
    """The same samples as a stream of four shards."""

    shards, shuffle_buffer, resampled, opened = 4, 3, False, 0

    def places(self, shard):
        return range(shard * self.n // 4, (shard + 1) * self.n // 4)

    def records(self, shard):
        self.opened += 1
        return iter(self.places(shard))

    def decode(self, record, index, seed, epoch):
        assert self.places(index // SHARD_STRIDE)[index % SHARD_STRIDE] == record
        return self.draw(record, seed, epoch)


KINDS = pytest.mark.parametrize("kind", [Listed, Streamed])


def numbers(seen: list[Batch]) -> list[int]:
    """The samples' numbers, which their texts tell; a stream's indices count within shards."""
    return torch.cat([batch.text for batch in seen])[:, 0].tolist()


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in ("image", "text", "index", "ids")
    )


def first(count, dataset, **options):
    stream = batches(dataset, tokenizer, 4, **{"seed": 3, **options})
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


@KINDS
@pytest.mark.parametrize("bad", [(), (0, 7, 20)], ids=["all readable", "three unreadable"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_that_starts_at_step_t_sees_what_the_whole_run_sees_from_there(kind, bad, shuffle):
    whole = first(20, kind(22, bad), shuffle=shuffle)
    for start in (1, 5, 6, 13):  # within the first epoch, at the border of two, in a later one
        assert same(first(20 - start, kind(22, bad), shuffle=shuffle, start_step=start), whole[start:])


@KINDS
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(kind, workers):
    assert same(first(20, kind(22, (1, 2)), workers=workers), first(20, kind(22, (1, 2))))


@KINDS
def test_seeds_and_epochs_each_have_an_order_and_every_epoch_has_every_sample_once(kind):
    dataset = kind(24)
    orders = {
        (seed, epoch): tuple(numbers(first(12, dataset, seed=seed)[6 * epoch :][:6]))
        for seed in (0, 1, -5, 2**40)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(24)) for order in orders.values())
    assert len(set(orders.values())) == len(orders)


def test_published_orders_never_change():
    assert random_int(1, 2, 3) == 5246500226706903259
    assert permutation(8, 0, 0).tolist() == [4, 2, 7, 0, 3, 6, 1, 5]


def test_an_array_of_random_bits_equals_the_numbers_one_by_one():
    words = np.arange(5)
    assert random_bits(-7, words, 2**65 + 1).tolist() == [random_int(-7, word, 2**65 + 1) for word in range(5)]


def test_random_bits_are_balanced():
    # A fair bit over 4096 draws stays within 5 standard deviations, 160, of one half.
    bits = random_bits(0, np.arange(4096))
    ones = [int(((bits >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    assert max(abs(count - 2048) for count in ones) <= 160


@KINDS
def test_the_epoch_reaches_the_sample(kind):
    texts = torch.cat([batch.text[:, 1] for batch in first(12, kind(24))])
    assert texts.tolist() == [0] * 24 + [1] * 24


@KINDS
def test_training_batches_keep_their_size_when_samples_are_unreadable(kind):
    dataset = kind(24, bad=(0, 1, 2, 3, 4))
    seen = first(12, dataset)
    assert all(len(batch) == 4 and len(batch.text.unique(dim=0)) == 4 for batch in seen)
    assert not {0, 1, 2, 3, 4} & set(numbers(seen))
    assert dataset.skipped["bad"] >= 5


def test_an_unreadable_sample_is_replaced_by_another_each_time():
    rows = torch.cat([batch.index for batch in first(250, Listed(100, bad=(3,)))]).tolist()  # ten epochs
    assert len({index for index in rows if rows.count(index) > 10}) >= 8


@KINDS
def test_evaluation_leaves_unreadable_samples_out_and_reads_every_other_once_in_order(kind):
    seen = first(None, kind(10, bad=(1, 4, 5, 6, 7)), shuffle=False, epochs=1)
    assert numbers(seen) == [0, 2, 3, 8, 9]


@KINDS
def test_a_short_last_batch_is_kept_for_evaluation_and_dropped_in_training(kind):
    assert [len(batch) for batch in first(None, kind(10), shuffle=False, epochs=1)] == [4, 4, 2]
    assert [len(batch) for batch in first(None, kind(10), epochs=1)] == [4, 4]
    assert [len(batch) for batch in first(None, kind(10), epochs=1, drop_last=False)] == [4, 4, 2]
    assert (steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_last=False)) == (2, 3)


def test_a_batch_with_too_few_readable_samples_in_all_the_set_is_a_row_short():
    assert [len(batch) for batch in first(2, Listed(4, bad=(2,)))] == [3, 3]


@KINDS
def test_a_set_without_a_readable_sample_says_so(kind):
    with pytest.raises(DataError, match=r"read.*'bad': \d+"):
        first(1, kind(8, bad=range(8)))


# Ranks and positions


@pytest.mark.parametrize(("n", "bad"), [(26, ()), (60, (0, 7, 20, 21, 50))])
def test_the_ranks_rows_together_are_those_of_one_rank_with_the_whole_batch(n, bad):
    whole = list(itertools.islice(batches(Listed(n, bad), tokenizer, 12, seed=3), 12))
    ranks = [first(12, Listed(n, bad), rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        rows = numbers([each[step] for each in ranks])
        assert len(set(rows)) == 12  # no sample twice, whoever took the row of an unreadable one
        assert set(rows) >= set(permutation(n, 3, step // (n // 12))[step % (n // 12) * 12 :][:12].tolist()) - set(bad)
        assert bad or rows == numbers([batch])


def test_a_rank_reads_its_own_rows_alone():
    class Counted(Listed):
        drawn = ()

        def draw(self, index, seed, epoch):
            self.drawn += (index,)
            return super().draw(index, seed, epoch)

    drawn = []
    for rank in range(3):
        dataset = Counted(24)
        first(2, dataset, rank=rank, world_size=3)
        assert len(dataset.drawn) == 8
        drawn += dataset.drawn
    assert sorted(drawn) == list(range(24))


def test_two_ranks_never_take_one_sample_for_two_unreadable_ones():
    # The samples of the step are all unreadable but three, and few others are left to take their rows.
    order = permutation(24, 3, 0)
    dataset = Listed(24, set(order[:12].tolist()) - {order[0], order[4], order[8]})
    rows = [numbers(first(1, dataset, rank=rank, world_size=3)) for rank in range(3)]
    assert all(len(each) > 1 for each in rows)
    assert len({*rows[0], *rows[1], *rows[2]}) == sum(map(len, rows))


def test_a_short_last_batch_is_shared_out_evenly():
    sizes = [
        [len(batch) for batch in first(None, Listed(17), shuffle=False, epochs=1, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert sizes == [[4, 2], [4, 2], [4, 1]]


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaded_state_goes_on_where_it_was_taken(kind, workers):
    whole = first(14, kind(22, (1, 2)), workers=workers)
    for stop in (0, 1, 5, 6, 11):
        stream = batches(kind(22, (1, 2)), tokenizer, 4, seed=3, workers=workers)
        assert same(list(itertools.islice(stream, stop)), whole[:stop])
        state = json.loads(json.dumps(stream.state_dict()))
        stream.close()
        again = batches(kind(22, (1, 2)), tokenizer, 4, seed=3, start_step=9, workers=workers)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert same(list(itertools.islice(again, 14 - stop)), whole[stop:])
        again.close()


def test_a_state_of_another_data_set_is_refused():
    state = batches(Listed(22), tokenizer, 4, seed=3).state_dict()
    with pytest.raises(DataError, match="saved with samples 22; this is samples 23"):
        batches(Listed(23), tokenizer, 4, seed=3).load_state_dict(state)


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (99, [10])])
def test_a_batch_comes_apart_in_order(size, sizes):
    batch = collate([sample(i) for i in range(10)], list(range(10)), tokenizer)
    pieces = batch.split(size)
    assert [len(piece) for piece in pieces] == sizes
    for name in ("image", "text", "index", "ids"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    bare = Batch(batch.image, batch.text, batch.index).split(size)
    assert [piece.ids for piece in bare] == [None] * len(sizes)
    assert pieces[0].image.data_ptr() == batch.image.data_ptr()  # no copy
    with pytest.raises(ValueError, match="size must be at least 1"):
        batch.split(0)


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match=r"has 3 samples, too few for a batch of 4"):
        batches(Listed(3), tokenizer, 4, seed=0)
    with pytest.raises(DataError, match=r"has 7 samples, too few for a batch of 4 on each of 2 ranks"):
        batches(Listed(7), tokenizer, 4, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start_step": -1}, {"workers": -1}, {"epochs": -1}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batches(Listed(8), tokenizer, **{"batch_size": 4, "seed": 0, **wrong})


def test_a_plain_list_is_a_data_set():
    (batch,) = batches([sample(i) for i in range(4)], tokenizer, 4, seed=0, epochs=1)
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3]
    assert torch.equal(batch.image[:, 0, 0, 0].long(), batch.index)
    assert torch.equal(batch.ids, batch.index // 2)


def test_a_set_that_reads_many_at_once_is_asked_once_a_batch():
    class Together(list):
        asked = ()

        def __getitems__(self, indices):
            self.asked += (len(indices),)
            return [self[index] for index in indices]

    samples = [sample(i) for i in range(14)]
    together = Together(samples)
    assert same(first(3, together), first(3, samples))
    assert together.asked == (4, 4, 4)


def test_images_of_two_sizes_in_one_batch_are_named():
    odd = Sample(torch.zeros(3, 5, 2, dtype=torch.uint8), "1 1", 0)
    with pytest.raises(ShapeError, match=r"one shape; got \(3, 2, 2\) \(sample 0\), \(3, 5, 2\) \(sample 7\)"):
        collate([sample(0), odd], [0, 7], tokenizer)


def test_a_batch_moves_whole():
    batch = collate([sample(0), sample(1)], [0, 1], tokenizer).to("meta")
    assert {batch.image.device.type, batch.text.device.type, batch.index.device.type, batch.ids.device.type} == {"meta"}
    assert Batch(batch.image, batch.text, batch.index).to("meta").ids is None


def test_an_error_in_a_worker_is_raised_and_no_thread_is_left():
    class Broken(Listed):
        def draw(self, index, seed, epoch):
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="the disk is on fire"):
        first(1, Broken(8), workers=2)
    first(2, Listed(100), workers=2)  # left early
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfast-data")]
