"""How far confidences can be believed: calibration errors, proper scores, temperature, risk against coverage.

Everything is computed in float64, whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.errors import DataError, ShapeError, missing_extra

BINS = 15
TEMPERATURES = (0.01, 100.0)  # between which a fit stays
HALVINGS = 50  # of the interval between their logarithms, down to rounding


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows. Where a bin is empty, its confidence and accuracy are 0."""

    lower: Tensor  # [bins] float64, in [0, 1]
    upper: Tensor  # [bins]
    count: Tensor  # [bins] int64
    confidence: Tensor  # [bins] mean in the bin
    accuracy: Tensor  # [bins] fraction that is right

    @property
    def gap(self) -> Tensor:
        """|accuracy - confidence| of each bin, 0 where it is empty."""
        return (self.accuracy - self.confidence).abs()

    @property
    def expected_error(self) -> float:
        """The mean gap over items: the ECE."""
        return (self.gap * self.count).sum().item() / self.count.sum().item()

    @property
    def max_error(self) -> float:
        """The largest gap of a bin: the MCE."""
        return self.gap.max().item()


def reliability(
    confidence: Tensor,  # [N]
    correct: Tensor,  # [N]
    bins: int = BINS,
    *,
    adaptive: bool = False,
) -> Reliability:
    """Confidence and accuracy in bins of equal width, or of equally many items.

    Bins of equal width are open on the left and closed on the right, the first holds 0 too. torchmetrics closes them on
    the left: the two differ only for a confidence that is exactly k / bins. With `adaptive`, items of one confidence
    count as that many items of their mean accuracy, so that their order does not matter where a bin parts them.

    Args:
        confidence: [N] probabilities.
        correct: [N] whether the prediction was right.
        bins: how many, at least 1.
        adaptive: bins of equally many items, as far as N can be divided; their edges are the confidences they begin
            and end with. Fewer than `bins` if N is.
    Raises:
        ShapeError: the two are not vectors of one length, or are empty, or bins is not positive.
        DataError: a confidence is not in [0, 1].
    Source: Naeini et al. 2015; Guo et al. 2017, sec. 2; adaptive: Nixon et al. 2019.
    """
    if bins < 1:
        raise ShapeError(f"reliability: bins must be at least 1; got {bins}")
    confidence, correct = _checked("reliability", confidence, correct)
    if adaptive:
        confidence, correct = _settle_ties(confidence, correct)
        parts = confidence.tensor_split(min(bins, len(confidence)))
        count = torch.tensor([len(part) for part in parts])
        bin_of = torch.arange(len(parts)).repeat_interleave(count)
        lower, upper = (torch.stack([part[end] for part in parts]) for end in (0, -1))
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        lower, upper = edges[:-1], edges[1:]
        bin_of = torch.bucketize(confidence, edges[1:-1])
        count = torch.bincount(bin_of, minlength=bins)
    total = torch.zeros(2, len(count), dtype=torch.float64).index_add_(1, bin_of, torch.stack([confidence, correct]))
    mean = total / count.clamp(min=1)
    return Reliability(lower, upper, count, mean[0], mean[1])


def expected_calibration_error(
    confidence: Tensor,  # [N]
    correct: Tensor,  # [N]
    bins: int = BINS,
    *,
    adaptive: bool = False,
) -> float:
    """The ECE: the mean, over items, of their bin's |accuracy - confidence|. In [0, 1].

    Args:
        confidence: [N] probabilities.
        correct: [N] whether the prediction was right.
        bins: how many.
        adaptive: bins of equally many items instead of equal width.
    """
    return reliability(confidence, correct, bins, adaptive=adaptive).expected_error


def classwise_calibration_error(
    probs: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    bins: int = BINS,
) -> float:
    """The mean, over the classes, of the ECE of a class's probability as confidence that it is the label.

    Args:
        probs: [N, V] probabilities.
        labels: [N] int64.
        bins: how many, of equal width.
    Raises:
        ShapeError: probs is not [N, V] or labels is not [N].
        DataError: a label is not in 0 .. V - 1.
    Source: Kull et al. 2019, "Beyond temperature scaling", eq. 3.
    """
    _check_classes("classwise_calibration_error", probs, labels)
    errors = [expected_calibration_error(column, labels == label, bins) for label, column in enumerate(probs.unbind(1))]
    return sum(errors) / len(errors)


def brier_score(
    probs: Tensor,  # [N, V]
    labels: Tensor,  # [N]
) -> float:
    """The mean squared distance of the probabilities from the truth, summed over the classes. In [0, 2].

    Equals:
        ((probs - one_hot(labels, V)) ** 2).sum(1).mean()

    Args:
        probs: [N, V] probabilities.
        labels: [N] int64.
    Raises:
        ShapeError: probs is not [N, V] or labels is not [N].
        DataError: a label is not in 0 .. V - 1.
    Source: Brier 1950. The form for two classes that looks at one of them is half of this.
    """
    _check_classes("brier_score", probs, labels)
    probs = probs.double()
    return (probs.square().sum(1) - 2 * probs.gather(1, labels[:, None])[:, 0] + 1).mean().item()


