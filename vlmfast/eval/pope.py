"""Scores of yes and no: POPE, which asks whether objects are there that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfast.errors import DataError


@dataclass(frozen=True)
class PopeScores:
    """The scores of answers to yes-or-no questions, "yes" being positive. Fractions in [0, 1]."""

    accuracy: float
    precision: float  # 0 where undefined
    recall: float  # likewise
    f1: float  # likewise
    yes_ratio: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    undefined: bool  # no answer is yes, or no question's truth is: POPE's own evaluator divides by zero there


def says_yes(text: str) -> bool:
    """How POPE reads an answer: no if "No", "no" or "not" is among the words of its first sentence, else yes.

    Its quirks: the first sentence ends at the first period, wherever it stands; commas are dropped; words are what
    single spaces divide, so that "no!" and "no" before a line break are none of the three, nor are "NO", "Not" and
    "isn't"; and whatever says neither, empty answers too, is yes. `says_neither` tells of the last.

    Args:
        text: an answer.
    Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"; POPE's evaluate.py.
    """
    return not {"No", "no", "not"} & set(_first_sentence(text).replace(",", "").split(" "))


def says_neither(text: str) -> bool:
    """Whether POPE reads an answer as yes in which there is no "yes", in any case.

    Args:
        text: an answer.
    """
    return says_yes(text) and "yes" not in text.lower()


def pope_scores(predicted: Sequence[bool], truth: Sequence[bool]) -> PopeScores:
    """Accuracy, precision, recall, F1 and the ratio of yes.

    Args:
        predicted: whether each of N answers is yes.
        truth: whether it should be.
    Raises:
        DataError: there are no answers, or the two are not as many.
    Source: Li et al. 2023, sec. 5; where it divides by zero, ours is 0 and says so in `undefined`.
    """
    if not predicted or len(predicted) != len(truth):
        raise DataError(f"pope_scores: needs the truth of each answer; got {len(predicted)} and {len(truth)}")
    pairs = list(zip(map(bool, predicted), map(bool, truth), strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    return PopeScores(
        accuracy=(tp + tn) / len(pairs),
        precision=tp / max(1, tp + fp),
        recall=tp / max(1, tp + fn),
        f1=2 * tp / max(1, 2 * tp + fp + fn),
        yes_ratio=(tp + fp) / len(pairs),
        true_positives=tp,
        false_positives=fp,
        true_negatives=tn,
        false_negatives=fn,
        undefined=tp + fp == 0 or tp + fn == 0,
    )


def _first_sentence(text: str) -> str:
    return text.split(".")[0]
