"""`vlmfast eval calibration`: whether a model's confidences can be believed, and the temperature that mends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlmfast.errors import DataError
from vlmfast.eval.calibration import (
    BINS,
    Reliability,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    fit_temperature,
    nll,
    reliability,
    risk_coverage,
)
from vlmfast.eval.predictions import Prediction
from vlmfast.eval.vqa import exact_match
from vlmfast.recipes.page import OURS, REFERENCE, RIVAL, figure
from vlmfast.recipes.scoring import ScoringFlags, open_scored, tell

POSITIONAL = True  # the predictions are named without a flag
COLUMNS = ("lower", "upper", "items", "confidence", "accuracy")
LEAST = 1e-12  # probabilities below it count as that much: their logarithms are needed


@dataclass(kw_only=True)
class Config(ScoringFlags):
    """Compares confidence with accuracy: reliability table, ECE, Brier score, NLL, risk against coverage, temperature.

    For example:
        vlmfast eval calibration predictions.jsonl
        vlmfast eval calibration predictions.jsonl --references truth.jsonl --bins 20 --plot reliability.png

    Predictions need "probs" over the candidates, or a "score" that is the probability of being right. The scores named
    scaled are those after temperature scaling, each half of the predictions by the temperature that the other half
    gives; the temperature itself is fitted on all.
    """

    bins: int = BINS
    """Of equal width."""
    plot: Path | None = None
    """Draw the reliability diagram here (.png, .svg or .pdf)."""


def run(config: Config) -> None:
    """Prints the scores and the reliability table, writes both, and draws the diagram.

    Args:
        config: the flags.
    Raises:
        DataError: a file cannot be read, predictions and references do not fit each other, or a prediction has no
            confidence.
        MissingExtraError: matplotlib is missing, and a plot is wanted.
    """
    items = open_scored(config)
    predicted = _predicted(items)
    scaled = replace(predicted, probs=_scaled(predicted))
    temperature = fit_temperature(predicted.probs.log(), predicted.labels)
    before, after = (reliability(each.confidence, each.correct, config.bins) for each in (predicted, scaled))
    metrics = {
        "accuracy": predicted.correct.mean().item(),
        "confidence": predicted.confidence.mean().item(),
        **_scores(predicted, before),
        "temperature": temperature,
        **{f"{name}_scaled": value for name, value in _scores(scaled, after).items()},
    }
    columns = (before.lower, before.upper, before.count, before.confidence, before.accuracy)
    table = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(each.tolist() for each in columns), strict=True)]
    over = (
        "candidates" if predicted.classes else "right or wrong"
    )  # where a prediction lacks probs with the truth in it
    lines = [f"probabilities of: {over}", "", "bin              items  confidence  accuracy", *map(_line, table)]
    if config.plot is not None:
        _draw(config.plot, before, after, temperature)
        lines += ["", str(config.plot)]
    tell(config, {"items": len(items), "metrics": metrics, "over": over, "reliability": table}, lines)


@dataclass(frozen=True)
class _Predicted:
    """Probabilities of what could have been said, of which one is right and one was said."""

    probs: Tensor  # [N, V] float64; 0 where an item does not have the class
    labels: Tensor  # [N] int64
    said: Tensor  # [N] int64
    classes: bool  # whether V are candidates; else they are "the prediction is right" and "it is wrong"

    @property
    def confidence(self) -> Tensor:
        """[N]"""
        return self.probs.gather(1, self.said[:, None])[:, 0].clamp(0, 1)

    @property
    def correct(self) -> Tensor:
        """[N]"""
        return (self.labels == self.said).double()


def _predicted(items: Sequence[Prediction]) -> _Predicted:
    """By candidates where every item has them and what was said and what is right are among them, else by score."""
    if not all(item.probs and item.prediction in item.probs and _right(item) for item in items):
        right = torch.tensor([exact_match(item.prediction, item.references) for item in items])
        score = torch.tensor([_score(item) for item in items], dtype=torch.float64).clamp(LEAST, 1 - LEAST)
        none = torch.zeros(len(items), dtype=torch.int64)
        return _Predicted(torch.stack([score, 1 - score], 1), 1 - right.long(), none, False)
    column = {name: i for i, name in enumerate(sorted({name for item in items for name in item.probs or ()}))}
    probs = torch.zeros(len(items), len(column), dtype=torch.float64)
    for row, item in zip(probs, items, strict=True):
        given = item.probs or {}
        row[[column[name] for name in given]] = torch.tensor([*given.values()], dtype=torch.float64).clamp(min=LEAST)
    labels = torch.tensor([column[_right(item)] for item in items])
    said = torch.tensor([column[item.prediction] for item in items])
    return _Predicted(probs / probs.sum(1, keepdim=True), labels, said, True)


def _right(item: Prediction) -> str:
    """The candidate that is right, "" without one: the prediction if it is, else the most probable."""
    right = [name for name in item.probs or () if exact_match(name, item.references)]
    return max(right, key=lambda name: (name == item.prediction, (item.probs or {})[name]), default="")


def _score(item: Prediction) -> float:
    score = item.confidence
    if score is None or not 0 <= score <= 1:
        raise DataError(
            f'id {item.id!r}: needs "probs" with the prediction among them, or a "score" from 0 to 1; got score {score}'
        )
    return score


def _scaled(predicted: _Predicted) -> Tensor:
    """[N, V] the probabilities, each half scaled by the temperature of the other."""
    if len(predicted.labels) < 2:
        raise DataError("temperature scaling needs at least two predictions, to fit on one and score the other")
    logits = predicted.probs.log()
    halves = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    out = torch.empty_like(logits)
    for half, other in (halves, halves[::-1]):
        out[half] = (logits[half] / fit_temperature(logits[other], predicted.labels[other])).softmax(1)
    return out


def _scores(predicted: _Predicted, table: Reliability) -> dict[str, float]:
    probs, labels, bins = predicted.probs, predicted.labels, len(table.count)
    pair = predicted.confidence, predicted.correct
    scores = {
        "ece": table.expected_error,
        "mce": table.max_error,
        "adaptive_ece": expected_calibration_error(*pair, bins, adaptive=True),
        "brier": brier_score(probs, labels),
        "nll": nll(probs.clamp(min=LEAST), labels),
        "aurc": risk_coverage(*pair).mean().item(),
    }
    return scores | ({"classwise_ece": classwise_calibration_error(probs, labels, bins)} if predicted.classes else {})


def _line(row: dict[str, float]) -> str:
    """A row of the reliability table."""
    means = f"  {row['confidence']:>10.4f}  {row['accuracy']:>8.4f}" if row["items"] else ""
    return f"{row['lower']:.4f} - {row['upper']:.4f}  {row['items']:>5}{means}"


def _draw(path: Path, before: Reliability, after: Reliability, temperature: float) -> None:
    """The reliability diagram."""
    drawing = figure(figsize=(5, 5), layout="constrained")
    axes = drawing.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    share, width = before.count / before.count.sum(), before.upper - before.lower
    axes.bar(
        before.lower.numpy(), share.numpy(), width.numpy(), align="edge", color=RIVAL, label="share of predictions"
    )
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    for table, colour, what in ((before, OURS, "as given"), (after, REFERENCE, f"scaled, T = {temperature:.2f}")):
        shown = table.count > 0
        label = f"{what}: ECE {table.expected_error:.3f}"
        axes.plot(table.confidence[shown].numpy(), table.accuracy[shown].numpy(), "o-", color=colour, label=label)
    axes.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)
