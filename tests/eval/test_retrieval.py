"""Retrieval against numpy's argsort, with one and with several positives, and at chance."""

import numpy as np
import pytest
import torch

from vlmfast.errors import DataError, ShapeError
from vlmfast.eval import retrieval, retrieval_metrics
from vlmfast.testing import pairs

KEYS = [
    f"{a}_to_{b}_{name}"
    for a, b in (("image", "text"), ("text", "image"))
    for name in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
]


def by_argsort(image, text, image_ids, text_ids):
    """open_clip's and CLIP_benchmark's numbers: sort every row, take the place of the first positive."""
    similarity = (image.double() @ text.double().T).numpy()
    positive = image_ids.numpy()[:, None] == text_ids.numpy()[None, :]
    metrics = {}
    for name, s, p in (("image_to_text", similarity, positive), ("text_to_image", similarity.T, positive.T)):
        order = np.argsort(-s, axis=1, kind="stable")
        ranks = np.take_along_axis(p, order, axis=1).argmax(1)
        metrics |= {f"{name}_R@{k}": np.mean(ranks < k) for k in (1, 5, 10)}
        metrics |= {f"{name}_median_rank": np.floor(np.median(ranks)) + 1, f"{name}_mean_rank": ranks.mean() + 1}
    return metrics


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("n", [1, 2, 37, 150])
def test_pairs_are_as_sorted(backend, n):
    image, text, _ = pairs(n, 33, match=0.3)
    rows = torch.arange(n)
    metrics = retrieval_metrics(image, text)
    assert list(metrics) == KEYS
    assert metrics == pytest.approx(by_argsort(unit(image), unit(text), rows, rows), abs=1e-12)
    assert metrics["text_to_image_R@1"] > 0


@pytest.mark.parametrize("at_once", [1 << 24, 60])  # all queries at once, and a few at a time
def test_several_positives_each_way(backend, at_once, monkeypatch):
    """Five captions an image, some images twice, ids neither sorted nor dense."""
    monkeypatch.setattr(retrieval, "POSITIVES", at_once)
    generator = torch.Generator().manual_seed(3)
    image_ids = torch.cat([torch.arange(40), torch.arange(10)])[torch.randperm(50, generator=generator)] * 7 - 100
    text_ids = (torch.arange(200) % 40)[torch.randperm(200, generator=generator)] * 7 - 100
    centre = torch.randn(300, 24, generator=generator)
    image = centre[image_ids + 100] + 1.2 * torch.randn(50, 24, generator=generator)
    text = centre[text_ids + 100] + 1.2 * torch.randn(200, 24, generator=generator)
    metrics = retrieval_metrics(image, text, image_ids=image_ids, text_ids=text_ids)
    expected = by_argsort(unit(image), unit(text), image_ids, text_ids)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert 0.1 < metrics["image_to_text_R@1"] < 0.9, "neither solved nor hopeless, or every mistake passes"


def test_matched_embeddings_are_found(backend):
    image, _, _ = pairs(60, 16)
    metrics = retrieval_metrics(image, 3 * image)
    assert {metrics[key] for key in KEYS} == {1.0}


def test_unrelated_embeddings_are_at_chance(backend):
    n, k = 1000, 10
    image, text, _ = pairs(n, 32, match=0.0)
    metrics = retrieval_metrics(image, text)
    for way in ("image_to_text", "text_to_image"):
        # A hit has probability k / n: five standard deviations of a binomial, and of the mean of uniform ranks.
        assert abs(metrics[f"{way}_R@{k}"] - k / n) < 5 * (k / n / n) ** 0.5
        assert abs(metrics[f"{way}_mean_rank"] - (n + 1) / 2) < 5 * n / (12 * n) ** 0.5


def test_collapsed_embeddings_win_nothing_by_ties(backend):
    """All scores equal: the order of a sort would be luck; ours is the middle, the best or the worst place."""
    image = text = torch.ones(41, 8)
    got = {ties: retrieval_metrics(image, text, ties=ties) for ties in ("mean", "optimistic", "pessimistic")}
    assert {ties: m["image_to_text_mean_rank"] for ties, m in got.items()} == {
        "mean": 21,
        "optimistic": 1,
        "pessimistic": 41,
    }
    assert got["mean"]["image_to_text_R@10"] == 0


def test_ties_with_other_positives_do_not_count(backend):
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    metrics = retrieval_metrics(image, text, image_ids=torch.tensor([0, 1]), text_ids=torch.tensor([0, 0, 1, 1]))
    assert metrics["image_to_text_mean_rank"] == 1
    metrics = retrieval_metrics(image, text, image_ids=torch.tensor([0, 1]), text_ids=torch.tensor([0, 1, 1, 0]))
    assert metrics["image_to_text_mean_rank"] == 1.5


def test_other_ks():
    image, text, _ = pairs(30, 8)
    metrics = retrieval_metrics(image, text, ks=(3,))
    assert [key for key in metrics if "R@" in key] == ["image_to_text_R@3", "text_to_image_R@3"]


def test_refusals():
    image, text, _ = pairs(6, 8)
    ids = torch.arange(6)
    with pytest.raises(ShapeError, match=r"got 6 and 4 rows\. Pass image_ids"):
        retrieval_metrics(image, text[:4])
    with pytest.raises(DataError, match="give both or neither"):
        retrieval_metrics(image, text, image_ids=ids)
    with pytest.raises(ShapeError, match=r"text_ids must be \[6\]; got \(5,\)"):
        retrieval_metrics(image, text, image_ids=ids, text_ids=ids[:5])
    with pytest.raises(DataError, match="query 2 has id 2, which no item has"):
        retrieval_metrics(image, text, image_ids=ids, text_ids=torch.tensor([0, 1, 3, 4, 5, 5]))
