"""Calibration errors, proper scores, temperature, risk against coverage: torchmetrics' numbers and laws."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlmfast.errors import DataError, ShapeError
from vlmfast.eval.calibration import (
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    nll,
    reliability,
    risk_coverage,
)

CASE = json.loads((Path(__file__).parent / "scorer_goldens.json").read_text(encoding="utf-8"))["calibration"]
CONFIDENCE, CORRECT = torch.tensor(CASE["confidence"], dtype=torch.float64), torch.tensor(CASE["correct"])


def believable(N, seed=0):
    """Confidences, and answers that are right that often."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(N, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(N, generator=generator, dtype=torch.float64) < confidence


def believable_logits(N, V, seed=0):
    """Logits, and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(N, V, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("bins", [10, 15])
def test_errors_are_torchmetrics(bins):
    table = reliability(CONFIDENCE, CORRECT, bins)
    assert table.expected_error == pytest.approx(CASE[f"ece_{bins}"], abs=1e-12)
    assert table.max_error == pytest.approx(CASE[f"mce_{bins}"], abs=1e-12)
    assert expected_calibration_error(CONFIDENCE, CORRECT) == pytest.approx(CASE["ece_15"], abs=1e-12)


def test_bins_are_closed_on_the_right_and_the_first_holds_zero():
    table = reliability(torch.tensor([0.0, 0.25, 0.2500001, 0.5, 1.0]), torch.ones(5), 4)
    assert table.count.tolist() == [2, 2, 0, 1]
    assert table.lower.tolist() == [0, 0.25, 0.5, 0.75]
    assert table.upper.tolist() == [0.25, 0.5, 0.75, 1]


def test_table_and_errors_by_hand():
    table = reliability(torch.tensor([0.1, 0.3, 0.9, 0.8, 1.0]), torch.tensor([0, 1, 1, 0, 1]), 2)
    assert table.confidence.tolist() == pytest.approx([0.2, 0.9])
    assert table.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert table.expected_error == pytest.approx(2 / 5 * 0.3 + 3 / 5 * (0.9 - 2 / 3))
    assert table.max_error == pytest.approx(0.3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_believable_confidences_have_no_error(adaptive):
    confidence, correct = believable(100_000)
    assert expected_calibration_error(confidence, correct, adaptive=adaptive) <= 0.01


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_confidence_too_high_by_a_tenth_is_an_error_of_a_tenth(adaptive):
    confidence, correct = believable(20_000)
    sober = confidence <= 0.9
    error = expected_calibration_error(confidence[sober] + 0.1, correct[sober], adaptive=adaptive)
    assert error == pytest.approx(0.1, abs=0.01)


def test_surely_right_is_perfect_and_surely_wrong_is_the_worst():
    sure = torch.ones(7)
    assert expected_calibration_error(sure, torch.ones(7)) == 0
    assert expected_calibration_error(sure, torch.zeros(7)) == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_order_changes_nothing_ties_included(adaptive):
    confidence, correct = believable(500)
    confidence = (confidence * 8).round() / 8
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    same = [expected_calibration_error(confidence[o], correct[o], adaptive=adaptive) for o in (order, order.flip(0))]
    assert same[0] == pytest.approx(same[1], abs=1e-12)
    torch.testing.assert_close(risk_coverage(confidence[order], correct[order]), risk_coverage(confidence, correct))


def test_adaptive_bins_hold_equally_many():
    confidence, correct = believable(100)
    table = reliability(confidence**4, correct, 7, adaptive=True)
    assert sorted(set(table.count.tolist())) == [14, 15]
    assert (table.lower[1:] >= table.upper[:-1]).all()
    assert len(reliability(confidence[:3], correct[:3], 7, adaptive=True).count) == 3


def test_one_confidence_for_all_is_compared_with_the_mean_accuracy():
    correct = torch.arange(100) < 60
    for adaptive in (False, True):
        error = expected_calibration_error(torch.full((100,), 0.9), correct, adaptive=adaptive)
        assert error == pytest.approx(0.3, abs=1e-6)


def test_classwise_error_is_the_mean_over_the_classes():
    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]])
    labels = torch.tensor([0, 0, 1])
    each = [expected_calibration_error(probs[:, k], labels == k, 5) for k in (0, 1)]
    assert classwise_calibration_error(probs, labels, 5) == pytest.approx(sum(each) / 2)
    logits, drawn = believable_logits(20_000, 4)
    assert classwise_calibration_error(logits.softmax(1), drawn) < 0.015
    assert classwise_calibration_error((3 * logits).softmax(1), drawn) > 0.05


def test_proper_scores_are_torchs():
    logits, labels = believable_logits(300, 6)
    probs = logits.double().softmax(1)
    assert nll(probs, labels) == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-12)
    truth = F.one_hot(labels, 6)
    assert brier_score(probs, labels) == pytest.approx((probs - truth).square().sum(1).mean().item(), abs=1e-12)
    assert brier_score(truth, labels) == nll(truth, labels) == 0
    assert brier_score(truth.flip(1), 5 - labels) == 0
    assert brier_score(truth.roll(1, 1), labels) == 2
    assert nll(truth.roll(1, 1), labels) == float("inf")


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0])
def test_the_temperature_undoes_a_scale(factor):
    logits, labels = believable_logits(20_000, 5)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, abs=0.02 * factor)
    assert fit_temperature((factor * logits).log_softmax(1), labels) == pytest.approx(factor, abs=0.02 * factor)


def test_the_temperature_is_the_minimum_of_the_loss():
    logits, labels = believable_logits(200, 3, seed=3)
    best = fit_temperature(4 * logits, labels)

    def loss(t):
        return F.cross_entropy(4 * logits.double() / t, labels).item()

    assert loss(best) <= min(loss(best * 1.001), loss(best / 1.001))


@pytest.mark.parametrize("true", [0.02, 0.05, 30.0, 80.0])
def test_the_temperature_is_found_near_its_bounds(true):
    logits, labels = believable_logits(2_000, 2, seed=5)
    best = fit_temperature(true * logits, labels)
    assert best == pytest.approx(true, rel=0.15)

    def loss(t):
        return F.cross_entropy(true * logits.double() / t, labels).item()

    assert loss(best) <= min(loss(best * 1.001), loss(best / 1.001))


def test_the_temperature_of_logits_that_are_all_alike_is_one():
    assert fit_temperature(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == 1


def test_classes_that_an_item_does_not_have_take_no_part():
    logits, labels = believable_logits(2_000, 3)
    wide = torch.cat([logits, torch.full((2_000, 4), -float("inf"))], 1)
    assert fit_temperature(wide, labels) == pytest.approx(fit_temperature(logits, labels), abs=1e-9)


def test_the_temperature_stays_in_bounds_and_the_gradient_mode_as_it_was():
    right, wrong = torch.tensor([0, 0]), torch.tensor([1, 1])
    logits = torch.tensor([[5.0, 0.0], [7.0, 0.0]], requires_grad=True)
    with torch.no_grad():
        assert fit_temperature(logits, right) == pytest.approx(0.01)
        assert fit_temperature(logits, wrong) == pytest.approx(100)
        assert not torch.is_grad_enabled()
    assert logits.grad is None


def test_isotonic_regression_mends_what_no_temperature_can():
    pytest.importorskip("sklearn", reason="scikit-learn cannot be imported")
    confidence, correct = believable(20_000)
    bent = 0.2 + 0.3 * confidence**3
    mend = fit_isotonic(bent[:10_000], correct[:10_000])
    assert expected_calibration_error(bent, correct) > 0.2
    assert expected_calibration_error(mend(bent[10_000:]), correct[10_000:]) < 0.03
    grid = mend(torch.linspace(0, 1, 50))
    assert (grid.diff() >= 0).all()
    assert grid.min() >= 0
    assert grid.max() <= 1


def test_risk_against_coverage_by_hand():
    risk = risk_coverage(torch.tensor([0.9, 0.2, 0.7, 0.5]), torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(risk, torch.tensor([0, 1 / 2, 1 / 3, 2 / 4], dtype=torch.float64))
    tied = risk_coverage(torch.full((4,), 0.5), torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(tied, torch.full((4,), 0.5, dtype=torch.float64))


def test_a_confidence_that_knows_has_less_risk_than_one_that_does_not():
    confidence, correct = believable(5_000)
    guessing = torch.rand(5_000, generator=torch.Generator().manual_seed(9))
    knowing = correct.double()
    areas = [risk_coverage(each, correct).mean().item() for each in (knowing, confidence, guessing)]
    assert areas[0] < areas[1] - 0.05 < areas[2] - 0.1
    assert risk_coverage(guessing, correct)[-1].item() == pytest.approx(1 - correct.double().mean().item())


@pytest.mark.parametrize("function", [reliability, risk_coverage, expected_calibration_error, fit_isotonic])
def test_confidences_are_checked(function):
    for confidence, correct in (([0.5], [1, 0]), ([], []), ([[0.5]], [[1]])):
        with pytest.raises(ShapeError, match="must both be \\[N\\]"):
            function(torch.tensor(confidence), torch.tensor(correct))
    for wrong in (1.01, -0.01, float("nan")):
        with pytest.raises(DataError, match=r"confidence must be in \[0, 1\]"):
            function(torch.tensor([0.5, wrong]), torch.tensor([1, 0]))


@pytest.mark.parametrize("function", [brier_score, nll, classwise_calibration_error, fit_temperature])
def test_shapes_are_checked(function):
    for probs, labels in ((torch.rand(3), torch.zeros(3)), (torch.rand(3, 2), torch.zeros(2)), (torch.rand(0, 2), [])):
        with pytest.raises(ShapeError, match=f"{function.__name__}: needs \\[N, V\\] and labels \\[N\\]"):
            function(probs, torch.as_tensor(labels).long())


@pytest.mark.parametrize("function", [brier_score, nll, classwise_calibration_error, fit_temperature])
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_are_named(function, label):
    with pytest.raises(DataError, match=f"{function.__name__}: labels must be 0 .. 1; got"):
        function(torch.full((2, 2), 0.5), torch.tensor([0, label]))


def test_temperatures_need_finite_logits_of_the_labels():
    for bad in (-float("inf"), float("nan"), float("inf")):
        with pytest.raises(DataError, match="labels' logits must be finite"):
            fit_temperature(torch.tensor([[bad, 0.0]]), torch.tensor([0]))
    with pytest.raises(DataError, match="the others finite or -inf"):
        fit_temperature(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))


def test_bins_must_be_there():
    with pytest.raises(ShapeError, match="bins must be at least 1; got 0"):
        reliability(torch.tensor([0.5]), torch.tensor([1]), 0)
