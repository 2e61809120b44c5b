"""POPE's reading of answers, and its scores, against its own rule and hand-worked numbers."""

import json
import random
from pathlib import Path

import pytest

from vlmfast.errors import DataError
from vlmfast.eval.pope import pope_scores, says_neither, says_yes

GOLDENS = json.loads((Path(__file__).parent / "scorer_goldens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDENS["pope"], ids=lambda case: case["text"][:20])
def test_answers_are_read_as_pope_reads_them(case):
    assert says_yes(case["text"]) == case["yes"]


@pytest.mark.parametrize(
    ("text", "neither"),
    [("Yes.", False), ("no", False), ("YES, it is", False), ("dunno", True), ("", True), ("NO", True), ("no!", True)],
)
def test_what_is_read_as_yes_without_saying_it_is_told(text, neither):
    assert says_neither(text) == neither


def test_always_yes():
    scores = pope_scores([True] * 10, [True, False] * 5)
    assert scores.f1 == pytest.approx(0.6667, abs=5e-5)
    assert (scores.accuracy, scores.precision, scores.recall, scores.yes_ratio) == (0.5, 0.5, 1.0, 1.0)
    assert not scores.undefined


def test_always_no_is_undefined_and_says_so():
    scores = pope_scores([False] * 10, [True, False] * 5)
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1, scores.yes_ratio) == (0.5, 0, 0, 0, 0)
    assert scores.undefined
    assert pope_scores([True], [False]).undefined


def test_scores_by_hand():
    scores = pope_scores([True] * 4 + [False] * 6, [True, True, True, False, True, True, False, False, False, False])
    counts = scores.true_positives, scores.false_positives, scores.true_negatives, scores.false_negatives
    assert counts == (3, 1, 4, 2)
    assert (scores.accuracy, scores.precision, scores.recall, scores.yes_ratio) == (0.7, 3 / 4, 3 / 5, 0.4)
    assert scores.f1 == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6), abs=1e-15)


def test_perfect_and_permuted():
    draw = random.Random(0)
    truth = [draw.random() < 0.5 for _ in range(50)]
    said = [draw.random() < 0.7 for _ in truth]
    perfect = pope_scores(truth, truth)
    assert (perfect.accuracy, perfect.precision, perfect.recall, perfect.f1) == (1, 1, 1, 1)
    order = draw.sample(range(50), 50)
    assert pope_scores([said[i] for i in order], [truth[i] for i in order]) == pope_scores(said, truth)


@pytest.mark.parametrize(("said", "truth"), [([], []), ([True], [True, False])])
def test_refusals(said, truth):
    with pytest.raises(DataError, match="needs the truth of each answer"):
        pope_scores(said, truth)