def nll(
    probs: Tensor,  # [N, V]
    labels: Tensor,  # [N]
) -> float:
    """The mean negative log-probability of the labels, in nats; infinite if one of them has probability 0.

    Args:
        probs: [N, V] probabilities.
        labels: [N] int64.
    Raises:
        ShapeError: probs is not [N, V] or labels is not [N].
        DataError: a label is not in 0 .. V - 1.
    """
    _check_classes("nll", probs, labels)
    return -probs.double().gather(1, labels[:, None]).log().mean().item()


def fit_temperature(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
) -> float:
    """The temperature T that minimises the cross-entropy of softmax(logits / T), by bisection of its slope in float64.

    Args:
        logits: [N, V]; log-probabilities serve as well. -inf where an item does not have the class.
        labels: [N] int64, of classes that the item has.

    Returns:
        A number from 0.01 to 100; without bounds it would fall to 0 for items that are all right. 1 where T is of no
        account, as all logits are alike.

    Raises:
        ShapeError: logits is not [N, V] or labels is not [N].
        DataError: a label's logit is -inf, a logit is NaN or +inf, or a label is not in 0 .. V - 1.
    Source: Guo et al. 2017, sec. 4.2.
    """
    _check_classes("fit_temperature", logits, labels)
    logits = logits.detach().double()
    if not logits.gather(1, labels[:, None]).isfinite().all() or not (logits < float("inf")).all():
        raise DataError("fit_temperature: the labels' logits must be finite, the others finite or -inf")
    margins = (logits - logits.gather(1, labels[:, None])).masked_fill(logits == -float("inf"), 0.0)
    low, high = map(math.log, TEMPERATURES)
    log_t = 0.0
    for _ in range(HALVINGS):
        # The slope over 1 / T, in which the loss is convex.
        slope = ((logits / math.exp(log_t)).softmax(1) * margins).sum(1).mean().item()
        if slope == 0:
            break
        low, high = (log_t, high) if slope > 0 else (low, log_t)
        log_t = (low + high) / 2
    return min(max(math.exp(log_t), TEMPERATURES[0]), TEMPERATURES[1])


def fit_isotonic(
    confidence: Tensor,  # [N]
    correct: Tensor,  # [N]
) -> Callable[[Tensor], Tensor]:
    """The function from confidence to probability of being right, never decreasing, that fits best in squares.

    Args:
        confidence: [N] probabilities.
        correct: [N] whether the prediction was right.

    Returns:
        [M] -> [M] float64; constant beyond the confidences it has seen.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ShapeError: the two are not vectors of one length, or are empty.
        DataError: a confidence is not in [0, 1].
    Source: Zadrozny & Elkan 2002.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError:
        raise missing_extra("scikit-learn", "demo") from None
    confidence, correct = _checked("fit_isotonic", confidence, correct)
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(confidence.numpy(), correct.numpy())
    return lambda new: torch.from_numpy(fitted.predict(new.double().cpu().numpy()))


def risk_coverage(
    confidence: Tensor,  # [N]
    correct: Tensor,  # [N]
) -> Tensor:
    """The fraction that is wrong among the k most confident items, for k = 1 to N; its mean is the AURC.

    Items of one confidence count with their mean accuracy: the curve is that expected of a random order among them.

    Args:
        confidence: [N] probabilities.
        correct: [N] whether the prediction was right.

    Returns:
        [N] float64; entry k - 1 is the risk at coverage k / N.

    Raises:
        ShapeError: the two are not vectors of one length, or are empty.
        DataError: a confidence is not in [0, 1].
    Source: Geifman & El-Yaniv 2017; the area as Geifman et al. 2019 take it, the mean over the N coverages.
    """
    confidence, correct = _settle_ties(*_checked("risk_coverage", confidence, correct))
    wrong = (1 - correct).flip(0).cumsum(0)
    return wrong / torch.arange(1, len(wrong) + 1)


def _settle_ties(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Both by rising confidence, items of one confidence with their mean accuracy."""
    values, of, count = confidence.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros_like(values).index_add_(0, of, correct) / count
    return values.repeat_interleave(count), mean.repeat_interleave(count)


def _checked(name: str, confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU."""
    if confidence.dim() != 1 or confidence.shape != correct.shape or confidence.numel() == 0:
        raise ShapeError(
            f"{name}: confidence and correct must both be [N], N > 0; got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    confidence, correct = (each.detach().double().cpu().contiguous() for each in (confidence, correct))
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError(f"{name}: confidence must be in [0, 1]; got {confidence.min():g} to {confidence.max():g}")
    return confidence, correct


def _check_classes(name: str, values: Tensor, labels: Tensor) -> None:
    if values.dim() != 2 or labels.shape != values.shape[:1] or values.numel() == 0:
        raise ShapeError(
            f"{name}: needs [N, V] and labels [N], N > 0; got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if not ((labels >= 0) & (labels < values.shape[1])).all():
        raise DataError(f"{name}: labels must be 0 .. {values.shape[1] - 1}; got {labels.min()} to {labels.max()}")
