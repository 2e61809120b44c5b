"""Synthetic pairs are made from (seed, index), in the shapes and lengths of real ones."""

import pytest
import torch

from vlmfast.data.synthetic import Synthetic


def test_a_pair_depends_on_seed_and_place_alone():
    pairs = Synthetic(100, 24)
    sample = pairs.draw(7, seed=1, epoch=0)
    assert sample.image.shape == (3, 24, 24)
    assert sample.image.dtype == torch.uint8
    assert sample.id == 7
    again = Synthetic(9, 24).draw(7, seed=1, epoch=5)
    assert torch.equal(sample.image, again.image)
    assert sample.text == again.text == pairs.caption(7, 1)
    for other in (pairs.draw(8, 1, 0), pairs.draw(7, 2, 0)):
        assert not torch.equal(sample.image, other.image)
        assert sample.text != other.text
    assert pairs[-1].id == 99
    with pytest.raises(IndexError):
        pairs[100]


def test_pixels_are_balanced_and_captions_have_the_lengths_that_are_told():
    pairs = Synthetic(2000, 31)  # an odd number of bytes
    pixels = pairs[0].image.float()
    # 2883 fair bytes: the mean lies within 5 standard errors, 74 / sqrt(2883), of 127.5.
    assert abs(pixels.mean() - 127.5) < 7
    lengths = [len(pairs.caption(index).split()) for index in range(2000)]
    assert set(lengths) == set(range(3, 24))
    assert abs(sum(lengths) / 2000 - 13) < 5 * 6.06 / 2000**0.5


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1; got 0 and 8"):
        Synthetic(0, 8)
