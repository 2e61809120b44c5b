"""Scores as pure functions of predictions and ranks. Every rate is a fraction in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.errors import ShapeError

TIES = ("mean", "optimistic", "pessimistic")


def topk_accuracy(
    ranked: Tensor,  # [N, K]
    labels: Tensor,  # [N]
    k: int = 1,
) -> float:
    """The fraction of rows whose label is among their first k predictions.

    Equals:
        (ranked[:, :k] == labels[:, None]).any(1).double().mean()

    Args:
        ranked: [N, K] int64, predicted classes, best first. K < k counts all there are.
        labels: [N] int64.
        k: how many predictions count, at least 1.

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: ranked is not [N, K] or labels is not [N], or N is 0.
    """
    if ranked.dim() != 2 or labels.shape != ranked.shape[:1] or ranked.numel() == 0:
        raise ShapeError(
            f"topk_accuracy: ranked must be [N, K] and labels [N]; got {tuple(ranked.shape)}, {tuple(labels.shape)}"
        )
    return (ranked[:, :k] == labels[:, None]).any(1).double().mean().item()


def mean_per_class_recall(
    predicted: Tensor,  # [N]
    labels: Tensor,  # [N]
) -> float:
    """The mean, over the classes that occur among the labels, of the fraction of a class that is predicted right.

    Args:
        predicted: [N] int64.
        labels: [N] int64, at least 0.

    Returns:
        A number in [0, 1]: balanced accuracy.

    Raises:
        ShapeError: the two are not vectors of one length, or are empty.
    """
    if predicted.dim() != 1 or predicted.shape != labels.shape or labels.numel() == 0:
        raise ShapeError(
            "mean_per_class_recall: predicted and labels must both be [N]; "
            f"got {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    of_class = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(of_class))
    present = of_class > 0
    return (right[present].double() / of_class[present]).mean().item()


def ranks_from_counts(
    above: Tensor,  # [M]
    tied: Tensor,  # [M]
    ties: str = "mean",
) -> Tensor:
    """The rank of each query's best positive, from 0, given how many items score above it and how many equal it.

    Args:
        above: [M] int64, items that score higher than the best positive.
        tied: [M] int64, items that are no positives and score the same.
        ties: "mean" puts the positive in the middle of its equals, "optimistic" before and "pessimistic" behind them.

    Returns:
        [M] float64; a rank can be half a number with "mean".

    Raises:
        ValueError: ties is none of the three.
    """
    if ties not in TIES:
        raise ValueError(f"ranks_from_counts: ties must be one of {', '.join(TIES)}; got {ties!r}")
    return above.double() + tied.double() * {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties]


def recall_at_k(
    ranks: Tensor,  # [M]
    k: int,
) -> float:
    """The fraction of ranks below k.

    Args:
        ranks: [M], from 0.
        k: at least 1.

    Returns:
        A number in [0, 1].
    """
    return (ranks < k).double().mean().item()


def median_rank(
    ranks: Tensor,  # [M]
) -> float:
    """The median rank, from 1: floor(median) + 1, where an even number of ranks has the mean of the middle two.

    Args:
        ranks: [M], from 0.

    Returns:
        A whole number, at least 1.

    Source: Faghri et al. 2018, "VSE++", and open_clip.
    """
    ordered = ranks.double().sort().values
    middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
    return (middle / 2).floor().item() + 1


def mean_rank(
    ranks: Tensor,  # [M]
) -> float:
    """The mean rank, from 1.

    Args:
        ranks: [M], from 0.

    Returns:
        A number, at least 1.
    """
    return ranks.double().mean().item() + 1
