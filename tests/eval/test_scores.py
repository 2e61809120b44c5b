"""Accuracies, recalls and ranks against hand-worked numbers and numpy's argsort."""

import numpy as np
import pytest
import torch

from vlmfast.errors import ShapeError
from vlmfast.eval import (
    mean_per_class_recall,
    mean_rank,
    median_rank,
    ranks_from_counts,
    recall_at_k,
    topk_accuracy,
)


def test_topk_accuracy_by_hand():
    ranked = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2], [2, 1, 0]])
    labels = torch.tensor([2, 2, 2, 0])
    assert [topk_accuracy(ranked, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]
    assert topk_accuracy(ranked, labels) == 0.25


def test_topk_accuracy_is_numpys():
    scores = np.random.default_rng(0).normal(size=(200, 17))
    labels = np.random.default_rng(1).integers(0, 17, 200)
    order = np.argsort(-scores, axis=1)
    for k in (1, 5, 17):
        expected = np.mean([labels[i] in order[i, :k] for i in range(200)])
        assert topk_accuracy(torch.tensor(order), torch.tensor(labels), k) == pytest.approx(expected, abs=1e-15)


def test_mean_per_class_recall_weighs_classes_not_samples():
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 5])  # classes 1, 3 and 4 do not occur
    predicted = torch.tensor([0, 0, 0, 1, 2, 5, 7])
    assert mean_per_class_recall(predicted, labels) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3, abs=1e-15)
    assert mean_per_class_recall(labels, labels) == 1.0


@pytest.mark.parametrize(
    ("ranks", "median", "mean"),
    [([0], 1, 1.0), ([0, 1], 1, 1.5), ([0, 3], 2, 2.5), ([4, 0, 2], 3, 3.0), ([0.5, 0.5], 1, 1.5)],
)
def test_median_and_mean_count_from_one(ranks, median, mean):
    ranks = torch.tensor(ranks)
    assert median_rank(ranks) == median == np.floor(np.median(ranks.numpy())) + 1
    assert mean_rank(ranks) == mean


def test_recall_at_k():
    ranks = torch.tensor([0, 0, 1, 4, 5, 9, 10, 99])
    assert [recall_at_k(ranks, k) for k in (1, 5, 10)] == [2 / 8, 4 / 8, 6 / 8]


def test_ties():
    above, tied = torch.tensor([0, 3]), torch.tensor([0, 5])
    assert ranks_from_counts(above, tied).tolist() == [0, 5.5]
    assert ranks_from_counts(above, tied, "optimistic").tolist() == [0, 3]
    assert ranks_from_counts(above, tied, "pessimistic").tolist() == [0, 8]
    with pytest.raises(ValueError, match="one of mean, optimistic, pessimistic; got 'lucky'"):
        ranks_from_counts(above, tied, "lucky")


def test_refusals():
    with pytest.raises(ShapeError, match=r"got \(3,\), \(3,\)"):
        topk_accuracy(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"got \(3, 2\), \(2,\)"):
        topk_accuracy(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"got \(0,\), \(0,\)"):
        mean_per_class_recall(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
