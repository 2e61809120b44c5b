"""VQA accuracy and its normaliser against the official evaluator's numbers; exact match."""

import json
from pathlib import Path

import pytest

from vlmfast.errors import DataError
from vlmfast.eval.vqa import exact_match, normalize_answer, vqa_accuracy

GOLDENS = json.loads((Path(__file__).parent / "scorer_goldens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDENS["answers"], ids=lambda case: case["text"][:20])
def test_answers_are_normalised_as_the_official_evaluator_does(case):
    assert normalize_answer(case["text"]) == case["answer"]


@pytest.mark.parametrize("rule", ["official", "lavis"])
@pytest.mark.parametrize("case", GOLDENS["accuracies"], ids=lambda case: case["answer"])
def test_accuracy_is_the_official_evaluators(case, rule):
    assert vqa_accuracy(case["answer"], case["references"], rule=rule) == pytest.approx(case[rule], abs=1e-12)


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
@pytest.mark.parametrize("rule", ["official", "lavis", "fixed"])
def test_accuracy_by_how_many_of_ten_agree(agreeing, accuracy, rule):
    # With 3 agreeing: leaving one of them out makes 2/3, three times; the other seven times 1.
    references = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert vqa_accuracy("red", references, rule=rule) == pytest.approx(accuracy, abs=1e-12)
    assert vqa_accuracy("red", references[::-1], rule=rule) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "official", "fixed"),
    [
        ("It is 3.", "it is 3", "it is 3"),
        ("3.14 or .5", "3.14 or .5", "3.14 or .5"),
        ("x." * 33, "x" * 33 + ".", "x" * 33),  # the 33rd period
        ("1,000 red/blue", "1000 redblue", "1000 red blue"),
        ("somebody'd", "somebodyd", "somebody'd"),
        ("dont, the TWO", "don't 2", "don't 2"),
    ],
)
def test_what_is_fixed_and_what_is_not(text, official, fixed):
    assert normalize_answer(text) == official
    assert normalize_answer(text, fixed=True) == fixed


@pytest.mark.parametrize("text", [case["text"] for case in GOLDENS["answers"]])
def test_normalising_with_the_fixes_twice_changes_nothing_more(text):
    once = normalize_answer(text, fixed=True)
    assert normalize_answer(once, fixed=True) == once


def test_the_three_rules_differ_where_the_docstring_says():
    unanimous = ["yes"] * 10
    assert [vqa_accuracy("Yes.", unanimous, rule=rule) for rule in ("official", "lavis", "fixed")] == [0, 1, 1]
    assert [vqa_accuracy("two", ["two"] * 10, rule=rule) for rule in ("official", "lavis", "fixed")] == [1, 0, 1]


def test_accuracy_refuses_what_it_cannot_score():
    with pytest.raises(DataError, match=r"needs 4 references or more.*got 3.*use exact_match"):
        vqa_accuracy("red", ["red"] * 3)
    with pytest.raises(ValueError, match="rule must be one of official, lavis, fixed; got 'new'"):
        vqa_accuracy("red", ["red"] * 10, rule="new")


@pytest.mark.parametrize("answer", ["red", " Red ", "RED.", "red\n", "dark  blue"])
def test_exact_match_looks_past_case_white_space_and_a_last_period(answer):
    assert exact_match(answer, ["Red", "dark blue"])


@pytest.mark.parametrize("answer", ["", "re", "red blue", "r.ed", "a red", "red!"])
def test_exact_match_looks_past_nothing_else(answer):
    assert not exact_match(answer, ["red", "dark blue"])


@pytest.mark.parametrize("references", [[], "red"])
def test_exact_match_refuses(references):
    with pytest.raises(DataError, match="references must be one text or more"):
        exact_match("red", references)
