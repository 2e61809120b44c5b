"""The digits are scikit-learn's, split by sample, with captions that the test has never seen."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vlmfast.data import batches
from vlmfast.data.digits import (
    CLASS_DIGITS,
    CLASS_NAMES,
    TEST_TEMPLATES,
    TRAIN_TEMPLATES,
    all_captions,
    digits,
)
from vlmfast.data.tokenize import train_tokenizer

SPLITS = ("train", "val", "test")


def test_images_and_labels_are_scikit_learns():
    scans = load_digits()
    for split in SPLITS:
        dataset = digits(split)
        grey = torch.from_numpy(np.round(scans.images[dataset.rows] * 255 / 16))
        assert (dataset.images.dtype, dataset.images.shape) == (torch.uint8, (len(dataset), 3, 8, 8))
        assert torch.equal(dataset.images.double(), grey[:, None].expand(-1, 3, -1, -1))
        assert dataset.labels.tolist() == scans.target[dataset.rows].tolist()
        assert dataset[5].id == dataset.labels[5]
        assert torch.equal(dataset[5].image, dataset.images[5])


def test_the_splits_share_no_scan_leave_none_out_and_have_every_class_alike():
    rows = {split: digits(split).rows.tolist() for split in SPLITS}
    assert sorted(rows["train"] + rows["val"] + rows["test"]) == list(range(1797))
    assert [len(rows[split]) for split in SPLITS] == [1168, 179, 450]
    counts = torch.bincount(torch.from_numpy(load_digits().target))
    for split, share in zip(SPLITS, (0.65, 0.1, 0.25), strict=True):
        assert ((torch.bincount(digits(split).labels) - share * counts).abs() <= 1).all()


def test_no_two_splits_hold_equal_scans():
    seen = [{image.numpy().tobytes() for image in digits(split).images} for split in SPLITS]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_the_split_never_changes():
    assert digits("test").rows[:12].tolist() == [3, 4, 8, 10, 11, 15, 16, 17, 20, 27, 31, 32]


def test_test_templates_are_new_but_their_words_are_not():
    assert not set(TRAIN_TEMPLATES) & set(TEST_TEMPLATES)
    assert not set(all_captions()) & set(all_captions(TEST_TEMPLATES))
    assert {word for template in TEST_TEMPLATES for word in template.split()} <= {
        word for template in TRAIN_TEMPLATES for word in template.split()
    }
    assert digits("test").templates == TEST_TEMPLATES
    assert digits("train").templates == digits("val").templates == TRAIN_TEMPLATES


def test_a_caption_depends_on_seed_epoch_and_index_and_all_come_up():
    dataset = digits("train")
    texts = [dataset.draw(0, seed, epoch).text for seed in range(2) for epoch in range(200)]
    label = int(dataset.labels[0])
    every = {template.format(name[label]) for template in TRAIN_TEMPLATES for name in (CLASS_NAMES, CLASS_DIGITS)}
    assert set(texts) == every
    assert texts[:200] != texts[200:]
    assert texts[200:] == [dataset.draw(0, 1, epoch).text for epoch in range(200)]
    assert len({dataset.draw(index, 0, 0).text for index in range(50) if dataset.labels[index] == label}) > 1


def test_all_captions_are_those_that_can_come_up():
    assert len(all_captions()) == len(set(all_captions())) == 20 * len(TRAIN_TEMPLATES)
    captions = set(all_captions())
    assert all(digits("train").draw(index, 3, 4).text in captions for index in range(100))


def test_digits_make_batches():
    tokenizer = train_tokenizer(all_captions(), 400, 16)
    dataset = digits("train", ["the {}"])
    batch = next(batches(dataset, tokenizer, 32, seed=0))
    assert torch.equal(batch.ids, dataset.labels[batch.index])
    assert torch.equal(batch.image, dataset.images[batch.index])
    assert {tokenizer.decode(row).removeprefix("the ") for row in batch.text} <= {*CLASS_NAMES, *CLASS_DIGITS}


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'dev'"):
        digits("dev")
    with pytest.raises(ValueError, match=r"every template must have \{\} where the digit goes; got 'a digit'"):
        digits("train", ["a digit"])
